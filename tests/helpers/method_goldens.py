"""Adapters of PEFT's other methods, on tiny models of Hugging Face, with what they compute."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import lora_jax as lora
from lora_jax import names, paths
from lora_jax.models import registry
from tests.helpers.places import GOLDENS

METHODS = GOLDENS / "methods"


@functools.cache
def base(name, *, scan_layers=False, dtype="float32"):
    """Function of (params, ids), parameters and table of names of a base: bert, gpt2 or llama."""
    folder = METHODS / "base" / name
    about = json.loads((folder / "config.json").read_text())
    family = registry.find(about)
    config, head = family.config.from_hf(about), "classifier" if name == "bert" else "causal-lm"
    table = family.names(config, head=head, scan_layers=scan_layers)
    labels = {"num_labels": 3} if head == "classifier" else {}
    model = family.models[head](config, scan_layers=scan_layers, dtype=jnp.dtype(dtype), **labels)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *family.inputs(head))["params"]
    state = safetensors.numpy.load_file(folder / "model.safetensors")
    leaves = {}
    for weight in names.weights(table, paths.named_leaves(shapes)):
        if weight.hf in state:
            value = names.from_tensor(weight, state[weight.hf])
            leaves.setdefault(weight.leaf, {})[weight.layer] = value
    join = lambda parts: parts[None] if None in parts else np.stack(list(parts.values()))
    params = {"params": paths.nest({n: jnp.asarray(join(x), dtype) for n, x in leaves.items()})}
    return lambda params, ids: model.apply(params, ids, jnp.ones_like(ids)), params, table


def golden(name):
    """Arrays of a case, and what its base is called."""
    with np.load(METHODS / name / "io.npz") as arrays:
        return dict(arrays), name.split("_")[1]


def check_outputs(fn, params, adapter, arrays):
    """Lifted and merged logits are PEFT's."""
    ids = jnp.asarray(arrays["input_ids"])
    lifted = jax.jit(lambda a, p: lora.lift(fn, strict=True)(lora.bind(p, a), ids))
    np.testing.assert_allclose(lifted(adapter, params), arrays["logits"], rtol=0, atol=1e-5)
    merged = jax.jit(lambda a, p: fn(lora.merge(p, a), ids))(adapter, params)
    np.testing.assert_allclose(merged, arrays["logits"], rtol=0, atol=1e-5)


def gradients(fn, params, adapter, arrays):
    """Gradients of the sum of the probe times the logits."""
    ids, probe = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["probe"])
    loss = lambda a, p: jnp.sum(probe * lora.lift(fn)(lora.bind(p, a), ids))
    return jax.jit(jax.grad(loss))(adapter, params)
