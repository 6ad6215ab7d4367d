"""Generates text with a cache of keys and values, in one compiled program.

A model is given as two functions, so that one file serves decoders and encoder-decoders, plain
parameters (with an adapter merged into them) and bound ones (``lora.lift(step)``):

- ``begin(params, inputs, room) -> Start`` returns the first tokens, and a cache with ``room`` more
  slots than they need;
- ``step(params, ids, mask, positions, cache) -> (logits, cache)`` puts the tokens ``ids`` ``(batch,
  n)`` into the cache, and returns the logits ``(batch, vocab)`` of the last one. The mask ``(batch,
  slots)`` is 1 at each slot that may be attended to once it is filled.

Parameters are arguments: another adapter of the same shapes needs no compilation. ``begin.limits``,
if ``begin`` has it, says which tokens and how many the model takes, padding not counted: prompts
are checked, and a text ends where the model has no more positions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.models import beam_search, kv_cache, token_ids
from lora_jax.models.decoding import Decoding, ban_repeats, filter_logits, is_stop
from lora_jax.models.kv_cache import Cache

Array = jax.Array
PyTree = Any
NextLogits = Callable[..., tuple[Array, PyTree]]  # (tokens, length, cache, beams=1)


class Limits(NamedTuple):
    """What a model takes.

    Attributes:
      tokens: number of tokens of the vocabulary.
      positions: largest number of tokens of a text; None for any.
    """

    tokens: int
    positions: int | None


class Start(NamedTuple):
    """What generation starts from.

    Attributes:
      ids: tokens ``(batch, n)``, padded on the left.
      mask: ``(batch, n)``, positive where there is a token.
      cache: tree of arrays. An axis whose size grows with the batch is the batch's; an array may
        have none.
    """

    ids: Array
    mask: Array
    cache: PyTree


class Generated(NamedTuple):
    """New tokens.

    Attributes:
      tokens: int32 ``(batch, max_new_tokens)``, with padding after the stop token.
      lengths: int32 ``(batch,)``, the number of tokens, with the stop token.
    """

    tokens: Array
    lengths: Array


Begin = Callable[[PyTree, PyTree, int], Start]
Step = Callable[[PyTree, Array, Array, Array, PyTree], tuple[Array, PyTree]]
Generate = Callable[..., Generated]


def causal_lm(model: nn.Module, init_cache: Callable[..., Cache]) -> tuple[Begin, Step]:
    """Makes ``begin`` and ``step`` of a decoder.

    The inputs are ``input_ids`` and ``attention_mask``, ``(batch, n)``, padded on either side.

    Args:
      model: Linen module that is called with tokens, mask, positions and cache.
      init_cache: the function of its family that makes an empty cache.
    """

    def begin(params: PyTree, inputs: dict[str, Array], room: int) -> Start:
        del params
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        ids = jnp.where(mask > 0, ids, 0)  # padding may be a token that the model does not have
        order = jnp.argsort(mask > 0, axis=-1, stable=True)  # puts padding first
        ids, mask = (jnp.take_along_axis(x, order, axis=-1) for x in (ids, mask))
        cache = init_cache(
            model.config,
            ids.shape[0],
            ids.shape[1] + room,
            model.dtype,
            scan_layers=model.scan_layers,
        )
        return Start(ids, mask, cache)

    def step(
        params: PyTree, ids: Array, mask: Array, positions: Array, cache: PyTree
    ) -> tuple[Array, PyTree]:
        logits, cache = model.apply(params, ids, mask, positions, cache)
        return logits[:, -1], cache

    c = model.config
    positions = getattr(c, "positions", None) or getattr(c, "max_position_embeddings", None)
    setattr(begin, "limits", Limits(c.vocab_size, positions))  # noqa: B010
    return begin, step


def seq2seq_lm(
    model: nn.Module,
    init_cache: Callable[..., Cache],
    *,
    transform: Callable[[Callable], Callable] = lambda fn: fn,
) -> tuple[Begin, Step]:
    """Makes ``begin`` and ``step`` of an encoder-decoder.

    The inputs are ``input_ids`` and ``attention_mask``, ``(batch, n)``, padded on either side. They
    are encoded once; every text starts with the token ``decoder_start_token_id`` of the config.

    Args:
      model: Linen module with methods ``encode`` and ``decode``, whose positions are relative.
      init_cache: the function of its family that makes an empty cache.
      transform: function that transforms both, ``lora.lift`` for bound parameters.
    """
    encode = transform(lambda params, ids, mask: model.apply(params, ids, mask, method="encode"))

    def begin(params: PyTree, inputs: dict[str, Array], room: int) -> Start:
        mask = inputs["attention_mask"]
        memory = encode(params, jnp.where(mask > 0, inputs["input_ids"], 0), mask)
        shape = (inputs["input_ids"].shape[0], 1)
        ids = jnp.full(shape, model.config.decoder_start_token_id, jnp.int32)
        cache = init_cache(
            model.config, shape[0], 1 + room, model.dtype, scan_layers=model.scan_layers
        )
        return Start(ids, jnp.ones(shape, jnp.int32), (memory, cache))

    def step(
        params: PyTree, ids: Array, mask: Array, positions: Array, cache: PyTree
    ) -> tuple[Array, PyTree]:
        del positions  # they are relative, and follow from the slots
        memory, cache = cache
        logits, cache = model.apply(params, ids, mask, memory=memory, cache=cache, method="decode")
        return logits[:, -1], (memory, cache)

    setattr(begin, "limits", Limits(model.config.vocab_size, None))  # noqa: B010
    return begin, transform(step)


def generator(begin: Begin, step: Step, decoding: Decoding) -> Generate:
    """Makes ``(params, inputs, key=None) -> Generated``, compiled once for each shape of inputs.

    Args:
      begin: function that starts, as at the top of this file.
      step: function that goes on, as at the top of this file.
      decoding: how tokens are chosen. Only sampling needs a ``key``.

    Raises:
      ValueError: the result is called without a key, and it samples; or a prompt has a token that
        the model does not have, or leaves no position for a new one (in beam search, not for
        ``max_new_tokens`` of them).
    """
    limits: Limits | None = getattr(begin, "limits", None)

    @jax.jit
    def run(params: PyTree, inputs: PyTree, key: Array) -> Generated:
        room = decoding.max_new_tokens
        ids, mask, cache = begin(params, inputs, room)
        left = _count_positions_left(mask, limits)
        mask = jnp.pad(mask, ((0, 0), (0, room)), constant_values=1)
        positions = kv_cache.compute_positions(mask, 0, mask.shape[1])
        if limits is not None and limits.positions is not None:
            # Rows that have ended stay in the batch, at the last position.
            positions = jnp.minimum(positions, limits.positions - 1)
        n = ids.shape[1]
        logits, cache = step(params, ids, mask, positions[:, :n], cache)

        def next_logits(
            tokens: Array, length: Array, cache: PyTree, beams: int = 1
        ) -> tuple[Array, PyTree]:
            """Computes logits after the last tokens ``(batch * beams,)`` of ``length`` new ones."""
            position = lax.dynamic_slice_in_dim(positions, n + length - 1, 1, axis=1)
            repeat = lambda x: jnp.repeat(x, beams, axis=0) if beams > 1 else x
            return step(params, tokens[:, None], repeat(mask), repeat(position), cache)

        if decoding.beams == 1:
            return _decode_rows(next_logits, logits, cache, left, decoding=decoding, key=key)
        axes = _find_batch_axes(begin, params, inputs, room)
        return _search_beams(next_logits, logits, cache, decoding=decoding, axes=axes)

    def generate(params: PyTree, inputs: PyTree, key: Array | None = None) -> Generated:
        if key is None and decoding.sample:
            raise ValueError("Sampling needs a PRNG key: generate(params, inputs, key).")
        if limits is not None:
            _check_prompts(inputs, limits, decoding)
        return run(params, inputs, jax.random.key(0) if key is None else key)

    return generate


def _count_positions_left(mask: Array, limits: Limits | None) -> Array | None:
    """Counts the new tokens of each row that the model has positions for; None for any number."""
    if limits is None or limits.positions is None:
        return None
    return limits.positions - (mask > 0).sum(axis=-1)


def _check_prompts(inputs: PyTree, limits: Limits, decoding: Decoding) -> None:
    """Raises ValueError for prompts that the model can't take; traced ones can't be checked."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(inputs)):
        return
    ids, is_token = np.asarray(inputs["input_ids"]), np.asarray(inputs["attention_mask"]) > 0
    token_ids.check(ids[is_token], token_ids.Table("the model", limits.tokens))
    longest = int(is_token.sum(axis=-1).max(initial=0))
    new = decoding.max_new_tokens if decoding.beams > 1 else 1
    if limits.positions is not None and longest + new > limits.positions:
        raise ValueError(
            f"{longest + new} tokens, of which {longest} are the prompt, and the model has "
            f"positions for {limits.positions}; shorten the prompt, or make fewer new tokens."
        )


