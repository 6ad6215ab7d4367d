"""Text generation with a cache of keys and values, compiled as one program.

A model is two functions, so that one file serves decoders and encoder-decoders, plain parameters
(an adapter merged into them) and bound ones (``lora.lift(step)``):

- ``begin(params, inputs, room) -> Start``: the tokens to go on from, and a cache with ``room`` more
  slots than these need;
- ``step(params, ids, mask, positions, cache) -> (logits, cache)``: the logits ``(batch, vocab)`` of
  the last of the tokens ``ids`` ``(batch, n)``, which are put into the cache. The mask ``(batch,
  slots of the cache)`` is 1 at each slot that may be attended to once it is filled.

Parameters are arguments: another adapter of the same shapes needs no compilation.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.models import beam_search, kv_cache
from lora_jax.models.decoding import Decoding, filtered, is_stop, no_repeat

Array = jax.Array
PyTree = Any


class Start(NamedTuple):
    """What generation starts from.

    Attributes:
      ids: tokens ``(batch, n)``, padded on the left.
      mask: ``(batch, n)``, positive where there is a token.
      cache: a tree of arrays. An axis along which they grow with the batch belongs to it; there may
        be arrays without one.
    """

    ids: Array
    mask: Array
    cache: PyTree


class Generated(NamedTuple):
    """New tokens.

    Attributes:
      tokens: ``(batch, max_new_tokens)`` int32; after the stop token there is padding.
      lengths: ``(batch,)`` int32, how many there are, the stop token included.
    """

    tokens: Array
    lengths: Array


def causal_lm(model: Any, init_cache: Callable) -> tuple[Callable, Callable]:
    """``begin`` and ``step`` of a decoder.

    The inputs are ``input_ids`` and ``attention_mask``, ``(batch, n)``, padded on either side.

    Args:
      model: a Linen module that is called with tokens, mask, positions and cache.
      init_cache: its family's.
    """

    def begin(params: PyTree, inputs: dict[str, Array], room: int) -> Start:
        del params
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        order = jnp.argsort(mask > 0, axis=-1, stable=True)  # padding first
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

    return begin, step


def seq2seq_lm(
    model: Any, init_cache: Callable, *, transform: Callable = lambda fn: fn
) -> tuple[Callable, Callable]:
    """``begin`` and ``step`` of an encoder-decoder.

    The inputs are ``input_ids`` and ``attention_mask``, ``(batch, n)``, padded on either side. They
    are encoded once; every text starts with the model's own first token.

    Args:
      model: a Linen module with methods ``encode`` and ``decode``, whose positions are relative.
      init_cache: its family's.
      transform: what both functions go through, ``lora.lift`` for bound parameters.
    """
    encode = transform(lambda params, ids, mask: model.apply(params, ids, mask, method="encode"))

    def begin(params: PyTree, inputs: dict[str, Array], room: int) -> Start:
        memory = encode(params, inputs["input_ids"], inputs["attention_mask"])
        shape = (inputs["input_ids"].shape[0], 1)
        ids = jnp.full(shape, model.config.decoder_start_token_id, jnp.int32)
        cache = init_cache(
            model.config, shape[0], 1 + room, model.dtype, scan_layers=model.scan_layers
        )
        return Start(ids, jnp.ones(shape, jnp.int32), (memory, cache))

    def step(
        params: PyTree, ids: Array, mask: Array, positions: Array, cache: PyTree
    ) -> tuple[Array, PyTree]:
        del positions  # the distances between slots say all
        memory, cache = cache
        logits, cache = model.apply(params, ids, mask, memory=memory, cache=cache, method="decode")
        return logits[:, -1], (memory, cache)

    return begin, transform(step)


def generator(begin: Callable, step: Callable, decoding: Decoding) -> Callable:
    """``(params, inputs, key=None) -> Generated``, compiled once for each shape of the inputs.

    Args:
      begin: see above.
      step: see above.
      decoding: how tokens are chosen. ``key`` is needed for sampling alone.

    Raises:
      ValueError: when called, sampling without a key.
    """

    @jax.jit
    def run(params: PyTree, inputs: PyTree, key: Array) -> Generated:
        room = decoding.max_new_tokens
        ids, mask, cache = begin(params, inputs, room)
        mask = jnp.pad(mask, ((0, 0), (0, room)), constant_values=1)
        positions = kv_cache.positions(mask, 0, mask.shape[1])
        n = ids.shape[1]
        logits, cache = step(params, ids, mask, positions[:, :n], cache)

        def more(tokens: Array, made: Array, cache: PyTree, rows: int = 1) -> tuple[Array, PyTree]:
            """One token further, for ``rows`` texts of each of the batch."""
            place = lax.dynamic_slice_in_dim(positions, n + made - 1, 1, axis=1)
            repeat = lambda x: jnp.repeat(x, rows, axis=0) if rows > 1 else x
            return step(params, tokens[:, None], repeat(mask), repeat(place), cache)

        if decoding.beams == 1:
            return _one_by_one(more, logits, cache, decoding=decoding, key=key)
        axes = _batch_axes(begin, params, inputs, room)
        return _beam_search(more, logits, cache, decoding=decoding, axes=axes)

    def generate(params: PyTree, inputs: PyTree, key: Array | None = None) -> Generated:
        if key is None and decoding.sample:
            raise ValueError("Sampling needs a PRNG key: generate(params, inputs, key).")
        return run(params, inputs, jax.random.key(0) if key is None else key)

    return generate


def left_padded(
    rows: Sequence[Sequence[int]], *, pad_id: int, length: int
) -> dict[str, np.ndarray]:
    """Prompts of different lengths as one batch.

    Raises:
      ValueError: a prompt is empty, or longer than ``length``.

    >>> left_padded([[5, 6], [7]], pad_id=0, length=3)["input_ids"].tolist()
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
    made: Array  # number of tokens of each row
    tokens: Array
    lengths: Array
    done: Array
    cache: PyTree


