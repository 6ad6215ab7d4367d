"""The GPT-2 model: values of transformers (goldens), and properties that hold for any weights."""

import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import names, paths
from lora_jax.models import checkpoints, gpt2, kv_cache
from tests.helpers import places, slow

# Made by scripts/make_gpt2_goldens.py.
GOLDENS = places.GOLDENS / "gpt2"
CASES = ("plain", "odd")


@functools.cache
def golden(case):
    with np.load(GOLDENS / case / "golden.npz") as file:
        values = dict(file)
    return [jnp.asarray(values[k]) for k in ("input_ids", "attention_mask")], values["logits"]


@functools.cache
def load(case, scan_layers=False):
    loaded = checkpoints.load(GOLDENS / case, head="causal-lm", scan_layers=scan_layers)
    assert loaded.fresh == ()
    return loaded


def model_of(case, scan_layers=False):
    loaded = load(case, scan_layers)
    return loaded.model, loaded.params


# Whole programs: operation by operation, compiling takes ten times as long.
@functools.partial(jax.jit, static_argnums=0, static_argnames="deterministic")
def run(model, params, *args, **options):
    return model.apply(params, *args, **options)


def test_doctests():
    assert doctest.testmod(gpt2).failed == 0


def test_goldens_cover_what_a_config_may_change():
    one, two = (load(case).model.config for case in CASES)
    assert one.tie_word_embeddings and not two.tie_word_embeddings
    assert one.scale_attn_weights and not two.scale_attn_weights
    assert two.scale_attn_by_inverse_layer_idx and not one.scale_attn_by_inverse_layer_idx
    assert one.n_inner is None and two.n_inner != 4 * two.n_embd
    assert one.activation_function != two.activation_function


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, scan_layers):
    (ids, mask), expected = golden(case)
    logits = run(*model_of(case, scan_layers), ids, mask)
    real = mask > 0
    assert np.abs(expected[real]).max() > 1 and not real[:, 0].all()
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=1e-5)


def test_bfloat16_computes_near_float32_and_keeps_parameters():
    (ids, mask), expected = golden("plain")
    loaded = checkpoints.load(GOLDENS / "plain", head="causal-lm", dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.float32)}
    logits = run(loaded.model, loaded.params, ids, mask)
    assert logits.dtype == jnp.float32
    # bfloat16 has 8 bits; errors of 2^-8 on values of about 1 add up over a few layers.
    real, scale = mask > 0, np.abs(expected).max()
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=0.05 * scale)


@pytest.mark.parametrize("scan_layers", slow.after(1, [True, False]))
@pytest.mark.parametrize("pieces", [(9,), (4, 1, 1, 3)])
def test_with_a_cache_the_logits_are_the_same(scan_layers, pieces):
    (ids, mask), _ = golden("odd")
    model, params = model_of("odd", scan_layers)
    cache = gpt2.init_cache(model.config, 4, 11, scan_layers=scan_layers)
    slots = jnp.pad(mask, ((0, 0), (0, 2)), constant_values=1)
    parts, done = [], 0
    for n in pieces:
        logits, cache = run(model, params, ids[:, done : done + n], slots, cache=cache)
        parts.append(logits)
        done += n
    assert int(cache.index) == 9 and kv_cache.count_slots(cache) == 11
    real = mask > 0
    # Sums over more keys may be taken in another order.
    whole = run(model, params, ids, mask)
    np.testing.assert_allclose(jnp.concatenate(parts, 1)[real], whole[real], rtol=0, atol=1e-5)


def test_a_token_sees_nothing_after_it_and_no_padding():
    (ids, mask), _ = golden("plain")
    model, params = model_of("plain")
    logits = run(model, params, ids, mask)
    later = ids.at[:, 6:].set((ids[:, 6:] + 1) % 30)
    after = run(model, params, later, mask)
    real = mask > 0
    np.testing.assert_array_equal(after[:, :6][real[:, :6]], logits[:, :6][real[:, :6]])
    assert np.abs(after[:, 6:] - logits[:, 6:]).max() > 0.1
    other = run(model, params, jnp.where(real, ids, 7), mask)
    np.testing.assert_array_equal(other[real], logits[real])
    alone = run(model, params, ids[1:2, 4:])  # as if there were no padding
    np.testing.assert_allclose(alone[0], logits[1, 4:], rtol=0, atol=1e-5)


def test_given_positions_are_used():
    (ids, mask), expected = golden("plain")
    places = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    model, params = model_of("plain")
    real = mask > 0
    logits = run(model, params, ids, mask, places)
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=1e-5)
    assert np.abs(run(model, params, ids, mask, places + 1) - logits).max() > 0.1


SIZES = {
    "small": (768, 12, 12, 124_439_808),
    "medium": (1024, 24, 16, 354_823_168),
    "large": (1280, 36, 20, 774_030_080),
    "xl": (1600, 48, 25, 1_557_611_200),
}


