"""Attention block by block against the program that writes its scores, and how one is chosen."""

import dataclasses
import doctest
import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax.test_util import check_grads

import lora_jax as lora
from configs import common
from lora_jax.models import (
    attention,
    attention_blocks,
    attention_mask,
    blockwise_attention,
    checkpoints,
    cudnn_attention,
    plain_attention,
    relative_positions,
)
from lora_jax.models.attention import Case, Heads
from lora_jax.models.attention_blocks import Scoring
from lora_jax.models.attention_mask import Mask, Slots
from lora_jax.models.relative_positions import RelativeBias
from lora_jax.training import training_config, workdirs
from tests.helpers import places

MODULES = (attention, attention_blocks, attention_mask, blockwise_attention, relative_positions)


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


BATCH, WIDTH, BLOCK = 2, 4, 4
# Sizes: queries, keys, heads of queries, heads of keys; and which parts the mask has.
CASES = {
    "padding": ((5, 11, 2, 2), {"is_token"}),
    "nothing": ((6, 9, 2, 1), {}),
    "causal": ((13, 13, 2, 2), {"is_token", "causal"}),
    "cache": ((3, 14, 4, 2), {"is_token", "causal", "start"}),
    "window": ((12, 12, 4, 1), {"is_token", "causal", "window"}),
    "window of some layers": ((10, 10, 2, 2), {"causal", "window", "is_windowed"}),
    "segments": ((13, 13, 4, 2), {"is_token", "causal", "segments", "softcap"}),
    "everything": (
        (11, 11, 4, 2),
        {"is_token", "causal", "segments", "softcap", "window", "is_windowed", "bias"},
    ),
    "relative": ((7, 9, 3, 3), {"is_token", "bias"}),
}


def make_mask(name, is_token, segments, start, is_windowed):
    (n, m, *_), parts = CASES[name]
    has = lambda part, value: value if part in parts else None
    numbers = has("segments", segments)
    return Mask(
        queries=Slots(start * ("start" in parts) + jnp.arange(n), None, numbers),
        keys=Slots(jnp.arange(m), has("is_token", is_token), numbers),
        causal="causal" in parts,
        window=has("window", 4),
        is_windowed=has("is_windowed", is_windowed),
    )


def attend_whole(query, key, value, mask, scoring):
    terms = 0.0
    if scoring.bias is not None:
        terms = relative_positions.make_relative_bias(
            scoring.bias, mask.queries.index, mask.keys.index
        )[None]
    bias, heads, groups = attention_mask.make_bias(mask, terms), query.shape[2], key.shape[2]
    if scoring.bias is not None:  # a bias for each head takes as many heads of keys
        key, value = (jnp.repeat(x, heads // groups, axis=2) for x in (key, value))
    options = {"scale": scoring.scale, "softcap": scoring.softcap}
    return plain_attention.attend(query, key, value, bias, **options)


@functools.cache
def make_pull(name):
    """Results and gradients of both, of arrays, a gradient, and what the mask is made of."""
    parts = CASES[name][1]

    @jax.jit
    def pull(arrays, gradient, values, *of_mask):
        mask = make_mask(name, *of_mask)
        sees = attention_mask.make_allowed(mask, mask.queries, mask.keys).any(-1)[..., None, None]
        first = 1 - CASES[name][0][0]

        def run(attend, query, key, value, values):
            bias = RelativeBias(values, first) if "bias" in parts else None
            scoring = Scoring(0.4, 1.5 if "softcap" in parts else None, bias)
            return jnp.where(sees, attend(query, key, value, mask, scoring), 0.0)

        by_blocks = functools.partial(blockwise_attention.attend, block=BLOCK)
        found = []
        for attend in (attend_whole, by_blocks):
            y, back = jax.vjp(functools.partial(run, attend), *arrays, values)
            found.append((y, back(gradient)))
        return found

    return pull


def make_arrays(name, seed):
    (n, m, heads, groups), _ = CASES[name]
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    arrays = (draw(BATCH, n, heads, WIDTH), *(draw(BATCH, m, groups, WIDTH) for _ in "kv"))
    return arrays, draw(BATCH, n, heads, WIDTH), draw(heads, n + m - 1)


@strategies.composite
def masks(draw, name):
    """What a mask is made of: any padding, ascending numbers of texts, a place in a cache."""
    (n, m, *_), _ = CASES[name]
    rows = lambda entry, size: strategies.lists(entry, min_size=size, max_size=size)
    is_token = draw(rows(rows(strategies.integers(0, 1), m), BATCH))
    steps = draw(rows(rows(strategies.integers(0, 1), m), BATCH))
    start = draw(strategies.integers(0, m - n))
    return np.array(is_token), np.cumsum(steps, axis=1), start, draw(strategies.booleans())


DEFAULT = ("cache", "everything")  # which between them have every part


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in DEFAULT else pytest.mark.slow) for n in CASES]
)
@hypothesis.given(strategies.data())
@hypothesis.settings(max_examples=15, deadline=None)
def test_values_and_gradients_are_those_of_the_whole(name, data):
    with jax.enable_x64(True):
        arrays = make_arrays(name, data.draw(strategies.integers(0, 9)))
        whole, by_blocks = make_pull(name)(*arrays, *data.draw(masks(name)))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12), by_blocks, whole
        )


