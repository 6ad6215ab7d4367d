"""Quantized kernels on 4 virtual devices, in a process of its own; prints a JSON object.

python -m tests.helpers.cases_on_quantized
"""

import json
import os

from tests.helpers import xla_flags

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {xla_flags.make_flags()}"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax import sharding
from lora_jax.quantized import is_quantized
from lora_jax.quantized_sharding import spec_of
from tests.helpers.collectives import collectives

LAYERS, WIDTH, INNER, ROWS = 2, 256, 512, 8
MESHES = {"fsdp": (4, 1), "tensor": (1, 4), "mixed": (2, 2)}
RULES = [("up", ("fsdp", "tensor")), ("down", ("tensor", "fsdp"))]
CASES = (("nf4_double", "fsdp"), ("int8", "fsdp"), ("nf4", "tensor"), ("nf4", "mixed"))


def fn(params, x):
    def layer(x, kernels):
        return x + jnp.tanh(sharding.split_rows(x) @ kernels["up"]) @ kernels["down"], None

    return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, params)[0]


def parameters():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 40, jnp.float32)
    return {"up": draw(LAYERS, WIDTH, INNER), "down": draw(LAYERS, INNER, WIDTH)}


def run(params, x, adapter):
    loss = lambda a, p, x: jnp.sum(jnp.sin(lora.lift(fn, strict=True)(lora.bind(p, a), x)))
    step = jax.jit(jax.value_and_grad(loss)).lower(adapter, params, x).compile()
    return step(adapter, params, x), step.as_text()


def case(scheme, shape, plain, adapter, x):
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=axis_types)
    params = lora.quantize(plain, scheme, like={"re:.*": "bio"})
    specs = sharding.specs(params, RULES, mesh)
    placed = sharding.place(params, specs, mesh)
    split = sharding.place(adapter, sharding.adapter_specs(specs, adapter), mesh)
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp")))
    (want, grads), _ = run(params, x, adapter)
    with jax.set_mesh(mesh):
        (got, placed_grads), text = run(placed, rows, split)
    pairs = zip(jax.tree.leaves(placed_grads), jax.tree.leaves(grads), strict=True)
    kernel = WIDTH * INNER
    moved = [c for c in collectives(text) if c.kind == "all-gather"]
    leaves = jax.tree.leaves(placed, is_leaf=is_quantized)
    return {
        "loss": abs(float(got - want) / float(want)),
        "gradients": max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs),
        "largest": max([c.largest for c in moved], default=0) / kernel,
        "held": sharding.bytes_per_device(params, specs, mesh) / sum(
            x.nbytes for x in jax.tree.leaves(params)
        ),
        "really": sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))
        / sum(x.nbytes for x in jax.tree.leaves(params)),
        "specs": [str(tuple(spec_of(x))) for x in leaves],
    }  # fmt: skip


def main():
    plain, rng = parameters(), np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
    config = lora.LoRAConfig(rank=4, targets=("up", "down"))
    adapter = lora.init(jax.random.key(0), fn, plain, config, x)
    adapter = jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape).astype(x.dtype), adapter)
    print(json.dumps({f"{s} {m}": case(s, MESHES[m], plain, adapter, x) for s, m in CASES}))


if __name__ == "__main__":
    main()
