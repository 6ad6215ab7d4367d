"""The Llama family: values of transformers (goldens), and properties that hold for any weights."""

import dataclasses
import doctest
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import paths
from lora_jax.models import checkpoints, llama, llama_config, plain_attention, registry, rope
from lora_jax.models.llama_config import LlamaConfig
from lora_jax.models.rope import Rope
from tests.helpers import places, slow

# Made by scripts/make_llama_goldens.py.
GOLDENS = places.GOLDENS / "llama"
CASES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())


@functools.cache
def load(case, scan=False):
    return checkpoints.load(GOLDENS / case, head="causal-lm", scan_layers=scan)


@functools.cache
def golden(case):
    with np.load(GOLDENS / case / "golden.npz") as file:
        return dict(file)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, *args, **options):
    return model.apply(params, *args, **options)


@pytest.mark.parametrize("module", [plain_attention, llama, llama_config, rope])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


def test_goldens_cover_what_a_config_may_say():
    configs = [LlamaConfig.from_hf(checkpoints.resolve(GOLDENS / c).config) for c in CASES]
    assert {c.model_type for c in configs} == set(llama_config.VARIANTS)
    assert {c.rope.rope_type for c in configs} == {"default", "linear", "llama3"}
    for field in ("tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window"):
        assert len({bool(getattr(c, field)) for c in configs}) == 2
    for field in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_rope"):
        assert len({getattr(c, field) is None for c in configs}) == 2
    assert any(len(set(c.layer_types)) == 2 for c in configs)
    assert any(c.query_pre_attn_scalar != c.head_dim for c in configs)


SCANNED = [(case, True) for case in ("llama3", "qwen2", "gemma3")]


@pytest.mark.parametrize("case, scan", [*((case, False) for case in CASES), *SCANNED])
def test_logits_equal_transformers(case, scan):
    values = golden(case)
    loaded = load(case, scan)
    assert loaded.fresh == ()
    logits = run(loaded.model, loaded.params, values["input_ids"], values["attention_mask"])
    assert np.abs(values["logits"]).max() > 0.1
    real = values["attention_mask"] > 0
    np.testing.assert_allclose(logits[real], values["logits"][real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["llama3", "gemma3"])
def test_bfloat16_computes_near_float32_and_keeps_parameters(case):
    values = golden(case)
    loaded = load(case)
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.float32)}
    model = loaded.model.clone(dtype=jnp.bfloat16)
    logits = run(model, loaded.params, values["input_ids"], values["attention_mask"])
    assert logits.dtype == jnp.float32
    real = values["attention_mask"] > 0
    # bfloat16 has 8 bits; errors of 2^-8 on values of a few units add up over the layers.
    error = np.abs(logits[real] - values["logits"][real]).max()
    assert 0 < error < 0.05 * np.abs(values["logits"]).max()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_table_is_a_bijection_onto_the_tree(case, scan):
    config = load(case).model.config
    model = llama.LlamaForCausalLM(config, scan_layers=scan)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    leaves = paths.named_leaves(jax.eval_shape(model.init, jax.random.key(0), ids)["params"])
    rows = llama.names(config, scan_layers=scan)
    assert sorted(row.flax for row in rows) == sorted(leaves)
    assert len({row.hf for row in rows}) == len(rows)
    assert {row.flax for row in rows if row.transpose} == {n for n in leaves if "kernel" in n}


@pytest.mark.parametrize(
    "case, scan",
    slow.after(2, [("llama3", True), ("gemma3", False), ("mistral", False), ("gemma3", True)]),
)
def test_a_cache_gives_the_same_logits(case, scan):
    """Five tokens at once, then the others one by one; a row is padded on the left."""
    loaded = load(case, scan)
    config = loaded.model.config
    ids = golden(case)["input_ids"]
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    whole = run(loaded.model, loaded.params, ids, mask)
    slots = np.concatenate([mask, np.ones((4, 2), int)], 1)  # two more than are filled
    cache = llama.init_cache(config, 4, slots.shape[1], scan_layers=scan)
    parts = []
    for k in (0, 5, 6, 7, 8):
        piece = ids[:, : 5 if k == 0 else k + 1][:, k:]
        logits, cache = run(loaded.model, loaded.params, piece, slots, None, cache)
        parts.append(logits)
    assert int(cache.index) == ids.shape[1]
    # Sums over another number of keys may be taken in another order.
    found = np.concatenate(parts, 1)[mask > 0]
    np.testing.assert_allclose(found, whole[mask > 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["llama3", "gemma2"])
def test_texts_in_one_row_do_not_see_each_other(case):
    loaded = load(case)
    ids = golden(case)["input_ids"][:2]
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3], [1, 1, 2, 2, 2, 2, 2, 2, 0]])
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 0]])
    packed = run(
        loaded.model, loaded.params, ids, segments > 0, positions, segment_ids=jnp.array(segments)
    )
    alone = np.zeros((5, 6), int)
    places = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]
    for k, (row, segment) in enumerate(places):
        text = ids[row][segments[row] == segment]
        alone[k, : len(text)] = text
    logits = run(loaded.model, loaded.params, alone)
    for k, (row, segment) in enumerate(places):
        own = packed[row][segments[row] == segment]
        np.testing.assert_allclose(own, logits[k, : len(own)], rtol=0, atol=1e-5)


