"""How long a start of a program takes, the first and later ones, to the end of its first step.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.start [--starts=4] \
        [--config=configs/quickstart.py] [--field=lora.rank=4]

Each start is a process of its own with a new workdir; all have one cache directory, which is empty
before the first. One JSON object a line: seconds since the process was made, and the processor time
of all its threads, to the beginning of the loop, the end of the evaluation before the first step,
if there is one, and the end of the first step, when its metrics are there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Starts the program again and again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--field", action="append", default=[], help="FIELD=VALUE of the config")
    args = parser.parse_args()
    fields = [f"--config.{text}" for text in args.field]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.starts):
            program = ["sst2", f"--config={args.config}", *fields, f"--workdir={folder}/{number}"]
            command = [sys.executable, "-c", "from benchmarks import start; start.child()"]
            done = subprocess.run(
                [*command, str(time.time()), *program, f"--compilation_cache={folder}/cache"],
                cwd=ROOT, check=False, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                sys.exit(done.stderr)
            row = next(line for line in done.stderr.splitlines() if line.startswith("{"))
            print(json.dumps({"start": number + 1} | json.loads(row)), flush=True)


def child() -> None:
    """Runs the program in ``sys.argv`` to the end of its first step, and tells the times."""
    began = float(sys.argv.pop(1))
    del sys.argv[0]  # of Python's -c; the program's name is next
    times: dict[str, float] = {}

    def note(name: str) -> None:
        times[f"{name}_s"] = round(time.time() - began, 2)
        times[f"{name}_cpu_s"] = round(time.process_time(), 2)

    from experiments import base_configs, cli, finetuning  # noqa: PLC0415

    note("program")

    def watch() -> None:
        import jax  # noqa: PLC0415

        from lora_jax.training import loop, metric_logger, train  # noqa: PLC0415

        note("imports")
        evaluate, run_loop = loop._evaluate, train.loop

        def noted_loop(*args: object) -> object:
            note("loop")
            return run_loop(*args)

        def noted_evaluate(*args: object) -> object:
            result = evaluate(*args)
            note("evaluation")
            return result

        def end(_: object, step: int, *metrics: object) -> None:
            jax.block_until_ready(metrics)
            note("first_step")
            print(f"\n{json.dumps(times | {'cpus': os.cpu_count()})}", file=sys.stderr)
            sys.exit(0)

        loop._evaluate, train.loop = noted_evaluate, noted_loop
        metric_logger.Meter.add = end

    def main(argv: list[str]) -> None:
        watch()
        finetuning.main(argv)

    cli.run(main, lambda: base_configs.GLUE)


if __name__ == "__main__":
    main()