def make_plain(n, dtype=jnp.float32, d=8, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    *arrays, gradient = (jax.random.normal(key, (2, n, 4, d), dtype) for key in keys)
    return arrays, gradient


def causal(n):
    return attention_mask.make_causal_mask(jnp.ones((2, n), jnp.int32), jnp.arange(n))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.slow
def test_precision(dtype, tolerance):
    """bfloat16 keeps 8 bits; a few roundings of 2^-9, relative to the largest value of about 5."""
    arrays, gradient = make_plain(20, dtype)
    found = []
    for attend in (functools.partial(blockwise_attention.attend, block=8), attend_whole):
        y, back = jax.vjp(lambda *x: attend(*x, causal(20), Scoring(0.35)), *arrays)  # noqa: B023
        found.append([x.astype(jnp.float32) for x in (y, *back(gradient))])
        assert {x.dtype for x in (y, *back(gradient))} == {jnp.dtype(dtype)}
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient():
    arrays, gradient = make_plain(6)
    mask = attention_mask.make_causal_mask(jnp.array([[0, 0, 1, 1, 1, 1], [0] * 6]), jnp.arange(6))
    attend = lambda *x: blockwise_attention.attend(*x, mask, Scoring(1.0), block=4)
    y, back = jax.vjp(attend, *arrays)
    found = back(gradient)
    assert not y[0, :2].any() and not y[1].any() and y[0, 2:].all()
    assert not any(x[1].any() for x in found) and not found[0][0, :2].any()
    assert all(np.isfinite(x).all() for x in found)


def test_large_scores_do_not_overflow():
    (query, key, value), gradient = make_plain(6)
    attend = lambda *x: blockwise_attention.attend(*x, causal(6), Scoring(1.0), block=4)
    y, back = jax.vjp(attend, 1e4 * query, key, value)
    assert all(np.isfinite(x).all() for x in (y, *back(gradient)))


def test_pairs_of_blocks_that_see_nothing_are_left_out():
    """Those above the diagonal, those before the window, and those of other texts."""
    split = lambda slots, size: attention_blocks._split_slots(slots, size)
    find = lambda mask: attention_mask.find_visible_blocks(
        mask, split(mask.queries, 2), split(mask.keys, 2)
    )
    ones, places = jnp.ones((1, 8), int), jnp.arange(8)
    make = functools.partial(attention_mask.make_causal_mask, ones, places)
    np.testing.assert_array_equal(find(make()), np.tri(4, dtype=bool))
    near = np.tri(4, dtype=bool) & ~np.tri(4, k=-2, dtype=bool)
    np.testing.assert_array_equal(find(make(window=2)), near)
    np.testing.assert_array_equal(find(make(window=2, is_windowed=False)), np.tri(4, dtype=bool))
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 3, 3]])
    np.testing.assert_array_equal(
        find(make(segments=segments)),
        np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    )
    assert find(Mask(queries=Slots(), keys=Slots())) is None


