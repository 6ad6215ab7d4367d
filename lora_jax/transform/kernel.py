"""A kernel that is a sum, as the interpreter carries it from one equation to the next."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax import factors
from lora_jax.factors import BATCH, IN, OUT, positions

Array = jax.Array
SAME = "="  # the role of an axis along which the sum is constant: neither factor carries it


class Unfactored(Exception):
    """The low-rank sum cannot be kept factored here; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Kernel:
    """A kernel inside the interpreter: ``gain ⊙ w + a·b``, rearranged by the moves so far.

    Attributes:
      w: the frozen part.
      a: ``(*batch, *in, rank)``.
      b: ``(*batch, rank, *out)`` with the scale already in it.
      gain: ``(*batch, *out)``, or ``(*batch, *in)`` if the sides were exchanged; None for one.
      axes: the role of each axis of ``w``: "i", "o", "b", or "=" for one that was added.
      gain_side: the role of the axes along which the gain varies, beside the batch axes.
      names: the paths of the parameters that it is made of; in a nested call their numbers.
      rate: its own rate of dropout on the input of the branch.
    """

    w: Array
    a: Array
    b: Array
    gain: Array | None = None
    axes: str
    gain_side: str = OUT
    names: tuple
    rate: float = 0.0


jax.tree_util.register_dataclass(
    Kernel, ["w", "a", "b", "gain"], ["axes", "gain_side", "names", "rate"]
)


def carried_axes(axes: str, role: str) -> list[int]:
    """The axes that a factor carries, in its own order: batch axes, then those of its role."""
    return positions(axes, BATCH + role)


def map_factors(
    kernel: Kernel, w: Array, axes: str, change: Callable, *, change_gain: Callable | None = None
) -> Kernel:
    """Applies ``change(factor, old, new)`` to both factors, and to the gain if there is one.

    ``old`` and ``new`` are the kernel axes that the factor carries before and after, in the order
    of its own axes; the rank is the factor's last axis meanwhile. A gain has a rank of one then.
    ``change_gain`` is for a change that fills up factors with zeros, and a gain with ones.
    """
    sides = lambda role: (carried_axes(kernel.axes, role), carried_axes(axes, role))
    a = change(kernel.a, *sides(IN))
    b = change(move_rank_last(kernel), *sides(OUT))
    new = {"w": w, "a": a, "b": move_rank_inside(b, axes), "axes": axes}
    if kernel.gain is not None:
        gain = lax.expand_dims(kernel.gain, [kernel.gain.ndim])
        gain = (change_gain or change)(gain, *sides(kernel.gain_side))
        new["gain"] = lax.squeeze(gain, [gain.ndim - 1])
    return dataclasses.replace(kernel, **new)


def factor_specs(kernel: Kernel, spec: Sequence[Any]) -> dict[str, PartitionSpec]:
    """The spec of each factor, and of a gain, where the kernel has the given one: see `spec_of`."""
    letters = {"a": factors.A_AXES, "b": factors.B_AXES}
    letters |= {} if kernel.gain is None else {"gain": BATCH + kernel.gain_side}
    return {name: factors.spec_of(axes, kernel.axes, spec) for name, axes in letters.items()}


def move_rank_last(kernel: Kernel) -> Array:
    """``b`` with its rank as the last axis, as ``a`` has it."""
    return _moveaxis(kernel.b, kernel.axes.count(BATCH), kernel.b.ndim - 1)


def move_rank_inside(b: Array, axes: str) -> Array:
    """The inverse of :func:`move_rank_last`."""
    return _moveaxis(b, b.ndim - 1, axes.count(BATCH))


def _moveaxis(x: Array, source: int, target: int) -> Array:
    order = [k for k in range(x.ndim) if k != source]
    order.insert(target, source)
    return x if order == list(range(x.ndim)) else lax.transpose(x, order)


def require_kernel(vals: Sequence[Any], which: int = 0) -> Kernel:
    """Operand number ``which``, if it and no other is a kernel."""
    kernels = [k for k, x in enumerate(vals) if isinstance(x, Kernel)]
    if kernels != [which]:
        raise Unfactored(
            f"operands {kernels} are low-rank sums; the rule wants operand {which} only"
        )
    return vals[which]


def broadcast_kernel(kernel: Kernel, w: Array, dims: Sequence[int]) -> Kernel:
    """``lax.broadcast_in_dim``, of which ``w`` is the result for the frozen part."""
    old = dict(zip(dims, kernel.axes, strict=True))
    axes = "".join(old.get(k, SAME) for k in range(w.ndim))

    def change(x: Array, before: list[int], new: list[int]) -> Array:
        sizes = [*(w.shape[k] for k in new), x.shape[-1]]
        return lax.broadcast_in_dim(x, sizes, [*(new.index(dims[k]) for k in before), len(new)])

    return map_factors(kernel, w, axes, change)


