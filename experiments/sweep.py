r"""Fine-tunes a whole sweep: many ranks, alphas, rates and seeds through one compiled step.

    python -m experiments.sweep --config=configs/quickstart_sweep.py --workdir=runs/sweep

The config file defines ``sweep(add)`` beside ``get_config()``. Run again, with or without more
points in the file, it does what is left to do. Then ``python -m experiments.report runs/sweep``.
"""

import logging
import time
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import cli, recipes
from lora_jax.sweeps import scheduler, sweep_dirs, trials

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep.", required=True)
_PARALLEL = flags.DEFINE_string("parallel", "auto", "Runs at a time, or auto to find out.")
_SHARD = flags.DEFINE_string("shard", "1/1", "i/n: only the i-th of n parts, for n machines.")
_ONLY = flags.DEFINE_multi_string("only", [], "FIELD=V1,V2: only runs with these values.")
_PROGRAM = flags.DEFINE_enum(
    "program", "glue", sorted(recipes.RECIPES), "Whose runs these are: glue stands for sst2 too."
)
_HALVING = flags.DEFINE_integer(
    "halving", 0, "Go on with one of so many runs at each rung; 0 to train all to the end."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what would be run, and stop.")
flags.mark_flag_as_required("config")


# What is done with the best adapter of each program.
_NEXT = {
    "glue": 'experiments.predict --adapter={adapter} "The movie was wonderful!"',
    "e2e_nlg": "experiments.export --adapter={adapter} --out=merged --merged",
    "instruct": 'experiments.chat --adapter={adapter} "Who are you?"',
}


def main(argv: list[str]) -> None:
    """Trains what is left of the sweep, and says what to do next."""
    if argv:
        raise ValueError(f"Unexpected arguments {argv}; options start with --.")
    logging.getLogger("lora_jax").setLevel(logging.ERROR)  # the notes say what is fresh
    base, workdir = _CONFIG.value, Path(_WORKDIR.value)
    sweep = _asked_for(base, workdir)
    sweep_dirs.check(workdir, base, sweep.halving)
    print(_plan(sweep), flush=True)
    if _DRY_RUN.value:
        return
    begin = time.perf_counter()
    compiled = scheduler.run(sweep, base)
    times = ", ".join(f"{name} {count}" for name, count in compiled.items()) or "nothing"
    print(f"{time.perf_counter() - begin:.1f} s; compiled: {times}\n{_outcome(sweep)}")


def _asked_for(base: ConfigDict, workdir: Path) -> scheduler.Sweep:
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    recipe = recipes.RECIPES[_PROGRAM.value]
    everything = trials.points(base, trials.load_sweep(path), recipe)
    everything = trials.only(everything, _ONLY.value)
    if _HALVING.value and (_HALVING.value < 2 or _SHARD.value != "1/1"):
        raise ValueError(
            f"--halving={_HALVING.value} --shard={_SHARD.value}: halving is by 2 or more, and "
            "compares all runs, so that it can't go with shards."
        )
    return scheduler.Sweep(
        points=everything,
        mine=trials.shard(everything, _SHARD.value),
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


def _plan(sweep: scheduler.Sweep) -> str:
    """All runs of this process, by group."""
    swept = trials.swept([p.config for p in sweep.points])
    lines = []
    for number, members in enumerate(trials.groups(sweep.mine), 1):
        left = scheduler.unfinished(sweep, members)
        lines.append(f"group {number}: {len(members)} runs, {len(left)} to do")
        for point in members if _DRY_RUN.value else []:
            found = sweep_dirs.result(sweep.workdir, point)
            state = found["status"] if found else "to do"
            lines.append(f"  {point.id}  {trials.label(point, swept)}: {state}")
    return "\n".join(lines)


def _outcome(sweep: scheduler.Sweep) -> str:
    """The best run, and the next commands."""
    results = [(sweep_dirs.result(sweep.workdir, p), p) for p in sweep.mine]
    statuses = [found["status"] for found, _ in results]
    counts = {s: statuses.count(s) for s in sorted(set(statuses))}
    lines = [", ".join(f"{count} runs {status}" for status, count in counts.items())]
    good = [(*sweep_dirs.best(r), p) for r, p in results if sweep_dirs.best(r)[1] is not None]
    if good:
        score, value, point = max(good, key=lambda found: found[0].merit(found[1]))
        run = trials.label(point, trials.swept([p.config for p in sweep.points]))
        adapter = sweep_dirs.run_dir(sweep.workdir, point) / "adapter"
        lines += [
            f"best validation {score.name} {value:.4f}: {run}",
            "Next:",
            f"  python -m {_NEXT[_PROGRAM.value].format(adapter=adapter)}",
        ]
    return "\n".join([*lines, f"  python -m experiments.report {sweep.workdir}"])


if __name__ == "__main__":
    cli.run(main)