@pytest.mark.parametrize("size", list(SIZES))
def test_parameter_counts(size):
    width, layers, heads, count = SIZES[size]
    config = gpt2.GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
    model = gpt2.GPT2LMHeadModel(config, scan_layers=True)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_table_is_a_bijection_onto_tree_and_checkpoint(case, scan_layers):
    model, params = model_of(case, scan_layers)
    leaves = paths.named_leaves(params["params"])
    table = gpt2.names(model.config, head="causal-lm", scan_layers=scan_layers)
    assert sorted(row.flax for row in table) == sorted(leaves)
    stored = set(safetensors.numpy.load_file(GOLDENS / case / "model.safetensors"))
    found = [w.hf for w in names.weights(table, leaves)]
    assert len(set(found)) == len(found) and set(found) >= stored
    assert set(found) - stored == ({"lm_head.weight"} if case == "plain" else set())
    assert {row.hf for row in table if row.transpose} <= {"lm_head.weight"}
    kernels = [w for w in names.weights(table, leaves) if w.hf.endswith("c_attn.weight")]
    assert kernels and all(names.is_conv1d(w) for w in kernels)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_bare_backbone_and_old_buffers_are_read(tmp_path, scan_layers):
    """The layout of the models on the Hub: no prefix, and a mask in each layer."""
    tensors = safetensors.numpy.load_file(GOLDENS / "plain" / "model.safetensors")
    bare = {n.removeprefix("transformer."): x for n, x in tensors.items()}
    bare |= {f"h.{k}.attn.bias": np.tri(4, dtype=np.float32) for k in range(2)}
    safetensors.numpy.save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GOLDENS / "plain" / "config.json").read_bytes())
    loaded = checkpoints.load(tmp_path, head="causal-lm", scan_layers=scan_layers)
    same = lambda x, y: np.testing.assert_array_equal(x, y)
    jax.tree.map(same, loaded.params, load("plain", scan_layers).params)


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_what_was_read(case, tmp_path):
    loaded = load(case, True)
    checkpoints.save_hf(tmp_path, loaded.params, loaded.checkpoint, head="causal-lm")
    ours, theirs = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (tmp_path, GOLDENS / case)
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])


@pytest.mark.parametrize("scan_layers", slow.after(1, [True, False]))
@pytest.mark.parametrize("targets", ["c_attn", "all-linear", "wte"])
def test_adapted_kernels_stay_factored(scan_layers, targets):
    (ids, mask), _ = golden("plain")
    loaded = load("plain", scan_layers)
    config = lora.LoRAConfig(rank=2, targets=(targets,))
    adapter = lora.init(jax.random.key(0), loaded.model.apply, loaded.params, config, ids, mask)
    kinds = {name.rpartition("/")[0].rpartition("/")[2] for name in adapters.nodes(adapter)}
    assert loaded.family.targets == ("c_attn",)
    if targets == "all-linear":
        assert kinds >= {"c_attn", "c_proj", "c_fc"}
    else:
        assert kinds == {targets}
    strict = lora.lift(loaded.model.apply, strict=True)
    adapter = jax.tree.map(lambda x: x + 0.1 if x.ndim else x, adapter)
    lifted = jax.jit(strict)(lora.bind(loaded.params, adapter), ids, mask)
    merged = run(loaded.model, lora.merge(loaded.params, adapter), ids, mask)
    np.testing.assert_allclose(lifted, merged, rtol=1e-4, atol=1e-4)


RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@pytest.mark.parametrize("rate", RATES)
def test_each_dropout_acts_while_training_only(rate):
    (ids, mask), _ = golden("plain")
    model, params = model_of("plain")
    config = dataclasses.replace(model.config, **(dict.fromkeys(RATES, 0.0) | {rate: 0.5}))
    model = model.clone(config=config)
    train = lambda seed: run(
        model, params, ids, mask, deterministic=False, rngs={"dropout": jax.random.key(seed)}
    )
    assert np.abs(train(1) - train(2)).max() > 1e-3
    np.testing.assert_array_equal(run(model, params, ids, mask), run(*model_of("plain"), ids, mask))


def test_initial_values_follow_the_config():
    config = gpt2.GPT2Config(vocab_size=500, n_embd=96, n_layer=8, initializer_range=0.03)
    model = gpt2.GPT2LMHeadModel(config, scan_layers=True)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    layers = params["transformer"]["h"]
    # At least 48,000 draws: the relative error of the estimate is about 0.3%.
    np.testing.assert_allclose(params["transformer"]["wte"]["embedding"].std(), 0.03, rtol=0.02)
    np.testing.assert_allclose(layers["attn"]["c_attn"]["kernel"].std(), 0.03, rtol=0.02)
    np.testing.assert_allclose(layers["mlp"]["c_proj"]["kernel"].std(), 0.03 / 4, rtol=0.02)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.zeros((1, 25), int),), "25 tokens.*positions for 24"),
        ((np.zeros((2, 3), int), np.ones((2, 4), int)), "one entry for each"),
        ((np.zeros(3, int),), r"\(batch, n\)"),
        ((np.zeros((2, 3), int), None, np.zeros((2, 2), int)), "positions must have the shape"),
    ],
)
def test_bad_inputs(args, message):
    with pytest.raises(ValueError, match=message):
        run(*model_of("plain"), *args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "mish"}, "activation_function 'mish' is not one of.*gelu_new"),
        ({"n_head": 5}, "n_embd 768 does not divide.*5"),
        ({"n_inner": 0}, "n_inner must be a whole number"),
        ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo'"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"attn_pdrop": 1.5}, "attn_pdrop.*1.5"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        gpt2.GPT2Config.from_hf({"model_type": "gpt2"} | changes)


def test_config_round_trip():
    config = gpt2.GPT2Config(n_inner=50, tie_word_embeddings=False, scale_attn_weights=False)
    assert gpt2.GPT2Config.from_hf(config.to_hf()) == config
