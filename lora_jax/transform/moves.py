"""Moves: the primitives that rearrange a kernel that is a low-rank sum, and give back such kernels.

The same moves serve to find out which axes of a kernel are inputs, outputs and batch: then the
kernel has no factors yet, and each axis carries, instead of a role, the set of (kernel name,
original axis, number of axes) that it came from.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

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
      rate: its own rate of dropout on the input of the branch.
    """

    w: Array
    a: Array | None
    b: Array | None
    axes: tuple
    name: str
    rate: float = 0.0


jax.tree_util.register_dataclass(Kernel, ["w", "a", "b"], ["axes", "name", "rate"])


def materialise(kernel: Kernel) -> Array:
    """The plain array that the kernel stands for."""
    if kernel.a is None:
        return kernel.w
    return lowrank.dense(kernel.w, kernel.a, kernel.b, "".join(kernel.axes))


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


def scaled(kernel: Kernel, change: Callable[[Array], Array], *numbers: Any) -> Kernel:
    """A negative, or a product or quotient with a number: ``c·(w + a·b) = c·w + a·(c·b)``.

    ``change`` is applied to both terms as it is, so that the frozen part keeps its very bits.
    """
    if any(isinstance(x, Kernel) or jnp.ndim(x) for x in numbers):
        raise Unfactored("multiplied or divided by something other than a single number")
    b = None if kernel.b is None else change(kernel.b)
    return dataclasses.replace(kernel, w=change(kernel.w), b=b)


def reverse(kernel: Kernel, *, dimensions: Sequence[int]) -> Kernel:
    """``lax.rev``."""

    def move(x: Array, old: list[int], new: list[int]) -> Array:
        return lax.rev(x, [old.index(k) for k in dimensions if k in old])

    return _moved(kernel, lax.rev(kernel.w, dimensions), kernel.axes, move)


def concatenate(parts: Sequence[Kernel | Array], *, dimension: int) -> Kernel:
    """``lax.concatenate``, as when gates or query, key and value are computed in one product.

    ``[W1 + a1·b1, W2 + a2·b2] = [W1, W2] + [a1, a2]·diag(b1, b2)``: the ranks add up. Along a batch
    axis the factors are concatenated as they are, the ranks padded with zeros to the largest.
    """
    kernels = [p for p in parts if isinstance(p, Kernel)]
    w = lax.concatenate([p.w if isinstance(p, Kernel) else p for p in parts], dimension)
    if kernels[0].a is None:
        return without_factors(w, kernels)
    axes = kernels[0].axes
    if any(k.axes != axes for k in kernels):
        raise Unfactored("concatenates kernels whose axes have different roles")
    if len({k.rate for k in kernels}) > 1:
        raise Unfactored("concatenates kernels with different rates of dropout")
    factors = [_factors(part, like=kernels[0]) for part in parts]
    a, b = _concatenated(factors, [p.shape[dimension] for p in _arrays(parts)], axes, dimension)
    return Kernel(w, a, b, axes, _joint_name(kernels), kernels[0].rate)


def without_factors(w: Array, kernels: Sequence[Kernel]) -> Kernel:
    """A kernel made of several while roles are being found: an axis has the origins of all."""
    origins = zip(*(k.axes for k in kernels), strict=True)
    axes = tuple(frozenset().union(*origin) for origin in origins)
    return Kernel(w, None, None, axes, _joint_name(kernels))


def _joint_name(kernels: Sequence[Kernel]) -> str:
    return " + ".join(k.name for k in kernels)


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


def _move_reshape(params: dict, kernel: Kernel) -> list[Kernel]:
    if params.get("dimensions") is not None:
        raise Unfactored("reshape in another order of dimensions")
    return [reshape(kernel, shape=params["new_sizes"])]


def pad(kernel: Kernel, value: Array, *, config: Sequence[tuple[int, int, int]]) -> Kernel:
    """``lax.pad``: the frozen part is padded with the value, the factors with zeros."""

    def move(x: Array, old: list[int], new: list[int]) -> Array:
        zero = jnp.zeros((), x.dtype)
        return lax.pad(x, zero, [*(config[k] for k in old), (0, 0, 0)])

    return _moved(kernel, lax.pad(kernel.w, value, config), kernel.axes, move)


def _move_mul(params: dict, x: Any, y: Any) -> list[Kernel]:
    kernel, number = (x, y) if isinstance(x, Kernel) else (y, x)
    return [scaled(kernel, lambda k: k * jnp.asarray(number, k.dtype), number)]


def _move_div(params: dict, x: Any, y: Any) -> list[Kernel]:
    if not isinstance(x, Kernel):
        raise Unfactored("divides something by the kernel")
    return [scaled(x, lambda k: k / jnp.asarray(y, k.dtype), y)]


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
    "pad": lambda p, k, value: [pad(k, value, config=p["padding_config"])],
    "rev": lambda p, k: [reverse(k, dimensions=p["dimensions"])],
    "neg": lambda p, k: [scaled(k, jnp.negative)],
    "mul": _move_mul,
    "div": _move_div,
    "split": lambda p, k: _split(k, p["sizes"], p["axis"]),
    "unstack": _move_unstack,
    "concatenate": lambda p, *ks: [concatenate(ks, dimension=p["dimension"])],
    "stack": lambda p, *ks: [
        concatenate([_new_axis(k, p["axis"]) for k in ks], dimension=p["axis"])
    ],
    "convert_element_type": lambda p, k: [convert(k, dtype=p["new_dtype"])],
    "sharding_constraint": lambda p, k: [
        dataclasses.replace(k, w=lax.with_sharding_constraint(k.w, p["sharding"]))
    ],
    "copy": lambda p, k: [k],
    "copy_p": lambda p, k: [k],
    "stop_gradient": lambda p, k: [jax.tree.map(lax.stop_gradient, k)],
}
