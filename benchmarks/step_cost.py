"""Cost of one gradient: full fine-tuning, LoRA merged in the loss, and LoRA lifted.

    python -m benchmarks.step_cost [--model=bert_base,minilm] [--time]

One JSON object a line and case. FLOPs and bytes are XLA's own counts of the compiled gradient;
times are medians, and only to be compared within one run. Runs on whatever device JAX finds.
"""

import argparse
import json
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax.models import bert

MODELS = {
    "bert_base": (bert.BertConfig(), 8, 64),
    "minilm": (
        bert.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        ),
        16,
        64,
    ),
}
SIX = ("query", "key", "value", "attention/output/dense", "intermediate/dense", "output/dense")
TARGETS = {"query+value": ("query", "value"), "all six": SIX}


def cases(model: bert.BertForSequenceClassification, params: dict, batch: tuple) -> dict:
    """Functions of ``(adapter, params)`` to differentiate by the adapter, with their adapters."""
    ids, attended, labels = batch

    def loss(apply: callable, tree: dict) -> jax.Array:
        logits = apply(tree, ids, attended)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])

    full = jax.tree.map(jnp.copy, params)
    found = {("full", "everything"): (lambda tree, _: loss(model.apply, tree), full)}
    for name, targets in TARGETS.items():
        config = lora.LoRAConfig(rank=8, targets=targets, train=("classifier",))
        adapter = lora.init(jax.random.key(1), model.apply, params, config, ids, attended)
        merged = lambda a, p: loss(model.apply, lora.merge(p, a))
        lifted = lambda a, p: loss(lora.lift(model.apply), lora.bind(p, a))
        found[("merged", name)] = (merged, adapter)
        found[("lifted", name)] = (lifted, adapter)
    return found


def measure(fn: callable, adapter: dict, params: dict, *, repeats: int) -> dict:
    """Compiles the gradient, reads XLA's counts, and times it if asked to."""
    start = time.perf_counter()
    compiled = jax.jit(jax.value_and_grad(fn)).lower(adapter, params).compile()
    row = {"compile_s": round(time.perf_counter() - start, 2)}
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    row["gflop"] = round(cost["flops"] / 1e9, 1)
    row["temporary_mb"] = round(memory.temp_size_in_bytes / 1e6, 1)
    row["output_mb"] = round(memory.output_size_in_bytes / 1e6, 1)
    times = []
    for _ in range(repeats + 1 if repeats else 0):
        start = time.perf_counter()
        jax.block_until_ready(compiled(adapter, params))
        times.append(time.perf_counter() - start)
    if times:
        row["step_s"] = round(statistics.median(times[1:]), 4)
    return row


def main() -> None:
    """Prints the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=",".join(MODELS))
    parser.add_argument("--time", action="store_true", help="also time the steps")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    device = jax.devices()[0]
    for name in args.model.split(","):
        config, size, length = MODELS[name]
        model = bert.BertForSequenceClassification(config, dtype=jnp.dtype(args.dtype))
        ids = jnp.asarray(np.random.default_rng(0).integers(1000, 20000, (size, length)), jnp.int32)
        batch = ids, jnp.ones_like(ids), jnp.arange(size) % 2
        params = jax.jit(model.init)(jax.random.key(0), *batch[:2])
        base = None
        for (how, targets), (fn, adapter) in cases(model, params, batch).items():
            row = {"model": name, "batch": [size, length], "how": how, "targets": targets}
            row |= measure(fn, adapter, params, repeats=5 if args.time else 0)
            base = base or row
            row["gflop_ratio"] = round(row["gflop"] / base["gflop"], 4)
            if args.time:
                row["step_ratio"] = round(row["step_s"] / base["step_s"], 3)
            row["device"] = f"{device.platform} {device.device_kind} {platform.machine()}"
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
