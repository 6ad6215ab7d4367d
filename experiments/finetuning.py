"""One run from the command line: flags of all programs, and the main of ``sst2`` and ``glue``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict

from experiments import cli, config_flag, environment, lazy, next_commands

with lazy.imports():
    from experiments import evaluation, recipes
    from lora_jax.tasks import from_config, glue
    from lora_jax.training import mesh, metric_writer, train, workdirs

if TYPE_CHECKING:
    from lora_jax.training.loop import Progress
    from lora_jax.training.task import Recipe

_ADAPTER = flags.DEFINE_string("adapter", None, "Directory of an adapter to go on from.")
_EVAL_ONLY = flags.DEFINE_bool(
    "eval_only",
    False,
    "Train nothing and write nothing: score the run's best adapter, or that of --adapter, on the "
    "evaluation set.",
)


def main(argv: list[str]) -> None:
    """Trains, and says what to do next."""
    config, workdir, devices = prepare(argv, recipes.GLUE)
    best = fit(config, workdir, recipes.GLUE, devices)
    if best is None:
        return
    task = glue.find(config.task)
    example = "The movie was absolutely wonderful!"
    if task.has_pairs:
        example = "A man is eating.\tSomebody eats."
    print(
        f"{describe_change(workdir, best, task.score)}"
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
    config, workdir = command_line(argv, recipe.resolve, recipe.base_config)
    logging.getLogger("lora_jax").setLevel(logging.ERROR)  # the report names fresh leaves
    recipe.check(config)
    choice = from_config.settle_dtype(config, workdir / workdirs.CONFIG)
    cli.say_all(choice, environment.describe_pages())
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
    if is_eval_only():
        task, _ = recipe.make_task(config, devices)
        evaluation.report(task, config, workdir, devices=devices)
        return None
    with environment.open_store(config) as store:
        task, lora_config = recipe.make_task(config, devices)
        if config.adapter:
            with config.unlocked():
                config.lora = from_config.to_config(lora_config)
        return train.train(
            task, config, lora_config, workdir, devices=devices, say=cli.say, store=store
        )


def describe_change(workdir: Path, best: Progress, score: str) -> str:
    """Says what training has changed, as a line; "" without an evaluation before the first step.

    Args:
      workdir: directory of the run.
      best: progress at its end.
      score: name of the score that selects the best adapter.
    """
    before = metric_writer.read_evaluation(workdir / workdirs.METRICS, 0)
    if not before:
        return ""
    after = {score: best.best_score, "loss": best.best_loss}
    parts = (f"{name} {before[name]:.4f} → {value:.4f}" for name, value in after.items())
    hint = "" if best.best_step else "; no later evaluation was better"
    return f"validation, before training → best: {', '.join(parts)}{hint}\n"


def is_eval_only() -> bool:
    """Returns whether the command line asks for an evaluation and nothing else."""
    return _EVAL_ONLY.value


def command_line(
    argv: list[str],
    resolve: Callable[[ConfigDict], ConfigDict],
    base_config: Callable[[], ConfigDict] | None,
) -> tuple[ConfigDict, Path]:
    """Reads the config, with the adapter of the command line, and the run's directory.

    With --eval_only the adapter is by default that of the directory's run, and without --config the
    config is that of the directory's run.

    Args:
      argv: arguments that are left when flags are read: fields of the config, and nothing else.
      resolve: returns a copy of the config that leaves nothing open.
      base_config: as :class:`lora_jax.training.task.Recipe` has it.

    Raises:
      ValueError: there are unexpected arguments, or settings that an adapter brings itself, or
        something is wrong with the config.
      FileNotFoundError: there is no such config; or only an evaluation is asked for, and there is
        no adapter.
    """
    command = config_flag.read(argv, base_config)
    environment.place_fonts()
    config = resolve(command.config)
    if _ADAPTER.value:
        config.adapter = _ADAPTER.value
    if _EVAL_ONLY.value and not _ADAPTER.value:
        config.adapter = str(evaluation.find_adapter(command.workdir))
        return config, command.workdir
    cli.check_adapter(config.adapter)
    fixed = [x for x in command.overrides if x.startswith("lora.") and x != "lora.dropout"]
    if config.adapter and fixed:
        raise ValueError(
            f"{', '.join(fixed)} can't be set together with an adapter to go on from, which has "
            "its own; lora.dropout can."
        )
    return config, command.workdir