def widen(kernel: Kernel, w: Array) -> Kernel:
    """The kernel with the shape of ``w``, to which an operation with an array has broadcast it."""
    if kernel.w.shape == w.shape:
        return kernel
    wide = lax.broadcast_in_dim(kernel.w, w.shape, range(w.ndim))
    return broadcast_kernel(kernel, wide, range(w.ndim))


def materialize(kernel: Kernel) -> Array:
    """The plain array that the kernel stands for."""
    if SAME not in kernel.axes:
        gain = spread_gain(kernel)
        return factors.materialize(kernel.w, kernel.a, kernel.b, kernel.axes, gain)
    return materialize(assign_roles(kernel, kernel.axes.replace(SAME, OUT)))


def spread_gain(kernel: Kernel) -> Array | None:
    """The gain with an axis for each of the kernel's; those that it does not carry have size 1."""
    if kernel.gain is None:
        return None
    where = carried_axes(kernel.axes, kernel.gain_side)
    return factors.spread(kernel.gain, where, kernel.w.ndim)


def refuse_gain(kernels: Sequence[Kernel], what: str) -> None:
    """Raises where a rule has no form for kernels with a gain.

    Raises:
      Unfactored: one has.
    """
    if any(k.gain is not None for k in kernels):
        raise Unfactored(f"{what}, which has a gain")


def is_free(kernel: Kernel, axis: int) -> bool:
    """Whether an axis may have any role: it has one entry, or all its entries are the same."""
    return kernel.axes[axis] == SAME or kernel.w.shape[axis] == 1


def assign_roles(kernel: Kernel, axes: str) -> Kernel:
    """The same kernel with other roles for its free axes.

    Raises:
      Unfactored: another axis would get another role.
    """
    if axes == kernel.axes:
        return kernel
    bound = [k for k in range(len(axes)) if axes[k] != kernel.axes[k] and not is_free(kernel, k)]
    if bound:
        raise Unfactored(f"uses a kernel with axes {kernel.axes!r} as one with axes {axes!r}")
    shape = kernel.w.shape

    def change(x: Array, old: list[int], new: list[int]) -> Array:
        kept = [k for k in old if k in new]  # what is left out has one entry
        x = lax.reshape(x, [*(shape[k] for k in kept), x.shape[-1]])
        where = [new.index(k) for k in kept]
        order = sorted(range(len(kept)), key=where.__getitem__)
        x = lax.transpose(x, [*order, len(kept)])
        sizes = [*(shape[k] for k in new), x.shape[-1]]
        return lax.broadcast_in_dim(x, sizes, [*sorted(where), len(new)])

    return map_factors(kernel, kernel.w, axes, change)


def flip_sides(kernel: Kernel) -> Kernel:
    """The same kernel with inputs and outputs exchanged: ``a·b`` is also ``bᵀ·aᵀ``, transposed."""
    a, b, axes = factors.swap_sides(kernel.a, kernel.b, kernel.axes)
    side = IN if kernel.gain_side == OUT else OUT
    return dataclasses.replace(kernel, a=a, b=b, axes=axes, gain_side=side)


def align_roles(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The kernels with the same roles, where free axes and turning some of them allow that.

    Raises:
      Unfactored: they have not.
    """
    first, *rest = kernels
    same = [first]
    for other in rest:
        for candidate in (other, flip_sides(other)):
            axes = _common_roles([*same, candidate])
            if axes:
                same = [assign_roles(k, axes) for k in (*same, candidate)]
                break
        else:
            raise Unfactored(
                f"combines kernels whose axes have different roles: {first.axes!r}, {other.axes!r}"
            )
    return same


def join_kernels(kernels: Sequence[Kernel], **parts: Any) -> Kernel:
    """A kernel that is made of several, which have been given the same roles.

    Args:
      kernels: with their names and rates.
      **parts: of the result: ``w``, ``a``, ``b``, ``axes``, and a gain if it has one.

    Raises:
      Unfactored: they have different rates of dropout.
    """
    names = tuple(dict.fromkeys(name for k in kernels for name in k.names))
    if len({k.rate for k in kernels}) > 1:
        raise Unfactored("combines kernels with different rates of dropout")
    return Kernel(**parts, names=names, rate=kernels[0].rate)


def _common_roles(kernels: Sequence[Kernel]) -> str:
    axes = ""
    for k in range(len(kernels[0].axes)):
        roles = {kernel.axes[k] for kernel in kernels if not is_free(kernel, k)}
        if len(roles) > 1:
            return ""
        rest = [kernel.axes[k] for kernel in kernels if kernel.axes[k] != SAME]
        axes += roles.pop() if roles else (rest or [SAME])[0]
    return axes


def axis_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs the runs of axes of two shapes that hold the same elements.

    >>> axis_groups((2, 6, 1), (2, 1, 2, 3))
    [([0], [0]), ([], [1]), ([1], [2, 3]), ([2], [])]
    """
    if 0 in (*old, *new):
        raise Unfactored("reshape of an empty array")
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = tuple(old[i : i + 1]), tuple(new[j : j + 1])
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
