"""The LoRA speedrun: seconds until MiniLM with an adapter is right on 86% of SST-2's sentences.

    python -m benchmarks.speedrun --source=DIRECTORY_OF_SST2 [--seeds=0,1,2] [--cores=2]
        [--config=configs/sst2_speedrun.py] [--config.FIELD=VALUE ...]

Starts ``experiments.sst2`` once for each seed, with nothing compiled before, and stops it at its
first evaluation with an accuracy of at least 0.86. The clock starts before the process does, so
that imports, the loading of the model, tokenization, compilation and all evaluations count. Prints
one JSON object. ``docs/speedrun.md`` has the rules, and the table.

    seconds     median over the seeds; null if a run ends without the accuracy
    runs        of each seed: seconds, step and accuracy of that evaluation, and the best accuracy
    commit      of the checkout, with "+" behind it where files were changed
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.vs_peft import find_processor
from lora_jax.training import metric_writer, workdirs

TARGET = 0.86
CONFIG = "configs/sst2_speedrun.py"
ROOT = Path(__file__).resolve().parents[1]
_ACCURACY = "eval_accuracy"
_INTERVAL = 0.05  # seconds between two looks at the metrics
_PATIENCE = 60  # seconds that a stopped run has to end


def main(argv: list[str] | None = None) -> int:
    """Prints the result; returns 1 if a run did not reach the accuracy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="directory of SST-2, or tfds:glue/sst2")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--cores", type=int, default=2, help="number of cores of a run")
    parser.add_argument("--config", default=CONFIG, help="file with the recipe")
    parser.add_argument("--target", type=float, default=TARGET, help="accuracy, for trying out")
    args, fields = parser.parse_known_args(argv)
    if wrong := [x for x in fields if not x.startswith("--config.")]:
        parser.error(f"{', '.join(wrong)}: only --config.FIELD=VALUE may follow")
    try:
        limit_cores(args.cores)
    except ValueError as error:
        parser.error(str(error))
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as `make quickstart` has it
    fields = [f"--config={args.config}", f"--config.data.source={args.source}", *fields]
    runs = []
    for seed in map(int, args.seeds.split(",")):
        with tempfile.TemporaryDirectory() as directory:
            workdir = Path(directory) / "run"
            try:
                run = time_run(workdir, [*fields, f"--config.seed={seed}"], args.target)
            except RuntimeError as error:
                parser.exit(1, f"{error}\n")
            runs.append({"seed": seed, **run})
            recipe = json.loads((workdir / workdirs.CONFIG).read_text(encoding="utf-8"))
    print(json.dumps(summarize(runs) | describe(args, recipe)))
    return int(any(run["seconds"] is None for run in runs))


def limit_cores(count: int) -> None:
    """Leaves this process, and those that it starts, so many of its cores.

    Raises:
      ValueError: there are fewer, or this system can't say so.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not 1 <= count <= len(cores):
        raise ValueError(f"--cores={count}: this process can be given 1 to {len(cores)} cores")
    os.sched_setaffinity(0, cores[:count])


def time_run(workdir: Path, arguments: list[str], target: float) -> dict:
    """Runs ``experiments.sst2`` up to the first evaluation with an accuracy.

    Args:
      workdir: directory of the run, a new one.
      arguments: of the program, but for --workdir.
      target: the accuracy.

    Returns:
      ``seconds``, ``step`` and ``accuracy`` of that evaluation, None if there was none; ``best``,
      the best accuracy so far.

    Raises:
      RuntimeError: the program failed; the message has the end of its output.
    """
    command = [sys.executable, "-m", "experiments.sst2", f"--workdir={workdir}", *arguments]
    with tempfile.TemporaryFile("w+") as output:
        start = time.monotonic()
        process = subprocess.Popen(
            [*command, "--compilation_cache="], cwd=ROOT, stdout=output, stderr=output
        )
        try:
            evaluation = wait_for(process, workdir / workdirs.METRICS, target)
            seconds = time.monotonic() - start
        finally:
            _stop(process)
        output.seek(0)
        if evaluation is None and process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{output.read()[-2000:]}")
    accuracies = [x[_ACCURACY] for x in _read_evaluations(workdir / workdirs.METRICS)]
    best = {"best": max(accuracies, default=None)}
    if evaluation is None:
        return {"seconds": None, "step": None, "accuracy": None, **best}
    step, accuracy = evaluation["step"], evaluation[_ACCURACY]
    return {"seconds": round(seconds, 1), "step": step, "accuracy": accuracy, **best}


def wait_for(process: subprocess.Popen, metrics: Path, target: float) -> dict[str, float] | None:
    """Waits for an evaluation with an accuracy of at least ``target``.

    Returns:
      Its line of the metrics; None if the process ends without one.
    """
    while True:
        is_over = process.poll() is not None  # asked first, so that no line of its end is missed
        for line in _read_evaluations(metrics):
            if line[_ACCURACY] >= target:
                return line
        if is_over:
            return None
        time.sleep(_INTERVAL)


def _read_evaluations(metrics: Path) -> list[dict[str, float]]:
    return [line for line in metric_writer.read(metrics) if _ACCURACY in line]


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def summarize(runs: list[dict]) -> dict:
    """Adds the median of the seconds to the runs.

    >>> summarize([{"seconds": 3.0}, {"seconds": 1.0}, {"seconds": 2.5}])["seconds"]
    2.5
    >>> summarize([{"seconds": 3.0}, {"seconds": None}])["seconds"] is None
    True
    """
    seconds = [run["seconds"] for run in runs]
    return {"seconds": None if None in seconds else statistics.median(seconds), "runs": runs}


def describe(args: argparse.Namespace, recipe: dict) -> dict:
    """Says what was run, on what, and when."""
    return {
        "target": args.target,
        "config": args.config,
        "model": recipe["model"]["name"],
        "held_out": recipe["data"]["holdout"],
        **find_processor(),
        "cores": args.cores,
        "jax": importlib.metadata.version("jax"),
        "python": sys.version.split()[0],
        "date": datetime.date.today().isoformat(),
        "commit": find_commit(ROOT),
    }


def find_commit(folder: Path) -> str:
    """Returns the commit of a checkout, with "+" for changed files; "" where there is no git."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
