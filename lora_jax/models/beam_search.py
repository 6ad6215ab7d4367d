"""Beam search: follows the likeliest texts of a model side by side.

It keeps the same texts at each step as ``transformers`` does, counts them as finished and ends the
search under the same conditions, so that the tokens are the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models.decoding import Decoding, ban_repeats, is_stop

Array = jax.Array
PyTree = Any

_LOWEST = -1e9  # a score that no text has; finite, since differences of it are taken


class _Beams(NamedTuple):
    """The state of the search.

    Attributes:
      length: number of tokens of each open text, an int32 scalar.
      tokens: open texts, int32 ``(batch, beams, max_new_tokens)``, best first.
      scores: their log-probabilities, float32 ``(batch, beams)``.
      finished_tokens: finished texts, int32 ``(batch, beams, max_new_tokens)``, best first.
      finished_scores: their log-probabilities with the length penalty, float32 ``(batch, beams)``.
      is_finished: booleans ``(batch, beams)``, whether there is a finished text at that place.
      is_improvable: booleans ``(batch, 1)``, whether an open text may still become one of them.
      is_stuck: boolean scalar, whether the last step has finished every candidate.
      cache: cache of ``batch * beams`` rows.
    """

    length: Array
    tokens: Array
    scores: Array
    finished_tokens: Array
    finished_scores: Array
    is_finished: Array
    is_improvable: Array
    is_stuck: Array
    cache: PyTree


class _Candidates(NamedTuple):
    """The likeliest continuations of the open texts of each batch entry, best first.

    Attributes:
      tokens: int32 ``(batch, candidates, max_new_tokens)``.
      scores: log-probabilities, float32 ``(batch, candidates)``.
      beam: int32 ``(batch, candidates)``, the open text that each continues.
      is_finished: booleans ``(batch, candidates)``.
    """

    tokens: Array
    scores: Array
    beam: Array
    is_finished: Array


def search(
    next_logits: Callable[..., tuple[Array, PyTree]],
    logits: Array,
    cache: PyTree,
    *,
    decoding: Decoding,
    axes: PyTree,
) -> Array:
    """Finds the best text for each prompt.

    Args:
      next_logits: function of ``(tokens, length, cache, beams)`` that returns ``(logits, cache)``
        after the last tokens ``(batch * beams,)``.
      logits: logits of the first new token, ``(batch, vocab)``.
      cache: cache of the prompts.
      decoding: the settings.
      axes: axis of the batch in each array of the cache, -1 for none.

    Returns:
      Tokens, int32 ``(batch, max_new_tokens)``, with padding after the end.

    Raises:
      ValueError: the vocabulary is too small for the number of beams.
    """
    batch, vocab = logits.shape
    beams, width = decoding.beams, _count_candidates(decoding)
    if beams * vocab < width:
        raise ValueError(
            f"With {len(decoding.stop)} stop tokens, beam search needs a vocabulary of at least "
            f"{width // beams}, and this one has {vocab}."
        )
    rows = jnp.repeat(jnp.arange(batch), beams)
    state = _init_state(batch, decoding, _take_rows(cache, axes, rows))
    state = _advance(state, logits[rows], decoding, axes)

    def body(state: _Beams) -> _Beams:
        last = state.tokens[:, :, state.length - 1].reshape(-1)
        logits, cache = next_logits(last, state.length, state.cache, beams)
        return _advance(state._replace(cache=cache), logits, decoding, axes)

    state = lax.while_loop(lambda state: _is_open(state, decoding), body, state)
    return state.finished_tokens[:, 0]


def _count_candidates(decoding: Decoding) -> int:
    """Counts candidates, enough that ``beams`` stay open even if every text finishes at once."""
    return max(2, 1 + len(decoding.stop)) * decoding.beams


def _init_state(batch: int, decoding: Decoding, cache: PyTree) -> _Beams:
    shape = (batch, decoding.beams)
    tokens = jnp.full((*shape, decoding.max_new_tokens), decoding.pad_id, jnp.int32)
    # All texts of an entry are the same at first, so only one of them may be continued.
    scores = jnp.where(jnp.arange(decoding.beams) == 0, 0.0, _LOWEST)
    return _Beams(
        length=jnp.int32(0),
        tokens=tokens,
        scores=jnp.broadcast_to(scores, shape),
        finished_tokens=tokens,
        finished_scores=jnp.full(shape, _LOWEST),
        is_finished=jnp.zeros(shape, bool),
        is_improvable=jnp.ones((batch, 1), bool),
        is_stuck=jnp.bool_(False),
        cache=cache,
    )


def _is_open(state: _Beams, decoding: Decoding) -> Array:
    is_open = (state.length < decoding.max_new_tokens) & state.is_improvable.any() & ~state.is_stuck
    return is_open & ~state.is_finished.all() if decoding.early_stopping is True else is_open


def _advance(state: _Beams, logits: Array, decoding: Decoding, axes: PyTree) -> _Beams:
    """Adds one token, given its logits ``(batch * beams, vocab)``."""
    candidates = _find_candidates(state, logits, decoding)
    open_scores = candidates.scores + _LOWEST * candidates.is_finished
    best = lax.top_k(open_scores, decoding.beams)[1]
    first_row = jnp.arange(best.shape[0])[:, None] * decoding.beams
    rows = (first_row + _pick(candidates.beam, best)).reshape(-1)
    state = _update_finished(state, candidates, decoding)
    state = state._replace(
        length=state.length + 1,
        tokens=_pick(candidates.tokens, best),
        scores=_pick(open_scores, best),
        is_stuck=candidates.is_finished.all(),
        cache=_take_rows(state.cache, axes, rows),
    )
    return state._replace(is_improvable=state.is_improvable & _is_improvable(state, decoding))


def _find_candidates(state: _Beams, logits: Array, decoding: Decoding) -> _Candidates:
    batch, beams, max_length = state.tokens.shape
    vocab = logits.shape[-1]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    rows = state.tokens.reshape(-1, max_length)
    log_probs = ban_repeats(log_probs, rows, state.length, decoding.no_repeat_ngram)
    total = log_probs.reshape(batch, beams, vocab) + state.scores[:, :, None]
    scores, places = lax.top_k(total.reshape(batch, beams * vocab), _count_candidates(decoding))
    beam, token = places // vocab, places % vocab
    tokens = _pick(state.tokens, beam).at[:, :, state.length].set(token)
    is_last = state.length + 1 >= decoding.max_new_tokens
    return _Candidates(tokens, scores, beam, is_stop(token, decoding.stop) | is_last)


def _update_finished(state: _Beams, candidates: _Candidates, decoding: Decoding) -> _Beams:
    """Adds the finished ones among the ``beams`` best candidates, and keeps the best texts."""
    is_best = jnp.arange(candidates.is_finished.shape[1]) < decoding.beams
    is_new = candidates.is_finished & is_best[None, :]
    scores = candidates.scores / _compute_penalty(state.length + 1, decoding)
    is_full = state.is_finished.all(axis=-1, keepdims=True) & (decoding.early_stopping is True)
    for is_closed in (is_full, ~state.is_improvable, ~is_new):
        scores = scores + _LOWEST * is_closed
    join = lambda old, new: jnp.concatenate([old, new], axis=1)
    scores, best = lax.top_k(join(state.finished_scores, scores), decoding.beams)
    return state._replace(
        finished_tokens=_pick(join(state.finished_tokens, candidates.tokens), best),
        finished_scores=scores,
        is_finished=_pick(join(state.is_finished, is_new), best),
    )


def _is_improvable(state: _Beams, decoding: Decoding) -> Array:
    """Tells if the best open text could beat the worst finished one: booleans ``(batch, 1)``."""
    length = state.length
    if decoding.early_stopping == "never" and decoding.length_penalty > 0:
        length = jnp.int32(decoding.max_new_tokens)
    best = state.scores[:, :1] / _compute_penalty(length, decoding)
    worst = state.finished_scores.min(axis=1, keepdims=True)
    return (best > jnp.where(state.is_finished, worst, _LOWEST)).any(axis=-1, keepdims=True)


def _compute_penalty(length: Array, decoding: Decoding) -> Array:
    return length.astype(jnp.float32) ** decoding.length_penalty


def _pick(x: Array, places: Array) -> Array:
    """Takes ``x[b, places[b, k]]`` for each entry ``b`` of the batch."""
    return jax.vmap(lambda row, k: row[k])(x, places)


def _take_rows(cache: PyTree, axes: PyTree, rows: Array) -> PyTree:
    """Takes rows of the batch from the cache."""
    take = lambda x, axis: x if axis < 0 else jnp.take(x, rows, axis=axis)
    return jax.tree.map(take, cache, axes)
