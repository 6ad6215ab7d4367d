"""Where the axes of an array come from: the axes of which parameters, through rearrangements.

The search for roles computes nothing. An array is a :class:`Value`: each of its axes has a set of
origins, and an origin is an axis of a parameter. This file has for each primitive that rearranges
an array, or changes it elementwise, the origins of the axes of its results.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from lora_jax.transform import forms
from lora_jax.transform.kernel import Unfactored, axis_groups

# A value depends on parameters and constants alone, on noise too, or on the function's inputs too.
FIXED, NOISE, DATA = range(3)


class Origin(NamedTuple):
    """An axis of a parameter: the parameter's name, the number of the axis, the number of axes."""

    name: str
    axis: int
    ndim: int


Axes = tuple[frozenset[Origin], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Value:
    """The facts that are known of an array.

    Attributes:
      axes: origins of each axis; None if the array is no rearrangement of parameters.
      level: dependence of the array: ``FIXED``, ``NOISE`` or ``DATA``.
      is_repeated: whether an axis was added or widened by repetition.
      is_picked: whether it has rows of a parameter that something chose by the inputs.
      is_mixed: whether it was multiplied by a constant matrix, as a resized table of positions.
    """

    axes: Axes | None = None
    level: int = FIXED
    is_repeated: bool = False
    is_picked: bool = False
    is_mixed: bool = False


CONSTANT, INPUT = Value(), Value(level=DATA)


def parameter_value(name: str, ndim: int) -> Value:
    """Returns the value of a parameter itself."""
    return Value(axes=tuple(frozenset({Origin(name, k, ndim)}) for k in range(ndim)))


def derive(values: Sequence[Value], *, axes: Axes | None = None, level: int) -> Value:
    """Makes a value of others: the flags of any value that has origins hold of it."""
    flags = ("is_repeated", "is_picked", "is_mixed")
    parts = [v for v in values if v.axes is not None]
    set_flags = {flag: any(getattr(v, flag) for v in parts) for flag in flags}
    return Value(axes=axes, level=level, **set_flags)


def names(axes: Axes | None) -> list[str]:
    """Returns the parameters that the axes come from, in a fixed order."""
    return sorted({origin.name for axis in axes or () for origin in axis})


def union(parts: Sequence[Axes]) -> Axes:
    """Unites the origins of the parts axis by axis; for ``W + Wᵀ`` it takes those of the first."""
    first, *rest = parts
    for part in rest:
        known_names = names(first)
        new = [frozenset(o for o in axis if o.name not in known_names) for axis in part]
        first = tuple(a | b for a, b in zip(first, new, strict=True))
    return first


def shape(atom: Any) -> tuple[int, ...]:
    """Returns the shape of a variable or literal of a jaxpr, also of a reference to an array."""
    return tuple(atom.aval.shape)


# ---- Rearrangements ------------------------------------------------------------------------------
#
# A rule takes the equation and the origins of its operands (None for those that have none), and
# returns the origins of each result.

Rule = Callable[[JaxprEqn, Sequence[Axes | None]], Sequence[Axes | None]]


def _transpose(eqn: JaxprEqn, axes: Sequence) -> list[Axes]:
    return [tuple(axes[0][k] for k in eqn.params["permutation"])]


def _reshape(eqn: JaxprEqn, axes: Sequence) -> list[Axes]:
    order = eqn.params.get("dimensions")
    order = range(len(axes[0])) if order is None else order
    old, sizes = [axes[0][k] for k in order], [shape(eqn.invars[0])[k] for k in order]
    new: list[frozenset] = [frozenset()] * len(shape(eqn.outvars[0]))
    for before, after in axis_groups(sizes, shape(eqn.outvars[0])):
        joined = [old[k] for k in before if sizes[k] != 1] or [old[k] for k in before]
        for k in after:
            new[k] = frozenset().union(*joined)
    return [tuple(new)]


def _squeeze(eqn: JaxprEqn, axes: Sequence) -> list[Axes]:
    removed = {k % len(axes[0]) for k in eqn.params["dimensions"]}
    return [tuple(axis for k, axis in enumerate(axes[0]) if k not in removed)]


def _broadcast(eqn: JaxprEqn, axes: Sequence) -> list[Axes]:
    old = dict(zip(eqn.params["broadcast_dimensions"], axes[0], strict=True))
    return [tuple(old.get(k, frozenset()) for k in range(len(shape(eqn.outvars[0]))))]


def _pick_blocks(eqn: JaxprEqn, axes: Sequence) -> list[Axes]:
    """Follows a ``dynamic_slice``: an axis of which one entry is taken loses its origin."""
    before, after = shape(eqn.invars[0]), shape(eqn.outvars[0])
    keeps_origin = [a == b or b > 1 for a, b in zip(before, after, strict=True)]
    return [
        tuple(x if keep else frozenset() for x, keep in zip(axes[0], keeps_origin, strict=True))
    ]


def _unstack(eqn: JaxprEqn, axes: Sequence) -> list[Axes]:
    removed = eqn.params["axis"]
    return [axes[0][:removed] + axes[0][removed + 1 :]] * len(eqn.outvars)


def _stack(eqn: JaxprEqn, axes: Sequence) -> list[Axes]:
    joined, new = union([x for x in axes if x is not None]), eqn.params["axis"]
    return [(*joined[:new], frozenset(), *joined[new:])]


def _gather(eqn: JaxprEqn, axes: Sequence) -> list[Axes]:
    """Follows a gather: entries picked by number keep the origin of their axis, if it is one.

    So does an axis of which a window is taken, as by a ``dynamic_slice`` under ``vmap``, unless the
    window holds one entry.
    """
    dims, indices = eqn.params["dimension_numbers"], shape(eqn.invars[1])
    looked_up = (*dims.collapsed_slice_dims, *getattr(dims, "operand_batching_dims", ()))
    rows = [k for k in range(len(axes[0])) if k not in looked_up]
    picked = {k for k in rows if eqn.params["slice_sizes"][k] == 1 < shape(eqn.invars[0])[k]}
    remaining = iter(frozenset() if k in picked else axes[0][k] for k in rows)
    index = axes[0][looked_up[0]] if len(looked_up) == 1 and len(indices) == 2 else frozenset()
    out = range(len(shape(eqn.outvars[0])))
    return [tuple(next(remaining) if k in dims.offset_dims else index for k in out)]


def _scatter(eqn: JaxprEqn, axes: Sequence) -> list[Axes]:
    """Follows ``x.at[...].set(y)``: the axes of ``x`` and those of ``y`` that lie along them."""
    dims, ndim = eqn.params["dimension_numbers"], len(shape(eqn.outvars[0]))
    set_by_number = (*dims.inserted_window_dims, *getattr(dims, "operand_batching_dims", ()))
    rows = [k for k in range(ndim) if k not in set_by_number]
    parts = [] if axes[0] is None else [axes[0]]
    if axes[2] is not None:
        along = dict(zip(rows, dims.update_window_dims, strict=True))
        numbers = [k for k in range(len(axes[2])) if k not in dims.update_window_dims]
        if len(set_by_number) == len(numbers) == 1:  # rows that are set by number
            along[set_by_number[0]] = numbers[0]
        parts.append(tuple(axes[2][along[k]] if k in along else frozenset() for k in range(ndim)))
    return [union(parts)]


def _all_gather(eqn: JaxprEqn, axes: Sequence) -> list[Axes]:
    new = eqn.params["all_gather_dimension"]
    added: Axes = () if eqn.params["tiled"] else (frozenset(),)
    return [(*axes[0][:new], *added, *axes[0][new:])]


def _reduce_scatter(eqn: JaxprEqn, axes: Sequence) -> list[Axes]:
    removed = eqn.params["scatter_dimension"]
    return [axes[0] if eqn.params["tiled"] else axes[0][:removed] + axes[0][removed + 1 :]]


def _all_to_all(eqn: JaxprEqn, axes: Sequence) -> list[Axes]:
    if eqn.params["tiled"]:
        return [axes[0]]
    removed, new = eqn.params["split_axis"], eqn.params["concat_axis"]
    rest = axes[0][:removed] + axes[0][removed + 1 :]
    return [(*rest[:new], frozenset(), *rest[new:])]


def _keep_axes(eqn: JaxprEqn, axes: Sequence) -> list[Axes]:
    """Gives all results the axes of the one operand with origins, in the same order."""
    (only,) = [x for x in axes if x is not None]
    return [only] * len(eqn.outvars)


def _unite_axes(eqn: JaxprEqn, axes: Sequence) -> list[Axes]:
    return [union([x for x in axes if x is not None])]


REARRANGEMENTS: dict[str, Rule] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _keep_axes,
    "dynamic_slice": _pick_blocks,
    "dynamic_update_slice": _unite_axes,
    "gather": _gather,
    "scatter": _scatter,
    **dict.fromkeys(
        (f"scatter{sign}{kind}" for sign in "-_" for kind in ("add", "sub", "mul", "min", "max")),
        _scatter,
    ),
    "pad": _keep_axes,
    "rev": _keep_axes,
    "tile": _keep_axes,
    "split": _keep_axes,
    "unstack": _unstack,
    "stack": _stack,
    "concatenate": _unite_axes,
    "sharding_constraint": _keep_axes,
    "reshard": _keep_axes,
    "pvary": _keep_axes,
    "pcast": _keep_axes,
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "ppermute": _keep_axes,
    "copy": _keep_axes,
    "copy_p": _keep_axes,
    "convert_element_type": _keep_axes,
    "reduce_precision": _keep_axes,
    "name": _keep_axes,
}

