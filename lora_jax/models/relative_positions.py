"""Relative positions as T5 has them: buckets of distances, and a bias for each distance."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class RelativeBias(NamedTuple):
    """Terms of attention's scores that depend on the distance ``key - query`` alone.

    Attributes:
      values: ``(heads, distances)``, for the distances from ``first`` on.
      first: the lowest distance, an integer scalar.
    """

    values: Array
    first: Array | int


def make_relative_bias(bias: RelativeBias, queries: Array, keys: Array) -> Array:
    """Makes the terms of some queries and keys.

    Args:
      bias: the term of each distance.
      queries: integers ``(n,)``, places of the queries.
      keys: integers ``(m,)``, places of the keys.

    Returns:
      ``(heads, n, m)``. A distance that has no term has that of the nearest one that has.

    >>> bias = RelativeBias(jnp.array([[-1, 0, 1]]), -1)
    >>> make_relative_bias(bias, jnp.arange(2), jnp.arange(2)).tolist()
    [[[0, 1], [-1, 0]]]
    """
    distances = keys[None, :] - queries[:, None] - bias.first
    return jnp.take(bias.values, distances, axis=1, mode="clip")


def relative_buckets(
    relative: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
    """Finds the buckets of ``key - query`` distances (Raffel et al. 2020, section 2.1).

    Half of the buckets of a direction hold one distance each, and the others grow with the
    logarithm of the distance. With two directions, each has half of all buckets; with one, keys
    after the query are in bucket 0.

    Args:
      relative: integers, of any shape.
      bidirectional: whether keys after the query have buckets of their own.
      num_buckets: number of buckets of both directions.
      max_distance: distance from which on all are in the last bucket of a direction.

    Returns:
      Integers in the shape of ``relative``.

    >>> distances = jnp.array([-40, -3, -1, 0, 1, 3, 40])
    >>> options = {"bidirectional": True, "num_buckets": 8, "max_distance": 16}
    >>> relative_buckets(distances, **options).tolist()
    [3, 2, 1, 0, 5, 6, 7]
    """
    count = num_buckets // 2 if bidirectional else num_buckets
    table = jnp.asarray(_make_table(count, max_distance))
    distances = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    buckets = table[jnp.minimum(distances, max_distance)]
    return jnp.where(relative > 0, buckets + count, buckets) if bidirectional else buckets


def _make_table(count: int, max_distance: int) -> np.ndarray:
    """Makes the bucket of each distance from 0 to ``max_distance``, int32."""
    exact = count // 2
    distances = np.arange(max_distance + 1)
    # The host computes it in float32, with the operations of the original in their order: where a
    # logarithm is near a whole number, another rounding would give another bucket.
    far = np.log(np.maximum(distances, exact).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(max_distance / exact)) * np.float32(count - exact)
    far = np.minimum(exact + far.astype(np.int32), count - 1)
    return np.where(distances < exact, distances, far).astype(np.int32)
