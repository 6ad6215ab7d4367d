"""Beam search: the likeliest texts of a model, followed side by side.

What is kept at each step, when a text counts as ended and when the search ends are as in
``transformers``, so that the tokens are the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models.decoding import Decoding, is_stop, no_repeat

Array = jax.Array
PyTree = Any

_NEVER = -1e9  # a score that no text has; finite, since differences of it are taken


class _Beams(NamedTuple):
    """The state of the search.

    Attributes:
      made: how many tokens each open text has.
      tokens: open texts ``(batch, beams, room)``, best first.
      scores: their log-probabilities ``(batch, beams)``.
      ended: ended texts ``(batch, beams, room)``, best first.
      ended_scores: their log-probabilities, penalised for length.
      has_ended: which of them are there.
      can_improve: ``(batch, 1)``, whether an open text may still become one of them.
      stuck: whether the last step has ended every candidate.
      cache: of ``batch * beams`` rows.
    """

    made: Array
    tokens: Array
    scores: Array
    ended: Array
    ended_scores: Array
    has_ended: Array
    can_improve: Array
    stuck: Array
    cache: PyTree


class _Candidates(NamedTuple):
    """The likeliest continuations of the open texts of each batch entry, best first."""

    tokens: Array  # (batch, candidates, room)
    scores: Array  # (batch, candidates)
    beam: Array  # (batch, candidates), the open text that each continues
    ends: Array  # (batch, candidates)


def search(
    more: Callable, logits: Array, cache: PyTree, *, decoding: Decoding, axes: PyTree
) -> Array:
    """The best text for each prompt: tokens ``(batch, max_new_tokens)``, then padding.

    Args:
      more: ``(tokens, made, cache, rows) -> (logits, cache)``, one token further.
      logits: of the first new token, ``(batch, vocab)``.
      cache: of the prompts.
      decoding: the settings.
      axes: which axis of each array of the cache is the batch, -1 for none.

    Raises:
      ValueError: the vocabulary is too small for so many beams.
    """
    batch, vocab = logits.shape
    count = decoding.beams
    if count * vocab < _width(decoding):
        raise ValueError(
            f"With {len(decoding.stop)} stop tokens, beam search needs a vocabulary of at least "
            f"{_width(decoding) // count}, and this one has {vocab}."
        )
    rows = jnp.repeat(jnp.arange(batch), count)
    state = _first(batch, decoding, _rows(cache, axes, rows))
    state = _advance(state, logits[rows], decoding, axes)

    def body(state: _Beams) -> _Beams:
        last = state.tokens[:, :, state.made - 1].reshape(-1)
        logits, cache = more(last, state.made, state.cache, count)
        return _advance(state._replace(cache=cache), logits, decoding, axes)

    return lax.while_loop(lambda s: _goes_on(s, decoding), body, state).ended[:, 0]


def _width(decoding: Decoding) -> int:
    """Enough candidates that ``beams`` stay open even if every text ends at once."""
    return max(2, 1 + len(decoding.stop)) * decoding.beams


def _first(batch: int, decoding: Decoding, cache: PyTree) -> _Beams:
    shape = (batch, decoding.beams)
    tokens = jnp.full((*shape, decoding.max_new_tokens), decoding.pad_id, jnp.int32)
    # All texts of an entry are the same at first, so only one of them may be continued.
    scores = jnp.where(jnp.arange(decoding.beams) == 0, 0.0, _NEVER)
    return _Beams(
        made=jnp.int32(0),
        tokens=tokens,
        scores=jnp.broadcast_to(scores, shape),
        ended=tokens,
        ended_scores=jnp.full(shape, _NEVER),
        has_ended=jnp.zeros(shape, bool),
        can_improve=jnp.ones((batch, 1), bool),
        stuck=jnp.bool_(False),
        cache=cache,
    )


def _goes_on(state: _Beams, decoding: Decoding) -> Array:
    goes_on = (state.made < decoding.max_new_tokens) & state.can_improve.any() & ~state.stuck
    return goes_on & ~state.has_ended.all() if decoding.early_stopping is True else goes_on


def _advance(state: _Beams, logits: Array, decoding: Decoding, axes: PyTree) -> _Beams:
    """Adds one token, given the logits ``(batch * beams, vocab)`` of it."""
    found = _candidates(state, logits, decoding)
    kept = lax.top_k(found.scores + _NEVER * found.ends, decoding.beams)[1]
    pick = lambda x: _pick(x, kept)
    first_row = jnp.arange(kept.shape[0])[:, None] * decoding.beams
    rows = (first_row + pick(found.beam)).reshape(-1)
    scores = pick(found.scores + _NEVER * found.ends)
    state = _with_ended(state, found, decoding)
    state = state._replace(
        made=state.made + 1,
        tokens=pick(found.tokens),
        scores=scores,
        stuck=found.ends.all(),
        cache=_rows(state.cache, axes, rows),
    )
    return state._replace(can_improve=state.can_improve & _may_improve(state, decoding))


def _candidates(state: _Beams, logits: Array, decoding: Decoding) -> _Candidates:
    batch, count, room = state.tokens.shape
    vocab = logits.shape[-1]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    flat = state.tokens.reshape(-1, room)
    log_probs = no_repeat(log_probs, flat, state.made, decoding.no_repeat_ngram)
    total = log_probs.reshape(batch, count, vocab) + state.scores[:, :, None]
    scores, place = lax.top_k(total.reshape(batch, count * vocab), _width(decoding))
    beam, token = place // vocab, place % vocab
    tokens = _pick(state.tokens, beam).at[:, :, state.made].set(token)
    last = state.made + 1 >= decoding.max_new_tokens
    return _Candidates(tokens, scores, beam, is_stop(token, decoding.stop) | last)


def _with_ended(state: _Beams, found: _Candidates, decoding: Decoding) -> _Beams:
    """Takes in the candidates that have ended and are among the ``beams`` best of all."""
    ended = found.ends & (jnp.arange(found.ends.shape[1]) < decoding.beams)[None, :]
    scores = found.scores / _length(state.made + 1, decoding)
    full = state.has_ended.all(axis=-1, keepdims=True) & (decoding.early_stopping is True)
    for closed in (full, ~state.can_improve, ~ended):
        scores = scores + _NEVER * closed
    join = lambda old, new: jnp.concatenate([old, new], axis=1)
    scores, best = lax.top_k(join(state.ended_scores, scores), decoding.beams)
    return state._replace(
        ended=_pick(join(state.ended, found.tokens), best),
        ended_scores=scores,
        has_ended=_pick(join(state.has_ended, ended), best),
    )


def _may_improve(state: _Beams, decoding: Decoding) -> Array:
    """Whether the best open text could score higher than the worst ended one: ``(batch, 1)``."""
    longest = decoding.early_stopping == "never" and decoding.length_penalty > 0
    length = jnp.int32(decoding.max_new_tokens) if longest else state.made
    best = state.scores[:, :1] / _length(length, decoding)
    worst = state.ended_scores.min(axis=1, keepdims=True)
    return (best > jnp.where(state.has_ended, worst, _NEVER)).any(axis=-1, keepdims=True)


def _length(made: Array, decoding: Decoding) -> Array:
    return made.astype(jnp.float32) ** decoding.length_penalty


def _pick(x: Array, places: Array) -> Array:
    """``x[b, places[b, k]]``, for each batch entry."""
    return jax.vmap(lambda row, k: row[k])(x, places)


def _rows(cache: PyTree, axes: PyTree, rows: Array) -> PyTree:
    """The cache with these rows of the batch."""
    take = lambda x, axis: x if axis < 0 else jnp.take(x, rows, axis=axis)
    return jax.tree.map(take, cache, axes)
