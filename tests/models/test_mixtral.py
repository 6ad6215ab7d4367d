"""Mixtral: values of transformers (goldens), its experts against one row at a time, its checkpoints."""

import doctest
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import names as tables
from lora_jax.models import checkpoints, mixtral, split_tensors
from lora_jax.models.mixtral import MixtralConfig, MixtralMoE
from lora_jax.peft import load_peft
from tests.helpers import method_goldens, slow
from tests.helpers.comparisons import perturbed

BASE = method_goldens.METHODS / "base" / "mixtral"  # scripts/make_method_goldens.py
SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
    "num_hidden_layers": 1, "num_local_experts": 4, "initializer_range": 0.3,
}  # fmt: skip
CONFIG = MixtralConfig(**SIZES)


def test_doctests():
    assert doctest.testmod(mixtral).failed == 0


@functools.cache
def moe(config=CONFIG, rows=11):
    """Function of (params, x), parameters and x of the block of one layer."""
    module = MixtralMoE(config)
    x = jax.random.normal(jax.random.key(1), (rows, config.hidden_size))
    params = module.init(jax.random.key(0), x)
    return module.apply, params, x


# Routes.


@pytest.mark.parametrize("seed", range(6))
def test_every_row_has_a_place_with_each_of_its_experts(seed):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(1, 9))
    count = int(rng.integers(1, experts + 1))
    rows = int(rng.choice([1, 7, 300]))
    chosen = np.stack([rng.permutation(experts)[:count] for _ in range(rows)])
    if seed == 0:
        chosen[:, 0] = 0  # all to one
    routes = mixtral.make_routes(jnp.asarray(chosen), experts)
    blocks, size = routes.sources.shape
    places = np.asarray(routes.places)
    assert len(np.unique(places)) == places.size and places.max() < blocks * size
    flat = np.asarray(routes.sources).reshape(-1)
    np.testing.assert_array_equal(flat[places], np.arange(rows)[:, None].repeat(count, 1))
    np.testing.assert_array_equal(np.asarray(routes.experts)[places // size], chosen)
    empty = np.setdiff1d(np.arange(blocks * size), places)
    assert np.all(flat[empty] == rows)


def test_blocks_are_about_two_for_each_expert():
    shape = lambda rows, count, experts: (
        mixtral.make_routes(jnp.zeros((rows, count), jnp.int32), experts).sources.shape
    )
    assert shape(1, 2, 8) == (2, 8)  # a token that is generated: no block but those of its experts
    assert shape(4096, 2, 8) == (23, 512)
    assert shape(64, 2, 8) == (23, 8)


def one_by_one(params, x, config):
    """Each row through its experts, in NumPy."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    silu = lambda x: x / (1 + np.exp(-x))
    y = np.zeros_like(x, np.float64)
    for k, row in enumerate(np.asarray(x, np.float64)):
        logits = row @ p["gate"]["kernel"]
        shares = np.exp(logits - logits.max())
        chosen = np.argsort(-shares)[: config.num_experts_per_tok]
        for e in chosen:
            gate, up = np.split(row @ p["experts"]["gate_up_proj"]["kernel"][e], 2)
            weight = shares[e] / shares[chosen].sum()
            y[k] += weight * (silu(gate) * up) @ p["experts"]["down_proj"]["kernel"][e]
    return y


@pytest.mark.parametrize("count", slow.after(1, [2, 4]))
def test_rows_go_through_their_experts(count):
    config = MixtralConfig(**SIZES, num_experts_per_tok=count)
    apply, params, x = moe(config, rows=40)
    y = jax.jit(apply)(params, x)
    np.testing.assert_allclose(y, one_by_one(params, x, config), rtol=0, atol=1e-5)
    mapped = jax.jit(jax.vmap(lambda x: apply(params, x)))(x.reshape(4, 10, -1))
    np.testing.assert_allclose(mapped.reshape(y.shape), y, rtol=0, atol=1e-5)


# Adapters of experts.

METHODS = {
    "lora": {},
    "dora": {"method": "dora"},
    "offset": {"init": "pissa"},
    "lora_fa": {"train_a": False},
    "vera": {"method": "vera"},
    "adalora": {"method": "adalora"},
}


def adapted(fields, params=None, **sizes):
    apply, plain, x = moe(**sizes)
    params = plain if params is None else params
    config = lora.LoRAConfig(rank=2, targets=("experts", "gate"), **fields)
    adapter = perturbed(lora.init(jax.random.key(3), apply, plain, config, x))
    loss = lambda y: jnp.sum(jnp.sin(y))
    lifted = lambda a, p: loss(lora.lift(apply, strict=True)(lora.bind(p, a), x))
    merged = lambda a, p: loss(apply(lora.merge(p, a), x))
    return adapter, params, lifted, merged


def assert_same(got, wanted):
    """In float32, through a softmax, three products and sines of large numbers."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        largest = max(1.0, np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("method", slow.after(1, METHODS))
def test_experts_stay_factored(method):
    adapter, params, lifted, merged = adapted(METHODS[method])
    kernels = adapters.nodes(adapter)
    assert {kernels[f"params/experts/{x}_proj/kernel"].axes for x in ("gate_up", "down")} == {"bio"}
    run = lambda fn: jax.jit(jax.value_and_grad(fn))(adapter, params)
    assert_same(run(lifted), run(merged))


@pytest.mark.slow
def test_adapters_of_a_sweep_share_one_program():
    adapter, params, lifted, _ = adapted({})
    others = [jax.tree.map(lambda x, k=k: x * k, adapter) for k in (1.0, 0.5)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *others)
    grad = jax.grad(lifted)
    together = jax.jit(jax.vmap(lambda a: grad(a, params)))(stack)
    for k, other in enumerate(others):
        assert_same(jax.tree.map(lambda x, k=k: x[k], together), grad(other, params))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nf4", "int4"])
def test_quantized_experts_give_the_same_as_their_numbers(scheme):
    apply, params, x = moe()
    table = lora.tabulate(apply, params, lora.LoRAConfig(targets=("experts",)), x)
    small = lora.quantize(params, scheme, like=table, targets=("experts",), block=8)
    adapter, small, lifted, merged = adapted({}, params=small)
    run = lambda fn, p: jax.jit(jax.value_and_grad(fn))(adapter, p)
    assert_same(run(lifted, small), run(merged, lora.merge(small, {})))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["", "nf4"])
def test_no_pass_keeps_the_kernels_of_more_than_one_block(scheme):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_local_experts": 16}
    wide = MixtralConfig(**SIZES | sizes)
    apply, params, x = moe(wide, rows=64)
    if scheme:
        table = lora.tabulate(apply, params, lora.LoRAConfig(targets=("experts",)), x)
        params = lora.quantize(params, scheme, like=table, targets=("experts",))
    adapter, params, lifted, _ = adapted({}, params=params, config=wide, rows=64)
    step = jax.jit(jax.grad(lifted)).lower(adapter, params).compile()
    kernel = 4 * 256 * 3 * 1024  # bytes of the kernels of one expert
    blocks = len(mixtral.make_routes(jnp.zeros((64, 2), jnp.int32), 16).experts)
    # Activations have about one kernel's size here.
    assert blocks == 30 and step.memory_analysis().temp_size_in_bytes < 3.5 * kernel


# The config.


def test_a_config_is_read_and_written():
    about = json.loads((BASE / "config.json").read_text())
    config = MixtralConfig.from_hf(about)
    assert (config.num_local_experts, config.num_experts_per_tok) == (3, 2)
    assert config.rope.rope_theta == 1e6 and config.sliding_window is None
    assert MixtralConfig.from_hf(config.to_hf()) == config
    windowed = MixtralConfig.from_hf(about | {"sliding_window": 4})
    assert set(windowed.layer_types) == {"sliding_attention"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"output_router_logits": True}, "output_router_logits is True in this config"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1 in this config"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok must be at most 3"),
        ({"num_local_experts": 0}, "num_local_experts must be a whole number of at least 1"),
        ({"model_type": "llama"}, "only 'mixtral' is built here"),
    ],
)  # fmt: skip
def test_what_is_not_built_is_refused_by_name(words, message):
    about = json.loads((BASE / "config.json").read_text()) | words
    with pytest.raises(ValueError, match=message):
        MixtralConfig.from_hf(about)


