"""A training step of BERT-base on an accelerator: against PEFT, and several adapters at once.

    python -m benchmarks.accelerator steps [--sides=ours,eager,compiled,graphs] [--seconds=140] \
        [--profile=DIR]
    python -m benchmarks.accelerator checks

Needs jax, flax and optax; the sides of PEFT need torch, transformers and peft. `--tiny` runs the
same with a tiny model, for trying it out on a CPU. One JSON object a line and case.

``steps`` compares training steps: lifted, merged in the loss, and full fine-tuning, here and in
PEFT, eager, under ``torch.compile`` and under its mode "reduce-overhead" (CUDA graphs); and one
step of several adapters on one base (``vmap`` over all that is trained, as the sweeps of this
library do it). Each side is a process. All compile at the same time, and then take turns, block by
block of steps. In "float32" both multiply in TF32, which is JAX's default on such a card.

    step_ms          median of the blocks' means, each measured until all results are there
    ratio            the time of PEFT's step divided by that of ours
    speed_ratio      time of as many steps of one adapter, divided by that of one step of all
    gflop            of the products in our traced step
    of_matmul_peak   ``gflop / step_ms`` divided by what one large product reaches in that dtype
    memory_mb        arguments, results and temporaries by XLA's count; in torch the peak allocated
    setup_s          drawing model and adapters, tracing; of the first case also starting the device
    compile_s        beside up to four other programs and the other sides
    build_s          in torch, all of it: to the end of the third step

``checks`` compares ``lift`` with ``merge`` on the device: relative differences of logits and of the
adapter's gradient. The reference is ``merge`` in float32 with products of the highest precision.
"""

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import lift_and_merge
from benchmarks.bert_steps import MODES, PROFILED, Case, attempt, kernels, ours, theirs

LONG, SHORT, SHORTEST = (32, 128), (8, 64), (2, 64)
# The most telling first: there may be no time for all.
CASES = [
    Case(LONG),
    Case(LONG, "all six"),
    Case(SHORT),
    Case(SHORT, at_once=16),
    Case(LONG, "everything", stored="float32", how="full"),
    Case(LONG, dtype="float32", stored="float32"),
    Case(LONG, "all six", how="merged"),
    Case(LONG, how="merged"),
    Case(SHORT, at_once=64),
    Case(SHORT, at_once=4),
    Case(SHORTEST),
    Case(SHORTEST, at_once=16),
    Case(SHORTEST, at_once=64),
    Case(SHORT, "all six"),
    Case(LONG, at_once=16),
    Case(LONG, dropout=0.1),
    Case(LONG, "all six", dtype="float32", stored="float32"),
    Case(LONG, stored="float32"),
    Case(SHORTEST, at_once=4),
    Case(LONG, at_once=4),
    Case(SHORT, dtype="float32", stored="float32"),
]


# ---- Steps, side by side -----------------------------------------------------------------------


def serve(pipe: Any, side: str, cases: list[Case], options: argparse.Namespace) -> None:
    """The life of a side's process: builds the cases, then times steps when asked to."""
    make = functools.partial(ours, profile=options.profile)
    if side != "ours":
        make = functools.partial(theirs, side=side)
    runs = []
    for about, run in make(cases, options.seconds):
        runs.append(run)
        pipe.send(about)
    while True:
        index, steps = pipe.recv()
        run = runs[index]
        pipe.send(run(steps) if steps else attempt(lambda: kernels(run, options.profile)))  # noqa: B023