# Primitives whose result has fewer axes, or other entries, and is no kernel any more.
REDUCTIONS = {
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce"),
    *("argmax", "argmin", "reduce_window", "reduce_window_sum", "reduce_window_max", "psum"),
    *("svd", "qr", "eigh", "eig", "lu", "fft", "top_k", "iota", "cumsum"),
}
# Primitives whose results are their operands.
ONE_TO_ONE = {"device_put", "optimization_barrier"}
# Primitives that repeat entries, if the result is larger than the operand.
REPETITIONS = {"broadcast_in_dim", "tile"}
# Products: a kernel that noise multiplies by zero or one is still a kernel.
MULTIPLICATIVE = {"mul", "div", "select_n"}


def elementwise_axes(eqn: JaxprEqn, values: Sequence[Value]) -> list[Axes | None]:
    """Gives a result of any other operation the origins of the operands of its shape.

    An operand that is broadcast does not count beside one that is not: a layer scale of shape
    ``(1, features)`` that multiplies a kernel is not another kernel.
    """
    result: list[Axes | None] = []
    for var in eqn.outvars:
        alike = [
            v
            for v, atom in zip(values, eqn.invars, strict=True)
            if v.axes is not None and shape(atom) == shape(var)
        ]
        alike = [v for v in alike if not v.is_repeated] or alike
        if not alike and eqn.primitive.name == "mul":
            result.append(_outer(eqn, values))
            continue
        real = jnp.issubdtype(getattr(var.aval, "dtype", jnp.int32), jnp.inexact)
        parts = [v.axes for v in alike if v.axes is not None]
        result.append(union(parts) if parts and real else None)
    return result


def _outer(eqn: JaxprEqn, values: Sequence[Value]) -> Axes | None:
    """Returns the origins of a product whose operands are all broadcast, as a Kronecker product."""
    pairs = zip(values, eqn.invars, strict=True)
    parts = [
        tuple(axis if n != 1 else frozenset() for axis, n in zip(v.axes, shape(x), strict=True))
        for v, x in pairs
        if v.axes is not None and len(v.axes) == len(shape(eqn.outvars[0]))
    ]
    return union(parts) if parts else None


def rearranged_axes(eqn: JaxprEqn, values: Sequence[Value]) -> Sequence[Axes | None] | None:
    """Returns the origins of each result; None where the primitive is no known rearrangement.

    Raises:
      KeyError, TypeError, ValueError, AttributeError: the equation has a form that is not known.
    """
    rule = REARRANGEMENTS.get(forms.name_of(eqn))
    if rule is None:
        return None
    try:
        return rule(eqn, [v.axes for v in values])
    except Unfactored:  # the reshape of an empty array
        return [None] * len(eqn.outvars)