def test_a_window_takes_a_causal_mask():
    with pytest.raises(ValueError, match="The window 3 takes a causal mask"):
        Mask(queries=Slots(), keys=Slots(), window=3)


def dropped_weights(n, rate, key, block):
    """All weights, found by giving each key a value of its own."""
    query, k, _ = make_plain(n)[0]
    value = jnp.broadcast_to(jnp.eye(n)[None, :, None], (2, n, 4, n))
    query, k = (jnp.pad(x, ((0, 0),) * 3 + ((0, n - x.shape[-1]),)) for x in (query, k))
    drop = (rate, key) if rate else None
    return blockwise_attention.attend(
        query, k, value, causal(n), Scoring(0.3), drop=drop, block=block
    ).swapaxes(1, 2)


def test_dropped_weights_are_zero_and_the_others_scaled():
    n, rate = 32, 0.25
    whole = dropped_weights(n, 0.0, None, 16)
    found = dropped_weights(n, rate, jax.random.key(1), 16)
    kept = found != 0
    np.testing.assert_allclose(found, np.where(kept, whole / (1 - rate), 0.0), atol=1e-6)
    seen = np.tri(n, dtype=bool)[None, None]
    share = kept.sum() / (np.broadcast_to(seen, kept.shape)).sum()
    # 4,224 weights: five standard deviations.
    assert abs(share - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / 4224)
    blocks = [kept[..., 16:, :16], kept[..., :16, 16:], kept[..., 16:, 16:]]
    assert not np.array_equal(blocks[0], blocks[2])  # each pair of blocks has its own key


@pytest.mark.slow
def test_gradients_with_dropout_are_those_of_the_same_weights():
    with jax.enable_x64(True):
        arrays, _ = make_plain(6, jnp.float64)
        drop = (0.3, jax.random.key(2))
        attend = lambda *x: blockwise_attention.attend(
            *x, causal(6), Scoring(0.5, 2.0), drop=drop, block=4
        )
        check_grads(jax.jit(attend), arrays, order=1, modes=["rev"])


@pytest.mark.slow
def test_the_second_derivative():
    with jax.enable_x64(True):
        arrays, gradient = make_plain(6, jnp.float64)

        def second(attend):
            f = lambda *x: (attend(*x, causal(6), Scoring(0.5)) * gradient).sum()
            inner = lambda *x: sum(jnp.square(d).sum() for d in jax.grad(f, (0, 1, 2))(*x))
            return jax.jit(jax.grad(inner, (0, 1, 2)))(*arrays)

        by_blocks = second(functools.partial(blockwise_attention.attend, block=4))
        for x, y in zip(by_blocks, second(attend_whole), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11)


def count_bytes(attend, n):
    """XLA's count of the temporary memory of a value and its gradients."""
    loss = lambda *x: attend(*x, causal(n), Scoring(0.1)).sum()
    x = jax.ShapeDtypeStruct((2, n, 4, 64), jnp.float32)
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    return step.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_length():
    """And so far below the scores alone, of 2 x 4 heads: 2.1 GB at 8,192 tokens."""
    short, long = (count_bytes(blockwise_attention.attend, n) for n in (2048, 8192))
    assert long < 4.1 * short
    assert long < 4 * 2 * 4 * 8192**2 / 10


