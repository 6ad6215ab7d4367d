"""A kernel that is a sum, as the interpreter carries it from one equation to the next."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax import factors
from lora_jax.factors import BATCH, IN, OUT, positions
from lora_jax.transform import deferred
from lora_jax.transform.deferred import Deferred

Array = jax.Array
SAME = "="  # the role of an axis along which the sum is constant: neither factor carries it
Change = Callable[[Array, list[int], list[int]], Array]


class Unfactored(Exception):
    """The low-rank sum cannot be kept factored here; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Kernel:
    """A kernel inside the interpreter: ``gain ⊙ w + a·b``, rearranged by the moves so far.

    Attributes:
      w: frozen part, which may be quantized.
      a: ``(*batch, *in, rank)``.
      b: ``(*batch, rank, *out)`` with the scale already in it.
      gain: ``(*batch, *out)``, or ``(*batch, *in)`` after the sides were exchanged; None if one.
      axes: role of each axis of ``w``: "i", "o", "b", or "=" for one that was added.
      gain_side: role of the axes along which the gain varies, beside the batch axes.
      names: paths of the parameters that it is made of; in a nested call their numbers.
      rate: rate of dropout on the input of its branch; None if it never has any.
    """

    w: Array | Deferred
    a: Array
    b: Array
    gain: Array | None = None
    axes: str
    gain_side: str = OUT
    names: tuple
    rate: float | None = 0.0

    @property
    def numbers(self) -> Array:
        """The frozen part as an array, decoded if it is quantized."""
        return deferred.materialize(self.w)


jax.tree_util.register_dataclass(
    Kernel, ["w", "a", "b", "gain"], ["axes", "gain_side", "names", "rate"]
)


def carried_axes(axes: str, role: str) -> list[int]:
    """Returns the axes that a factor carries, in its own order: batch axes, then its role's."""
    return positions(axes, BATCH + role)


def map_factors(
    kernel: Kernel,
    w: Array | Deferred,
    axes: str,
    change: Change,
    *,
    change_gain: Change | None = None,
) -> Kernel:
    """Applies ``change(factor, old, new)`` to both factors, and to the gain if there is one.

    ``old`` and ``new`` are the kernel axes that the factor carries before and after, in the order
    of its own axes; ``change`` sees the rank as the last axis, and a gain with a rank of one.
    ``change_gain`` replaces ``change`` for a gain: padding fills factors with zeros, gains with
    ones.
    """
    sides = lambda role: (carried_axes(kernel.axes, role), carried_axes(axes, role))
    a = change(kernel.a, *sides(IN))
    b = change(move_rank_last(kernel), *sides(OUT))
    new: dict[str, Any] = {"w": w, "a": a, "b": move_rank_inside(b, axes), "axes": axes}
    if kernel.gain is not None:
        gain = lax.expand_dims(kernel.gain, [kernel.gain.ndim])
        gain = (change_gain or change)(gain, *sides(kernel.gain_side))
        new["gain"] = lax.squeeze(gain, [gain.ndim - 1])
    return dataclasses.replace(kernel, **new)


def factor_specs(kernel: Kernel, spec: factors.Spec) -> dict[str, PartitionSpec]:
    """Returns the specs of the factors, and of a gain, for a kernel with the given spec."""
    letters = {"a": factors.A_AXES, "b": factors.B_AXES}
    letters |= {} if kernel.gain is None else {"gain": BATCH + kernel.gain_side}
    return {name: factors.spec_of(axes, kernel.axes, spec) for name, axes in letters.items()}


def move_rank_last(kernel: Kernel) -> Array:
    """Moves the rank of ``b`` to its last axis, where ``a`` has it."""
    return _moveaxis(kernel.b, kernel.axes.count(BATCH), kernel.b.ndim - 1)


def move_rank_inside(b: Array, axes: str) -> Array:
    """Inverts :func:`move_rank_last`."""
    return _moveaxis(b, b.ndim - 1, axes.count(BATCH))


def _moveaxis(x: Array, source: int, target: int) -> Array:
    order = [k for k in range(x.ndim) if k != source]
    order.insert(target, source)
    return x if order == list(range(x.ndim)) else lax.transpose(x, order)


def require_kernel(vals: Sequence[Any], which: int = 0) -> Kernel:
    """Returns operand number ``which``, if it and no other is a kernel."""
    kernels = [k for k, x in enumerate(vals) if isinstance(x, Kernel)]
    if kernels != [which]:
        raise Unfactored(
            f"operands {kernels} are low-rank sums; the rule wants operand {which} only"
        )
    return vals[which]


