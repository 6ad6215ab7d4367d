"""What a decoder has seen so far: keys and values slot by slot, and which slots a query sees."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
PyTree = Any


class Cache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
      layers: of each layer keys ``k`` and values ``v``, ``(batch, slots, kv_heads, head_dim)``; one
        stacked entry for scanned layers.
      index: int32, how many slots are filled.
    """

    layers: PyTree
    index: Array


def empty(shape: tuple[int, ...], dtype: Any, *, count: int, stacked: bool) -> Cache:
    """A cache of ``count`` layers with nothing in it.

    Args:
      shape: ``(batch, slots, kv_heads, head_dim)``.
      dtype: of keys and values.
      count: number of layers.
      stacked: whether they are scanned.

    >>> empty((3, 5, 2, 8), jnp.float32, count=4, stacked=True).layers["k"].shape
    (4, 3, 5, 2, 8)
    """
    layer = lambda *stack: {name: jnp.zeros((*stack, *shape), dtype) for name in "kv"}
    layers = layer(count) if stacked else tuple(layer() for _ in range(count))
    return Cache(layers, jnp.int32(0))


def slots(cache: Cache) -> int:
    """How many slots a cache has, filled or not."""
    return jax.tree.leaves(cache.layers)[0].shape[-3]


def write(layer: PyTree, new: Mapping[str, Array], index: Array) -> PyTree:
    """One layer's cache with keys and values ``(batch, n, kv_heads, head_dim)`` from ``index`` on.

    >>> layer = {"k": jnp.zeros((1, 3, 1, 1))}
    >>> write(layer, {"k": jnp.ones((1, 1, 1, 1))}, jnp.int32(1))["k"].ravel().tolist()
    [0.0, 1.0, 0.0]
    """
    put = lambda old, x: lax.dynamic_update_slice(old, x.astype(old.dtype), (0, index, 0, 0))
    return jax.tree.map(put, layer, dict(new))


def positions(mask: Array, start: Array | int, n: int) -> Array:
    """Positions ``(batch, n)`` of the tokens in the slots from ``start`` on.

    A position is the number of tokens before, by the mask ``(batch, slots)``; 0 at padding before
    the first one.

    >>> positions(jnp.array([[0, 0, 1, 1, 1]]), 1, 3).tolist()
    [[0, 0, 1]]
    """
    before = jnp.maximum(jnp.cumsum(mask > 0, axis=-1) - 1, 0)
    return lax.dynamic_slice_in_dim(before, start, n, axis=1)


def check(ids: Array, mask: Array, places: Array | None, count: int) -> None:
    """Raises ValueError unless tokens, mask of ``count`` slots, and positions if any, fit."""
    if len(ids.shape) != 2 or mask.shape != (ids.shape[0], count):
        raise ValueError(
            f"input_ids must have shape (batch, n), and attention_mask one entry for each, or for "
            f"each of the cache's {count} slots; got {ids.shape} and {mask.shape}."
        )
    if places is not None and places.shape != ids.shape:
        raise ValueError(f"positions must have the shape {ids.shape} of input_ids: {places.shape}.")
