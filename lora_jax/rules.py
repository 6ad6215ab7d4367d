"""How each primitive treats a kernel that is a low-rank sum: the rules that keep it factored.

There are two sorts. A *move* rearranges the kernel (transpose, reshape, slice, concatenate, ...)
and gives back kernels. A *use* multiplies or looks up (``dot_general``, ``conv_general_dilated``,
``gather``) and gives back an array. A rule that does not fit raises :class:`Unfactored` with the
reason, and the interpreter falls back to forming ``W + s·BA``.

The same moves serve to find out which axes of a kernel are inputs, outputs and batch: then the
kernel has no factors yet, and each axis carries, instead of a role, the set of (kernel name,
original axis, number of axes) that it came from.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import lowrank
from lora_jax.lowrank import BATCH, IN, OUT, positions

Array = jax.Array


class Unfactored(Exception):
    """The low-rank sum cannot be kept factored here; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel inside the interpreter: ``w + a·b``, rearranged by the moves so far.

    Attributes:
      w: the frozen part.
      a: ``(*batch, *in, rank)``, or None while roles are being found.
      b: ``(*batch, rank, *out)`` with the scale already in it, or None likewise.
      axes: the role of each axis of ``w``; while roles are being found, its origins.
      name: the path of the parameter, or of several that were concatenated.
    """

    w: Array
    a: Array | None
    b: Array | None
    axes: tuple
    name: str


jax.tree_util.register_dataclass(Kernel, ["w", "a", "b"], ["axes", "name"])


def materialise(kernel: Kernel) -> Array:
    """The plain array that the kernel stands for."""
    if kernel.a is None:
        return kernel.w
    return lowrank.dense(kernel.w, kernel.a, kernel.b, "".join(kernel.axes))


# ---- Moves ---------------------------------------------------------------------------------------


def _moved(kernel: Kernel, w: Array, axes: Sequence[Any], move: Callable) -> Kernel:
    """Applies ``move(factor, old, new)`` to both factors.

    ``old`` and ``new`` are the kernel axes that the factor carries before and after, in the order
    of its own axes; the rank is the factor's last axis during the move.
    """
    axes = tuple(axes)
    if kernel.a is None:
        return dataclasses.replace(kernel, w=w, axes=axes)
    carried = lambda role: (positions(kernel.axes, BATCH + role), positions(axes, BATCH + role))
    a = move(kernel.a, *carried(IN))
    b = jnp.moveaxis(kernel.b, kernel.axes.count(BATCH), -1)
    b = jnp.moveaxis(move(b, *carried(OUT)), -1, axes.count(BATCH))
    return dataclasses.replace(kernel, w=w, a=a, b=b, axes=axes)


def transpose(kernel: Kernel, *, permutation: Sequence[int]) -> Kernel:
    """``lax.transpose``."""

    def move(x: Array, old: list[int], new: list[int]) -> Array:
        return lax.transpose(x, [old.index(permutation[k]) for k in new] + [x.ndim - 1])

    w = lax.transpose(kernel.w, permutation)
    return _moved(kernel, w, [kernel.axes[k] for k in permutation], move)


def reshape(kernel: Kernel, *, shape: Sequence[int]) -> Kernel:
    """``lax.reshape``, if it splits and joins axes within one role only."""
    axes: list[Any] = [None] * len(shape)
    for old, new in _groups(kernel.w.shape, shape):
        role = _join(kernel, [k for k in old if kernel.w.shape[k] != 1] or old)
        for k in new:
            axes[k] = role
    return _reshaped(kernel, shape, axes)


def _reshaped(kernel: Kernel, shape: Sequence[int], axes: Sequence[Any]) -> Kernel:
    def move(x: Array, old: list[int], new: list[int]) -> Array:
        return lax.reshape(x, [shape[k] for k in new] + [x.shape[-1]])

    return _moved(kernel, lax.reshape(kernel.w, shape), axes, move)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs the runs of axes of two shapes that hold the same elements.

    >>> _groups((2, 6, 1), (2, 1, 2, 3))
    [([0], [0]), ([], [1]), ([1], [2, 3]), ([2], [])]
    """
    if 0 in (*old, *new):
        raise Unfactored("reshape of an empty array")
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = old[i : i + 1], new[j : j + 1]
        if left != right and left == (1,):
            step = (1, 0)
        elif left != right and right == (1,):
            step = (0, 1)
        else:
            step = _same_product(old[i:], new[j:])
        groups.append((list(range(i, i + step[0])), list(range(j, j + step[1]))))
        i, j = i + step[0], j + step[1]
    return groups


