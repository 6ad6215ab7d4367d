"""Time to trace and to compile: plain, lifted and merged, 24 layers that are not scanned.

    python -m benchmarks.compile_time [--repeats=3]

One JSON object a line: processor seconds, the least of the repeats, of a GPT-2 of width 64 whose
attention is adapted, forward and with the gradient by the adapter. No compilation is cached.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora
from lora_jax.models import gpt2

PyTree = Any


def functions() -> tuple[dict[str, Callable], PyTree, PyTree]:
    """Functions of ``(params, adapter)`` by name, and what to give them."""
    shape = gpt2.GPT2Config(
        vocab_size=512, n_positions=64, n_embd=64, n_layer=24, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model, ids = gpt2.GPT2LMHeadModel(shape), jnp.ones((2, 32), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids)
    config = lora.LoRAConfig(rank=4, targets=("c_attn",))
    adapter = lora.init(jax.random.key(1), model.apply, params, config, ids)
    loss = lambda apply, tree: jnp.sum(apply(tree, ids) ** 2)
    plain = lambda p, a: loss(model.apply, p)
    lifted = lambda p, a: loss(lora.lift(model.apply), lora.bind(p, a))
    merged = lambda p, a: loss(model.apply, lora.merge(p, a))
    found = {
        "forward, plain": plain,
        "forward, lifted": lifted,
        "forward, merged": merged,
        "gradient, full fine-tuning": jax.grad(plain),
        "gradient, lifted": jax.grad(lifted, argnums=1),
        "gradient, merged": jax.grad(merged, argnums=1),
    }
    return found, params, adapter


def measure(fn: Callable, params: PyTree, adapter: PyTree) -> tuple[float, float]:
    """Processor seconds of tracing with lowering, and of compiling."""
    start = time.process_time()
    lowered = jax.jit(lambda p, a: fn(p, a)).lower(params, adapter)
    middle = time.process_time()
    lowered.compile()
    return middle - start, time.process_time() - middle


def main() -> None:
    """Prints the cases, which take turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    found, params, adapter = functions()
    times: dict[str, list] = {name: [] for name in found}
    for _ in range(args.repeats):
        for name, fn in found.items():
            times[name].append(measure(fn, params, adapter))
    for name, rows in times.items():
        trace, compilation = (round(min(x), 2) for x in zip(*rows, strict=True))
        print(json.dumps({"case": name, "trace_s": trace, "compile_s": compilation}), flush=True)


if __name__ == "__main__":
    main()
