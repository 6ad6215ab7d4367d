"""The BERT model: values of transformers (goldens), and properties that hold for any weights."""

import dataclasses
import doctest
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import paths
from lora_jax.models import bert, checkpoints, layers, registry, tables
from lora_jax.models.layers import ACTIVATIONS
from tests.helpers import places, slow

# Made by scripts/make_bert_goldens.py.
GOLDENS = places.GOLDENS / "bert"
CASES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
TINY = bert.BertConfig(
    vocab_size=30,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=10,
    initializer_range=0.5,
)
# One layer of the two, which compiles faster.
NO_DROPOUT = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_hidden_layers": 1,
}


@functools.cache
def inputs(lengths=(6, 3), length=6):
    ids = jax.random.randint(jax.random.key(1), (len(lengths), length), 0, TINY.vocab_size)
    mask = (jnp.arange(length)[None, :] < jnp.array(lengths)[:, None]).astype(jnp.int32)
    return ids, mask


def tiny(**changes):
    return bert.BertForSequenceClassification(dataclasses.replace(TINY, **changes)), tiny_params()


@functools.cache
def tiny_params():
    return jax.jit(bert.BertForSequenceClassification(TINY).init)(jax.random.key(0), *inputs())


# Whole programs: operation by operation, compiling takes ten times as long.
@functools.partial(jax.jit, static_argnums=0, static_argnames="deterministic")
def run(model, params, *args, **options):
    return model.apply(params, *args, **options)


def golden(case):
    with np.load(GOLDENS / case / "golden.npz") as file:
        values = dict(file)
    args = [values[k] for k in ("input_ids", "attention_mask", "token_type_ids")]
    return args, values


@pytest.mark.parametrize("module", [bert, layers, registry, tables])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


def test_goldens_cover_what_a_config_may_change():
    configs = [checkpoints.resolve(GOLDENS / case).config for case in CASES]
    assert {c["hidden_act"] for c in configs} == {"gelu", "gelu_new", "relu"}
    assert len({c["layer_norm_eps"] for c in configs}) > 1
    assert {len(c.get("id2label", "01")) for c in configs} == {2, 3}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    args, values = golden(case)
    loaded = checkpoints.load(
        GOLDENS / case, head="classifier", num_labels=values["logits"].shape[1]
    )
    assert loaded.fresh == ()
    logits = run(loaded.model, loaded.params, *args)
    assert np.abs(values["logits"]).max() > 0.1
    np.testing.assert_allclose(logits, values["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", slow.after(1, CASES))
def test_scanned_layers_compute_the_same(case):
    args, values = golden(case)
    labels = values["logits"].shape[1]
    loaded = checkpoints.load(
        GOLDENS / case, head="classifier", num_labels=labels, scan_layers=True
    )
    logits = run(loaded.model, loaded.params, *args)
    np.testing.assert_allclose(logits, values["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_encoder_alone_equals_transformers(case):
    (ids, mask, types), values = golden(case)
    loaded = checkpoints.load(
        GOLDENS / case, head="classifier", num_labels=values["logits"].shape[1]
    )
    encoder = bert.BertModel(loaded.model.config)
    params = {"params": loaded.params["params"]["bert"]}
    hidden, pooled = run(encoder, params, ids, mask, types)
    # At padding, too, where the position attends to the real tokens as everywhere.
    np.testing.assert_allclose(hidden, values["hidden"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(pooled, values["pooled"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", slow.after(1, CASES))
def test_bfloat16_computes_near_float32_and_keeps_parameters(case):
    args, values = golden(case)
    labels = values["logits"].shape[1]
    loaded = checkpoints.load(
        GOLDENS / case, head="classifier", num_labels=labels, dtype=jnp.bfloat16
    )
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.float32)}
    logits = run(loaded.model, loaded.params, *args)
    assert logits.dtype == jnp.float32
    # bfloat16 has 8 bits; errors of 2^-8 on values of about 1 add up over a few layers.
    scale = np.abs(values["logits"]).max()
    np.testing.assert_allclose(logits, values["logits"], rtol=0, atol=0.05 * max(scale, 1.0))
    assert not np.array_equal(logits, values["logits"])


def test_parameter_count_of_bert_base():
    config = bert.BertConfig()
    model = bert.BertForSequenceClassification(config, num_labels=2)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids, ids)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 109_483_778


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("head", ["classifier", "encoder"])
def test_table_is_a_bijection_onto_the_tree(head, scan):
    model = bert.FAMILY.models[head](TINY, scan_layers=scan)
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs())
    leaves = paths.named_leaves(variables["params"])
    rows = bert.names(TINY, head=head, scan_layers=scan)
    assert sorted(row.flax for row in rows) == sorted(leaves)
    assert len({row.hf for row in rows}) == len(rows)
    assert {row.flax for row in rows if row.transpose} == {n for n in leaves if "kernel" in n}


def test_standard_names():
    layer = tiny()[1]["params"]["bert"]["encoder"]["layer_1"]
    assert set(layer) == {"attention", "intermediate", "output"}
    assert set(layer["attention"]) == {"query", "key", "value", "output"}
    assert layer["intermediate"]["dense"]["kernel"].shape == (8, 12)
    assert layer["output"]["dense"]["kernel"].shape == (12, 8)
    assert set(layer["attention"]["output"]) == {"dense", "LayerNorm"}


def test_initial_values_follow_the_config():
    config = bert.BertConfig(vocab_size=1000, num_hidden_layers=1, initializer_range=0.03)
    init = jax.jit(bert.BertForSequenceClassification(config).init)
    params = init(jax.random.key(0), *inputs())["params"]
    layer = params["bert"]["encoder"]["layer_0"]
    # At least 768,000 draws: the relative error of the estimate is about 0.1%.
    np.testing.assert_allclose(layer["intermediate"]["dense"]["kernel"].std(), 0.03, rtol=0.01)
    embeddings = params["bert"]["embeddings"]["word_embeddings"]["embedding"]
    np.testing.assert_allclose(embeddings.std(), 0.03, rtol=0.01)
    np.testing.assert_array_equal(params["classifier"]["bias"], np.zeros(2))


def test_what_stands_at_padding_does_not_matter():
    model, params = tiny()
    ids, mask = inputs()
    other = jnp.where(mask == 1, ids, (ids + 7) % TINY.vocab_size)
    np.testing.assert_array_equal(run(model, params, ids, mask), run(model, params, other, mask))
    whole = run(model, params, other, jnp.ones_like(mask))
    assert np.abs(run(model, params, ids, mask) - whole)[1].max() > 1e-3


def test_longer_padding_does_not_matter():
    model, params = tiny()
    ids, mask = inputs()
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 3)))
    # Sums over another length may be taken in another order.
    np.testing.assert_allclose(
        run(model, params, pad(ids), pad(mask)), run(model, params, ids, mask), atol=2e-6
    )


