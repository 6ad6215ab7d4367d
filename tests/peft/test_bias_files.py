"""Adapted biases in PEFT's files, against what PEFT computes with the same files."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax.methods.bias import AdaptedBias
from lora_jax.models import checkpoints
from lora_jax.peft import load_peft, save_peft
from tests.helpers import places

# Made by scripts/make_token_goldens.py.
GOLDENS = places.GOLDENS / "lora_bias"
HEADS = {"bert": "classifier", "gpt2": "causal-lm"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
every = pytest.mark.parametrize("case", HEADS)


@functools.cache
def base(case, scan=False):
    loaded = checkpoints.load(
        GOLDENS / case / "base", head=HEADS[case], scan_layers=scan, num_labels=3
    )
    return loaded, checkpoints.names(loaded)


@functools.cache
def golden(case):
    with np.load(GOLDENS / case / "io.npz") as file:
        return dict(file)


def read(case, directory=None, scan=False):
    loaded, names = base(case, scan)
    return load_peft(directory or GOLDENS / case, loaded.params, names=names)


def biases(adapter):
    return {n: x for n, x in adapters.nodes(adapter).items() if isinstance(x, AdaptedBias)}


def inputs(case):
    ids = golden(case)["input_ids"]
    return (ids,) if case == "gpt2" else (ids, np.ones_like(ids))


@functools.cache
def run(case, scan=False):
    fn = lora.lift(base(case, scan)[0].model.apply, strict=True)
    return jax.jit(lambda p, a, *args: fn(lora.bind(p, a), *args))


@pytest.mark.parametrize(("case", "scan"), [("bert", False), ("gpt2", False), ("gpt2", True)])
def test_computes_what_peft_computes(case, scan):
    (loaded, _), values = base(case, scan), golden(case)
    adapter, config = read(case, scan=scan)
    assert config.adapt_bias and {x.scale for x in biases(adapter).values()} == {2.0}
    logits = run(case, scan)(loaded.params, adapter, *inputs(case))
    np.testing.assert_allclose(logits, values["logits"], rtol=0, atol=1e-5)


@every
def test_merged_biases_and_gradients_are_those_of_peft(case):
    (loaded, _), values = base(case), golden(case)
    adapter, config = read(case)
    merged = adapters.nodes(lora.merge(loaded.params, adapter))
    is_bias = lambda n: n.startswith("merged/") and n.endswith(".bias") and "classifier" not in n
    of_peft = [x for n, x in values.items() if is_bias(n)]
    for name in biases(adapter):
        assert min(np.abs(merged[name] - x).max() for x in of_peft) <= 1e-6
    loss = lambda a: jnp.sum(values["probe"] * run(case)(loaded.params, a, *inputs(case)))
    grads = jax.grad(loss)(adapter)
    of_peft = [x for n, x in values.items() if n.endswith(".lora_B.bias")]
    assert len(of_peft) == len(biases(adapter))
    for node in biases(grads).values():
        assert min(np.abs(node.beta - x).max() / np.abs(x).max() for x in of_peft) < 1e-5
    made = lora.init(jax.random.key(0), loaded.model.apply, loaded.params, config, *inputs(case))
    assert jax.tree.structure(biases(made)) == jax.tree.structure(biases(adapter))


@every
def test_written_byte_for_byte(case, tmp_path):
    loaded, names = base(case)
    adapter, config = read(case)
    save_peft(tmp_path, loaded.params, adapter, config, names=names)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / file).read_bytes() == (GOLDENS / case / file).read_bytes(), file
    plain = lora.LoRAConfig(rank=4, alpha=8, targets=config.targets)
    task = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM"}[case]
    save_peft(tmp_path, loaded.params, adapter, plain, names=names, task_type=task)
    assert json.loads((tmp_path / CONFIG).read_text())["lora_bias"] is True
    assert (tmp_path / WEIGHTS).read_bytes() == (GOLDENS / case / WEIGHTS).read_bytes()


def test_what_peft_can_not_hold(tmp_path):
    loaded, names = base("gpt2")
    adapter, config = read("gpt2")
    save = lambda adapter: save_peft(tmp_path, loaded.params, adapter, config, names=names)
    layer = adapter["params"]["transformer"]["h_0"]["attn"]["c_attn"]
    without = jax.tree.map(lambda x: x, adapter)
    bias = without["params"]["transformer"]["h_0"]["attn"]["c_attn"].pop("bias")
    with pytest.raises(ValueError, match="h_0/attn/c_attn/bias is not adapted, and other biases"):
        save(without)
    scaled = jax.tree.map(lambda x: x, adapter)
    scaled["params"]["transformer"]["h_0"]["attn"]["c_attn"]["bias"] = AdaptedBias(bias.beta, 3.0)
    with pytest.raises(ValueError, match="c_attn/bias has another scale than the kernel"):
        save(scaled)
    assert layer["bias"].scale == 2.0


def test_a_model_without_biases_is_refused_by_name(tmp_path):
    """PEFT adds a bias there that it can't merge, after it has changed the weight."""
    folder = places.GOLDENS / "tokens" / "llama"
    loaded = checkpoints.load(folder / "base", head="causal-lm")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    words = json.loads((folder / CONFIG).read_text()) | {"lora_bias": True}
    (tmp_path / CONFIG).write_text(json.dumps(words))
    names = checkpoints.names(loaded)
    with pytest.raises(ValueError, match=r"lora_bias is true, and model.layers.0.self_attn.q_proj"):
        load_peft(tmp_path, loaded.params, names=names)
    config = lora.LoRAConfig(targets=("q_proj",), adapt_bias=True)
    ids = np.zeros((1, 3), np.int32)
    with pytest.raises(ValueError, match=r"self_attn/q_proj/kernel has no leaf 'bias'"):
        lora.init(jax.random.key(0), loaded.model.apply, loaded.params, config, ids)
