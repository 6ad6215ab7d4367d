"""Cost of one gradient of a small U-Net: full fine-tuning, LoRA merged in the loss, LoRA lifted.

    python -m benchmarks.convolutions [--repeats=10] [--channels=64]

One JSON object a case: FLOPs and temporary memory by XLA's counts, and the least step of the
repeats, in which the cases take turns. Every convolution is adapted with rank 8.
"""

import argparse
import json
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import lora_jax as lora

PyTree = Any


class UNet(nn.Module):
    """Two levels of 3 x 3 convolutions, with a connection between the upper ones."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """An image of the shape of ``x``, ``(batch, height, width, features)``."""
        block = lambda x, n: nn.silu(nn.Conv(n, (3, 3))(nn.silu(nn.Conv(n, (3, 3))(x))))
        upper = block(x, self.channels)
        lower = block(nn.avg_pool(upper, (2, 2), (2, 2)), 2 * self.channels)
        lower = nn.Conv(self.channels, (3, 3))(jnp.repeat(jnp.repeat(lower, 2, 1), 2, 2))
        return nn.Conv(x.shape[-1], (3, 3))(
            block(jnp.concatenate([upper, lower], -1), self.channels)
        )


def cases(channels: int) -> tuple[dict[str, Any], PyTree, PyTree]:
    """Compiled gradients of ``(params, adapter)`` by name, and what to give them."""
    model, x = UNet(channels), jax.random.normal(jax.random.key(0), (8, 32, 32, 4))
    params = jax.jit(model.init)(jax.random.key(1), x)
    config = lora.LoRAConfig(rank=8, targets="all-linear")
    adapter = lora.init(jax.random.key(2), model.apply, params, config, x)
    loss = lambda apply, tree: jnp.mean((apply(tree, x) - x) ** 2)
    full = jax.grad(lambda p, a: loss(model.apply, p))
    merged = jax.grad(lambda p, a: loss(model.apply, lora.merge(p, a)), argnums=1)
    lifted = jax.grad(lambda p, a: loss(lora.lift(model.apply), lora.bind(p, a)), argnums=1)
    found = {"full": full, "merged": merged, "lifted": lifted}
    run = {name: jax.jit(fn).lower(params, adapter).compile() for name, fn in found.items()}
    return run, params, adapter


def main() -> None:
    """Prints the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--channels", type=int, default=64)
    args = parser.parse_args()
    run, params, adapter = cases(args.channels)
    times: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(args.repeats + 1):
        for name, compiled in run.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(params, adapter))
            times[name].append(time.perf_counter() - start)
    base = run["full"].cost_analysis()["flops"], min(times["full"][1:])
    for name, compiled in run.items():
        flops, step = compiled.cost_analysis()["flops"], min(times[name][1:])
        row = {
            "how": name,
            "gflop": round(flops / 1e9, 2),
            "gflop_ratio": round(flops / base[0], 3),
        }
        row["temporary_mb"] = round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1)
        row |= {"step_s": round(step, 4), "step_ratio": round(step / base[1], 3)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
