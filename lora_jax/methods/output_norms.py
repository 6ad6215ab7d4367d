"""Norms of the outputs of a kernel, alone and with a low-rank term, without forming the sum.

For each output, over its inputs::

    ‖W + a·b‖² = ‖W‖² + c,    c = 2⟨aᵀW, b⟩ + ⟨b, (aᵀa)b⟩
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax.factors import B_AXES, BATCH, GAIN_AXES, IN, positions, spec_of, wide_dtype
from lora_jax.quantized import Quantized, decode, is_quantized

Array = jax.Array
# Squares of smaller norms are near the end of float32: such an output counts as zeros.
_SMALLEST = 1e-15


@functools.partial(jax.jit, static_argnames="axes")
def compute_norms(w: Array | Quantized, axes: str) -> Array:
    """Computes the norm of each output of a kernel over its inputs, in float32 or wider.

    Args:
      w: kernel, which may be quantized.
      axes: role of each axis of the kernel.

    Returns:
      ``(*batch, *out)``; norms that are too small for their squares are zero.
    """
    if is_quantized(w) and axes.startswith(BATCH):
        return lax.map(lambda layer: compute_norms(layer, _drop_batch(axes)), w)
    w = decode(w) if is_quantized(w) else w
    squares = jnp.square(jnp.asarray(w, wide_dtype(w.dtype)))
    norms = jnp.sqrt(jnp.sum(squares, axis=tuple(positions(axes, IN))))
    kept = [role for role in axes if role != IN]
    norms = lax.transpose(norms, positions(kept, GAIN_AXES))
    return jnp.where(norms < _SMALLEST, 0, norms)


def compute_gain(magnitude: Array, norm: Array, change: Array) -> Array:
    """Computes ``m / √(‖W‖² + c)`` so that it is one exactly at the start.

    It is ``(1 + (m - ‖W‖) / ‖W‖) / √(1 + c / ‖W‖²)``, which is one where ``m = ‖W‖`` and ``c = 0``,
    whatever a compiler makes of it: so an adapted kernel starts as the frozen one.

    Args:
      magnitude: ``m``, which alone has a gradient.
      norm: ``‖W‖``.
      change: ``c``, what the low-rank term adds to the square of the norm.
    """
    has_norm = norm > 0
    divisor = jnp.where(has_norm, norm, 1)
    ratio = jnp.where(has_norm, 1 + (magnitude - norm) / divisor, magnitude)
    # Where the sum is nearly zero, what is left of it by rounding must not be negative.
    square = 1 + change / divisor / divisor
    square = jnp.where(has_norm, jnp.maximum(square, jnp.finfo(square.dtype).eps), change)
    is_same = has_norm & (change == 0)  # not left to how a device rounds a root of one
    shrink = jnp.where(is_same, 1, lax.rsqrt(jnp.where(square > 0, square, 1)))
    return jnp.where(square > 0, ratio * shrink, 1)


def compute_change(w: Array | Quantized, a: Array, b: Array, axes: str) -> Array:
    """Computes ``‖W + a·b‖² - ‖W‖²`` of each output, ``2⟨aᵀW, b⟩ + ⟨b, (aᵀa)b⟩``.

    Args:
      w: kernel, which may be quantized.
      a: ``(*batch, *in, rank)``.
      b: ``(*batch, rank, *out)``, with the scale.
      axes: role of each axis of the kernel.

    Returns:
      ``(*batch, *out)`` in float32 or wider.
    """
    n = axes.count(BATCH)
    wide = wide_dtype(w.dtype, a.dtype, b.dtype)
    a, b = a.astype(wide), b.astype(wide)
    inputs = tuple(range(n, a.ndim - 1))
    gram = _dot(a, a, inputs, inputs, n, _find_sharding(w, axes, "brk"))  # aᵀa
    of_gram = _dot(gram, b, (n + 1,), (n,), n, _find_sharding(w, axes, B_AXES))
    return jnp.sum(b * (2 * project(w, a, axes) + of_gram), axis=n)


def project(w: Array | Quantized, a: Array, axes: str) -> Array:
    """Computes ``aᵀW``, ``(*batch, rank, *out)`` in the precision of ``a``, with no copy of ``W``.

    Numbers of a quantized kernel are made for one layer at a time. A kernel of 16 bits is not
    widened: ``a`` is taken for the sum of two arrays of 16 bits, but for CPUs, which have no such
    products.

    Args:
      w: kernel, which may be quantized.
      a: ``(*batch, *in, rank)``, in float32 or wider.
      axes: role of each axis of the kernel.
    """
    on_cpu = jax.default_backend() == "cpu"
    is_wide = not is_quantized(w) and w.dtype.itemsize >= 4
    if axes.startswith(BATCH) and (is_quantized(w) or (on_cpu and not is_wide)):
        return lax.map(lambda layer: project(layer[0], layer[1], _drop_batch(axes)), (w, a))
    kernel = decode(w) if is_quantized(w) else w
    if is_wide or on_cpu:
        return _project(kernel.astype(a.dtype), a, axes)
    is_half = kernel.dtype.itemsize == 2
    return project_in_halves(kernel if is_half else kernel.astype(jnp.bfloat16), a, axes)


def project_in_halves(w: Array, a: Array, axes: str) -> Array:
    """Computes ``aᵀW`` for a kernel of 16 bits, from the two halves of each number of ``a``."""
    high = lax.reduce_precision(a, *_bits(w.dtype))
    halves = jnp.concatenate([high, a - high], axis=-1).astype(w.dtype)
    of_halves = _project(w, halves, axes, preferred_element_type=a.dtype)
    of_high, of_low = jnp.split(of_halves, 2, axis=axes.count(BATCH))
    return of_high + of_low


def _project(w: Array, a: Array, axes: str, **options: Any) -> Array:
    n = axes.count(BATCH)
    batch, inputs = positions(axes, BATCH), positions(axes, IN)
    sharding = _find_sharding(w, axes, B_AXES)
    return lax.dot_general(
        a,
        w,
        ((range(n, a.ndim - 1), inputs), (range(n), batch)),
        precision=lax.Precision.HIGHEST,
        out_sharding=sharding,
        **options,
    )


def _bits(dtype: Any) -> tuple[int, int]:
    about = jnp.finfo(dtype)
    return about.nexp, about.nmant


def _dot(
    x: Array,
    y: Array,
    of_x: Sequence[int],
    of_y: Sequence[int],
    n_batch: int,
    sharding: NamedSharding | None,
) -> Array:
    """Sums over the given axes of both arrays, whose first ``n_batch`` axes are common to them."""
    batch = tuple(range(n_batch))
    dims = (of_x, of_y), (batch, batch)
    return lax.dot_general(x, y, dims, precision=lax.Precision.HIGHEST, out_sharding=sharding)


def _find_sharding(w: Array | Quantized, axes: str, letters: str) -> NamedSharding | None:
    """Returns the explicit sharding of an array that carries axes of a kernel; None without one."""
    sharding = None if is_quantized(w) else getattr(jax.typeof(w), "sharding", None)
    if sharding is None or all(entry is None for entry in sharding.spec):
        return None
    return NamedSharding(sharding.mesh, spec_of(letters, axes, sharding.spec))


def _drop_batch(axes: str) -> str:
    return axes.replace(BATCH, "", 1)