def _same_product(old: Sequence[int], new: Sequence[int]) -> tuple[int, int]:
    """The smallest non-empty leading runs of two shapes with the same product."""
    i, j, left, right = 1, 1, old[0], new[0]
    while left != right:
        if left < right:
            left, i = left * old[i], i + 1
        else:
            right, j = right * new[j], j + 1
    return i, j


def _join(kernel: Kernel, group: list[int]) -> Any:
    """The role of the axes that a reshape joins; axes that it adds belong to no side: batch."""
    roles = {kernel.axes[k] for k in group}
    if kernel.a is None:
        return frozenset().union(*roles)
    if len(roles) > 1:
        raise Unfactored("reshape joins axes of different sides (input, output, batch)")
    return roles.pop() if roles else BATCH


def squeeze(kernel: Kernel, *, dimensions: Sequence[int]) -> Kernel:
    """``lax.squeeze``."""
    keep = [k for k in range(kernel.w.ndim) if k not in dimensions]
    shape = [kernel.w.shape[k] for k in keep]
    return _reshaped(kernel, shape, [kernel.axes[k] for k in keep])


def broadcast_in_dim(kernel: Kernel, *, shape: Sequence[int], dims: Sequence[int]) -> Kernel:
    """``lax.broadcast_in_dim``; an axis that it adds becomes a batch axis of both factors."""
    added = frozenset() if kernel.a is None else BATCH
    axes = [kernel.axes[dims.index(k)] if k in dims else added for k in range(len(shape))]

    def move(x: Array, old: list[int], new: list[int]) -> Array:
        target = [shape[k] for k in new] + [x.shape[-1]]
        return lax.broadcast_in_dim(x, target, [new.index(dims[k]) for k in old] + [len(new)])

    return _moved(kernel, lax.broadcast_in_dim(kernel.w, shape, dims), axes, move)


def slice_(kernel: Kernel, *, start: Sequence[int], limit: Sequence[int], strides: Any) -> Kernel:
    """``lax.slice``: rows of ``a`` for input axes, columns of ``b`` for output axes."""
    strides = strides or (1,) * kernel.w.ndim

    def move(x: Array, old: list[int], new: list[int]) -> Array:
        pick = lambda values, last: [values[k] for k in old] + [last]
        return lax.slice(x, pick(start, 0), pick(limit, x.shape[-1]), pick(strides, 1))

    return _moved(kernel, lax.slice(kernel.w, start, limit, strides), kernel.axes, move)


def dynamic_slice(kernel: Kernel, indices: Sequence[Array], *, sizes: Sequence[int]) -> Kernel:
    """``lax.dynamic_slice``."""

    def move(x: Array, old: list[int], new: list[int]) -> Array:
        start = [indices[k] for k in old] + [jnp.zeros_like(indices[0])]
        return lax.dynamic_slice(x, start, [sizes[k] for k in old] + [x.shape[-1]])

    return _moved(kernel, lax.dynamic_slice(kernel.w, indices, sizes), kernel.axes, move)


