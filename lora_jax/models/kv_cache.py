"""The cache of a decoder: keys and values of the tokens so far, in slots."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

Array = jax.Array
PyTree = Any


class Cache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
      layers: keys ``k`` and values ``v`` of each layer, ``(batch, slots, kv_heads, head_dim)``; one
        stacked entry for scanned layers.
      index: number of slots that are filled, an int32 scalar.
    """

    layers: PyTree
    index: Array  # type: ignore[assignment]  # it hides tuple.index


def init(shape: tuple[int, ...], dtype: DTypeLike, *, num_layers: int, scan_layers: bool) -> Cache:
    """Makes an empty cache.

    Args:
      shape: ``(batch, slots, kv_heads, head_dim)``.
      dtype: dtype of keys and values.
      num_layers: number of layers.
      scan_layers: whether the layers are stacked.

    >>> init((3, 5, 2, 8), jnp.float32, num_layers=4, scan_layers=True).layers["k"].shape
    (4, 3, 5, 2, 8)
    """
    if scan_layers:
        return Cache(_init_layer((num_layers, *shape), dtype), jnp.int32(0))
    return Cache(tuple(_init_layer(shape, dtype) for _ in range(num_layers)), jnp.int32(0))


def _init_layer(shape: tuple[int, ...], dtype: DTypeLike) -> dict[str, Array]:
    return {name: jnp.zeros(shape, dtype) for name in "kv"}


def count_slots(cache: Cache) -> int:
    """Counts the slots of a cache, filled or not."""
    return jax.tree.leaves(cache.layers)[0].shape[-3]


def write(layer: PyTree, new: Mapping[str, Array], index: Any) -> PyTree:
    """Writes keys and values into the slots of one layer.

    Args:
      layer: the layer's cache, ``(batch, slots, kv_heads, head_dim)`` for each name.
      new: ``(batch, n, kv_heads, head_dim)`` for each name, in any dtype.
      index: the slot of the first of the ``n``, an integer scalar.

    Returns:
      The layer's new cache.

    >>> layer = {"k": jnp.zeros((1, 3, 1, 1))}
    >>> write(layer, {"k": jnp.ones((1, 1, 1, 1))}, jnp.int32(1))["k"].ravel().tolist()
    [0.0, 1.0, 0.0]
    """
    put = lambda old, x: lax.dynamic_update_slice(old, x.astype(old.dtype), (0, index, 0, 0))
    return jax.tree.map(put, layer, dict(new))


def compute_positions(mask: Array, start: Array | int, n: int) -> Array:
    """Computes the positions of the tokens in ``n`` slots from ``start`` on.

    A position is the number of tokens before it; it is 0 at padding before the first token.

    Args:
      mask: ``(batch, slots)``, positive where there is a token.
      start: the first of the slots.
      n: number of slots.

    Returns:
      Integers ``(batch, n)``.

    >>> compute_positions(jnp.array([[0, 0, 1, 1, 1]]), 1, 3).tolist()
    [[0, 0, 1]]
    """
    before = jnp.maximum(jnp.cumsum(mask > 0, axis=-1) - 1, 0)
    return lax.dynamic_slice_in_dim(before, start, n, axis=1)


def check_inputs(ids: Array, mask: Array, positions: Array | None, num_slots: int) -> None:
    """Raises ValueError unless tokens, mask and positions (if there are any) fit the slots."""
    if len(ids.shape) != 2 or mask.shape != (ids.shape[0], num_slots):
        raise ValueError(
            f"input_ids must have shape (batch, n), and attention_mask one entry for each, or for "
            f"each of the cache's {num_slots} slots; got {ids.shape} and {mask.shape}."
        )
    if positions is not None and positions.shape != ids.shape:
        raise ValueError(
            f"positions must have the shape {ids.shape} of input_ids: {positions.shape}."
        )


def check_mask(ids: Array, mask: Array, slots: tuple[int, ...]) -> None:
    """Raises ValueError unless tokens ``(batch, n)`` and a mask ``(batch, *slots)`` fit."""
    if len(ids.shape) != 2 or mask.shape != (*ids.shape[:1], *slots):
        raise ValueError(
            f"The tokens must have shape (batch, length) and the mask one entry for each, or for "
            f"each of the cache's slots {slots}; got {ids.shape} and {mask.shape}."
        )
