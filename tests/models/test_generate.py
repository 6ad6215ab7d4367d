"""Generation: what is chosen, when it ends, and that one compilation serves."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.lowrank import LowRank
from lora_jax.models import checkpoints, decoding, generate, gpt2
from lora_jax.models.decoding import Decoding
from tests.helpers import places, slow

# Made by scripts/make_gpt2_goldens.py.
GOLDENS = places.GOLDENS / "gpt2"
TEXTS = json.loads((GOLDENS / "texts.json").read_text())
VOCAB, ROOM = 6, 4


# --- The texts of transformers


@functools.cache
def golden(case):
    with np.load(GOLDENS / case / "golden.npz") as file:
        values = dict(file)
    prompt = {k: values.pop(k) for k in ("input_ids", "attention_mask")}
    return prompt, values


CASES = [("plain", False, kind) for kind in TEXTS]
CASES += [("odd", True, kind) for kind in ("stop", "beams_3")]


@pytest.mark.parametrize("case, scan_layers, kind", slow.after(3, CASES))
def test_texts_equal_transformers(case, scan_layers, kind):
    prompt, values = golden(case)
    loaded = checkpoints.load(GOLDENS / case, head="causal-lm", scan_layers=scan_layers)
    settings = Decoding(max_new_tokens=values[kind].shape[1], pad_id=1, **TEXTS[kind])
    begin, step = generate.causal_lm(loaded.model, loaded.family.init_cache)
    made = generate.generator(begin, step, settings)(loaded.params, prompt)
    np.testing.assert_array_equal(made.tokens, values[kind])
    assert len({tuple(row) for row in made.tokens.tolist()}) > 1
    for row, length in zip(made.tokens.tolist(), made.lengths.tolist(), strict=True):
        ends = [k for k, token in enumerate(row) if token in settings.stop]
        assert length == (ends[0] + 1 if ends else len(row))


def test_goldens_stop_at_different_tokens():
    stops = [
        {t for t in golden(c)[1]["stop"].ravel() if t in TEXTS["stop"]["stop"]}
        for c in ("plain", "odd")
    ]
    assert set.union(*stops) == set(TEXTS["stop"]["stop"])


# --- A model of six words, small enough to look at every text


@functools.cache
def small():
    config = gpt2.GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=8, n_layer=2, n_head=2, initializer_range=1.0
    )
    model = gpt2.GPT2LMHeadModel(config)
    params = jax.jit(model.init)(jax.random.key(3), jnp.ones((1, 2), jnp.int32))
    return model, params


PROMPTS = [[1, 4, 2], [3], [5, 0, 5, 2], [2, 2]]


def prompts(rows=None, *, length=5):
    return generate.pad_left(rows or PROMPTS, pad_id=0, length=length)


def parts():
    return generate.causal_lm(small()[0], gpt2.init_cache)


def texts(made):
    rows = zip(made.tokens.tolist(), made.lengths.tolist(), strict=True)
    return [row[:length] for row, length in rows]


@functools.cache
def log_probs():
    """Of the next token, after any tokens at all: a whole pass without a cache."""
    model, params = small()
    run = jax.jit(lambda ids, mask: jax.nn.log_softmax(model.apply(params, ids, mask)))

    def after(rows):
        width = 12
        ids = np.array([[*row, *[0] * (width - len(row))] for row in rows])
        mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        made = np.asarray(run(ids, mask))
        return made[np.arange(len(rows)), [len(row) - 1 for row in rows]]

    return after


def greedy_by_hand(prompt, *, stop=(), size=0, room=ROOM):
    made = []
    while len(made) < room and not (made and made[-1] in stop):
        scores = log_probs()([[*prompt, *made]])[0].copy()
        if size:
            grams = [tuple(made[k : k + size]) for k in range(len(made) - size + 1)]
            for token in range(VOCAB):
                if tuple([*made, token][-size:]) in grams and len(made) >= size - 1:
                    scores[token] = -np.inf
        made.append(int(np.argmax(scores)))
    return made


@pytest.mark.parametrize("stop, size", slow.after(1, [((4, 1), 0), ((), 0), ((), 1), ((), 2)]))
def test_greedy_is_the_likeliest_token_each_time(stop, size):
    settings = Decoding(max_new_tokens=ROOM, stop=stop, no_repeat_ngram=size, pad_id=5)
    made = generate.generator(*parts(), settings)(small()[1], prompts())
    assert texts(made) == [greedy_by_hand(row, stop=stop, size=size) for row in PROMPTS]
    for row, length in zip(made.tokens, made.lengths, strict=True):
        assert (row[length:] == 5).all()


def test_padding_on_either_side_changes_nothing():
    run = generate.generator(*parts(), Decoding(max_new_tokens=ROOM))
    left = prompts(length=5)
    right = {k: np.zeros_like(x) for k, x in left.items()}
    for k, row in enumerate(PROMPTS):
        right["input_ids"][k, : len(row)] = row
        right["attention_mask"][k, : len(row)] = 1
    tokens = run(small()[1], left).tokens
    np.testing.assert_array_equal(run(small()[1], right).tokens, tokens)
    other = left | {"input_ids": np.where(left["attention_mask"], left["input_ids"], 3)}
    np.testing.assert_array_equal(run(small()[1], other).tokens, tokens)


def all_texts(prompt, *, stop, penalty):
    """Every text and its score."""
    scores, opened = {}, {(): 0.0}
    for length in range(1, ROOM + 1):
        after = log_probs()([[*prompt, *text] for text in opened])
        longer = {}
        for (text, score), row in zip(opened.items(), after, strict=True):
            for token in range(VOCAB):
                new, total = (*text, token), score + row[token]
                if token in stop or length == ROOM:
                    scores[new] = total / length**penalty
                else:
                    longer[new] = total
        opened = longer
    return scores


@pytest.mark.parametrize("stop, penalty", [((), 1.0), ((2, 4), 0.0), ((2, 4), 1.5)])
@pytest.mark.slow
def test_a_wide_beam_finds_the_best_text_of_all(stop, penalty):
    settings = Decoding(
        max_new_tokens=ROOM, beams=VOCAB ** (ROOM - 1), stop=stop, length_penalty=penalty,
        early_stopping="never",
    )  # fmt: skip
    made = generate.generator(*parts(), settings)(small()[1], prompts())
    for prompt, text in zip(PROMPTS, texts(made), strict=True):
        scores = all_texts(prompt, stop=stop, penalty=penalty)
        # Two texts may differ by no more than rounding.
        assert scores[tuple(text)] > max(scores.values()) - 1e-5


@pytest.mark.slow
def test_beams_repeat_nothing_that_they_must_not():
    settings = Decoding(max_new_tokens=8, beams=3, no_repeat_ngram=2)
    free = dataclasses.replace(settings, no_repeat_ngram=0)
    pairs = lambda row: list(itertools.pairwise(row))
    repeats = lambda made: sum(len(pairs(r)) - len(set(pairs(r))) for r in made.tokens.tolist())
    run = lambda s: generate.generator(*parts(), s)(small()[1], prompts())
    assert repeats(run(settings)) == 0 < repeats(run(free))


# --- Sampling


def filtered_by_hand(logits, settings):
    """The distribution that is sampled, token by token."""
    probs = np.exp(logits / settings.temperature - np.max(logits / settings.temperature))
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda k: -probs[k])
    kept = order[: settings.top_k or len(order)]
    total, stay = 0.0, []
    mass = sum(probs[k] for k in kept)
    for k in kept:
        if total < settings.top_p:
            stay.append(k)
        total += probs[k] / mass
    out = np.zeros_like(probs)
    out[stay] = probs[stay] / probs[stay].sum()
    return out


SAMPLED = [
    dict(temperature=0.7), dict(top_k=3), dict(top_p=0.8), dict(top_k=100),
    dict(temperature=1.5, top_k=4, top_p=0.6), dict(top_p=1e-6),
]  # fmt: skip


@pytest.mark.parametrize("options", SAMPLED)
def test_filters_equal_those_by_hand(options):
    settings = Decoding(max_new_tokens=1, sample=True, **options)
    logits = np.random.default_rng(0).normal(size=(20, 11)).astype(np.float32) * 2
    ours = jax.nn.softmax(decoding.filter_logits(jnp.asarray(logits), settings))
    for row, mine in zip(logits.astype(np.float64), ours, strict=True):
        np.testing.assert_allclose(mine, filtered_by_hand(row, settings), atol=1e-6)


def test_samples_have_the_distribution_of_the_model():
    settings = Decoding(max_new_tokens=2, sample=True, temperature=1.3, top_k=4)
    count = 6000
    row = {k: np.repeat(x, count, axis=0) for k, x in prompts([[1, 4, 2]]).items()}
    run = generate.generator(*parts(), settings)
    made = np.asarray(run(small()[1], row, jax.random.key(0)).tokens)
    expected = filtered_by_hand(log_probs()([[1, 4, 2]])[0], settings)
    assert_frequencies(made[:, 0], expected)
    first = int(np.argmax(expected))
    some = made[made[:, 0] == first, 1]
    assert_frequencies(some, filtered_by_hand(log_probs()([[1, 4, 2, first]])[0], settings))
    again = run(small()[1], row, jax.random.key(0)).tokens
    np.testing.assert_array_equal(again, made)
    assert (np.asarray(run(small()[1], row, jax.random.key(1)).tokens) != made).any()


def assert_frequencies(tokens, expected):
    found = np.bincount(tokens, minlength=VOCAB) / len(tokens)
    # Five standard deviations of a frequency.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(tokens))).all()
    assert (expected == 0).any()


def test_sampling_needs_a_key():
    run = generate.generator(*parts(), Decoding(max_new_tokens=1, sample=True))
    with pytest.raises(ValueError, match="needs a PRNG key"):
        run(small()[1], prompts())


# --- Adapters


def adapter(seed, rank=2):
    model, params = small()
    config = lora.LoRAConfig(rank=rank, targets=("c_attn", "mlp/c_fc"))
    ids = jnp.ones((1, 3), jnp.int32)
    made = lora.init(jax.random.key(seed), model.apply, params, config, ids)
    draw = lambda x: LowRank(
        x.a, jax.random.normal(jax.random.key(seed), x.b.shape), x.scale, axes=x.axes
    )
    return jax.tree.map(draw, made, is_leaf=lambda x: isinstance(x, LowRank))


@pytest.mark.parametrize("options", [dict(), dict(beams=3, stop=(4,))])
@pytest.mark.slow
def test_lifted_and_merged_are_the_same_and_another_adapter_needs_no_compilation(options):
    begin, step = parts()
    traced = []

    def counted(*args):
        traced.append(1)
        return step(*args)

    settings = Decoding(max_new_tokens=ROOM, **options)
    lifted = generate.generator(begin, lora.lift(counted), settings)
    merged = generate.generator(begin, step, settings)
    results, count = [], 0
    for seed in range(3):
        given = adapter(seed)
        made = lifted(lora.bind(small()[1], given), prompts())
        results.append(texts(made))
        count = len(traced) if seed == 0 else count
        plain = merged(lora.merge(small()[1], given), prompts())
        jax.tree.map(np.testing.assert_array_equal, made, plain)
    assert len(traced) == count > 0
    assert results[0] != results[1] != results[2]
    lifted(lora.bind(small()[1], adapter(0, rank=1)), prompts())
    assert len(traced) > count  # another shape does


def test_the_whole_program_can_be_lifted():
    run = generate.generator(*parts(), Decoding(max_new_tokens=ROOM, stop=(1,)))
    given = adapter(0)
    made = lora.lift(run)(lora.bind(small()[1], given), prompts())
    plain = run(lora.merge(small()[1], given), prompts())
    jax.tree.map(np.testing.assert_array_equal, made, plain)


@pytest.mark.slow
def test_bfloat16_generates():
    model = small()[0].clone(dtype=jnp.bfloat16)
    begin, step = generate.causal_lm(model, gpt2.init_cache)
    made = generate.generator(begin, step, Decoding(max_new_tokens=2, beams=2))(
        small()[1], prompts()
    )
    best = [all_two(row) for row in PROMPTS]
    # A text that float32 finds as good as any, but for bfloat16's 8 bits.
    for scores, text in zip(best, made.tokens.tolist(), strict=True):
        assert scores[tuple(text)] > max(scores.values()) - 0.2


def all_two(prompt):
    first = log_probs()([prompt])[0]
    after = log_probs()([[*prompt, token] for token in range(VOCAB)])
    return {(a, b): first[a] + after[a, b] for a in range(VOCAB) for b in range(VOCAB)}


# --- Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens must be a whole number of at least 1, got 0"),
        (dict(stop=(2, -1)), r"stop\[1\] must be a whole number of at least 0, got -1"),
        (dict(sample=True, temperature=0.0, top_p=2.0), "temperature.*0.0; top_p.*2.0"),
        (dict(temperature=0.5), "temperature is 0.5, which has an effect with sample=True only"),
        (dict(sample=True, beams=2), "beams is 2, which has an effect with sample=False only"),
        (dict(length_penalty=2.0), "length_penalty is 2.0, which has an effect with beams above 1"),
        (dict(beams=2, early_stopping="soon"), "early_stopping must be True, False or 'never'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**({"max_new_tokens": 3} | options))


def test_bad_prompts():
    for rows in ([], [[1], []], [[1] * 6]):
        with pytest.raises(ValueError, match="1 to 5 tokens"):
            generate.pad_left(rows, pad_id=0, length=5)
    run = generate.generator(*parts(), Decoding(max_new_tokens=13, beams=2))
    with pytest.raises(ValueError, match="17 tokens, of which 4 are.* positions for 16"):
        run(small()[1], prompts())
    run = generate.generator(*parts(), Decoding(max_new_tokens=1))
    with pytest.raises(ValueError, match="17 tokens, of which 16 are the prompt"):
        run(small()[1], prompts([[1] * 16], length=16))
    with pytest.raises(
        ValueError, match="token 6 is beyond the embedding of the model, which has 6"
    ):
        run(small()[1], prompts([[1, VOCAB]]))


def test_padding_needs_no_position_and_no_row():
    """12 new tokens after a prompt of 4 that is padded to 12, by a token that does not exist."""
    run = generate.generator(*parts(), Decoding(max_new_tokens=12))
    inputs = generate.pad_left(PROMPTS[2:3], pad_id=VOCAB, length=12)
    plain = generate.pad_left(PROMPTS[2:3], pad_id=0, length=4)
    assert texts(run(small()[1], inputs)) == texts(run(small()[1], plain))
    assert len(texts(run(small()[1], inputs))[0]) == 12


def test_a_text_ends_with_the_positions():
    run = generate.generator(*parts(), Decoding(max_new_tokens=15, pad_id=5))
    made = run(small()[1], prompts())
    assert made.lengths.tolist() == [16 - len(row) for row in PROMPTS]
    whole = generate.generator(*parts(), Decoding(max_new_tokens=12))(small()[1], prompts())
    for row, other in zip(made.tokens.tolist(), whole.tokens.tolist(), strict=True):
        assert row[:12] == other
    assert made.tokens[0, 13:].tolist() == [5, 5]
    stop = tuple(range(6))
    run = generate.generator(*parts(), Decoding(max_new_tokens=2, beams=2, stop=stop))
    with pytest.raises(ValueError, match="vocabulary of at least 7, and this one has 6"):
        run(small()[1], prompts())