def test_padding_on_the_left_changes_nothing():
    loaded = load("gemma3")
    ids = golden("gemma3")["input_ids"]
    pad = lambda x: np.pad(x, ((0, 0), (4, 0)))
    whole = run(loaded.model, loaded.params, ids)
    padded = run(loaded.model, loaded.params, pad(ids), pad(np.ones_like(ids)))
    np.testing.assert_allclose(padded[:, 4:], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case, scan", slow.after(1, [("qwen3", False), ("gemma3", True)]))
def test_every_kernel_stays_factored(case, scan):
    loaded = load(case, scan)
    ids = golden(case)["input_ids"]
    config = lora.LoRAConfig(rank=2, alpha=4.0, targets=("all-linear",))
    apply = loaded.model.apply
    adapter = lora.init(jax.random.key(0), apply, loaded.params, config, ids)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    lifted = jax.jit(lora.lift(apply, strict=True))(lora.bind(loaded.params, adapter), ids)
    merged = run(loaded.model, lora.merge(loaded.params, adapter), ids)
    assert np.abs(merged - run(loaded.model, loaded.params, ids)).max() > 0.1
    # Two roundings of float32 sums whose terms are as large as the weights' change.
    np.testing.assert_allclose(lifted, merged, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_dropout_of_the_attention_weights():
    config = dataclasses.replace(load("llama3").model.config, attention_dropout=0.5)
    model, params = llama.LlamaForCausalLM(config), load("llama3").params
    ids = golden("llama3")["input_ids"]
    train = jax.jit(
        lambda seed: model.apply(
            params, ids, deterministic=False, rngs={"dropout": jax.random.key(seed)}
        )
    )
    assert np.abs(train(1) - train(2)).max() > 1e-3
    np.testing.assert_array_equal(run(model, params, ids), run(load("llama3").model, params, ids))


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip(case):
    config = load(case).model.config
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize("words", [
    {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
    {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
])  # fmt: skip
def test_rope_in_the_words_of_both_generations(words):
    config = LlamaConfig.from_hf({"model_type": "llama"} | words)
    assert config.rope == Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)


def test_rope_of_gemma_in_the_words_of_both_generations():
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4} | {
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}
    }
    new = {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }}  # fmt: skip
    read = lambda words: LlamaConfig.from_hf({"model_type": "gemma3_text"} | words)
    assert read(old) == read(new)
    assert (read(old).rope, read(old).sliding_rope) == (Rope(1e6, "linear", 8.0), Rope(1e4))
    assert (read({}).rope, read({}).sliding_rope) == (Rope(1e6), Rope(1e4))


def test_layers_with_a_window():
    kinds = lambda **words: [
        kind.partition("_")[0] for kind in LlamaConfig.from_hf(words).layer_types
    ]
    four = {"num_hidden_layers": 4}
    assert set(kinds(model_type="llama", sliding_window=9)) == {"full"}
    assert set(kinds(model_type="mistral")) == {"sliding"}
    assert set(kinds(model_type="mistral", sliding_window=None)) == {"full"}
    assert set(kinds(model_type="qwen2", max_window_layers=0)) == {"full"}
    window = {"use_sliding_window": True, "max_window_layers": 3}
    assert kinds(model_type="qwen3", **four, **window) == ["full"] * 3 + ["sliding"]
    assert kinds(model_type="gemma2", **four) == ["sliding", "full"] * 2
    assert kinds(model_type="gemma3_text", num_hidden_layers=7)[5:] == ["full", "sliding"]
    assert kinds(model_type="gemma3_text", sliding_window_pattern=2, **four) == (
        ["sliding", "full"] * 2
    )