def test_masks_of_other_dtypes_mean_the_same():
    model, params = tiny()
    ids, mask = inputs()
    expected = run(model, params, ids, mask)
    for dtype in (jnp.bool_, jnp.float32):
        logits = run(model, params, ids, mask.astype(dtype))
        np.testing.assert_allclose(logits, expected, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_without_tokens_is_finite(dtype):
    model, params = tiny(num_hidden_layers=1)
    ids, mask = inputs(lengths=(6, 0))
    model = model.clone(dtype=dtype)
    loss = lambda params: run(model, params, ids, mask).sum()
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert all(np.isfinite(x).all() for x in [value, *jax.tree.leaves(grads)])


def test_token_types_default_to_zero_and_are_used():
    model, params = tiny()
    ids, mask = inputs()
    without = run(model, params, ids, mask)
    zeros = run(model, params, ids, mask, jnp.zeros_like(ids))
    np.testing.assert_allclose(without, zeros, atol=2e-6)
    assert np.abs(without - run(model, params, ids, mask, jnp.ones_like(ids))).max() > 1e-3


def phi(x):
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-14), ("float32", 1e-6), ("bfloat16", 2e-2)]
)
def test_gelu_is_the_exact_one(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.linspace(-6, 6, 97, dtype=dtype)
        y, back = jax.vjp(ACTIVATIONS["gelu"], x)
        (slope,) = back(jnp.ones_like(y))
        assert y.dtype == slope.dtype == jnp.dtype(dtype)
        x, y, slope = (np.asarray(v, np.float64) for v in (x, y, slope))
    density = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(y, x * phi(x), rtol=0, atol=tolerance)
    np.testing.assert_allclose(slope, phi(x) + x * density, rtol=0, atol=tolerance)


RATES = ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]


@pytest.mark.parametrize("rate", slow.after(1, RATES))
def test_each_dropout_acts_while_training_only(rate):
    model, params = tiny(**(NO_DROPOUT | {"classifier_dropout": 0.0} | {rate: 0.5}))
    train = lambda seed: run(
        model, params, *inputs(), deterministic=False, rngs={"dropout": jax.random.key(seed)}
    )
    assert np.abs(train(1) - train(2)).max() > 1e-3
    plain, _ = tiny(**NO_DROPOUT)
    np.testing.assert_array_equal(run(model, params, *inputs()), run(plain, params, *inputs()))


def test_dropout_of_rate_zero_is_none():
    model, params = tiny(**NO_DROPOUT)
    logits = run(model, params, *inputs(), deterministic=False)
    np.testing.assert_allclose(logits, run(model, params, *inputs()), atol=2e-6)


def test_classifier_dropout_defaults_to_the_hidden_one():
    config = NO_DROPOUT | {"hidden_dropout_prob": 0.5}
    rng = {"dropout": jax.random.key(3)}
    model, params = tiny(**config)
    same, _ = tiny(**config, classifier_dropout=0.5)
    other, _ = tiny(**config, classifier_dropout=0.0)
    apply = lambda m: run(m, params, *inputs(), deterministic=False, rngs=rng)
    np.testing.assert_array_equal(apply(model), apply(same))
    assert np.abs(apply(model) - apply(other)).max() > 1e-3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.zeros((1, 11), int), np.ones((1, 11), int)), "11 tokens.*positions for 10"),
        ((np.zeros((2, 3), int), np.ones((2, 4), int)), "one shape"),
        ((np.zeros(3, int), np.ones(3, int)), r"\(batch, length\)"),
        ((np.zeros((2, 3), int), np.ones((2, 3), int), np.zeros((1, 3), int)), "token_type_ids"),
    ],
)
def test_bad_inputs(args, message):
    model, params = tiny()
    with pytest.raises(ValueError, match=message):
        run(model, params, *args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not one of.*gelu"),
        ({"num_attention_heads": 5}, "hidden_size 768 does not divide.*5"),
        ({"hidden_size": 0}, "hidden_size must be a whole number"),
        ({"vocab_size": "many"}, "vocab_size.*'many'"),
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps.*-1.0"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob.*1.5"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        bert.BertConfig.from_hf({"model_type": "bert"} | changes)


def test_config_round_trip():
    config = dataclasses.replace(TINY, hidden_act="relu", classifier_dropout=0.3)
    assert bert.BertConfig.from_hf(config.to_hf()) == config
    assert bert.BertConfig.from_hf({"model_type": "bert", "unknown": 1}) == bert.BertConfig()
