"""Memory and time of attention's value and gradient: scores in memory, or block by block.

    python -m benchmarks.attention [--lengths=512,1024,2048,4096,8192] [--time] [--mask=causal]

One JSON object a line and case. Bytes are XLA's own counts of temporary memory; times are medians
of programs that take turns, and only to be compared within one run. Runs on whatever device JAX
finds; with "cudnn" among the implementations, on an NVIDIA GPU in bfloat16.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models.attention import Case, Heads, attention, make_plan
from lora_jax.models.attention_mask import make_causal_mask, make_padding_mask

HEADS = Heads(count=8, groups=8, size=64)
Step = Callable[..., tuple]


def make_step(mask: str, implementation: str, batch: int, dtype: DTypeLike) -> Step:
    """Returns value and gradients of attention, as a function of queries, keys and values."""

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        n = query.shape[1]
        tokens = jnp.ones((batch, n), jnp.int32)
        seen = make_padding_mask(tokens)
        if mask == "causal":
            seen = make_causal_mask(tokens, jnp.arange(n))
        case = Case(heads=HEADS, batch=batch, queries=n, dtype=dtype)
        y = attention(query, key, value, make_plan(seen, case, implementation))
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    return jax.value_and_grad(loss, (0, 1, 2))


def measure(options: argparse.Namespace, length: int) -> list[dict]:
    """Compiles the programs for a length, reads XLA's counts, and times them if asked to."""
    dtype = jnp.dtype(options.dtype)
    shape = (options.batch, length, HEADS.count, HEADS.size)
    x = jax.ShapeDtypeStruct(shape, dtype)
    rows, programs = [], []
    for name in options.implementations.split(","):
        start = time.perf_counter()
        step = make_step(options.mask, name, options.batch, dtype)
        programs.append(jax.jit(step).lower(x, x, x).compile())
        compile_s = time.perf_counter() - start
        used = programs[-1].memory_analysis().temp_size_in_bytes
        about = {"implementation": name, "mask": options.mask, "length": length}
        about |= {"batch": options.batch, "dtype": dtype.name, "compile_s": round(compile_s, 2)}
        rows.append(about | {"temporary_mb": round(used / 1e6, 1)})
    if options.time:
        for row, seconds in zip(rows, time_all(programs, shape, dtype), strict=True):
            row["seconds"] = seconds
    return rows


def time_all(programs: list[Step], shape: tuple[int, ...], dtype: DTypeLike) -> list[float]:
    """Times the programs in turn; the first turn does not count."""
    arrays = [jax.random.normal(jax.random.key(k), shape, dtype) for k in range(3)]
    found: list[list[float]] = [[] for _ in programs]
    for _ in range(6):
        for seconds, program in zip(found, programs, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            seconds.append(time.perf_counter() - start)
    return [round(statistics.median(seconds[1:]), 4) for seconds in found]


def main() -> None:
    """Prints one line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192")
    parser.add_argument("--implementations", default="xla,blockwise")
    parser.add_argument("--mask", default="causal", choices=("causal", "padding"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args()
    device = jax.devices()[0]
    about = {"device": f"{device.device_kind} ({platform.processor() or platform.machine()})"}
    print(json.dumps(about | {"jax": jax.__version__, "heads": HEADS.count, "size": HEADS.size}))
    for row in map(functools.partial(measure, options), map(int, options.lengths.split(","))):
        for line in row:
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
