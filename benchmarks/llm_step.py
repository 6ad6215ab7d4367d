"""A training step of a Llama on one accelerator: LoRA on every linear layer, here and in PEFT.

    python -m benchmarks.llm_step [--models=3b,8b,1b] [--sides=ours,eager,compiled] [--seconds=460]
    python -m benchmarks.llm_step --memory [--models=3b,8b,1b] [--lengths=4096,8192]

Needs jax, flax, optax; PEFT's sides need torch, transformers and peft, and their 4 bits
bitsandbytes. ``--models=tiny`` is for trying it out on a CPU. One JSON object a line and case; the
weights are random, and so are the tokens. A row is full, and holds ``texts`` texts that do not see
each other. Each case is a process, since nothing else gives all of its memory back.

``--memory`` compiles the program of the full size for weights that are not there
(``jax.ShapeDtypeStruct``), and prints XLA's count of its memory. It takes no memory of that size,
and no accelerator. A CPU multiplies in float32: its program widens bfloat16 arrays, and makes
float32 copies of whole ones (the head, the inputs of all layers) before it enters a loop. No
accelerator needs them, so here the pass that moves them out of loops is off, on a CPU;
``own_temporary_gb`` is what the CPU's program takes with it.

    tokens_per_s     tokens of the batch divided by the median time of a step
    mfu              model FLOPs divided by what the device can do: 4 for each parameter of a kernel
                     and token, since kernels have no gradient (6 with remat, which computes each
                     layer again), without attention's. Of "peak_tflops", the maker's figure for
                     dense bfloat16; on other devices what one large product reaches
    argument_gb, temporary_gb   XLA's count; ``peak_gb`` the device's own high-water mark
    compile_s        from the traced step to the compiled one
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import jax

from benchmarks.llama_steps import SHAPES, Case, measure_memory, ours, theirs

SIDES = {
    "ours": ours,
    "eager": functools.partial(theirs, is_compiled=False),
    "compiled": functools.partial(theirs, is_compiled=True),
}


def cases(models: list[str]) -> list[Case]:
    """Makes the cases of some models: the first of each, the second of each, and so on."""
    return [x for turn in zip_longest(*map(cases_of, models)) for x in turn if x is not None]


def cases_of(name: str) -> list[Case]:
    """Makes the cases of a model, the most telling first."""
    if name == "tiny":
        case = Case(model=name, batch=(2, 128))
        others = ({"texts": 2}, {"remat": False}, {"base": "nf4", "texts": 2})
    elif name == "8b":
        case, others = Case(model=name, batch=(1, 4096), base="nf4"), ({"texts": 4},)
    else:
        case = Case(model=name, batch=(2, 4096))
        others = ({"texts": 4}, {"remat": False}, {"base": "nf4"})
    return [case, *(dataclasses.replace(case, **changes) for changes in others)]


def order(models: list[str], sides: list[str]) -> Iterator[tuple[Case, str]]:
    """Orders what is to be measured: torch's compiler, which takes minutes, is last but once."""
    first, *others = cases(models)
    yield from ((first, side) for side in sides)
    yield from ((case, side) for case in others for side in sides if side != "compiled")
    yield from ((case, side) for case in others for side in sides if side == "compiled")


def measure(pipe: Any, side: str, case: Case, steps: int) -> None:
    """Measures a case in a process of its own, and sends what is found, or the error."""
    try:
        row = SIDES[side](case, steps)
    except Exception as error:  # noqa: BLE001 - whatever it is, the next case goes on
        row = {"error": f"{type(error).__name__}: {error}"[:300]}
    pipe.send(row)


def run(options: argparse.Namespace) -> None:
    """Prints a line for each case and side, until the time is over."""
    context, end = multiprocessing.get_context("spawn"), time.monotonic() + options.seconds
    mine: dict[Case, float | None] = {}
    for case, side in order(options.models.split(","), options.sides.split(",")):
        row = attempt(context, side, case, options.steps, end - time.monotonic())
        if side == "ours":
            mine[case] = row.get("step_s")
        elif "step_s" in row and mine.get(case):
            row["ratio"] = round(row["step_s"] / mine[case], 3)
        print(json.dumps({"side": side, **dataclasses.asdict(case), **row}), flush=True)


def attempt(context: Any, side: str, case: Case, steps: int, seconds: float) -> dict[str, Any]:
    """Measures a case in a process that is ended when the time is over."""
    if seconds <= 0:
        return {"error": "no time"}
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(send, side, case, steps))
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(seconds) else {"error": "no time"}
    except EOFError:
        return {"error": "the process ended: out of memory?"}
    finally:
        process.terminate()
        process.join()


def print_memory(options: argparse.Namespace) -> None:
    """Prints XLA's memory of the programs of full size, with a base in bfloat16 and in 4 bits."""
    for name in options.models.split(","):
        for length in map(int, options.lengths.split(",")):
            for base in ("bfloat16", "nf4"):
                case = Case(model=name, batch=(1, length), base=base)
                row = measure_memory(case) | {"device": jax.devices()[0].device_kind}
                print(json.dumps(dataclasses.asdict(case) | row), flush=True)


def main() -> None:
    """Prints the cases."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # so that a peak is one
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="3b,8b,1b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--sides", default=",".join(SIDES), help="ours, or PEFT's")
    parser.add_argument("--steps", type=int, default=5, help="steps to measure")
    parser.add_argument("--seconds", type=float, default=460, help="the time for all cases")
    parser.add_argument("--memory", action="store_true", help="compile only, for shapes")
    parser.add_argument("--lengths", default="4096,8192", help="tokens of a row, for --memory")
    options = parser.parse_args()
    if options.memory:
        print_memory(options)
    else:
        run(options)


if __name__ == "__main__":
    main()