def broadcast_kernel(kernel: Kernel, w: Array, dims: Sequence[int]) -> Kernel:
    """Broadcasts factors as ``lax.broadcast_in_dim`` has broadcast the frozen part to ``w``."""
    role_of = dict(zip(dims, kernel.axes, strict=True))
    axes = "".join(role_of.get(k, SAME) for k in range(w.ndim))

    def change(x: Array, before: list[int], new: list[int]) -> Array:
        sizes = [*(w.shape[k] for k in new), x.shape[-1]]
        return lax.broadcast_in_dim(x, sizes, [*(new.index(dims[k]) for k in before), len(new)])

    return map_factors(kernel, w, axes, change)


def widen(kernel: Kernel, w: Array) -> Kernel:
    """Broadcasts a kernel to the shape of ``w``, the result of an operation with an array."""
    if kernel.w.shape == w.shape:
        return kernel
    wide = lax.broadcast_in_dim(kernel.numbers, w.shape, range(w.ndim))
    return broadcast_kernel(kernel, wide, range(w.ndim))


def with_numbers(value: Any) -> Any:
    """Makes numbers of what is quantized: a kernel's frozen part, or the value itself."""
    if not isinstance(value, Kernel):
        return deferred.materialize(value)
    return dataclasses.replace(value, w=deferred.materialize(value.w))


def materialize(kernel: Kernel) -> Array:
    """Computes the plain array that the kernel stands for."""
    kernel = with_numbers(kernel)
    if SAME not in kernel.axes:
        gain = spread_gain(kernel)
        return factors.materialize(kernel.numbers, kernel.a, kernel.b, kernel.axes, gain)
    return materialize(assign_roles(kernel, kernel.axes.replace(SAME, OUT)))


def spread_gain(kernel: Kernel) -> Array | None:
    """Returns the gain with as many axes as the kernel, of size 1 where it does not vary."""
    if kernel.gain is None:
        return None
    where = carried_axes(kernel.axes, kernel.gain_side)
    return factors.spread(kernel.gain, where, kernel.w.ndim)


def refuse_gain(kernels: Sequence[Kernel], what: str) -> None:
    """Refuses kernels with a gain where a rule has no form for them.

    Raises:
      Unfactored: a kernel has a gain.
    """
    if any(k.gain is not None for k in kernels):
        raise Unfactored(f"{what}, which has a gain")


def is_free(kernel: Kernel, axis: int) -> bool:
    """Tells whether an axis may have any role: it has one entry, or only equal ones."""
    return kernel.axes[axis] == SAME or kernel.w.shape[axis] == 1


def assign_roles(kernel: Kernel, axes: str) -> Kernel:
    """Gives other roles to the free axes of a kernel.

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
        remaining = [k for k in old if k in new]  # the others have one entry
        x = lax.reshape(x, [*(shape[k] for k in remaining), x.shape[-1]])
        places = [new.index(k) for k in remaining]
        order = sorted(range(len(remaining)), key=places.__getitem__)
        x = lax.transpose(x, [*order, len(remaining)])
        sizes = [*(shape[k] for k in new), x.shape[-1]]
        return lax.broadcast_in_dim(x, sizes, [*sorted(places), len(new)])

    return map_factors(kernel, kernel.w, axes, change)


def flip_sides(kernel: Kernel) -> Kernel:
    """Exchanges inputs and outputs of a kernel: ``a·b`` is also ``bᵀ·aᵀ``, transposed."""
    a, b, axes = factors.swap_sides(kernel.a, kernel.b, kernel.axes)
    side = IN if kernel.gain_side == OUT else OUT
    return dataclasses.replace(kernel, a=a, b=b, axes=axes, gain_side=side)


def align_roles(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Gives kernels the same roles, by their free axes and by flipping the sides of some.

    Raises:
      Unfactored: they can't have the same roles.
    """
    first, *rest = kernels
    aligned = [first]
    for other in rest:
        for candidate in (other, flip_sides(other)):
            axes = _common_roles([*aligned, candidate])
            if axes:
                aligned = [assign_roles(k, axes) for k in (*aligned, candidate)]
                break
        else:
            raise Unfactored(
                f"combines kernels whose axes have different roles: {first.axes!r}, {other.axes!r}"
            )
    return aligned


def join_kernels(kernels: Sequence[Kernel], **parts: Any) -> Kernel:
    """Makes one kernel of several, which have been given the same roles.

    Args:
      kernels: the kernels, which give names and rate.
      **parts: fields of the result: ``w``, ``a``, ``b``, ``axes``, and a gain if it has one.

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
        free_roles = [kernel.axes[k] for kernel in kernels if kernel.axes[k] != SAME]
        axes += roles.pop() if roles else (free_roles or [SAME])[0]
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
    """Returns the lengths of the shortest leading runs of two shapes with the same product."""
    i, j, left, right = 1, 1, old[0], new[0]
    while left != right:
        if left < right:
            left, i = left * old[i], i + 1
        else:
            right, j = right * new[j], j + 1
    return i, j
