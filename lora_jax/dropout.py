"""Dropout that draws 16 random bits for each entry."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def dropout(x: Array, rate: Any, key: Array, shape: Sequence[int] | None = None) -> Array:
    """Applies inverted dropout (Srivastava et al. 2014) with probability ``rate``.

    An entry becomes zero, or is scaled up so that the mean stays. The rate is rounded to a multiple
    of 2⁻¹⁶, and the scale fits the rounded rate, so that the mean is exact. With 32 bits for each
    entry the random numbers would take twice the time, which is much of a step on a CPU.

    Args:
      x: array of any floating-point dtype, which the result has, too.
      rate: a number or a scalar array, in [0, 1).
      key: PRNG key.
      shape: shape of the mask, if it is to be broadcast over some axes of ``x``.

    >>> y = dropout(jnp.ones((64, 63)), 0.25, jax.random.key(0))
    >>> sorted(set(y.ravel().tolist()))
    [0.0, 1.3333333730697632]
    """
    shape = x.shape if shape is None else tuple(shape)
    steps = jnp.clip(jnp.round(jnp.asarray(rate, jnp.float32) * 2**16), 0, 2**16 - 1)
    drop = _random_16_bits(key, shape) < steps.astype(jnp.uint32)
    sharding = getattr(jax.typeof(x), "sharding", None)
    if shape == x.shape and any(entry is not None for entry in getattr(sharding, "spec", ())):
        drop = jax.sharding.reshard(drop, sharding)  # types with explicit shardings have to agree
    scaled = x / (1.0 - steps / 2**16).astype(x.dtype)
    return jnp.where(jnp.broadcast_to(drop, x.shape), jnp.zeros_like(scaled), scaled)


def _random_16_bits(key: Array, shape: Sequence[int]) -> Array:
    """Draws integers in ``[0, 2**16)``, uint32, two from each word along the last axis."""
    *lead, last = shape or (1,)
    words = jax.random.bits(key, (*lead, -(-last // 2)), jnp.uint32)
    if any(map(jax.export.is_symbolic_dim, shape)):  # an exported bitcast can't be refined
        halves = jnp.stack([words & 0xFFFF, words >> 16], axis=-1)
    else:
        halves = lax.bitcast_convert_type(words, jnp.uint16)  # (*lead, words, 2)
    flat = halves.reshape(*lead, -1)[..., :last]
    return flat.reshape(tuple(shape)).astype(jnp.uint32)
