"""Relative positions in buckets, as T5 has them."""

import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def relative_buckets(relative: Array, *, bidirectional: bool, buckets: int, furthest: int) -> Array:
    """Numbers of the buckets of ``key - query`` distances (Raffel et al. 2020, section 2.1).

    Half of the buckets of a direction hold one distance each; the others grow with the logarithm
    of the distance. With two directions each has half of all buckets; with one, keys after the
    query are in bucket 0.

    Args:
      relative: integers, of any shape.
      bidirectional: whether keys after the query are told from those before it.
      buckets: how many there are in all.
      furthest: the last bucket of a direction holds all distances from this one on.

    >>> distances = jnp.array([-40, -3, -1, 0, 1, 3, 40])
    >>> relative_buckets(distances, bidirectional=True, buckets=8, furthest=16).tolist()
    [3, 2, 1, 0, 5, 6, 7]
    """
    count = buckets // 2 if bidirectional else buckets
    table = jnp.asarray(_table(count, furthest))
    steps = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    found = table[jnp.minimum(steps, furthest)]
    return jnp.where(relative > 0, found + count, found) if bidirectional else found


def _table(count: int, furthest: int) -> np.ndarray:
    """The bucket of each distance from 0 to ``furthest``."""
    exact = count // 2
    distances = np.arange(furthest + 1)
    # On the host and in float32, operation by operation as in the original: where a logarithm
    # falls on a whole number, another rounding would be another bucket.
    far = np.log(np.maximum(distances, exact).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(furthest / exact)) * np.float32(count - exact)
    far = np.minimum(exact + far.astype(np.int32), count - 1)
    return np.where(distances < exact, distances, far).astype(np.int32)