def test_masks_stay_inside_a_scan_over_layers():
    """The gradient of a scan computes ahead what does not depend on the layer, here all masks."""

    def count_bytes(n):
        def layer(x, kernel):
            y = x @ kernel
            return blockwise_attention.attend(y, y, y, causal(n), Scoring(0.1)), None

        loss = lambda kernels, x: jax.lax.scan(layer, x, kernels)[0].sum()
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 16, 16), (2, n, 4, 16))]
        compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert count_bytes(4096) < 4.1 * count_bytes(1024)


@pytest.mark.slow
def test_memory_at_all_lengths():
    lengths = (512, 1024, 2048, 4096, 8192)
    linear, quadratic = (
        [count_bytes(attend, n) for n in lengths]
        for attend in (blockwise_attention.attend, attend_whole)
    )
    assert all(y < 2.1 * x for x, y in zip(linear[1:], linear[2:], strict=False))
    assert all(y > 3 * x for x, y in zip(quadratic[1:], quadratic[2:], strict=False))


# Checkpoint, head, modules to adapt; a config of Gemma 2 has a window in every other layer, a bound
# of the scores and groups of heads.
MODELS = {
    "bert/gelu": ("classifier", ("query", "value")),
    "distilbert/base": ("classifier", ("q_lin", "v_lin")),
    "gpt2/plain": ("causal-lm", ("c_attn",)),
    "llama/gemma2": ("causal-lm", ("q_proj", "v_proj")),
    "t5/v1_1": ("seq2seq-lm", ("q", "v")),
}


def model_gradient(case, implementation, **options):
    """Logits and gradients of the factors through ``lift``, of rows with padding or several texts.

    There are 11 tokens, so that blocks of 4 are more than one.
    """
    head, targets = MODELS[case]
    loaded = checkpoints.load(places.GOLDENS / case, head=head, attention=implementation, **options)
    ids = jnp.array(np.random.default_rng(0).integers(3, 20, (2, 11)), jnp.int32)
    mask = jnp.array(np.arange(11) < np.array([[11], [7]]), jnp.int32)
    arrays = {"input_ids": ids, "attention_mask": mask}
    if "llama" in case:
        arrays["segment_ids"] = mask * jnp.where(jnp.arange(11) > 4, 2, 1)[None]
    if "t5" in case:
        arrays["decoder_input_ids"] = ids[:, :9]
    fn = lambda params, arrays: loaded.model.apply(params, **arrays)
    config = lora.LoRAConfig(rank=2, targets=targets)
    adapter = lora.init(jax.random.key(0), fn, loaded.params, config, arrays)
    moved = lambda x, real: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape) * real
    adapter = jax.tree.map(moved, adapter, lora.mask(adapter))
    counts = (mask[:, :9] if "t5" in case else mask)[..., None] if head != "classifier" else 1.0

    def loss(adapter):
        logits = lora.lift(fn)(lora.bind(loaded.params, adapter), arrays) * counts
        return jnp.square(logits).mean(), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter)
    return logits, gradients


def check_model(case, monkeypatch, **options):
    monkeypatch.setattr(blockwise_attention, "default_block", lambda: BLOCK)
    found, by_blocks = (model_gradient(case, name, **options) for name in ("xla", "blockwise"))
    np.testing.assert_allclose(by_blocks[0], found[0], rtol=1e-5, atol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found[1]))
    for x, y in zip(*map(jax.tree.leaves, (by_blocks[1], found[1])), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * largest)


QUICK = [("llama/gemma2", {"scan_layers": True})]


@pytest.mark.parametrize(("case", "options"), QUICK)
@pytest.mark.slow
def test_models_compute_the_same(case, options, monkeypatch):
    check_model(case, monkeypatch, **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"scan_layers": True}, {"remat": "full"}], ids=str)
@pytest.mark.parametrize("case", MODELS)
def test_every_model_computes_the_same(case, options, monkeypatch):
    check_model(case, monkeypatch, **options)


HEADS = Heads(count=8, groups=2, size=64)
LONG = Case(heads=HEADS, batch=2, queries=8192, dtype=jnp.bfloat16)