def pad_left(rows: Sequence[Sequence[int]], *, pad_id: int, length: int) -> dict[str, np.ndarray]:
    """Pads prompts of different lengths on the left, so that they are one batch.

    Returns:
      ``input_ids`` and ``attention_mask``, each int32 ``(rows, length)``.

    Raises:
      ValueError: a prompt is empty, or longer than ``length``.

    >>> pad_left([[5, 6], [7]], pad_id=0, length=3)["input_ids"].tolist()
    [[0, 5, 6], [0, 0, 7]]
    """
    lengths = np.array([len(row) for row in rows])
    if len(rows) == 0 or lengths.min() < 1 or lengths.max() > length:
        raise ValueError(f"prompts must have 1 to {length} tokens, got {sorted(set(lengths))}.")
    mask = np.arange(length)[None, :] >= length - lengths[:, None]
    ids = np.full(mask.shape, pad_id, np.int32)
    ids[mask] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return {"input_ids": ids, "attention_mask": mask.astype(np.int32)}


class _State(NamedTuple):
    """The state of a decoder that follows one text for each prompt.

    Attributes:
      length: number of tokens of each row, padding included, an int32 scalar.
      tokens: int32 ``(batch, max_new_tokens)``.
      lengths: int32 ``(batch,)``, the number of tokens without padding.
      has_ended: booleans ``(batch,)``, whether the row has its stop token.
      cache: the model's cache.
    """

    length: Array
    tokens: Array
    lengths: Array
    has_ended: Array
    cache: PyTree


