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
from lora_jax.peft import save_peft
from tests.helpers.places import GOLDENS

METHODS = GOLDENS / "methods"


def fuse(state):
    """The state of transformers 5 in memory, which has the experts of a layer in one tensor."""
    fused = dict(state)
    for first in (n for n in state if n.endswith(".experts.0.w1.weight")):
        block = first.removesuffix(".experts.0.w1.weight")
        moe = block.replace("block_sparse_moe", "mlp")
        count = sum(n.startswith(f"{block}.experts.") for n in state) // 3
        get = lambda e, x, block=block: state[f"{block}.experts.{e}.{x}.weight"]
        gate_up = [np.concatenate([get(e, "w1"), get(e, "w3")]) for e in range(count)]
        fused[f"{moe}.experts.gate_up_proj"] = np.stack(gate_up)
        fused[f"{moe}.experts.down_proj"] = np.stack([get(e, "w2") for e in range(count)])
        fused[f"{moe}.gate.weight"] = state[f"{block}.gate.weight"]
    return fused


@functools.cache
def base(name, *, scan_layers=False, dtype="float32"):
    """Function of (params, ids), parameters and table of names of a base: bert, gpt2, llama, mixtral."""
    folder = METHODS / "base" / name
    about = json.loads((folder / "config.json").read_text())
    family = registry.find(about)
    config, head = family.config.from_hf(about), "classifier" if name == "bert" else "causal-lm"
    table = family.names(config, head=head, scan_layers=scan_layers)
    labels = {"num_labels": 3} if head == "classifier" else {}
    model = family.models[head](config, scan_layers=scan_layers, dtype=jnp.dtype(dtype), **labels)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *family.inputs(head))["params"]
    state = fuse(safetensors.numpy.load_file(folder / "model.safetensors"))
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


def check_gradients(fn, params, adapter, config, arrays, table, folder):
    """Gradients are PEFT's; they have the layout of their arrays, and so can be written."""
    grads = gradients(fn, params, adapter, arrays)
    save_peft(folder, params, grads, config, names=table)
    got = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    wanted = {key.removeprefix("grad/"): x for key, x in arrays.items() if key.startswith("grad/")}
    largest = max(np.abs(x).max(initial=0) for x in wanted.values())
    assert set(got) - set(wanted) <= {"base_model.vera_A", "base_model.vera_B"}
    for name, want in wanted.items():
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-5 * largest, err_msg=name)