def convert(kernel: Kernel, *, dtype: Any) -> Kernel:
    """A cast. The factors keep their precision until they meet an activation."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Unfactored(f"conversion to {dtype}")
    return dataclasses.replace(kernel, w=kernel.w.astype(dtype))


def concatenate(parts: Sequence[Kernel | Array], *, dimension: int) -> Kernel:
    """``lax.concatenate``, as when gates or query, key and value are computed in one product.

    ``[W1 + a1·b1, W2 + a2·b2] = [W1, W2] + [a1, a2]·diag(b1, b2)``: the ranks add up. Along a batch
    axis the factors are concatenated as they are, the ranks padded with zeros to the largest.
    """
    kernels = [p for p in parts if isinstance(p, Kernel)]
    w = lax.concatenate([p.w if isinstance(p, Kernel) else p for p in parts], dimension)
    name = " + ".join(k.name for k in kernels)
    if kernels[0].a is None:
        origins = zip(*(k.axes for k in kernels), strict=True)
        axes = tuple(frozenset().union(*origin) for origin in origins)
        return Kernel(w, None, None, axes, name)
    axes = kernels[0].axes
    if any(k.axes != axes for k in kernels):
        raise Unfactored("concatenates kernels whose axes have different roles")
    factors = [_factors(part, like=kernels[0]) for part in parts]
    a, b = _concatenated(factors, [p.shape[dimension] for p in _arrays(parts)], axes, dimension)
    return Kernel(w, a, b, axes, name)


def _arrays(parts: Sequence[Kernel | Array]) -> list[Array]:
    return [p.w if isinstance(p, Kernel) else p for p in parts]


def _factors(part: Kernel | Array, *, like: Kernel) -> tuple[Array, Array]:
    """The factors of a kernel; a plain array is one of rank zero."""
    if isinstance(part, Kernel):
        return part.a, part.b
    a, b = lowrank.factor_shapes(part.shape, "".join(like.axes), rank=0)
    return jnp.zeros(a, like.a.dtype), jnp.zeros(b, like.b.dtype)


def _concatenated(
    factors: list[tuple[Array, Array]], sizes: list[int], axes: tuple, dimension: int
) -> tuple[Array, Array]:
    n, role = axes.count(BATCH), axes[dimension]
    if role == IN:  # the mirror image of an output axis
        mirror = "".join(axes)
        swapped = [lowrank.swap_sides(a, b, mirror)[:2] for a, b in factors]
        axes = tuple(lowrank.swap_sides(*factors[0], mirror)[2])
        a, b = _concatenated(swapped, sizes, axes, dimension)
        return lowrank.swap_sides(a, b, "".join(axes))[:2]
    if role == BATCH:
        rank = max(a.shape[-1] for a, _ in factors)
        where = positions(axes, BATCH).index(dimension)
        a = [_pad(a, a.ndim - 1, 0, rank) for a, _ in factors]
        b = [_pad(b, n, 0, rank) for _, b in factors]
        return lax.concatenate(a, where), lax.concatenate(b, where)
    where = n + 1 + positions(axes, OUT).index(dimension)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    b = [_pad(b, where, s, sum(sizes)) for (_, b), s in zip(factors, starts, strict=True)]
    a = [a for a, _ in factors]
    return lax.concatenate(a, a[0].ndim - 1), lax.concatenate(b, n)


def _pad(x: Array, axis: int, before: int, size: int) -> Array:
    """Zeros around ``x`` along one axis, up to ``size``."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, size - before - x.shape[axis])
    return jnp.pad(x, widths)


def _new_axis(part: Kernel | Array, axis: int) -> Kernel | Array:
    shape = _arrays([part])[0].shape
    shape, dims = (*shape[:axis], 1, *shape[axis:]), [k + (k >= axis) for k in range(len(shape))]
    if isinstance(part, Kernel):
        return broadcast_in_dim(part, shape=shape, dims=dims)
    return lax.broadcast_in_dim(part, shape, dims)


def _split(kernel: Kernel, sizes: Sequence[int], axis: int) -> list[Kernel]:
    parts, start = [], [0] * kernel.w.ndim
    for size in map(int, sizes):
        limit = list(kernel.w.shape)
        limit[axis] = start[axis] + size
        parts.append(slice_(kernel, start=list(start), limit=limit, strides=None))
        start[axis] += size
    return parts


def _only_kernel(vals: Sequence[Any], which: int) -> None:
    """Raises unless operand number ``which``, and no other, is a kernel."""
    kernels = [k for k, x in enumerate(vals) if isinstance(x, Kernel)]
    if kernels != [which]:
        raise Unfactored(
            f"operands {kernels} are low-rank sums; the rule wants operand {which} only"
        )


def _move_reshape(params: dict, kernel: Kernel) -> list[Kernel]:
    if params.get("dimensions") is not None:
        raise Unfactored("reshape in another order of dimensions")
    return [reshape(kernel, shape=params["new_sizes"])]


def _move_dynamic_slice(params: dict, kernel: Any, *indices: Any) -> list[Kernel]:
    return [dynamic_slice(kernel, indices, sizes=params["slice_sizes"])]


