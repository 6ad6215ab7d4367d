"""Moves of several kernels, or of a kernel and arrays: sums, choices, concatenation, products.

The rules of :mod:`.moves` that make one kernel of several, whose ranks add up.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from lora_jax.factors import BATCH, IN, OUT, factor_shapes, positions, swap_sides
from lora_jax.transform.kernel import (
    SAME,
    Kernel,
    Unfactored,
    align_roles,
    assign_roles,
    carried_axes,
    flip_sides,
    join_kernels,
    refuse_gain,
    widen,
)

Array = jax.Array


def add(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Computes ``w + plain + a·b``; the ranks of two kernels add up."""
    return [_sum_kernels([widen(v, w[0]) for v in vals if isinstance(v, Kernel)], w[0])]


def sub(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Computes ``w - plain + a·b``, or the other way round; the ranks of two kernels add up."""
    kernels = [widen(v, w[0]) for v in vals if isinstance(v, Kernel)]
    if isinstance(vals[1], Kernel):
        kernels[-1] = dataclasses.replace(kernels[-1], b=-kernels[-1].b)
    return [_sum_kernels(kernels, w[0])]


def _sum_kernels(kernels: Sequence[Kernel], w: Array) -> Kernel:
    refuse_gain(kernels, "adds to a kernel")
    kernels = align_roles(kernels)
    first = kernels[0]
    if len(kernels) == 1:
        return dataclasses.replace(first, w=w)
    a = _join([k.a for k in kernels], first.a.ndim - 1)
    b = _join([k.b for k in kernels], first.axes.count(BATCH))
    return join_kernels(kernels, w=w, a=a, b=b, axes=first.axes)


def _join(parts: Sequence[Array], axis: int) -> Array:
    dtype = jnp.result_type(*parts)
    return lax.concatenate([x.astype(dtype) for x in parts], axis)


def select(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Selects with ``lax.select_n`` by a scalar; a plain case has factors of zeros."""
    which, *cases = vals
    if isinstance(which, Kernel) or jnp.ndim(which):
        raise Unfactored("selects entry by entry")
    kernels = align_roles([c for c in cases if isinstance(c, Kernel)])
    rank = max(k.a.shape[-1] for k in kernels)
    remaining = iter([_pad_rank(k, rank) for k in kernels])
    zero = jax.tree.map(jnp.zeros_like, _pad_rank(kernels[0], rank))
    kernel_cases = [next(remaining) if isinstance(c, Kernel) else zero for c in cases]
    a, b = (_select_n(which, [getattr(k, side) for k in kernel_cases]) for side in ("a", "b"))
    gains, side = _collect_gains(cases, kernels)
    gain = _select_n(which, gains) if gains else None
    axes = kernels[0].axes
    return [join_kernels(kernels, w=w[0], a=a, b=b, axes=axes, gain=gain, gain_side=side)]


def _collect_gains(
    parts: Sequence[Kernel | Array], kernels: Sequence[Kernel]
) -> tuple[list[Array], str]:
    """Returns a gain for each part, ones where it has none, and their side; [] if none has any.

    Args:
      parts: kernels and plain arrays.
      kernels: the kernels among the parts, in their order, with the same roles.
    """
    sides = {k.gain_side for k in kernels if k.gain is not None}
    if len(sides) > 1:
        raise Unfactored("combines kernels with gains on different sides")
    if not sides:
        return [], OUT
    (side,), remaining = sides, iter(kernels)
    axes = carried_axes(kernels[0].axes, side)
    dtype = jnp.result_type(*(k.gain for k in kernels if k.gain is not None))

    def gain(part: Kernel | Array) -> Array:
        kernel = next(remaining) if isinstance(part, Kernel) else None
        if kernel is not None and kernel.gain is not None:
            return kernel.gain
        shape = (part.w if isinstance(part, Kernel) else part).shape
        return jnp.ones([shape[k] for k in axes], dtype)

    return [gain(part) for part in parts], side


def _select_n(which: Array, cases: Sequence[Array]) -> Array:
    dtype = jnp.result_type(*cases)
    return lax.select_n(which, *(x.astype(dtype) for x in cases))


def _pad_rank(kernel: Kernel, rank: int) -> Kernel:
    a = _pad_axis(kernel.a, kernel.a.ndim - 1, 0, rank)
    return dataclasses.replace(
        kernel, a=a, b=_pad_axis(kernel.b, kernel.axes.count(BATCH), 0, rank)
    )


def _pad_axis(x: Array, axis: int, before: int, size: int) -> Array:
    """Pads ``x`` with zeros along one axis, up to ``size``."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, size - before - x.shape[axis])
    return jnp.pad(x, widths)


def concatenate(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Concatenates as ``lax.concatenate``; see :func:`_concatenate_kernels`."""
    return [_concatenate_kernels(list(vals), w[0], eqn.params["dimension"])]


def stack(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Stacks as the primitive of ``jnp.stack``: concatenates along a new axis."""
    axis = eqn.params["axis"]
    return [_concatenate_kernels([_insert_axis(v, axis) for v in vals], w[0], axis)]


def _insert_axis(part: Kernel | Array, axis: int) -> Kernel | Array:
    if not isinstance(part, Kernel):
        return lax.expand_dims(part, [axis])
    axes = part.axes[:axis] + SAME + part.axes[axis:]
    return dataclasses.replace(part, w=lax.expand_dims(part.numbers, [axis]), axes=axes)


def _concatenate_kernels(parts: Sequence[Kernel | Array], w: Array, dimension: int) -> Kernel:
    """Puts kernels side by side, as when query, key and value are computed in one product.

    ``[W1 + a1·b1, W2 + a2·b2] = [W1, W2] + [a1, a2]·diag(b1, b2)``: the ranks add up. Along a batch
    axis the factors are concatenated as they are, the ranks padded with zeros to the largest.
    """
    kernels = align_roles([p for p in parts if isinstance(p, Kernel)])
    axes = kernels[0].axes
    if axes[dimension] == SAME:
        axes = axes[:dimension] + BATCH + axes[dimension + 1 :]
        kernels = [assign_roles(k, axes) for k in kernels]
    remaining = iter(kernels)
    aligned = [next(remaining) if isinstance(p, Kernel) else p for p in parts]
    factors = [_factors(part, kernels[0]) for part in aligned]
    sizes = [(p.w if isinstance(p, Kernel) else p).shape[dimension] for p in parts]
    a, b = _concatenate_factors(factors, sizes, axes, dimension)
    gains, side = _collect_gains(aligned, kernels)
    if gains and axes[dimension] not in (BATCH, side):
        refuse_gain(kernels, "joins kernels along a side that the gain does not vary over")
    gain = _join(gains, carried_axes(axes, side).index(dimension)) if gains else None
    return join_kernels(kernels, w=w, a=a, b=b, axes=axes, gain=gain, gain_side=side)


def _factors(part: Kernel | Array, like: Kernel) -> tuple[Array, Array]:
    """Returns the factors of a kernel; a plain array has factors of rank zero."""
    if isinstance(part, Kernel):
        return part.a, part.b
    axes = like.axes.replace(SAME, "")
    shape = [n for n, role in zip(part.shape, like.axes, strict=True) if role != SAME]
    a, b = factor_shapes(shape, axes, rank=0)
    return jnp.zeros(a, like.a.dtype), jnp.zeros(b, like.b.dtype)


def _concatenate_factors(
    factors: list[tuple[Array, Array]], sizes: list[int], axes: str, dimension: int
) -> tuple[Array, Array]:
    n, role = axes.count(BATCH), axes[dimension]
    if role == IN:  # the mirror image of an output axis
        swapped = [swap_sides(a, b, axes)[:2] for a, b in factors]
        mirror = swap_sides(*factors[0], axes)[2]
        a, b = _concatenate_factors(swapped, sizes, mirror, dimension)
        return swap_sides(a, b, mirror)[:2]
    if role == BATCH:
        rank = max(a.shape[-1] for a, _ in factors)
        where = positions(axes, BATCH).index(dimension)
        wide_a = [_pad_axis(a, a.ndim - 1, 0, rank) for a, _ in factors]
        wide_b = [_pad_axis(b, n, 0, rank) for _, b in factors]
        return _join(wide_a, where), _join(wide_b, where)
    where = n + 1 + positions(axes, OUT).index(dimension)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    pairs = zip(factors, starts, strict=True)
    wide_b = [_pad_axis(b, where, start, sum(sizes)) for (_, b), start in pairs]
    all_a = [a for a, _ in factors]
    return _join(all_a, all_a[0].ndim - 1), _join(wide_b, n)


def product(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Multiplies two kernels, whose ranks add up.

    ``(W1 + a1·b1)·(W2 + a2·b2) = W1·W2 + [a1, W1·a2]·[b1·(W2 + a2·b2), b2]``.
    """
    (left_in, right_in), (left_batch, _) = eqn.params["dimension_numbers"]
    if left_batch or not all(isinstance(v, Kernel) for v in vals):
        raise Unfactored("a product of two kernels with batch axes")
    left = _assign_sides(vals[0], left_in, OUT)
    right = _assign_sides(vals[1], right_in, IN)
    # As matrices the kernels are (rows, summed) and (summed, columns).
    rows, columns = positions(left.axes, IN), positions(right.axes, OUT)
    n_summed = math.prod(left.w.shape[k] for k in left_in)
    w1 = lax.transpose(left.numbers, [*rows, *left_in]).reshape(-1, n_summed)
    w2 = lax.transpose(right.numbers, [*right_in, *columns]).reshape(w1.shape[1], -1)
    order = lambda axes, wanted: [axes.index(k) for k in wanted]
    b1 = lax.transpose(left.b, [0, *(1 + k for k in order(positions(left.axes, OUT), left_in))])
    a2_order = order(positions(right.axes, IN), right_in)
    a2 = lax.transpose(right.a, [*a2_order, right.a.ndim - 1]).reshape(w1.shape[1], -1)
    a1, b1 = left.a.reshape(w1.shape[0], -1), b1.reshape(-1, w1.shape[1])
    b2 = right.b.reshape(-1, w2.shape[1])
    dtype = jnp.result_type(a1, b1, a2, b2)
    a1, b1, a2, b2, w1, w2 = (x.astype(dtype) for x in (a1, b1, a2, b2, w1, w2))
    a = lax.concatenate([a1, w1 @ a2], 1)
    b = lax.concatenate([b1 @ w2 + (b1 @ a2) @ b2, b2], 0)
    a = a.reshape(*(left.w.shape[k] for k in rows), -1)
    b = b.reshape(-1, *(right.w.shape[k] for k in columns))
    axes = IN * len(rows) + OUT * len(columns)
    return [join_kernels([left, right], w=w[0], a=a, b=b, axes=axes)]


def _assign_sides(kernel: Kernel, summed: Sequence[int], role: str) -> Kernel:
    """Puts exactly the given axes of a kernel on one side, and the rest on the other."""
    other = IN if role == OUT else OUT
    axes = "".join(role if k in summed else other for k in range(len(kernel.axes)))
    try:
        return assign_roles(kernel, axes)
    except Unfactored:
        return assign_roles(flip_sides(kernel), axes)
