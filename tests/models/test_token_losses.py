"""Losses by chunks of tokens are those of whole logits, in the memory of a chunk."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax.models import checkpoints, token_losses
from lora_jax.models.token_losses import compute_token_losses
from lora_jax.quantized import as_array, is_quantized
from lora_jax.tasks import language_modeling
from tests.helpers import slow
from tests.helpers.comparisons import assert_close, perturbed
from tests.helpers.places import GOLDENS

D, VOCAB = 6, 11


def test_doctests():
    assert doctest.testmod(token_losses).failed == 0


def set_chunk(monkeypatch, tokens, vocab=VOCAB, itemsize=4):
    """Lets a chunk have a number of tokens, over all rows."""
    monkeypatch.setattr(token_losses, "CHUNK_BYTES", tokens * vocab * itemsize)


# ---- Values ---------------------------------------------------------------------------------------


def by_hand(hidden, kernel, labels, counts, *, smoothing, bound):
    """Losses, right answers, and the gradients of the sum of ``counts * losses``, in float64."""
    raw = np.einsum("bld,dv->blv", hidden, kernel)
    logits = bound * np.tanh(raw / bound) if bound else raw
    log_probs = logits - logits.max(-1, keepdims=True)
    log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
    target = (1 - smoothing) * np.eye(VOCAB)[labels] + smoothing / VOCAB
    losses = -(target * log_probs).sum(-1)
    slope = (np.exp(log_probs) - target) * counts[..., None]
    slope *= 1 - (logits / bound) ** 2 if bound else 1
    grads = np.einsum("blv,dv->bld", slope, kernel), np.einsum("bld,blv->dv", hidden, slope)
    return losses * (counts > 0), (logits.argmax(-1) == labels) & (counts > 0), grads


@pytest.mark.parametrize(
    "rows, length, tokens, chunks, smoothing, bound",
    [
        (2, 7, 4, 4, 0.0, None),  # the last chunk has one token of each row
        (2, 7, 6, 3, 0.1, None),
        (3, 8, 12, 2, 0.1, 2.0),
        (4, 5, 1, 5, 0.0, 2.0),  # a token of each row is the least
        (1, 1, 1, 1, 0.0, None),
        (2, 5, 10, 1, 0.1, 2.0),
    ],
)
def test_values_and_gradients(monkeypatch, rows, length, tokens, chunks, smoothing, bound):
    rng = np.random.default_rng(rows * length)
    hidden, kernel = rng.normal(size=(rows, length, D)), rng.normal(size=(D, VOCAB))
    labels = rng.integers(0, VOCAB, (rows, length))
    counts = rng.integers(0, 2, (rows, length)) * rng.random((rows, length))
    counts[0, 0] = 1.0
    losses, correct, (d_hidden, d_kernel) = by_hand(
        hidden, kernel, labels, counts, smoothing=smoothing, bound=bound
    )
    # What does not count matters to nothing, whatever stands in it.
    hidden[counts == 0] = np.nan
    labels[counts == 0] = VOCAB + 3

    def loss(hidden, kernel):
        cap = lambda x: bound * jnp.tanh(x / bound) if bound else x
        head = lambda x: cap(x @ kernel)
        made = compute_token_losses(head, hidden, labels, counts > 0, smoothing=smoothing)
        return jnp.sum(counts * made.loss), made

    with jax.enable_x64(True):
        set_chunk(monkeypatch, tokens, itemsize=8)
        jaxpr = jax.make_jaxpr(loss)(hidden, kernel)
        scans = [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
        assert scans == ([chunks] if chunks > 1 else [])
        grads, made = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(hidden, kernel)
    assert made.loss.dtype == jnp.float64
    np.testing.assert_array_equal(made.correct, correct)
    exact = dict(rtol=1e-12, atol=1e-12)
    assert_close((made.loss, *grads), (losses, d_hidden, d_kernel), **exact)


def test_the_first_of_the_highest_logits_is_the_prediction():
    logits = jnp.array([[[0.0, 2.0, 2.0], [0.0, 2.0, 2.0]]], jnp.bfloat16)
    every = jnp.ones((1, 2), bool)
    made = compute_token_losses(lambda x: x, logits, jnp.array([[1, 2]]), every)
    assert made.correct.tolist() == [[True, False]] and made.loss.dtype == jnp.float32


@pytest.mark.parametrize("label", [-1, VOCAB])
def test_a_label_beyond_the_vocabulary_is_no_number(label):
    """As an embedding gives for such a token, so that a run's guard sees it."""
    labels, every = jnp.array([[0, label]]), jnp.ones((1, 2), bool)
    made = compute_token_losses(lambda x: x, jnp.zeros((1, 2, VOCAB)), labels, every)
    assert np.isnan(made.loss).tolist() == [[False, True]]


