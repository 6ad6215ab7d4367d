r"""Fine-tunes a whole sweep: many ranks, alphas, rates and seeds through one compiled step.

    python -m experiments.sweep --config=configs/quickstart_sweep.py --workdir=runs/sweep

The config file defines ``sweep(add)`` beside ``get_config()``. Run again, with or without more
runs in the file, it trains the runs that are left. The next command is
``python -m experiments.report runs/sweep``.
"""

import logging
import time
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import cli, next_commands, recipes
from lora_jax.sweeps import scheduler, sweep_dirs, trials
from lora_jax.tasks import own_texts

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep.", required=True)
_PARALLEL = flags.DEFINE_string("parallel", "auto", "Runs at a time, or auto to find out.")
_SHARD = flags.DEFINE_string("shard", "1/1", "i/n: only the i-th of n parts, for n machines.")
_ONLY = flags.DEFINE_multi_string("only", [], "FIELD=V1,V2: only runs with these values.")
_PROGRAM = flags.DEFINE_enum(
    "program", "glue", sorted(recipes.RECIPES), "Whose runs these are: glue stands for sst2 too."
)
_HALVING = flags.DEFINE_integer(
    "halving", 0, "Number of runs of which one goes on at each rung; 0 to train all to the end."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what would be run, and stop.")
flags.mark_flag_as_required("config")


# The next command for the best adapter of each program.
_NEXT = {
    "glue": 'experiments.predict --adapter={adapter} "The movie was wonderful!"',
    "classify": "experiments.predict --adapter={adapter} {example}",
    "e2e_nlg": "experiments.export --adapter={adapter} --out=merged --merged",
    "instruct": 'experiments.chat --adapter={adapter} "Who are you?"',
}


def main(argv: list[str]) -> None:
    """Trains the runs of the sweep that are left, and says what to do next."""
    if argv:
        raise ValueError(f"Unexpected arguments {argv}; options start with --.")
    logging.getLogger("lora_jax").setLevel(logging.ERROR)  # the notes say what is fresh
    base, workdir = _CONFIG.value, Path(_WORKDIR.value)
    sweep = _read_command_line(base, workdir)
    sweep_dirs.check(workdir, base, sweep.halving)
    print(_list_runs(sweep), flush=True)
    if _DRY_RUN.value:
        return
    begin = time.perf_counter()
    compiled = scheduler.run(sweep, base)
    times = ", ".join(f"{name} {count}" for name, count in compiled.items()) or "nothing"
    print(f"{time.perf_counter() - begin:.1f} s; compiled: {times}\n{_outcome(sweep)}")


def _read_command_line(base: ConfigDict, workdir: Path) -> scheduler.Sweep:
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    recipe = recipes.RECIPES[_PROGRAM.value]
    runs = trials.make_trials(base, trials.load_sweep(path), recipe)
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
        workdir=workdir,
        parallel=_parallel(_PARALLEL.value),
        halving=_HALVING.value,
        shard=_SHARD.value,
        say=cli.say,
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
    lines = []
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
    results = [(sweep_dirs.read_result(sweep.workdir, t), t) for t in sweep.local_trials]
    statuses = [result["status"] for result, _ in results]
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    lines = [", ".join(f"{count} runs {status}" for status, count in counts.items())]
    scored = [(*sweep_dirs.best_score(result), trial) for result, trial in results]
    scored = [(score, value, trial) for score, value, trial in scored if value is not None]
    if scored:
        score, value, trial = max(scored, key=lambda entry: entry[0].merit(entry[1]))
        run = trials.describe(trial, trials.varied_fields([t.config for t in sweep.trials]))
        adapter, example = sweep_dirs.run_dir(sweep.workdir, trial) / "adapter", ""
        if _PROGRAM.value == "classify":
            (examples,) = own_texts.load(trial.config).evaluations
            example = next_commands.quote_text(own_texts.find_example(examples))
        lines += [
            f"best validation {score.name} {value:.4f}: {run}",
            "Next:",
            f"  python -m {_NEXT[_PROGRAM.value].format(adapter=adapter, example=example)}",
        ]
    return "\n".join([*lines, f"  python -m experiments.report {sweep.workdir}"])


if __name__ == "__main__":
    cli.run(main)