@pytest.mark.parametrize("words, message", [
    ({"model_type": "gpt_neox"}, "model_type is 'gpt_neox'.*'llama'"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is not built.*llama3"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs factor"),
    ({"rope_parameters": LLAMA3 | {"factor": -1}}, "factor in the rope parameters.*-1"),
    ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4}}, "low_freq_factor 4.*less than"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"hidden_act": "mish"}, "hidden_act 'mish' is not one of"),
    ({"num_key_value_heads": 5}, "num_attention_heads 32 does not divide.*5"),
    ({"head_dim": 7}, "head_dim must be even.*7"),
    ({"vocab_size": 0}, "vocab_size must be a whole number"),
    ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"model_type": "gemma2", "sliding_window": None, "layer_types": ["sliding_attention"] * 26},
     "there is no sliding_window"),
    ({"model_type": "gemma3_text", "layer_types": ["chunked_attention"] * 26}, "layer_types must"),
    ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 3.0}}, "rope_parameters must"),
    ({"model_type": "gemma2", "final_logit_softcapping": 0.0}, "final_logit_softcapping.*0.0"),
])  # fmt: skip
def test_bad_configs(words, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf({"model_type": "llama"} | words)


def test_what_another_model_type_has_is_no_field_of_this_one():
    with pytest.raises(ValueError, match="type 'mistral' has no mlp_bias"):
        LlamaConfig(model_type="mistral", mlp_bias=True)
    with pytest.raises(ValueError, match="type 'llama' has no sliding_window"):
        LlamaConfig(sliding_window=3)


@pytest.mark.parametrize("options, message", [
    ({"attention_mask": np.ones((2, 4), int)}, "attention_mask one entry for each"),
    ({"positions": np.ones((1, 3), int)}, "positions must have the shape"),
    ({"segment_ids": np.ones((2, 4), int)}, "segment_ids must have the shape"),
])  # fmt: skip
def test_bad_inputs(options, message):
    loaded = load("llama3")
    with pytest.raises(ValueError, match=message):
        loaded.model.apply(loaded.params, np.zeros((2, 3), int), **options)


def test_segments_and_a_cache_do_not_go_together():
    loaded = load("llama3")
    cache = llama.init_cache(loaded.model.config, 2, 5)
    ids = np.zeros((2, 3), int)
    with pytest.raises(ValueError, match="there is a cache"):
        loaded.model.apply(loaded.params, ids, None, None, cache, segment_ids=ids)


def test_rotation_by_hand():
    """Pair i of position p turns by p·theta^(-2i/d), as complex numbers do."""
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 6)).astype(np.float32)
    cos, sin = rope.compute_angles(Rope(rope_theta=50.0), jnp.arange(5)[None], 6)
    turn = np.exp(1j * np.arange(5)[:, None] * 50.0 ** (-np.arange(3) / 3))
    turned = (x[..., :3] + 1j * x[..., 3:]) * turn[None, :, None, :]
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(rope.rotate(jnp.array(x), cos, sin), expected, atol=1e-6)


def test_llama3_frequencies():
    """High ones stay, low ones are divided, and between the two bounds they blend."""
    plain = rope.compute_frequencies(Rope(5e5), 128)
    scaled = rope.compute_frequencies(Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192), 128)
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.sum() > 3
    assert np.all((scaled < plain) & (scaled > plain / 8) == between)


def test_groups_of_queries_share_keys():
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, 5, heads, 4)) for i, heads in enumerate((6, 2, 2))
    )
    bias = jnp.where(jnp.tril(jnp.ones((5, 5))) > 0, 0.0, -1e9)[None, None]
    many = lambda x: jnp.repeat(x, 3, axis=2)
    for options in ({}, {"scale": 0.3, "softcap": 2.0}):
        found = plain_attention.attend(q, k, v, bias, **options)
        expected = plain_attention.attend(q, many(k), many(v), bias, **options)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_registry_knows_all_model_types():
    for kind, variant in llama_config.VARIANTS.items():
        family = registry.find({"model_type": kind})
        assert family.architectures["causal-lm"] == variant.architecture


# Sizes from the models' own config.json, and the counts that their authors give.
MODELS = {
    "Llama 3 8B": (8_030_261_248, dict(
        model_type="llama", vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)),
    "Llama 3.2 1B": (1_235_814_400, dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=16, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True)),
    "Mistral 7B": (7_241_732_096, dict(model_type="mistral")),
    "Qwen2.5 0.5B": (494_032_768, dict(
        model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)),
    "Qwen3 0.6B": (596_049_920, dict(
        model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True)),
    "Gemma 2 2B": (2_614_341_888, dict(model_type="gemma2")),
    "Gemma 3 1B": (999_885_952, dict(
        model_type="gemma3_text", vocab_size=262144, hidden_size=1152, intermediate_size=6912,
        num_attention_heads=4, num_key_value_heads=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MODELS))
def test_parameter_counts_of_published_models(name):
    count, words = MODELS[name]
    model = llama.LlamaForCausalLM(LlamaConfig.from_hf(words), scan_layers=True)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count
