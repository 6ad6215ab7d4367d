r"""Fine-tunes a whole sweep: many ranks, alphas, rates and seeds through one compiled step.

    python -m experiments.sweep --config=configs/quickstart_sweep.py --workdir=runs/sweep

The config file defines ``sweep(add)`` beside ``get_config()``; or the command line has a grid:

    python -m experiments.sweep --config=configs/quickstart.py --workdir=runs/ranks \
        --sweep lora.rank=1,4,16 --sweep seed=0,1

Run again, with or without more runs in the file, or more values on the command line, it trains the
runs that are left. With ``--points=24`` Optuna proposes as many, by the file's ``search(trial)``.
The next command is ``python -m experiments.report runs/sweep``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import base_configs, cli, config_flag, environment, lazy, next_commands, sweep_flag
from experiments.config_flag import Command

with lazy.imports():
    from configs import common
    from experiments import recipes
    from lora_jax.sweeps import scheduler, search, sweep_dirs, trials
    from lora_jax.tasks import from_config, own_texts
    from lora_jax.training import config_files, metric_writer, workdirs

if TYPE_CHECKING:
    from lora_jax.training.task import Recipe

SAMPLERS = ("tpe", "random")  # as in lora_jax.sweeps.search

_PARALLEL = flags.DEFINE_string("parallel", "auto", "Runs at a time, or auto to find out.")
_SWEEP = flags.DEFINE_multi_string(
    "sweep",
    [],
    "FIELD=V1,V2,...: a sweep over these values of a field of the config, without a sweep(add) in "
    "its file; several fields make a grid. A value that is a list stands in brackets.",
)
_SHARD = flags.DEFINE_string("shard", "1/1", "i/n: only the i-th of n parts, for n machines.")
_ONLY = flags.DEFINE_multi_string("only", [], "FIELD=V1,V2: only runs with these values.")
_PROGRAM = flags.DEFINE_enum(
    "program",
    "glue",
    sorted(base_configs.BY_PROGRAM),
    "Whose runs these are: glue stands for sst2 too.",
)
_HALVING = flags.DEFINE_integer(
    "halving", 0, "Number of runs of which one goes on at each rung; 0 to train all to the end."
)
_POINTS = flags.DEFINE_integer(
    "points", 0, "Points that Optuna proposes by the file's search(trial); 0: those of sweep(add)."
)
_BATCH = flags.DEFINE_integer("batch", 8, "Points that Optuna proposes at a time.")
_SAMPLER = flags.DEFINE_enum("sampler", "tpe", SAMPLERS, "How Optuna proposes points.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what would be run, and stop.")

# The next command for the best adapter of each program.
_NEXT = {
    "glue": 'experiments.predict --adapter={adapter} "The movie was wonderful!"',
    "classify": "experiments.predict --adapter={adapter} {example}",
    "e2e_nlg": "experiments.export --adapter={adapter} --out=merged --merged",
    "instruct": 'experiments.chat --adapter={adapter} "Who are you?"',
}


def main(argv: list[str]) -> None:
    """Trains the runs of the sweep that are left, and says what to do next."""
    logging.getLogger("lora_jax").setLevel(logging.ERROR)  # the notes say what is fresh
    recipe = recipes.RECIPES[_PROGRAM.value]
    command = _read_command(argv, recipe)
    environment.place_fonts()
    base = command.config
    choice = from_config.settle_dtype(base, command.workdir / workdirs.SWEEP)
    if _POINTS.value:
        sweep_dirs.check(command.workdir, base, 0)
        cli.say_all(choice, environment.describe_pages())
        _search(command, recipe)
        return
    sweep = _make_sweep(command, recipe)
    sweep_dirs.check(command.workdir, base, sweep.halving, sweep.axes)
    print(_list_runs(sweep), flush=True)
    cli.say_all(choice, environment.describe_pages())
    if _DRY_RUN.value:
        return
    begin = time.perf_counter()
    compiled = scheduler.run(sweep, base)
    print(_describe_end(begin, compiled, sweep))


def _search(command: Command, recipe: Recipe) -> None:
    """Trains the points that Optuna proposes, and says what to do next.

    Raises:
      ValueError: flags are given that go with the points of a file alone; or as :func:`search.run`.
    """
    if _HALVING.value or _ONLY.value or _SWEEP.value or _SHARD.value != "1/1" or _DRY_RUN.value:
        raise ValueError(
            "--points goes without --halving, --only, --sweep, --shard and --dry_run: what Optuna "
            "proposes depends on the scores of all points before."
        )
    file, _ = config_files.split_argument(command.path)
    points = search.Search(
        propose=search.load_search(file), count=_POINTS.value, batch=_BATCH.value,
        sampler=_SAMPLER.value, seed=command.config.seed,
    )  # fmt: skip
    sweep = scheduler.Sweep(
        trials=[], local_trials=[], recipe=recipe, workdir=command.workdir,
        parallel=_parallel(_PARALLEL.value), say=cli.say,
    )  # fmt: skip
    begin = time.perf_counter()
    sweep, compiled = search.run(points, sweep, command.config)
    print(_describe_end(begin, compiled, sweep))


def _describe_end(begin: float, compiled: dict[str, int], sweep: scheduler.Sweep) -> str:
    times = ", ".join(f"{name} {count}" for name, count in compiled.items()) or "nothing"
    return f"{time.perf_counter() - begin:.1f} s; compiled: {times}\n{_outcome(sweep)}"


def _read_command(argv: list[str], recipe: Recipe) -> Command:
    """Reads the command line; an error says if the config is one of another program.

    Raises:
      FileNotFoundError, ValueError: as :func:`config_flag.read`.
    """
    try:
        return config_flag.read(argv, recipe.base_config)
    except ValueError as error:
        for name, other in recipes.RECIPES.items():
            try:
                command = config_flag.read(argv, other.base_config)
            except (FileNotFoundError, ValueError):
                continue
            raise ValueError(
                f"--program={_PROGRAM.value} has other fields than {command.path}: did you mean "
                f"--program={name}?"
            ) from error
        raise


def _make_sweep(command: Command, recipe: Recipe) -> scheduler.Sweep:
    axes = sweep_flag.read(_SWEEP.value, base_configs.BY_PROGRAM[_PROGRAM.value]())
    runs = trials.make_trials(command.config, _find_sweep(command, axes), recipe)
    _check_overrides(command, runs)
    runs = trials.select(runs, _ONLY.value)
    if _HALVING.value and (_HALVING.value < 2 or _SHARD.value != "1/1"):
        raise ValueError(
            f"--halving={_HALVING.value} --shard={_SHARD.value}: halving is by 2 or more, and "
            "compares all runs, so that it can't go with shards."
        )
    return scheduler.Sweep(
        trials=runs,
        local_trials=trials.shard(runs, _SHARD.value),
        recipe=recipe,
        workdir=command.workdir,
        parallel=_parallel(_PARALLEL.value),
        halving=_HALVING.value,
        axes=axes,
        shard=_SHARD.value,
        say=cli.say,
    )


def _find_sweep(
    command: Command, axes: Mapping[str, Sequence[Any]]
) -> Callable[[Callable[..., None]], None]:
    """Returns the sweep of the command line, or else that of the config's file.

    Raises:
      ValueError: there is none, or there are both.
    """
    file, _ = config_files.split_argument(command.path)
    if not axes:
        return trials.load_sweep(file)
    if trials.has_sweep(file):
        raise ValueError(
            f"{file} has a sweep(add) of its own, and --sweep is another: leave out --sweep, or "
            "give a config without one. --only=FIELD=V1,V2 chooses among the runs of the file."
        )

    def sweep(add: Callable[..., None]) -> None:
        for point in common.product(axes):
            add(**point)

    return sweep


def _check_overrides(command: Command, runs: list[trials.Trial]) -> None:
    if replaced := trials.find_replaced(runs, command.overrides):
        options = [f"--config.{field}={command.overrides[field]}" for field in replaced]
        raise ValueError(
            f"{', '.join(options)} would change nothing: each run of the sweep "
            f"sets {', '.join(replaced)} itself. Leave it out; --only={replaced[0]}=VALUE chooses "
            "among the runs."
        )


def _parallel(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--parallel={text}: give a number of runs, 1 or more, or auto.")
    return int(text)


def _list_runs(sweep: scheduler.Sweep) -> str:
    """Lists the runs of this process, by group."""
    varied = trials.varied_fields([t.config for t in sweep.trials])
    lines = [sweep_flag.describe(sweep.axes)] if sweep.axes else []
    for number, members in enumerate(trials.group(sweep.local_trials), 1):
        left = scheduler.unfinished(sweep, members)
        lines.append(f"group {number}: {len(members)} runs, {len(left)} to do")
        if _DRY_RUN.value:
            lines += [_describe_run(sweep, trial, varied) for trial in members]
    return "\n".join(lines)


def _describe_run(sweep: scheduler.Sweep, trial: trials.Trial, varied: list[str]) -> str:
    result = sweep_dirs.read_result(sweep.workdir, trial)
    status = result["status"] if result else "to do"
    return f"  {trial.id}  {trials.describe(trial, varied)}: {status}"


def _outcome(sweep: scheduler.Sweep) -> str:
    """Says which run is the best, and which commands come next."""
    results = [(sweep_dirs.read_result(sweep.workdir, t) or {}, t) for t in sweep.local_trials]
    statuses = [result["status"] for result, _ in results]
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    lines = [", ".join(f"{count} runs {status}" for status, count in counts.items())]
    scored = [(result, trial) for result, trial in results if result["best_step"] is not None]
    if scored:
        result, trial = max(scored, key=lambda entry: sweep_dirs.rank(entry[0]))
        score, value = sweep_dirs.best_score(result)
        run = trials.describe(trial, trials.varied_fields([t.config for t in sweep.trials]))
        directory = sweep_dirs.run_dir(sweep.workdir, trial)
        adapter, example = directory / workdirs.ADAPTER, ""
        before = metric_writer.read_evaluation(directory / workdirs.METRICS, 0).get(score.name)
        change = "" if before is None else f" ({before:.4f} before training)"
        if _PROGRAM.value == "classify":
            (examples,) = own_texts.load(trial.config).evaluations
            example = next_commands.quote_text(own_texts.find_example(examples))
        lines += [
            f"best validation {score.name} {value:.4f}: {run}{change}",
            "Next:",
            f"  python -m {_NEXT[_PROGRAM.value].format(adapter=adapter, example=example)}",
        ]
    return "\n".join([*lines, f"  python -m experiments.report {sweep.workdir}"])


if __name__ == "__main__":
    cli.run(main, lambda: base_configs.BY_PROGRAM[_PROGRAM.value])
