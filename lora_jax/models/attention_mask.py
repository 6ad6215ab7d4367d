"""What a query of attention may see, as a description whose size is linear in the length.

A mask of all queries and keys has a number for each pair of them. :class:`Mask` has what that is
made of, one entry for a query or a key. Of it :func:`make_allowed` makes the mask of all, or of any
block of queries and keys: one function for both, so that all ways to compute attention agree.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
_ABSENT: Any = None  # what belongs to no query and no key


class Slots(NamedTuple):
    """What is known of some queries, or of some keys; each part is None where it plays no part.

    Attributes:
      index: integers ``(n,)``, the places among the keys.
      is_token: ``(batch, n)``, positive where there is a token, 0 at padding; of keys alone.
      segments: integers ``(batch, n)``, the number of the text that a token belongs to.
    """

    index: Array = _ABSENT  # type: ignore[assignment]  # it hides tuple.index
    is_token: Array | None = None
    segments: Array | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("queries", "keys", "is_windowed"),
    meta_fields=("causal", "window"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query may see: those that every part of the description allows.

    Attributes:
      queries: the queries.
      keys: the keys; a key that holds no token is seen by nobody.
      causal: whether a query sees no key that comes after it.
      window: number of keys that a query sees at most, itself and those right before it; None for
        all. It takes a causal mask.
      is_windowed: whether the window holds, a boolean that may be traced, for layers that share one
        program and differ in this; None where the window holds in any case.
    """

    queries: Slots
    keys: Slots
    causal: bool = False
    window: int | None = None
    is_windowed: Array | bool | None = None

    def __post_init__(self) -> None:
        if self.window is not None and not self.causal:
            raise ValueError(f"The window {self.window} takes a causal mask, and this one is not.")


def make_padding_mask(attention_mask: Array) -> Mask:
    """Allows every query all keys that hold a token.

    Args:
      attention_mask: ``(batch, keys)``, positive where there is a token, 0 at padding.

    >>> make_bias(make_padding_mask(jnp.array([[1, 0]]))).shape
    (1, 1, 1, 2)
    """
    return Mask(queries=Slots(), keys=Slots(is_token=attention_mask))


def make_causal_mask(
    attention_mask: Array,
    queries: Array,
    *,
    segments: Array | None = None,
    window: int | None = None,
    is_windowed: Array | bool | None = None,
) -> Mask:
    """Allows each query the keys that hold a token and do not come after it.

    Args:
      attention_mask: ``(batch, keys)``, positive where there is a token, 0 at padding.
      queries: integers ``(n,)``, the places of the queries among the keys.
      segments: integers ``(batch, keys)``, where there are as many queries as keys: a query sees
        only keys with its own number. None for one text.
      window: as of :class:`Mask`.
      is_windowed: as of :class:`Mask`.

    >>> mask = make_causal_mask(jnp.array([[0, 1, 1]]), jnp.array([1, 2]))
    >>> make_allowed(mask, mask.queries, mask.keys).tolist()
    [[[False, True, False], [False, True, True]]]
    """
    keys = jnp.arange(attention_mask.shape[1])
    return Mask(
        queries=Slots(queries, segments=segments),
        keys=Slots(keys, attention_mask, segments),
        causal=True,
        window=window,
        is_windowed=is_windowed,
    )


def make_allowed(mask: Mask, queries: Slots, keys: Slots) -> Array:
    """Makes the mask of some queries and some keys.

    Args:
      mask: the description, of which only ``causal`` and the window are read here.
      queries: its queries, or a block of them.
      keys: its keys, or a block of them.

    Returns:
      Booleans ``(batch, n, keys)``; an axis has size 1 where all along it are alike.
    """
    parts = []
    if mask.causal:
        parts.append(keys.index[None, None, :] <= queries.index[None, :, None])
    if keys.is_token is not None:
        parts.append((keys.is_token > 0)[:, None, :])
    if keys.segments is not None and queries.segments is not None:
        parts.append(queries.segments[:, :, None] == keys.segments[:, None, :])
    if mask.window is not None and mask.is_windowed is not False:
        near = keys.index[None, None, :] > queries.index[None, :, None] - mask.window
        parts.append(_or_unwindowed(mask, near))
    return functools.reduce(jnp.logical_and, parts) if parts else jnp.ones((1, 1, 1), bool)


def make_bias(mask: Mask, bias: Array | float = 0.0) -> Array:
    """Returns what is added to the scores: ``bias``, or the lowest float32 where it is not allowed.

    The sum is taken in float32 before the softmax: a key that is not allowed has weight exactly
    zero, and a query that is allowed no key (padding) has equal weights rather than NaN.

    Args:
      mask: what the queries may see.
      bias: added to the scores that are allowed; it broadcasts with ``(batch, 1, n, keys)``.

    Returns:
      Float32, or the dtype of ``bias`` if that is wider: ``(batch, 1, n, keys)``, or its shape
      broadcast with that of ``bias``; an axis has size 1 where all along it are alike.
    """
    allowed = make_allowed(mask, mask.queries, mask.keys)[:, None]
    return jnp.where(allowed, bias, jnp.finfo(jnp.float32).min)


def find_visible_blocks(mask: Mask, queries: Slots, keys: Slots) -> Array | None:
    """Finds the pairs of blocks in which some query may see some key, without looking at each pair.

    A block is known by the first and the last place, and the smallest and the largest number of a
    segment in it, so that some pairs are named in which nothing can be seen, but none is left out.

    Args:
      mask: the description, of which only ``causal`` and the window are read here.
      queries: blocks of its queries, each part with a leading axis of blocks.
      keys: blocks of its keys, each part with a leading axis of blocks.

    Returns:
      Booleans ``(blocks of queries, blocks of keys)``; None if nothing can be said.
    """
    parts = []
    if keys.is_token is not None:
        parts.append((keys.is_token > 0).any((1, 2))[None, :])
    if keys.segments is not None and queries.segments is not None:
        parts.append(_find_shared_segments(queries.segments, keys.segments))
    if mask.causal:
        parts.append(keys.index.min(1)[None, :] <= queries.index.max(1)[:, None])
    if mask.window is not None and mask.is_windowed is not False:
        near = keys.index.max(1)[None, :] > queries.index.min(1)[:, None] - mask.window
        parts.append(_or_unwindowed(mask, near))
    return functools.reduce(jnp.logical_and, parts) if parts else None


def _find_shared_segments(queries: Array, keys: Array) -> Array:
    """Finds the blocks whose segments overlap in some row, given ``(blocks, batch, n)`` of each."""
    low = lambda x, y: x.min(2)[:, None] <= y.max(2)[None, :]
    return (low(queries, keys) & low(keys, queries).swapaxes(0, 1)).any(2)


def _or_unwindowed(mask: Mask, near: Array) -> Array:
    if mask.is_windowed is None or mask.is_windowed is True:
        return near
    return near | jnp.logical_not(mask.is_windowed)
