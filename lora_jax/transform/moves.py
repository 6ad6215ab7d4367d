"""Moves: the primitives that take a kernel that is a low-rank sum, and give back such kernels.

The frozen part goes through the very equation of the user's function, whatever its parameters are.
A rule says only what becomes of the factors. It is called with the equation, its operands, and the
equation's results for the frozen parts, and gives the results: kernels, or plain arrays where no
factor is concerned. It raises :class:`Unfactored` with the reason where the sum does not stay one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import lowrank
from lora_jax.lowrank import BATCH, IN, OUT, positions
from lora_jax.transform import forms
from lora_jax.transform.kernel import (
    SAME,
    Kernel,
    Unfactored,
    alike,
    axis_groups,
    carried,
    is_free,
    joint,
    map_factors,
    rank_inside,
    rank_last,
    turned,
    with_roles,
)

Array = jax.Array
Rule = Callable[[Any, Sequence[Any], Sequence[Array]], list]


def _the_kernel(vals: Sequence[Any], which: int = 0) -> Kernel:
    """Operand number ``which``, if it and no other is a kernel."""
    kernels = [k for k, x in enumerate(vals) if isinstance(x, Kernel)]
    if kernels != [which]:
        raise Unfactored(
            f"operands {kernels} are low-rank sums; the rule wants operand {which} only"
        )
    return vals[which]


# ---- One kernel, rearranged ----------------------------------------------------------------------


def _transpose(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    return [_transposed(_the_kernel(vals), w[0], eqn.params["permutation"])]


def _transposed(kernel: Kernel, w: Array, order: Sequence[int]) -> Kernel:
    def change(x: Array, old: list[int], new: list[int]) -> Array:
        return lax.transpose(x, [old.index(order[k]) for k in new] + [x.ndim - 1])

    return map_factors(kernel, w, "".join(kernel.axes[k] for k in order), change)


def _reshape(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """``lax.reshape``, if it splits and joins axes within one role only."""
    kernel, shape, order = _the_kernel(vals), w[0].shape, eqn.params.get("dimensions")
    if order is not None:
        kernel = _transposed(kernel, lax.transpose(kernel.w, order), order)
    groups = axis_groups(kernel.w.shape, shape)
    axes = [SAME] * len(shape)
    for old, new in groups:
        role = _joined_role(kernel, old)
        # An axis along which nothing changes takes the role of the axes that it is joined with.
        joined = [role if is_free(kernel, k) and k in old else x for k, x in enumerate(kernel.axes)]
        if role != SAME and any(kernel.axes[k] == SAME and kernel.w.shape[k] != 1 for k in old):
            kernel = with_roles(kernel, "".join(joined))
        for k in new:
            axes[k] = role
    return [_reshaped(kernel, w[0], "".join(axes), eqn.params.get("sharding"))]


def _joined_role(kernel: Kernel, group: Sequence[int]) -> str:
    roles = {kernel.axes[k] for k in group if not is_free(kernel, k)}
    if len(roles) > 1:
        raise Unfactored("reshape joins axes of different sides (input, output, batch)")
    rest = [kernel.axes[k] for k in group if kernel.axes[k] != SAME]
    return roles.pop() if roles else (rest or [SAME])[0]


def _reshaped(kernel: Kernel, w: Array, axes: str, sharding: Any = None) -> Kernel:
    def change(x: Array, old: list[int], new: list[int]) -> Array:
        sizes = [*(w.shape[k] for k in new), x.shape[-1]]
        options = {} if sharding is None else {"out_sharding": _of_factor(sharding, new)}
        return jnp.reshape(x, sizes, **options)

    return map_factors(kernel, w, axes, change)


def _of_factor(sharding: Any, axes: Sequence[int]) -> NamedSharding:
    """The sharding of a kernel, for a factor with its rank, which is whole, as the last axis."""
    entries = _entries(sharding.spec, max(axes, default=-1) + 1)
    return NamedSharding(sharding.mesh, PartitionSpec(*(entries[k] for k in axes), None))


def _entries(spec: Any, ndim: int) -> list:
    return [*spec, *[None] * (ndim - len(spec))]


def _squeeze(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    kernel = _the_kernel(vals)
    gone = {k % kernel.w.ndim for k in eqn.params["dimensions"]}
    axes = "".join(axis for k, axis in enumerate(kernel.axes) if k not in gone)
    return [_reshaped(kernel, w[0], axes)]


def _broadcast(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """``lax.broadcast_in_dim``: along an axis that it adds or widens the sum is constant."""
    kernel, dims = _the_kernel(vals), eqn.params["broadcast_dimensions"]
    if eqn.params.get("sharding") is not None:
        raise Unfactored("broadcast to an explicit sharding")
    return [_broadcasted(kernel, w[0], dims)]


def _broadcasted(kernel: Kernel, w: Array, dims: Sequence[int]) -> Kernel:
    old = dict(zip(dims, kernel.axes, strict=True))
    axes = "".join(old.get(k, SAME) for k in range(w.ndim))

    def change(x: Array, before: list[int], new: list[int]) -> Array:
        sizes = [*(w.shape[k] for k in new), x.shape[-1]]
        return lax.broadcast_in_dim(x, sizes, [*(new.index(dims[k]) for k in before), len(new)])

    return map_factors(kernel, w, axes, change)


def _slice(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """``lax.slice``: rows of ``a`` for input axes, columns of ``b`` for output axes."""
    kernel = _the_kernel(vals)
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * kernel.w.ndim
    return [_sliced(kernel, w[0], start, limit, strides)]


def _sliced(
    kernel: Kernel, w: Array, start: Sequence, limit: Sequence, strides: Sequence
) -> Kernel:
    def change(x: Array, old: list[int], new: list[int]) -> Array:
        pick = lambda values, last: [values[k] for k in old] + [last]
        return lax.slice(x, pick(start, 0), pick(limit, x.shape[-1]), pick(strides, 1))

    return map_factors(kernel, w, kernel.axes, change)


def _dynamic_slice(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    kernel, sizes, indices = _the_kernel(vals), eqn.params["slice_sizes"], vals[1:]

    def change(x: Array, old: list[int], new: list[int]) -> Array:
        start = [indices[k] for k in old] + [jnp.zeros_like(indices[0])]
        return lax.dynamic_slice(x, start, [sizes[k] for k in old] + [x.shape[-1]])

    return [map_factors(kernel, w[0], kernel.axes, change)]


def _reverse(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    kernel, turned_axes = _the_kernel(vals), eqn.params["dimensions"]

    def change(x: Array, old: list[int], new: list[int]) -> Array:
        return lax.rev(x, [old.index(k) for k in turned_axes if k in old])

    return [map_factors(kernel, w[0], kernel.axes, change)]


def _pad(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """``lax.pad``: the frozen part is padded with the value, the factors with zeros."""
    kernel, config = _the_kernel(vals), eqn.params["padding_config"]
    padded = lambda k: tuple(config[k]) != (0, 0, 0) and is_free(kernel, k)
    kernel = with_roles(
        kernel, "".join(OUT if padded(k) else role for k, role in enumerate(kernel.axes))
    )

    def change(x: Array, old: list[int], new: list[int]) -> Array:
        zero = jnp.zeros((), x.dtype)
        return lax.pad(x, zero, [*(config[k] for k in old), (0, 0, 0)])

    return [map_factors(kernel, w[0], kernel.axes, change)]


def _tile(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    kernel, reps = _the_kernel(vals), eqn.params["reps"]

    def change(x: Array, old: list[int], new: list[int]) -> Array:
        return jnp.tile(x, (*(reps[k] for k in old), 1))

    return [map_factors(kernel, w[0], kernel.axes, change)]


def _split(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    kernel, axis = _the_kernel(vals), eqn.params["axis"]
    parts, start = [], [0] * kernel.w.ndim
    for size, part in zip(map(int, eqn.params["sizes"]), w, strict=True):
        limit = list(kernel.w.shape)
        limit[axis] = start[axis] + size
        parts.append(_sliced(kernel, part, list(start), limit, [1] * kernel.w.ndim))
        start[axis] += size
    return parts


def _unstack(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    kernel, axis = _the_kernel(vals), eqn.params["axis"]
    axes = kernel.axes[:axis] + kernel.axes[axis + 1 :]
    rows = []
    for k, part in enumerate(w):
        start, limit = [0] * kernel.w.ndim, list(kernel.w.shape)
        start[axis], limit[axis] = k, k + 1
        row = _sliced(kernel, lax.expand_dims(part, [axis]), start, limit, [1] * kernel.w.ndim)
        rows.append(_reshaped(row, part, axes))
    return rows


def picked(eqn: Any, kernel: Kernel, indices: Array, w: Array, rows: Sequence[int]) -> list[Kernel]:
    """``lax.gather`` of entries of batch axes: each index has a kernel of its own, and its factors.

    So experts are picked for each token, or layers by number.
    """
    dims, n_ids = eqn.params["dimension_numbers"], indices.ndim - 1
    columns = [k for k, axis in enumerate(dims.start_index_map) if axis in rows]
    kept = iter(k for k in range(len(kernel.axes)) if k not in dims.collapsed_slice_dims)
    ids = iter(range(n_ids))
    # What each axis of the result is: an axis of the indices, or of the kernel.
    labels = [
        ("kernel", next(kept)) if p in dims.offset_dims else ("ids", next(ids))
        for p in range(w.ndim)
    ]
    role = lambda kind, k: BATCH if kind == "ids" else SAME if k in rows else kernel.axes[k]
    axes = "".join(role(*label) for label in labels)

    def change(x: Array, old: list[int], new: list[int]) -> Array:
        rest = [k for k in old if k not in rows]
        y = lax.gather(
            x,
            indices[..., np.array(columns)],
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(n_ids, n_ids + len(rest) + 1)),
                collapsed_slice_dims=tuple(sorted(old.index(k) for k in rows)),
                start_index_map=tuple(old.index(dims.start_index_map[k]) for k in columns),
            ),
            slice_sizes=[1 if k in rows else x.shape[n] for n, k in enumerate(old)] + [x.shape[-1]],
            indices_are_sorted=eqn.params["indices_are_sorted"],
            unique_indices=eqn.params["unique_indices"],
            mode=eqn.params["mode"],
            fill_value=0,  # out of bounds the base's own fill value must stand
        )
        have = [*(("ids", k) for k in range(n_ids)), *(("kernel", k) for k in rest)]
        return lax.transpose(y, [*(have.index(labels[p]) for p in new), len(have)])

    return [map_factors(kernel, w, axes, change)]


# ---- One kernel, its entries changed -------------------------------------------------------------


def _convert(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """A cast. The factors keep their precision until they meet an activation."""
    kernel, dtype = _the_kernel(vals), w[0].dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Unfactored(f"conversion to {dtype}")
    if jnp.finfo(dtype).bits < 16 and dtype != kernel.w.dtype:
        raise Unfactored(f"rounding to {dtype}: the sum is rounded, not its parts")
    return [dataclasses.replace(kernel, w=w[0])]


def _reduce_precision(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    kernel = _the_kernel(vals)
    if eqn.params["mantissa_bits"] < jnp.finfo(jnp.bfloat16).nmant:
        raise Unfactored("rounding to few bits: the sum is rounded, not its parts")
    a, b = (eqn.primitive.bind(x, **eqn.params) for x in (kernel.a, kernel.b))
    return [dataclasses.replace(kernel, w=w[0], a=a, b=b)]


def _stop_gradient(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    kernel = _the_kernel(vals)
    a, b = (lax.stop_gradient(x) for x in (kernel.a, kernel.b))
    return [dataclasses.replace(kernel, w=w[0], a=a, b=b)]


def _negative(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    kernel = _the_kernel(vals)
    return [dataclasses.replace(kernel, w=w[0], b=-kernel.b)]


def _mul(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    which = 0 if isinstance(vals[0], Kernel) else 1
    return [_scaled(_the_kernel(vals, which), vals[1 - which], w[0], jnp.multiply)]


def _div(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    if not isinstance(vals[0], Kernel):
        raise Unfactored("divides something by the kernel")
    return [_scaled(_the_kernel(vals), vals[1], w[0], jnp.divide)]


def _scaled(kernel: Kernel, scale: Any, w: Array, change: Callable) -> Kernel:
    """A product or quotient with a number, or with an array that varies along one side only."""
    if jnp.ndim(scale) == 0:
        b = change(kernel.b, jnp.asarray(scale, kernel.b.dtype))
        return dataclasses.replace(kernel, w=w, b=b)
    kernel = _widened(kernel, w)
    varies = [k for k, n in enumerate(scale.shape) if n != 1]
    free = {k for k in varies if is_free(kernel, k)}
    roles = {kernel.axes[k] for k in varies if k not in free} - {BATCH}
    if len(roles) > 1:
        raise Unfactored("multiplied or divided by an array that varies over inputs and outputs")
    side = roles.pop() if roles else OUT
    kernel = with_roles(
        kernel, "".join(side if k in free else role for k, role in enumerate(kernel.axes))
    )
    factor = rank_last(kernel) if side == OUT else kernel.a
    axes = carried(kernel.axes, side)
    thin = lax.squeeze(scale, [k for k in range(scale.ndim) if k not in axes])
    kept = sorted(axes)
    thin = lax.transpose(thin, [kept.index(k) for k in axes])
    factor = change(factor, lax.expand_dims(thin, [thin.ndim]).astype(factor.dtype))
    new = {"b": rank_inside(factor, kernel.axes)} if side == OUT else {"a": factor}
    return dataclasses.replace(kernel, w=w, **new)


def _widened(kernel: Kernel, w: Array) -> Kernel:
    """The kernel with the shape of ``w``, to which an operation with an array has broadcast it."""
    if kernel.w.shape == w.shape:
        return kernel
    wide = lax.broadcast_in_dim(kernel.w, w.shape, range(w.ndim))
    return _broadcasted(kernel, wide, range(w.ndim))


# ---- Several kernels -----------------------------------------------------------------------------


def _add(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """``w + plain + a·b``; the ranks of two kernels add up."""
    return [_summed([_widened(v, w[0]) for v in vals if isinstance(v, Kernel)], w[0])]


def _sub(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    kernels = [_widened(v, w[0]) for v in vals if isinstance(v, Kernel)]
    if isinstance(vals[1], Kernel):
        kernels[-1] = dataclasses.replace(kernels[-1], b=-kernels[-1].b)
    return [_summed(kernels, w[0])]


def _summed(kernels: Sequence[Kernel], w: Array) -> Kernel:
    kernels = alike(kernels)
    first = kernels[0]
    if len(kernels) == 1:
        return dataclasses.replace(first, w=w)
    a = _join([k.a for k in kernels], first.a.ndim - 1)
    b = _join([k.b for k in kernels], first.axes.count(BATCH))
    return joint(kernels, w, a, b, first.axes)


def _join(parts: Sequence[Array], axis: int) -> Array:
    dtype = jnp.result_type(*parts)
    return lax.concatenate([x.astype(dtype) for x in parts], axis)


def _select(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """``lax.select_n`` by a scalar: a plain case has factors of zeros."""
    which, *cases = vals
    if isinstance(which, Kernel) or jnp.ndim(which):
        raise Unfactored("selects entry by entry")
    kernels = alike([c for c in cases if isinstance(c, Kernel)])
    rank = max(k.a.shape[-1] for k in kernels)
    found = iter([_padded(k, rank) for k in kernels])
    zero = jax.tree.map(jnp.zeros_like, _padded(kernels[0], rank))
    whole = [next(found) if isinstance(c, Kernel) else zero for c in cases]
    a, b = (_select_n(which, [getattr(k, side) for k in whole]) for side in ("a", "b"))
    return [joint(kernels, w[0], a, b, kernels[0].axes)]


def _select_n(which: Array, cases: Sequence[Array]) -> Array:
    dtype = jnp.result_type(*cases)
    return lax.select_n(which, *(x.astype(dtype) for x in cases))


def _padded(kernel: Kernel, rank: int) -> Kernel:
    a = _pad_axis(kernel.a, kernel.a.ndim - 1, 0, rank)
    return dataclasses.replace(
        kernel, a=a, b=_pad_axis(kernel.b, kernel.axes.count(BATCH), 0, rank)
    )


def _pad_axis(x: Array, axis: int, before: int, size: int) -> Array:
    """Zeros around ``x`` along one axis, up to ``size``."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, size - before - x.shape[axis])
    return jnp.pad(x, widths)