def _move_unstack(params: dict, kernel: Kernel) -> list[Kernel]:
    axis = params["axis"]
    rows = _split(kernel, [1] * kernel.w.shape[axis], axis)
    return [squeeze(row, dimensions=(axis,)) for row in rows]


# (parameters of the equation, its inputs) -> its outputs
MOVES: dict[str, Callable[..., list[Kernel]]] = {
    "transpose": lambda p, k: [transpose(k, permutation=p["permutation"])],
    "reshape": _move_reshape,
    "squeeze": lambda p, k: [squeeze(k, dimensions=p["dimensions"])],
    "broadcast_in_dim": lambda p, k, *_: [
        broadcast_in_dim(k, shape=p["shape"], dims=p["broadcast_dimensions"])
    ],
    "slice": lambda p, k: [
        slice_(k, start=p["start_indices"], limit=p["limit_indices"], strides=p["strides"])
    ],
    "dynamic_slice": _move_dynamic_slice,
    "split": lambda p, k: _split(k, p["sizes"], p["axis"]),
    "unstack": _move_unstack,
    "concatenate": lambda p, *ks: [concatenate(ks, dimension=p["dimension"])],
    "stack": lambda p, *ks: [
        concatenate([_new_axis(k, p["axis"]) for k in ks], dimension=p["axis"])
    ],
    "convert_element_type": lambda p, k: [convert(k, dtype=p["new_dtype"])],
    "copy": lambda p, k: [k],
    "copy_p": lambda p, k: [k],
    "stop_gradient": lambda p, k: [jax.tree.map(lax.stop_gradient, k)],
}


# ---- Uses ----------------------------------------------------------------------------------------


class Sides(NamedTuple):
    """How a use treats the kernel's axes: what it sums over or looks up, and what it batches."""

    inputs: tuple[int, ...]
    batch: tuple[int, ...] = ()


class Factors(NamedTuple):
    """Factors with the kernel's inputs on the side of ``a``."""

    a: Array
    b: Array
    axes: str


def oriented(kernel: Kernel, sides: Sides) -> Factors:
    """The factors such that the use sums over the axes of ``a``.

    Raises:
      Unfactored: the use takes some input and some output axes, or part of one side.
    """
    axes = "".join(kernel.axes)
    if not set(sides.batch) <= set(positions(axes, BATCH)):
        raise Unfactored(f"batches over axes {sides.batch} of a kernel with axes {axes!r}")
    if set(sides.inputs) == set(positions(axes, IN)):
        return Factors(kernel.a, kernel.b, axes)
    if set(sides.inputs) == set(positions(axes, OUT)):
        return Factors(*lowrank.swap_sides(kernel.a, kernel.b, axes))
    raise Unfactored(
        f"contracts axes {sides.inputs} of a kernel with axes {axes!r}: neither all inputs (i) nor "
        "all outputs (o)"
    )


def _branch_dtype(x: Array, result: Array) -> Any:
    """The activation's dtype, so that a float32 adapter leaves a bfloat16 model in bfloat16."""
    return x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else result.dtype


def _dot_sides(params: dict, vals: Sequence[Any]) -> tuple[int, Sides]:
    which = 0 if isinstance(vals[0], Kernel) else 1
    _only_kernel(vals, which)
    contracting, batch = params["dimension_numbers"]
    return which, Sides(tuple(contracting[which]), tuple(batch[which]))


def _dot(params: dict, vals: Sequence[Any], f: Factors, base: Array, drop: Callable) -> Array:
    which = 0 if isinstance(vals[0], Kernel) else 1
    x = vals[1 - which]
    dtype = _branch_dtype(x, base)
    contracting, batch = params["dimension_numbers"]
    pairs = lambda dims: (dims[1 - which], dims[which])
    (x_in, k_in), (x_batch, k_batch) = pairs(contracting), pairs(batch)
    return lowrank.contract(
        drop(x.astype(dtype)),
        f.a.astype(dtype),
        f.b.astype(dtype),
        f.axes,
        dims=((x_in, k_in), (x_batch, k_batch)),
        x_first=which == 1,
        precision=params["precision"],
        preferred_element_type=base.dtype,
    )


