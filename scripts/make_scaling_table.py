"""Prints the tables of docs/scaling.md: what a device holds, by arithmetic from the shapes alone.

    python scripts/make_scaling_table.py

Nothing is allocated. Parameters are counted from the models' own shapes, pieces by the families'
sharding tables, and activations are the residuals that JAX's own linearisation of the lifted model
keeps for the backward pass, in bfloat16: those of a model of two layers less those of one are a
layer's, and what is left is the embedding's and the head's.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

import lora_jax as lora
from lora_jax import sharding
from lora_jax.models import llama
from lora_jax.models.token_losses import CHUNK_BYTES

LENGTH = 2048  # tokens of a row; each device has one row of the batch
RANK = 16
DEVICES = (1, 8, 64)
FULL = 4 + 8 + 4  # bytes a parameter: float32 master, two moments of Adam, gradient

# From the config.json of meta-llama/Llama-2-{7b,13b,70b}-hf.
_COMMON = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
MODELS = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
               "num_attention_heads": 32, "num_key_value_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                "num_attention_heads": 40, "num_key_value_heads": 40},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
FAMILY = next(family for family in llama.FAMILIES if "llama" in family.model_type)
IDS = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)


def config(name):
    return llama.LlamaConfig.from_hf({"model_type": "llama", **_COMMON, **MODELS[name]})


def shapes(config, *, scan=True):
    """The model, its base in bfloat16, and its adapter in float32, as shapes."""
    model = llama.LlamaForCausalLM(config, dtype=jnp.bfloat16, scan_layers=scan)
    base = jax.eval_shape(model.init, jax.random.key(0), IDS)
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), base)
    settings = lora.LoRAConfig(rank=RANK)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), model.apply, base, settings, IDS))
    return model, base, adapter


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def trained(adapter):
    """How many numbers are trained: the factors, not their scales."""
    sizes = jax.tree.map(lambda x, real: real * math.prod(x.shape), adapter, lora.mask(adapter))
    return sum(jax.tree.leaves(sizes))


def size(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def residuals(config):
    """Bytes that the backward pass of one row needs, besides base and adapter."""
    model, base, adapter = shapes(config, scan=False)

    def kept(base, adapter, ids):
        run = lambda adapter: lora.lift(model.apply)(lora.bind(base, adapter), ids)
        _, pull = jax.vjp(run, adapter)
        given = {id(x) for x in jax.tree.leaves((base, adapter))}
        found = {id(x): x for x in jax.tree.leaves(pull) if id(x) not in given}
        return [x for x in found.values() if hasattr(x, "shape")]

    return size(jax.eval_shape(kept, base, adapter, IDS))


@functools.cache
def activations(name):
    """Bytes for one row: with everything kept, and with each layer computed again (full remat)."""
    whole = config(name)
    cut = lambda n: {"num_hidden_layers": n, "layer_types": whole.layer_types[:n]}
    one, two = (residuals(dataclasses.replace(whole, **cut(n))) for n in (1, 2))
    layer = two - one
    logits = 2 * min(LENGTH * whole.vocab_size * 4, CHUNK_BYTES)  # and their softmax, in float32
    ends = one - layer + logits
    entry = LENGTH * whole.hidden_size * 2
    count = whole.num_hidden_layers
    return count * layer + ends, count * entry + layer + ends


def gathered(base):
    """Bytes of the kernels of one layer, which are whole while it is computed."""
    layers = base["params"]["model"]["layers"]
    return size(layers) // jax.tree.leaves(layers)[0].shape[0]


def gb(x):
    return f"{x / 1e9:.2f}" if x < 1e11 else f"{x / 1e9:,.0f}"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counts_table(made):
    header = ["model", "parameters", "base, bf16", f"adapter's, rank {RANK}", "full fine-tuning"]
    rows = []
    for name, (_, base, adapter) in made.items():
        numbers = [f"{count(base):,}", gb(size(base)), f"{trained(adapter):,}"]
        rows.append([name, *numbers, gb(FULL * count(base))])
    return table(header, rows)


def devices_table(made):
    header = ["model", "devices", "base", "adapter", "optimiser", "layer at work"]
    header += ["LoRA, all kept", "LoRA, remat", "full fine-tuning, remat"]
    rows = [device_row(name, n, *made[name][1:]) for name in made for n in DEVICES]
    return table(header, rows)


def device_row(name, devices, base, adapter):
    mesh = AbstractMesh((1, devices, 1), sharding.AXES)
    specs = sharding.specs(base, FAMILY.sharding, mesh)
    held = sharding.bytes_per_device(base, specs, mesh)
    factors = sharding.bytes_per_device(adapter, sharding.adapter_specs(specs, adapter), mesh)
    layer = gathered(base) if devices > 1 else 0
    kept, again = activations(name)
    ours = held + 4 * factors + layer  # with two moments and a gradient
    theirs = FULL * held // 2 + layer  # held is two bytes a parameter
    sizes = [held, factors, 2 * factors, layer, ours + kept, ours + again, theirs + again]
    return [name, str(devices), *map(gb, sizes)]


def activations_table():
    rows = [[name, *map(gb, activations(name))] for name in MODELS]
    return table(["model", "all kept", "each layer made again"], rows)


def main():
    made = {name: shapes(config(name)) for name in MODELS}
    print(counts_table(made), activations_table(), devices_table(made), sep="\n\n")


if __name__ == "__main__":
    main()