def _decode_rows(
    next_logits: NextLogits,
    logits: Array,
    cache: PyTree,
    left: Array | None,
    *,
    decoding: Decoding,
    key: Array,
) -> Generated:
    """Decodes every row by itself, greedily or by sampling, as far as its positions last."""

    def add_token(state: _State, logits: Array, cache: PyTree) -> _State:
        logits = ban_repeats(logits, state.tokens, state.length, decoding.no_repeat_ngram)
        if decoding.sample:
            token_key = jax.random.fold_in(key, state.length)
            token = jax.random.categorical(token_key, filter_logits(logits, decoding), axis=-1)
        else:
            token = jnp.argmax(logits, axis=-1)
        token = jnp.where(state.has_ended, decoding.pad_id, token).astype(jnp.int32)
        has_ended = state.has_ended | is_stop(token, decoding.stop)
        if left is not None:
            has_ended |= state.length + 1 >= left
        return _State(
            state.length + 1,
            state.tokens.at[:, state.length].set(token),
            state.lengths + (1 - state.has_ended.astype(jnp.int32)),
            has_ended,
            cache,
        )

    def is_open(state: _State) -> Array:
        return (state.length < decoding.max_new_tokens) & ~state.has_ended.all()

    def body(state: _State) -> _State:
        last = state.tokens[:, state.length - 1]
        return add_token(state, *next_logits(last, state.length, state.cache))

    batch = logits.shape[0]
    zeros = jnp.zeros(batch, jnp.int32)
    tokens = jnp.full((batch, decoding.max_new_tokens), decoding.pad_id, jnp.int32)
    state = _State(jnp.int32(0), tokens, zeros, zeros > 0, cache)
    state = add_token(state, logits, cache)
    state = lax.while_loop(is_open, body, state)
    return Generated(state.tokens, state.lengths)


def _search_beams(
    next_logits: NextLogits, logits: Array, cache: PyTree, *, decoding: Decoding, axes: PyTree
) -> Generated:
    tokens = beam_search.search(next_logits, logits, cache, decoding=decoding, axes=axes)
    ends = is_stop(tokens, decoding.stop)
    first = jnp.argmax(ends, axis=-1).astype(jnp.int32) + 1
    return Generated(tokens, jnp.where(ends.any(axis=-1), first, decoding.max_new_tokens))


def _find_batch_axes(begin: Begin, params: PyTree, inputs: PyTree, room: int) -> PyTree:
    """Finds the axis along which each array of the cache grows with the batch; -1 for none."""

    def eval_cache(extra: int) -> PyTree:
        grow = lambda x: jax.ShapeDtypeStruct((x.shape[0] + extra, *x.shape[1:]), x.dtype)
        make_cache = lambda params, inputs: begin(params, inputs, room).cache
        return jax.eval_shape(make_cache, params, jax.tree.map(grow, inputs))

    def find_axis(small: jax.ShapeDtypeStruct, large: jax.ShapeDtypeStruct) -> int:
        sizes = zip(small.shape, large.shape, strict=True)
        return next((k for k, (size, larger) in enumerate(sizes) if size != larger), -1)

    return jax.tree.map(find_axis, eval_cache(0), eval_cache(1))