def _concatenate(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    return [_concatenated(list(vals), w[0], eqn.params["dimension"])]


def _stack(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    axis = eqn.params["axis"]
    return [_concatenated([_with_new_axis(v, axis) for v in vals], w[0], axis)]


def _with_new_axis(part: Kernel | Array, axis: int) -> Kernel | Array:
    if not isinstance(part, Kernel):
        return lax.expand_dims(part, [axis])
    axes = part.axes[:axis] + SAME + part.axes[axis:]
    return dataclasses.replace(part, w=lax.expand_dims(part.w, [axis]), axes=axes)


def _concatenated(parts: Sequence[Any], w: Array, dimension: int) -> Kernel:
    """Several kernels side by side, as when query, key and value are computed in one product.

    ``[W1 + a1·b1, W2 + a2·b2] = [W1, W2] + [a1, a2]·diag(b1, b2)``: the ranks add up. Along a batch
    axis the factors are concatenated as they are, the ranks padded with zeros to the largest.
    """
    kernels = alike([p for p in parts if isinstance(p, Kernel)])
    axes = kernels[0].axes
    if axes[dimension] == SAME:
        axes = axes[:dimension] + BATCH + axes[dimension + 1 :]
        kernels = [with_roles(k, axes) for k in kernels]
    found = iter(kernels)
    whole = [next(found) if isinstance(p, Kernel) else p for p in parts]
    factors = [_factors(part, kernels[0]) for part in whole]
    sizes = [(p.w if isinstance(p, Kernel) else p).shape[dimension] for p in parts]
    a, b = _side_by_side(factors, sizes, axes, dimension)
    return joint(kernels, w, a, b, axes)


def _factors(part: Kernel | Array, like: Kernel) -> tuple[Array, Array]:
    """The factors of a kernel; a plain array is one of rank zero."""
    if isinstance(part, Kernel):
        return part.a, part.b
    axes = like.axes.replace(SAME, "")
    shape = [n for n, role in zip(part.shape, like.axes, strict=True) if role != SAME]
    a, b = lowrank.factor_shapes(shape, axes, rank=0)
    return jnp.zeros(a, like.a.dtype), jnp.zeros(b, like.b.dtype)


def _side_by_side(
    factors: list[tuple[Array, Array]], sizes: list[int], axes: str, dimension: int
) -> tuple[Array, Array]:
    n, role = axes.count(BATCH), axes[dimension]
    if role == IN:  # the mirror image of an output axis
        swapped = [lowrank.swap_sides(a, b, axes)[:2] for a, b in factors]
        mirror = lowrank.swap_sides(*factors[0], axes)[2]
        a, b = _side_by_side(swapped, sizes, mirror, dimension)
        return lowrank.swap_sides(a, b, mirror)[:2]
    if role == BATCH:
        rank = max(a.shape[-1] for a, _ in factors)
        where = positions(axes, BATCH).index(dimension)
        a = [_pad_axis(a, a.ndim - 1, 0, rank) for a, _ in factors]
        b = [_pad_axis(b, n, 0, rank) for _, b in factors]
        return _join(a, where), _join(b, where)
    where = n + 1 + positions(axes, OUT).index(dimension)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    b = [_pad_axis(b, where, s, sum(sizes)) for (_, b), s in zip(factors, starts, strict=True)]
    a = [a for a, _ in factors]
    return _join(a, a[0].ndim - 1), _join(b, n)


def product(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """A product of two kernels, whose ranks add up.

    ``(W1 + a1·b1)·(W2 + a2·b2) = W1·W2 + [a1, W1·a2]·[b1·(W2 + a2·b2), b2]``.
    """
    (left_in, right_in), (left_batch, _) = eqn.params["dimension_numbers"]
    if left_batch or not all(isinstance(v, Kernel) for v in vals):
        raise Unfactored("a product of two kernels with batch axes")
    left = _with_side(vals[0], left_in, OUT)
    right = _with_side(vals[1], right_in, IN)
    # As matrices: rows of the left kernel, what is summed over, columns of the right one.
    rows, columns = positions(left.axes, IN), positions(right.axes, OUT)
    w1 = lax.transpose(left.w, [*rows, *left_in]).reshape(-1, _size(left.w, left_in))
    w2 = lax.transpose(right.w, [*right_in, *columns]).reshape(w1.shape[1], -1)
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
    return [joint([left, right], w[0], a, b, axes)]


def _size(x: Array, axes: Sequence[int]) -> int:
    size = 1
    for k in axes:
        size *= x.shape[k]
    return size


def _with_side(kernel: Kernel, summed: Sequence[int], role: str) -> Kernel:
    """The kernel with exactly the given axes on one side, and the rest on the other."""
    other = IN if role == OUT else OUT
    axes = "".join(role if k in summed else other for k in range(len(kernel.axes)))
    try:
        return with_roles(kernel, axes)
    except Unfactored:
        return with_roles(turned(kernel), axes)


# ---- Where arrays lie ----------------------------------------------------------------------------


def _factors_untouched(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list:
    """Marks and moves the frozen part alone; the results are one for each operand."""
    pairs = zip(vals, w, strict=True)
    return [dataclasses.replace(v, w=x) if isinstance(v, Kernel) else x for v, x in pairs]


def rebound(eqn: Any, x: Array, **params: Any) -> Array:
    """The equation for another operand, with some parameters changed."""
    out = eqn.primitive.bind(x, **{**eqn.params, **params})
    return out[0] if eqn.primitive.multiple_results else out


def _reshard(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """``jax.reshard``: an axis of a factor lies where the kernel's does."""
    kernel, target = _the_kernel(vals), eqn.params["dst_sharding"]
    specs = lowrank.factor_specs(kernel.axes, target.spec)
    a, b = (
        rebound(eqn, x, dst_sharding=NamedSharding(target.mesh, spec))
        for x, spec in zip((kernel.a, kernel.b), specs, strict=True)
    )
    return [dataclasses.replace(kernel, w=w[0], a=a, b=b)]


def _device_put(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list:
    """``jax.device_put``, also from one kind of memory to another."""
    triples = zip(vals, w, eqn.params["devices"], strict=True)
    return [_put(v, x, target) if isinstance(v, Kernel) else x for v, x, target in triples]


def _put(kernel: Kernel, w: Array, target: Any) -> Kernel:
    targets = [target, target]
    if isinstance(target, NamedSharding):
        specs, kind = lowrank.factor_specs(kernel.axes, target.spec), target.memory_kind
        targets = [NamedSharding(target.mesh, spec, memory_kind=kind) for spec in specs]
    if target is None:
        return dataclasses.replace(kernel, w=w)
    a, b = (jax.device_put(x, t) for x, t in zip((kernel.a, kernel.b), targets, strict=True))
    return dataclasses.replace(kernel, w=w, a=a, b=b)


def _all_gather(eqn: Any, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """``lax.all_gather`` in a ``shard_map``, along an axis of which each device has a part."""
    kernel, axis = _the_kernel(vals), eqn.params["all_gather_dimension"]
    if not eqn.params["tiled"]:
        axes = kernel.axes[:axis] + _role_over_devices(eqn, kernel) + kernel.axes[axis:]
    elif is_free(kernel, axis) and kernel.axes[axis] == SAME:
        return [dataclasses.replace(kernel, w=w[0])]
    else:
        axes = kernel.axes

    def change(x: Array, old: list[int], new: list[int]) -> Array:
        if axis not in new:
            return x
        return rebound(eqn, x, all_gather_dimension=new.index(axis))

    return [map_factors(kernel, w[0], axes, change)]


def _role_over_devices(eqn: Any, kernel: Kernel) -> str:
    """The role of an axis of devices, of which a factor that varies over them has a part each."""
    names = eqn.params["axis_name"]
    names = frozenset(names if isinstance(names, tuple | list) else (names,))
    w, a, b = (bool(names & forms.varying_axes(x)) for x in (kernel.w, kernel.a, kernel.b))
    if a == b:  # with check_vma=False nothing is known to vary
        return SAME if w and not a else BATCH
    return IN if a else OUT


MOVES: dict[str, Rule] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "rev": _reverse,
    "pad": _pad,
    "tile": _tile,
    "split": _split,
    "unstack": _unstack,
    "convert_element_type": _convert,
    "reduce_precision": _reduce_precision,
    "stop_gradient": _stop_gradient,
    "neg": _negative,
    "mul": _mul,
    "div": _div,
    "add": _add,
    "add_any": _add,
    "sub": _sub,
    "select_n": _select,
    "concatenate": _concatenate,
    "stack": _stack,
    "sharding_constraint": _factors_untouched,
    "pvary": _factors_untouched,
    "pcast": _factors_untouched,
    "name": _factors_untouched,
    "copy": _factors_untouched,
    "copy_p": _factors_untouched,
    "optimization_barrier": _factors_untouched,
    "reshard": _reshard,
    "device_put": _device_put,
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
}

# With another array these make a kernel of a kernel, or an activation of an activation: which of
# them is told by what the result is used for.
WITH_AN_ARRAY = {"add", "add_any", "sub", "mul", "div"}