@given(
    rows=st.integers(1, 6),
    length=st.integers(1, 50),
    vocab=st.integers(2, 40),
    tokens=st.integers(1, 200),
)
@settings(max_examples=15, deadline=None)
def test_chunks_hold_all_tokens_and_few_more(rows, length, vocab, tokens):
    with pytest.MonkeyPatch.context() as patch:
        set_chunk(patch, tokens, vocab)
        hidden = jax.ShapeDtypeStruct((rows, length, 3), jnp.float32)
        labels = jnp.zeros((rows, length), jnp.int32)
        head, shapes = lambda x: x @ jnp.ones((3, vocab)), []
        seen = lambda x: shapes.append(x.shape) or head(x)
        run = lambda x: compute_token_losses(seen, x, labels, labels == 0).loss
        assert jax.eval_shape(run, hidden).shape == (rows, length)
    whole, *parts = shapes  # the first is asked for its size
    size = parts[0][1]
    assert whole[1] == length and set(parts) == {(rows, size, 3)}
    assert size == 1 or rows * size <= tokens
    count = -(-length // size)
    assert 0 <= count * size - length < count  # at most one token of padding for each chunk


# ---- Under lift -----------------------------------------------------------------------------------

IDS = np.random.default_rng(1).integers(0, 16, (2, 7))


def decoded(tree):
    return jax.tree.map(as_array, tree, is_leaf=is_quantized)


class Toy:
    """Looked-up rows, a layer, and a head of its own or the rows again."""

    def __init__(self, *, tied, quantized=(), **settings):
        rng = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2, float)
        self.params = {"embed": draw(16, 8), "up": draw(8, 8)}
        if not tied:
            self.params["head"] = draw(8, 16)
        like = {"embed": "oi" if tied else "io", "head": "io"} if quantized else {}
        like = {k: v for k, v in like.items() if k in self.params}
        if quantized:
            self.params = lora.quantize(
                self.params, "nf4", like=like, targets=quantized, block=8, skip=()
            )
        self.config = lora.LoRAConfig(rank=2, alpha=3.0, **settings)
        draw = lora.init(jax.random.key(0), self.losses, self.params, self.config)
        self.adapter = perturbed(draw)

    @staticmethod
    def split(p):
        hidden = jnp.tanh(p["embed"][IDS] @ p["up"])
        return hidden, lambda x: x @ (p["head"] if "head" in p else p["embed"].T)

    def losses(self, p):
        hidden, head = self.split(p)
        return compute_token_losses(head, hidden, IDS, IDS != 3, smoothing=0.1).loss

    def whole(self, p):
        hidden, head = self.split(p)
        log_probs = jax.nn.log_softmax(head(hidden))
        picked = jnp.take_along_axis(log_probs, IDS[..., None], -1)[..., 0]
        return jnp.where(IDS != 3, -0.9 * picked - 0.1 * log_probs.mean(-1), 0.0)

    def run(self, adapter):
        return lora.lift(self.losses, strict=True)(lora.bind(self.params, adapter))

    def run_merged(self, adapter):
        return self.whole(lora.merge(decoded(self.params), adapter))


TOYS = {
    "head": dict(tied=False, targets=("head", "up")),
    "frozen head": dict(tied=False, targets=("up",)),
    "tied": dict(tied=True, targets=("embed",)),
    "trained head": dict(tied=False, targets=("up",), train=("head",)),
    "trained rows": dict(tied=True, targets=("up",), train=("embed",)),
    "quantized head": dict(tied=False, targets=("head",), quantized=("head",)),
    "quantized rows": dict(tied=True, targets=("embed",), quantized=("embed",)),
}


