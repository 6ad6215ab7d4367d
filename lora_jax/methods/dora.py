"""DoRA: a trained magnitude for each output of a kernel (Liu et al. 2024, section 4.1, eq. 5).

With ``V = W + s·BA`` a kernel becomes ``W' = m ⊙ V / ‖V‖``, where ``‖V‖`` has the norm of each
output over the inputs, and is a constant to the gradient (section 4.3). Here this is ``gain ⊙ W +
a·b`` with the gain ``m / ‖V‖`` on both terms, and the norm is found without forming ``V``::

    ‖V‖² = ‖W‖² + c,    c = 2s⟨aᵀW, b⟩ + s²⟨b, (aᵀa)b⟩

The gain is computed as ``(1 + (m - ‖W‖) / ‖W‖) / √(1 + c / ‖W‖²)``, which is one exactly where
``m = ‖W‖`` and ``b = 0``, whatever a compiler makes of it: so the kernel starts as the frozen one.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax.factors import (
    A_AXES,
    B_AXES,
    BATCH,
    GAIN_AXES,
    IN,
    positions,
    spec_of,
    wide_dtype,
)
from lora_jax.lowrank import LowRank, scaled_b
from lora_jax.methods.initial_values import INITS
from lora_jax.methods.start import Start
from lora_jax.nodes import Adapted, Field, Terms
from lora_jax.quantized import Quantized, decode, is_quantized
from lora_jax.registration import register

Array = jax.Array
# Squares of smaller norms are near the end of float32: such an output counts as zeros.
_SMALLEST = 1e-15


@register
@dataclasses.dataclass(frozen=True, eq=False)
class DoRA(Adapted):
    """A kernel whose outputs have trained magnitudes, and directions with a low-rank term.

    An output whose frozen kernel is zero has the magnitude zero, and the gain one until its
    low-rank term is no longer zero.

    Attributes:
      a: ``(*batch, *in, rank)``, the paper's ``A`` transposed.
      b: ``(*batch, rank, *out)``, the paper's ``B`` transposed.
      magnitude: ``m``, ``(*batch, *out)``, which is trained.
      norm: ``‖W‖``, ``(*batch, *out)``, the norms of the kernel that the adapter was made for.
      scale: ``s``, a finite number, which becomes a Python float, or a scalar array.
      w: frozen kernel in a bound tree; None in an adapter.
      axes: role of each kernel axis, for example "io".
      name: path of the kernel in a bound tree, for messages.
      dropout: rate in [0, 1) of the dropout on the input of the branch, for :func:`lora_jax.lift`.

    >>> w = jnp.array([[3.0, 0.0], [4.0, 1.0]])
    >>> a, b, norm = jnp.ones((2, 1)), jnp.zeros((1, 2)), compute_norms(w, "io")
    >>> DoRA(a, b, 2 * norm, norm, 1.0).merge(w)
    Array([[6., 0.],
           [8., 2.]], dtype=float32)
    """

    kind: ClassVar[str] = "dora"
    reads_kernel: ClassVar[bool] = False  # but for its product with a, which `project` computes
    table: ClassVar[Mapping[str, Field]] = {
        "a": Field(A_AXES),
        "b": Field(B_AXES, has_b_rate=True),
        "magnitude": Field(GAIN_AXES, has_b_rate=True),
        "norm": Field(GAIN_AXES, is_trained=False),
        "scale": Field("", is_trained=False, scales="b"),
    }

    a: Array
    b: Array
    magnitude: Array
    norm: Array
    scale: Array | float
    w: Array | None = None
    axes: str = "io"
    name: str = ""
    dropout: float = 0.0

    def terms(self, w: Array | Quantized) -> Terms:
        """Returns ``a``, ``gain · s·b`` and the gain."""
        b = scaled_b(self)
        change = compute_change(*lax.stop_gradient((w, self.a, b)), self.axes)
        # Behind the barrier it is one number for each output, and not computed for each row.
        gain = lax.optimization_barrier(compute_gain(self.magnitude, self.norm, change))
        return Terms(self.a, b * _beside_rank(gain, self.axes).astype(b.dtype), gain)


def start_dora(start: Start) -> DoRA:
    """Makes the first node of a kernel: factors as in plain LoRA, and the kernel's own magnitudes.

    Raises:
      ValueError: there are no numbers to take the magnitudes from, or the first values of the
        factors are those of another method than plain LoRA.
    """
    factors = INITS[start.init](start)
    if type(factors) is not LowRank:
        raise ValueError(
            f"method 'dora' can't start with init {start.init!r}, which gives {start.name!r} a "
            f"node of the kind {factors.kind!r}; choose another of them."
        )
    start.require_numbers("method='dora'")
    norm = compute_norms(start.kernel, start.axes).astype(start.dtype)
    return DoRA(
        a=factors.a,
        b=factors.b,
        magnitude=jnp.array(norm, copy=True),  # two arrays, of which a step may donate each
        norm=norm,
        scale=factors.scale,
        axes=factors.axes,
        dropout=factors.dropout,
    )


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


def _beside_rank(gain: Array, axes: str) -> Array:
    """Gives a gain the axis of the rank that ``b`` has."""
    return lax.expand_dims(gain, [axes.count(BATCH)])


def _drop_batch(axes: str) -> str:
    return axes.replace(BATCH, "", 1)