def _gather_sides(params: dict, vals: Sequence[Any]) -> tuple[int, Sides]:
    dims, sizes = params["dimension_numbers"], params["slice_sizes"]
    _only_kernel(vals, 0)
    rows = set(dims.collapsed_slice_dims)
    whole = all(sizes[k] == n for k, n in enumerate(vals[0].w.shape) if k not in rows)
    if dims.operand_batching_dims or not whole or rows != set(dims.start_index_map):
        raise Unfactored("gather of something other than whole rows")
    return 0, Sides(tuple(sorted(rows)))


def _gather(params: dict, vals: Sequence[Any], f: Factors, base: Array, drop: Callable) -> Array:
    """Rows of ``a`` at the indices, times ``b``: the lookup is a product with a one-hot input."""
    if BATCH in f.axes:
        raise Unfactored("gather from a stack of tables")
    dims, indices = params["dimension_numbers"], vals[1]
    rows, n_ids = positions(f.axes, IN), indices.ndim - 1
    looked_up = lax.gather(
        f.a,
        indices,
        lax.GatherDimensionNumbers(
            offset_dims=(n_ids,),
            collapsed_slice_dims=tuple(range(len(rows))),
            start_index_map=tuple(rows.index(k) for k in dims.start_index_map),
        ),
        slice_sizes=(1,) * len(rows) + (f.a.shape[-1],),
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"],
        mode=params["mode"],
        fill_value=0,  # out of bounds the base's own fill value must stand
    ).astype(base.dtype)
    looked_up = drop(looked_up, (*looked_up.shape[:-1], 1))  # one draw a row: the input is one-hot
    y = lax.dot_general(looked_up, f.b.astype(base.dtype), (((n_ids,), (0,)), ((), ())))
    ids, offsets = iter(range(n_ids)), iter(range(n_ids, y.ndim))
    return lax.transpose(
        y, [next(offsets if k in dims.offset_dims else ids) for k in range(y.ndim)]
    )


def _conv_sides(params: dict, vals: Sequence[Any]) -> tuple[int, Sides]:
    _only_kernel(vals, 1)
    if params["batch_group_count"] != 1:
        raise Unfactored("convolution with batch groups")
    out = params["dimension_numbers"].rhs_spec[0]
    return 1, Sides(tuple(k for k in range(vals[1].w.ndim) if k != out))


def _conv(params: dict, vals: Sequence[Any], f: Factors, base: Array, drop: Callable) -> Array:
    """A convolution with ``a`` to ``rank`` channels, then a 1×1 convolution with ``b``.

    With ``g`` feature groups each group has its own inputs and outputs but shares ``a``, so that
    the middle has ``g·rank`` channels, and ``b`` is grouped likewise.
    """
    spec, x = params["dimension_numbers"], vals[0]
    if f.axes.count(OUT) != 1 or BATCH in f.axes:
        raise Unfactored("convolution with a kernel whose output axis is not its only output")
    dtype, groups = _branch_dtype(x, base), params["feature_group_count"]
    rows, rank, n = positions(f.axes, IN), f.a.ndim - 1, f.a.ndim
    a = jnp.tile(f.a.astype(dtype), (*[1] * rank, groups))
    b = lax.expand_dims(f.b.astype(dtype), range(2, n))
    a_spec = (rank, *(rows.index(k) for k in spec.rhs_spec[1:]))
    t = lax.conv_general_dilated(
        drop(x.astype(dtype)),
        a,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        lax.ConvDimensionNumbers(spec.lhs_spec, a_spec, spec.out_spec),
        feature_group_count=groups,
        precision=params["precision"],
    )
    return lax.conv_general_dilated(
        t,
        b,
        (1,) * (n - 2),
        "VALID",
        dimension_numbers=lax.ConvDimensionNumbers(
            spec.out_spec, (1, 0, *range(2, n)), spec.out_spec
        ),
        feature_group_count=groups,
        precision=params["precision"],
        preferred_element_type=base.dtype,
    )


class Use(NamedTuple):
    """A primitive that consumes a kernel.

    ``sides(params, inputs)`` says which input is the kernel and how its axes are used;
    ``branch(params, inputs, factors, base, drop)`` computes what ``a·b`` adds to the result.
    """

    sides: Callable
    branch: Callable


USES: dict[str, Use] = {
    "dot_general": Use(_dot_sides, _dot),
    "gather": Use(_gather_sides, _gather),
    "conv_general_dilated": Use(_conv_sides, _conv),
}
