"""Where the time of a step goes: its operations, summed by what they are for.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.small_step [--dtype=bfloat16] \
        [--batch=16x32] [--targets=query,value] [--dropout=0.1] [--param_dtype=bfloat16]

The training step of MiniLM with random weights, with its optimizer: median time, processor time and
page faults of a step, then milliseconds a step of each kind of operation, from a trace of
``jax.profiler``. Operations are told apart by the name that the compiled program gives them, which
is that of the largest part where XLA has joined several. The trace itself costs some percent.
"""

import argparse
import collections
import dataclasses
import glob
import json
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.sweep import MODELS, random_task
from configs import common
from lora_jax.tasks import from_config
from lora_jax.training import durations
from lora_jax.training.state import initial_state
from lora_jax.training.step import make_train_step, step_options

STEPS = 20
INSTRUCTION = re.compile(r'\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"')
DENSE = r"(dense|query|key|value|pooler)/"
# The first kind whose pattern is found in "<name of the operation> <where it comes from>".
KINDS = {
    "base rounded to bfloat16": rf"^wrapped_convert.*{DENSE}convert_element_type",
    "dense products": rf"{DENSE}(jit\(bfloat16_dot_general\)/)?dot_general",
    "LayerNorm": "LayerNorm",
    "random numbers": "threefry|random_bits",
    "GELU, and the bias before it": "intermediate|checkpoint",
    "attention core": "attention",
    "the rest": "",
}


def main() -> None:
    """Compiles, times and traces a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="minilm", choices=list(MODELS))
    parser.add_argument("--batch", default="16x32")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--param_dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--targets", default="query,value", help="kernels, as lora.targets")
    parser.add_argument("--dropout", type=float, default=0.0, help="0: the model's own off, too")
    args = parser.parse_args()
    run, origins = compile_step(args)
    for _ in range(5):
        run()
    print(json.dumps(vars(args) | measure(run) | {"device": jax.devices()[0].device_kind}))
    for kind, milliseconds in trace(run, origins).most_common():
        print(f"{milliseconds:8.2f} ms  {kind}")


def compile_step(args: argparse.Namespace) -> tuple[Callable[[], object], dict[str, str]]:
    """Returns a function that makes a step and waits for it, and where its operations come from."""
    rows, length = map(int, args.batch.split("x"))
    task = random_task(args.model, (rows, length), args.dtype, dropout=args.dropout > 0)
    base = jax.tree.map(lambda x: x.astype(jnp.dtype(args.param_dtype)), task.base)
    task = dataclasses.replace(task, base=base)
    config = common.base_config()
    config.lora.targets, config.lora.dropout = tuple(args.targets.split(",")), args.dropout
    lora_config = from_config.lora_config(config)
    plan = durations.make_plan(config, task.steps_per_epoch)
    state, tx = initial_state(task, config, lora_config, plan=plan)
    step, batch = make_train_step(task, tx, args.dropout, step_options(config)), task.train_batch(0)
    compiled = step.lower(state, base, batch).compile()
    found = filter(None, map(INSTRUCTION.match, compiled.as_text().splitlines()))

    def run() -> object:
        nonlocal state
        state, metrics = compiled(state, base, batch)
        return jax.block_until_ready(metrics)

    return run, {match[1]: match[2] for match in found}


def measure(run: Callable[[], object]) -> dict[str, float]:
    """Measures steps without a trace."""
    seconds, before = [], resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(STEPS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = (after.ru_stime - before.ru_stime) / STEPS
    user = (after.ru_utime - before.ru_utime) / STEPS
    return {
        "step_ms": round(statistics.median(seconds) * 1e3, 1),
        "cpu_ms": round((user + system) * 1e3, 1),
        "system_ms": round(system * 1e3, 1),
        "page_faults": round((after.ru_minflt - before.ru_minflt) / STEPS),
    }


def trace(run: Callable[[], object], origins: dict[str, str]) -> collections.Counter[str]:
    """Returns the milliseconds a step of each kind of operation."""
    total: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            for event in (event for line in plane.lines for event in line.events):
                if event.name in origins:
                    text = f"{event.name} {origins[event.name]}"
                    kind = next(kind for kind, rule in KINDS.items() if re.search(rule, text))
                    total[kind] += event.duration_ns / STEPS / 1e6
    return total


if __name__ == "__main__":
    main()
