"""One run from the command line: flags of all programs, and the main of ``sst2`` and ``glue``."""

import logging
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import cli, evaluation, next_commands, recipes
from lora_jax.tasks import from_config
from lora_jax.tasks.glue import find
from lora_jax.training import mesh, train, workdirs
from lora_jax.training.loop import Progress
from lora_jax.training.task import Recipe

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_ADAPTER = flags.DEFINE_string("adapter", None, "Directory of an adapter to go on from.")
_EVAL_ONLY = flags.DEFINE_bool(
    "eval_only",
    False,
    "Train nothing and write nothing: score the run's best adapter, or that of --adapter, on the "
    "evaluation set.",
)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Trains, and says what to do next."""
    config, workdir, devices = prepare(argv, recipes.GLUE)
    best = fit(config, workdir, recipes.GLUE, devices)
    if best is None:
        return
    task = find(config.task)
    example = "The movie was absolutely wonderful!"
    if task.has_pairs:
        example = "A man is eating.\tSomebody eats."
    print(
        f"best validation {task.score} {best.best_score:.4f} (loss {best.best_loss:.4f}) at "
        f"step {best.best_step}; {best.seconds / 60:.1f} minutes; "
        f"curves in {workdir / workdirs.CURVES}\n"
        "Next:\n"
        f"  {next_commands.predict(workdir / workdirs.ADAPTER, example)}\n"
        f"  {next_commands.export(workdir / workdirs.ADAPTER, workdir / 'merged')}"
    )


def prepare(argv: list[str], recipe: Recipe) -> tuple[ConfigDict, Path, mesh.Devices]:
    """Reads and checks the command line.

    Returns:
      Config, directory and devices of the run.

    Raises:
      ValueError: as :func:`command_line`, or the config is wrong.
      FileNotFoundError: as :func:`command_line`.
    """
    config, workdir = command_line(argv, recipe.resolve)
    logging.getLogger("lora_jax").setLevel(logging.ERROR)  # the report names fresh leaves
    recipe.check(config)
    return config, workdir, mesh.find(config)


def fit(
    config: ConfigDict, workdir: Path, recipe: Recipe, devices: mesh.Devices
) -> Progress | None:
    """Trains; or only evaluates, if the command line says so, and returns None.

    Raises:
      As :func:`train.train` and :func:`evaluation.report`.
    """
    if not config.adapter:  # its settings would not be known yet
        workdirs.check(workdir, config)
    task, lora_config = recipe.make_task(config, devices)
    if is_eval_only():
        evaluation.report(task, config, workdir, devices=devices)
        return None
    if config.adapter:
        with config.unlocked():
            config.lora = from_config.to_config(lora_config)
    return train.train(task, config, lora_config, workdir, devices=devices, say=cli.say)


def is_eval_only() -> bool:
    """Returns whether the command line asks for an evaluation and nothing else."""
    return _EVAL_ONLY.value


def command_line(
    argv: list[str], resolve: Callable[[ConfigDict], ConfigDict]
) -> tuple[ConfigDict, Path]:
    """Reads the config, with the adapter of the command line, and the run's directory.

    With --eval_only the adapter is by default that of the directory's run.

    Args:
      argv: positional arguments; there must be none.
      resolve: returns a copy of the config that leaves nothing open.

    Raises:
      ValueError: there are unexpected arguments, or settings that an adapter brings itself.
      FileNotFoundError: only an evaluation is asked for, and there is no adapter.
    """
    if argv:
        raise ValueError(f"Unexpected arguments {argv}; options start with --.")
    config = resolve(_CONFIG.value)
    if _ADAPTER.value:
        config.adapter = _ADAPTER.value
    if _EVAL_ONLY.value and not _ADAPTER.value:
        config.adapter = str(evaluation.find_adapter(Path(_WORKDIR.value)))
        return config, Path(_WORKDIR.value)
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    fixed = [name for name in overrides if name.startswith("lora.") and name != "lora.dropout"]
    if config.adapter and fixed:
        raise ValueError(
            f"{', '.join(fixed)} can't be set together with an adapter to go on from, which has "
            "its own; lora.dropout can."
        )
    return config, Path(_WORKDIR.value)