def steps(options: argparse.Namespace) -> None:
    """Prints a row for each case, with all sides, and perhaps profiles."""
    cases, context = list(shrunk(CASES, options)), multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for side in options.sides.split(","):
        pipes[side], end = context.Pipe()
        given = (end, side, cases, options)
        processes.append(context.Process(target=serve, args=given, daemon=True))
        processes[-1].start()
    last = time.monotonic() + options.seconds + 90
    about = {side: answers(pipe, len(cases), last) for side, pipe in pipes.items()}
    roof = {dtype: matmul_tflops(dtype, options) for dtype in ("bfloat16", "float32")}
    alone: dict[Case, float | None] = {}
    for index, case in enumerate(cases):
        rows = timed({side: found[index] for side, found in about.items()}, pipes, index, options)
        ms = rows.get("ours", {}).get("step_ms")
        single = alone.setdefault(case._replace(at_once=1), ms)
        row = compared(rows, roof[case.dtype])
        if ms and single and case.at_once > 1:
            row["speed_ratio"] = round(case.at_once * single / ms, 2)
        print_row(case=case._asdict(), **row)
    for index, row in enumerate(about.get("ours", [])[: PROFILED if options.profile else 0]):
        if "error" not in row:
            pipes["ours"].send((index, 0))
            print_row(case=cases[index]._asdict(), kernels_ms=pipes["ours"].recv())
    for process in processes:
        process.terminate()


def answers(pipe: Any, count: int, last: float) -> list[dict]:
    """Collects the facts of a side's cases; all are errors if they do not end in time."""
    found = []
    while len(found) < count and pipe.poll(max(last - time.monotonic(), 0)):
        found.append(pipe.recv())
    return found if len(found) == count else [{"error": "no answer"}] * count


def timed(rows: dict, pipes: dict, index: int, options: argparse.Namespace) -> dict:
    """The sides' rows with the times of a step; the sides take turns, one mean a round."""
    times = {side: [] for side, row in rows.items() if "error" not in row}
    for _ in range(options.rounds):
        for side, seconds in times.items():
            pipes[side].send((index, options.steps))
            seconds.append(pipes[side].recv())
    of = lambda pick, side: round(pick(times[side]) * 1e3, 3)
    ms = lambda side: {"step_ms": of(statistics.median, side), "least_ms": of(min, side)}
    return {side: row | (ms(side) if side in times else {}) for side, row in rows.items()}


def compared(rows: dict, roof: float) -> dict:
    """The sides' rows, the ratios of the others' times to ours, and shares of the roof."""
    ms = {side: row["step_ms"] for side, row in rows.items() if "step_ms" in row}
    if "ours" not in ms:
        return {"ratio": {}, **rows}
    tflop = rows["ours"]["gflop"] / 1e3
    return {
        "ratio": {side: round(x / ms["ours"], 3) for side, x in ms.items() if side != "ours"},
        "of_matmul_peak": {side: round(tflop / x * 1e3 / roof, 3) for side, x in ms.items()},
        **rows,
    }


def matmul_tflops(dtype: str, options: argparse.Namespace) -> float:
    """What one large matrix product of random numbers reaches, the median of ten, and a row."""
    size = 256 if options.tiny else 8192
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    multiply, times = jax.jit(lambda x: x @ x), []
    for _ in range(13):
        begin = time.perf_counter()
        multiply(x).block_until_ready()
        times.append(time.perf_counter() - begin)
    reached = 2 * size**3 / statistics.median(times[3:]) / 1e12
    print_row(how="matmul", dtype=dtype, size=size, tflops=round(reached, 3))
    return reached


# ---- The program -------------------------------------------------------------------------------


def shrunk(cases: list[Case], options: argparse.Namespace) -> Iterator[Case]:
    """The cases, or some of them with a tiny model."""
    if not options.tiny:
        yield from cases
        return
    for case in cases:
        yield case._replace(model="tiny", batch=(case.batch[0] // 2, 8))


def print_row(**values: object) -> None:
    """Prints a JSON object, with the device."""
    print(json.dumps(values | {"device": jax.devices()[0].device_kind}), flush=True)


def main() -> None:
    """Prints the cases."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the sides share the device
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["steps", "checks"])
    parser.add_argument("--sides", default=",".join(["ours", *MODES]))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps in each round")
    parser.add_argument("--seconds", type=int, default=600, help="no case is begun after them")
    parser.add_argument(
        "--profile", default="", help="folder for profiles and programs of our side"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    options = parser.parse_args()
    if options.profile:
        os.makedirs(options.profile, exist_ok=True)
    if options.part == "steps":
        steps(options)
    else:
        for row in lift_and_merge.rows():
            print_row(how="check", **row)


if __name__ == "__main__":
    main()