# Checkpoints.


@pytest.mark.parametrize("scan", slow.after(1, [False, True]))
def test_a_checkpoint_of_single_experts_is_read_and_written(scan, tmp_path):
    loaded = checkpoints.load(BASE, head="causal-lm", scan_layers=scan)
    fn, params, _ = method_goldens.base("mixtral", scan_layers=scan)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    checkpoints.save_hf(tmp_path, loaded.params, loaded.checkpoint, head="causal-lm")
    old, new = (safetensors.numpy.load_file(x / "model.safetensors") for x in (BASE, tmp_path))
    assert set(old) == set(new)
    for name, value in old.items():
        np.testing.assert_array_equal(new[name], value)


def changed(tmp_path, change):
    """A copy of the base whose tensors are changed."""
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    tensors = {n: np.ascontiguousarray(x) for n, x in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def test_experts_in_one_tensor_are_read_too(tmp_path):
    fused = lambda tensors: {
        n: x for n, x in method_goldens.fuse(tensors).items() if "block_sparse_moe" not in n
    }
    loaded = checkpoints.load(changed(tmp_path, fused), head="causal-lm")
    params = checkpoints.load(BASE, head="causal-lm").params
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_a_bare_backbone_is_read(tmp_path):
    bare = lambda tensors: {n.removeprefix("model."): x for n, x in tensors.items()}
    loaded = checkpoints.load(changed(tmp_path, bare), head="causal-lm")
    params = checkpoints.load(BASE, head="causal-lm").params
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


FIRST = "model.layers.0.block_sparse_moe.experts"


def put(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {n: x for n, x in tensors.items() if n != f"{FIRST}.2.w3.weight"},
         rf"{FIRST}.2.w3.weight is missing"),
        (put(f"{FIRST}.1.w1.weight", lambda x: x[:-1]), r"1.w1.weight has shape \(39, 32\) instead"),
        (put(f"{FIRST}.0.w2.weight", lambda x: x * np.float32(np.nan)), "down_proj holds NaN"),
        (put("model.layers.0.mlp.experts.down_proj", np.ones((3, 32, 40), np.float32)),
         "down_proj is there twice, once as"),
        (put(f"{FIRST}.3.w1.weight", np.ones((40, 32), np.float32)), "experts.3.w1.weight is unexp"),
    ],
)  # fmt: skip
def test_damaged_experts_are_told_by_name(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoints.load(changed(tmp_path, change), head="causal-lm")


def test_experts_that_are_quantized_by_themselves_are_refused(tmp_path):
    def to_float8(tensors):
        name = f"{FIRST}.0.w1.weight"
        tensors[name] = tensors[name].astype(jnp.float8_e4m3fn)
        tensors[f"{name}_scale"] = np.ones((40, 1), np.float32)

    folder = changed(tmp_path, to_float8)
    about = json.loads((folder / "config.json").read_text())
    words = {"quantization_config": {"quant_method": "compressed-tensors"}}
    words["quantization_config"]["config_groups"] = {"0": {"weights": {"num_bits": 8}}}
    (folder / "config.json").write_text(json.dumps(about | words))
    with pytest.raises(ValueError, match="quantized, each expert by itself, which is not read"):
        checkpoints.load(folder, head="causal-lm")


@pytest.mark.parametrize("scan", slow.after(1, [False, True]))
def test_merged_experts_are_saved_one_at_a_time(scan, tmp_path):
    loaded = checkpoints.load(BASE, head="causal-lm", scan_layers=scan)
    fn, params, table = method_goldens.base("mixtral", scan_layers=scan)
    adapter, _ = load_peft(method_goldens.METHODS / "experts_mixtral", loaded.params, names=table)
    checkpoints.save_hf(
        tmp_path, loaded.params, loaded.checkpoint, head="causal-lm", adapter=adapter
    )
    again = checkpoints.load(tmp_path, head="causal-lm", scan_layers=scan)
    wanted = lora.merge(loaded.params, adapter)
    for x, y in zip(jax.tree.leaves(again.params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_experts_are_quantized_on_loading():
    loaded = checkpoints.load(BASE, head="causal-lm", quantize="nf4")
    kernel = loaded.params["params"]["model"]["layers_0"]["mlp"]["experts"]["gate_up_proj"]
    assert kernel["kernel"].shape == (3, 32, 80) and kernel["kernel"].codes.shape[0] == 3


def test_pieces_are_the_tensors_of_a_real_checkpoint():
    """The names and shapes of Mixtral-8x7B, from the table alone."""
    config = MixtralConfig.from_hf({"model_type": "mixtral"})
    leaves = {
        "model/layers_0/mlp/experts/gate_up_proj/kernel": np.broadcast_to(0, (8, 4096, 28672))
    }
    (weight,) = tables.weights(mixtral.names(config), leaves)
    pieces = split_tensors.list_pieces(weight)
    assert len(pieces) == 16 and {p.shape for p in pieces} == {(14336, 4096)}
    assert pieces[3].name == "model.layers.0.block_sparse_moe.experts.1.w3.weight"