def test_auto_goes_by_the_size_of_the_scores():
    assert attention.choose(LONG, "auto") == "blockwise"
    for changes in ({"queries": 512, "keys": 512}, {"queries": 1}):
        assert attention.choose(dataclasses.replace(LONG, **changes), "auto") == "xla"
    # Scores of 4 bytes for each head and key, against 34 for each number of a head.
    rows = functools.partial(dataclasses.replace, LONG, batch=64)
    at = lambda keys: attention.choose(rows(queries=512, keys=keys), "auto")
    assert (at(17 * 2 * 64 // 4), at(17 * 2 * 64 // 4 + 1)) == ("xla", "blockwise")


def on_gpu(monkeypatch):
    monkeypatch.setattr(cudnn_attention, "device_problems", lambda: iter(()))


def test_cudnn_is_chosen_where_its_conditions_hold(monkeypatch):
    on_gpu(monkeypatch)
    dropping = dataclasses.replace(HEADS, dropout=0.1)
    assert attention.choose(LONG, "auto") == attention.choose(LONG, "cudnn") == "cudnn"
    assert attention.choose(dataclasses.replace(LONG, heads=dropping), "cudnn") == "cudnn"
    packed = dataclasses.replace(LONG, has_segments=True, queries=2048, keys=2048)
    assert attention.choose(packed, "auto") == "cudnn"
    cached = dataclasses.replace(LONG, has_cache=True)
    assert {attention.choose(cached, name) for name in ("auto", "cudnn")} == {"blockwise"}


REFUSED = {
    "activations are float32, and it takes bfloat16 or float16": {"dtype": jnp.float32},
    "heads have size 136": {"heads": dataclasses.replace(HEADS, size=136)},
    "heads have size 20": {"heads": dataclasses.replace(HEADS, size=20)},
    r"scores have a bound \(attn_logit_softcapping 50.0\)": {
        "heads": dataclasses.replace(HEADS, softcap=50.0)
    },
    r"attention weights are dropped \(rate 0.1\)": {
        "heads": dataclasses.replace(HEADS, dropout=0.1), "deterministic": False,
    },
    "rows of 2047 tokens hold several texts, and it takes even numbers": {
        "has_segments": True, "queries": 2047, "keys": 2047,
    },
    "rows of 8192 tokens hold several texts, whose mask would take more memory": {
        "has_segments": True,
    },
    "scores have terms for relative positions": {
        "heads": dataclasses.replace(HEADS, is_relative=True)
    },
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_cudnn_says_why_it_can_not(message, monkeypatch):
    on_gpu(monkeypatch)
    case = dataclasses.replace(LONG, **REFUSED[message])
    with pytest.raises(ValueError, match=f"'cudnn': {message}.*Choose 'auto', 'blockwise'"):
        attention.choose(case, "cudnn")
    assert attention.choose(case, "auto") == "blockwise"


def test_cudnn_is_refused_without_a_gpu():
    with pytest.raises(ValueError, match="it is for NVIDIA GPUs, and JAX runs on cpu"):
        attention.choose(LONG, "cudnn")


def test_mistakes_list_the_names():
    message = "attention must be one of auto, xla, cudnn, blockwise; got 'flash'"
    with pytest.raises(ValueError, match=message):
        checkpoints.load(places.GOLDENS / "bert/gelu", head="classifier", attention="flash")
    c = common.base_config()
    c.model.attention = "flash"
    with pytest.raises(ValueError, match=re.escape(f"model.{message}")):
        training_config.check(c)


def test_runs_of_before_the_field_go_on():
    c = workdirs.to_json_types(common.base_config())
    older = c | {"model": {n: x for n, x in c["model"].items() if n != "attention"}}
    assert not [*workdirs.differences(older, c)]
    c["model"] |= {"attention": "xla"}
    (difference,) = workdirs.differences(older, c)
    assert difference == "model.attention is 'auto' there and 'xla' here"