def _one_by_one(
    more: Callable, logits: Array, cache: PyTree, *, decoding: Decoding, key: Array
) -> Generated:
    """Greedy decoding, or sampling."""

    def add(state: _State, logits: Array, cache: PyTree) -> _State:
        logits = no_repeat(logits, state.tokens, state.made, decoding.no_repeat_ngram)
        if decoding.sample:
            own = jax.random.fold_in(key, state.made)
            token = jax.random.categorical(own, filtered(logits, decoding), axis=-1)
        else:
            token = jnp.argmax(logits, axis=-1)
        token = jnp.where(state.done, decoding.pad_id, token).astype(jnp.int32)
        return _State(
            state.made + 1,
            state.tokens.at[:, state.made].set(token),
            state.lengths + (1 - state.done.astype(jnp.int32)),
            state.done | is_stop(token, decoding.stop),
            cache,
        )

    def body(state: _State) -> _State:
        last = state.tokens[:, state.made - 1]
        return add(state, *more(last, state.made, state.cache))

    batch, room = logits.shape[0], decoding.max_new_tokens
    zeros = jnp.zeros(batch, jnp.int32)
    tokens = jnp.full((batch, room), decoding.pad_id, jnp.int32)
    state = _State(jnp.int32(0), tokens, zeros, zeros > 0, cache)
    state = add(state, logits, cache)
    state = lax.while_loop(lambda s: (s.made < room) & ~s.done.all(), body, state)
    return Generated(state.tokens, state.lengths)


def _beam_search(
    more: Callable, logits: Array, cache: PyTree, *, decoding: Decoding, axes: PyTree
) -> Generated:
    tokens = beam_search.search(more, logits, cache, decoding=decoding, axes=axes)
    ends = is_stop(tokens, decoding.stop)
    first = jnp.argmax(ends, axis=-1).astype(jnp.int32) + 1
    return Generated(tokens, jnp.where(ends.any(axis=-1), first, decoding.max_new_tokens))


def _batch_axes(begin: Callable, params: PyTree, inputs: PyTree, room: int) -> PyTree:
    """Along which axis each array of the cache grows with the batch; -1 for none."""

    def shapes(extra: int) -> PyTree:
        more = lambda x: jax.ShapeDtypeStruct((x.shape[0] + extra, *x.shape[1:]), x.dtype)
        cache_of = lambda params, inputs: begin(params, inputs, room).cache
        return jax.eval_shape(cache_of, params, jax.tree.map(more, inputs))

    def axis(one: Any, other: Any) -> int:
        sizes = zip(one.shape, other.shape, strict=True)
        return next((k for k, (size, larger) in enumerate(sizes) if size != larger), -1)

    return jax.tree.map(axis, shapes(0), shapes(1))