@pytest.mark.parametrize("name", slow.after(2, TOYS))
def test_lifted(monkeypatch, name):
    """The head stays factored, and values and gradients are those of the merged one."""
    set_chunk(monkeypatch, 4, 16, itemsize=8)
    with jax.enable_x64(True):
        toy = Toy(**TOYS[name])
        uses = lora.explain(toy.losses, toy.params, toy.adapter).kernels
        assert uses and not any(use.fallbacks for use in uses.values())
        weights = jnp.asarray(np.random.default_rng(2).normal(size=IDS.shape))
        total = lambda run: lambda adapter: (((y := run(adapter)) * weights).sum(), y)
        value = lambda run: jax.jit(jax.grad(total(run), has_aux=True))(toy.adapter)
        (got_grad, got), (grad, want) = value(toy.run), value(toy.run_merged)
        # Codes are decoded in float32.
        exact = 1e-12 if not TOYS[name].get("quantized") else 1e-6
        assert_close((got, got_grad), (want, grad), rtol=exact, atol=exact)


def test_adapters_at_once(monkeypatch):
    """As in a sweep."""
    set_chunk(monkeypatch, 4, 16)
    toy = Toy(**TOYS["head"])
    several = [perturbed(toy.adapter, seed=s) for s in range(2)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *several)
    assert_close(jax.vmap(toy.run)(stacked), jnp.stack([*map(toy.run_merged, several)]))


def test_each_chunk_draws_its_own_dropout(monkeypatch):
    set_chunk(monkeypatch, 2, 16)
    toy = Toy(**TOYS["head"])
    fn = lambda p: (
        compute_token_losses(
            lambda x: x @ p["head"],
            jnp.ones((2, 6, 8)),
            jnp.zeros((2, 6), int),
            jnp.ones((2, 6), bool),
        ).loss
    )
    bound = lora.bind(toy.params, toy.adapter)
    losses = lora.lift(fn, dropout=0.5, dropout_key=jax.random.key(0))(bound)
    assert len(np.unique(losses)) > 6


@pytest.mark.parametrize(
    "name, targets",
    slow.after(
        1,
        [
            ("llama/gemma2", ("embed_tokens", "q_proj")),  # tied, with a bound of the logits
            ("llama/llama3", ("lm_head", "q_proj")),
            ("gpt2/plain", ("wte", "c_attn")),
        ],
    ),
)
def test_models(monkeypatch, name, targets):
    """The task's losses are those of the logits that a call of the merged model gives."""
    loaded = checkpoints.load(GOLDENS / name, head="causal-lm")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, loaded.model.config.vocab_size, (3, 10)).astype(np.int32)
    counts = rng.integers(0, 2, ids.shape)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "counts": counts}
    batch["weights"] = np.array([1.0, 0.0, 0.5], np.float32)
    set_chunk(monkeypatch, 7, loaded.model.config.vocab_size)
    fn = functools.partial(language_modeling.apply, loaded.model, smoothing=0.1)
    config = lora.LoRAConfig(rank=2, targets=targets)
    adapter = perturbed(lora.init(jax.random.key(0), fn, loaded.params, config, batch, None))
    run = lambda params: language_modeling.token_loss(
        lora.lift(fn, strict=True)(params, batch, None), batch
    )
    sums = jax.jit(run)(lora.bind(loaded.params, adapter))
    logits = jax.jit(loaded.model.apply)(lora.merge(loaded.params, adapter), ids)
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_probs, ids[:, 1:, None], -1)[..., 0]
    weights = counts[:, 1:] * batch["weights"][:, None]
    losses = -0.9 * picked - 0.1 * log_probs.mean(-1)
    correct = logits[:, :-1].argmax(-1) == ids[:, 1:]
    want = (weights * losses).sum(), (weights * correct).sum(), weights.sum()
    np.testing.assert_allclose(sums, want, rtol=1e-5)


# ---- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_memory_is_that_of_a_chunk(trained):
    """8,192 tokens with Llama 3's vocabulary, whose logits are 4.2 GB: by XLA's own account."""
    vocab, hidden, tokens = 128_256, 64, jax.ShapeDtypeStruct((4, 2048), jnp.int32)

    def loss(x, kernel, labels):
        made = compute_token_losses(lambda x: x @ kernel, x, labels, labels >= 0)
        return made.loss.mean()

    x = jax.ShapeDtypeStruct((*tokens.shape, hidden), jnp.float32)
    kernel = jax.ShapeDtypeStruct((hidden, vocab), jnp.float32)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1) if trained else 0))
    # As users have it; the tests' own setting, for fast compilation, keeps more.
    options = {"xla_backend_optimization_level": 3}
    compiled = run.lower(x, kernel, tokens).compile(options)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    # Logits and their gradient; the CPU backend has a copy for a second use, by the kernel's.
    assert temporary < (3.2 if trained else 2.2) * token_losses.CHUNK_BYTES
