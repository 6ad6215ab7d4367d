"""Uses: the primitives that consume a kernel that is a low-rank sum, and compute ``x·W + (x·A)·B``.

A rule has two parts: one tells how its primitive treats the kernel's axes, the other computes what
the low-rank term adds to the result. A rule that does not fit raises ``Unfactored`` with the
reason. The first part also serves to find out which parameters are kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import factors
from lora_jax.factors import BATCH, IN, OUT, positions
from lora_jax.transform.kernel import Kernel, Unfactored, assign_roles, flip_sides, is_free

Array = jax.Array


class Sides(NamedTuple):
    """The axes of a kernel that a use sums over or looks up, and those that it batches over."""

    inputs: tuple[int, ...]
    batch: tuple[int, ...] = ()


class Factors(NamedTuple):
    """Factors with the kernel's inputs on the side of ``a``; the gain varies along either side."""

    a: Array
    b: Array
    axes: str
    gain: Array | None = None
    gain_side: str = OUT


def orient(kernel: Kernel, sides: Sides) -> Factors:
    """Returns the factors such that the use sums over the axes of ``a``.

    Raises:
      Unfactored: the use takes some input and some output axes, or part of one side.
    """
    for candidate in (kernel, flip_sides(kernel)):
        try:
            fitting = assign_roles(candidate, _required_roles(candidate, sides))
        except Unfactored:
            continue
        return Factors(fitting.a, fitting.b, fitting.axes, fitting.gain, fitting.gain_side)
    axes = kernel.axes
    if any(axes[k] != BATCH and not is_free(kernel, k) for k in sides.batch):
        raise Unfactored(f"batches over axes {sides.batch} of a kernel with axes {axes!r}")
    raise Unfactored(
        f"contracts axes {sides.inputs} of a kernel with axes {axes!r}: neither all inputs (i) nor "
        "all outputs (o)"
    )


def _required_roles(kernel: Kernel, sides: Sides) -> str:
    """Makes inputs of what is summed over; batch axes stay so where the use leaves them free."""
    rest = lambda k: BATCH if kernel.axes[k] == BATCH and kernel.w.shape[k] != 1 else OUT
    named = dict.fromkeys(sides.inputs, IN) | dict.fromkeys(sides.batch, BATCH)
    return "".join(named[k] if k in named else rest(k) for k in range(len(kernel.axes)))


def _branch_dtype(x: Array, result: Array) -> Any:
    """Returns the activation's dtype: a float32 adapter leaves a bfloat16 model in bfloat16."""
    return x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else result.dtype


def _dot_sides(params: dict, which: int, shape: Sequence[int]) -> Sides:
    contracting, batch = params["dimension_numbers"]
    return Sides(tuple(contracting[which]), tuple(batch[which]))


def _dot(params: dict, vals: Sequence[Any], f: Factors, base: Array, drop: Callable) -> Array:
    which = 0 if isinstance(vals[0], Kernel) else 1
    x = vals[1 - which]
    dtype = _branch_dtype(x, base)
    contracting, batch = params["dimension_numbers"]
    pairs = lambda dims: (dims[1 - which], dims[which])
    (x_in, k_in), (x_batch, k_batch) = pairs(contracting), pairs(batch)
    return factors.contract(
        drop(x.astype(dtype)),
        f.a.astype(dtype),
        f.b.astype(dtype),
        f.axes,
        dims=((x_in, k_in), (x_batch, k_batch)),
        x_first=which == 1,
        out_sharding=params.get("out_sharding"),
        precision=params["precision"],
        preferred_element_type=base.dtype,
    )


def _ragged_sides(params: dict, which: int, shape: Sequence[int]) -> Sides:
    dims = params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = dims.dot_dimension_numbers
    return Sides(tuple(contracting), (*batch, *dims.rhs_group_dimensions))


def _ragged(params: dict, vals: Sequence[Any], f: Factors, base: Array, drop: Callable) -> Array:
    """Multiplies each group of rows by its expert's factors."""
    x, _, sizes = vals
    if x.ndim != 2 or f.axes != "bio" or params["group_offset"] is not None:
        raise Unfactored("a ragged product of other than (rows, in) and (experts, in, out)")
    dtype = _branch_dtype(x, base)
    t = lax.ragged_dot(drop(x.astype(dtype)), f.a.astype(dtype), sizes, params["precision"])
    return lax.ragged_dot(
        t, f.b.astype(dtype), sizes, params["precision"], preferred_element_type=base.dtype
    )


def _gather_sides(params: dict, which: int, shape: Sequence[int]) -> Sides:
    dims, sizes = params["dimension_numbers"], params["slice_sizes"]
    rows = _looked_up_axes(params, shape)
    whole = all(sizes[k] == n for k, n in enumerate(shape) if k not in rows)
    # A slice of a whole axis starts at 0, unless it is filled where its start is out of bounds.
    filled = params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    indexed = set(dims.start_index_map)
    fits = rows == indexed or (rows < indexed and not filled)
    if dims.operand_batching_dims or not whole or not fits:
        raise Unfactored("gather of something other than whole rows")
    return Sides(tuple(sorted(rows)))


def _looked_up_axes(params: dict, shape: Sequence[int]) -> set[int]:
    """Returns the axes of which a gather takes one entry.

    They are collapsed if a table is indexed by an array of rows. ``vmap`` of an index leaves them
    in the result with size 1, and indexes every other axis as well, at 0.
    """
    dims, sizes = params["dimension_numbers"], params["slice_sizes"]
    one_of_many = {k for k in dims.start_index_map if sizes[k] == 1 and shape[k] != 1}
    return one_of_many | set(dims.collapsed_slice_dims)


def _gather(params: dict, vals: Sequence[Any], f: Factors, base: Array, drop: Callable) -> Array:
    """Multiplies rows of ``a`` at the indices by ``b``: the input of a lookup is one-hot."""
    if BATCH in f.axes:
        raise Unfactored("gather from a stack of tables")
    dims, n_ids = params["dimension_numbers"], vals[1].ndim - 1
    looked_up = look_up_rows(params, vals[1], f.a, f.axes).astype(base.dtype)
    # The input is one-hot, so that there is one draw for each row.
    looked_up = drop(looked_up, (*looked_up.shape[:-1], 1))
    # With a gain of 0 the branch is the whole row, which must come with all of its digits.
    precision = None if f.gain is None else lax.Precision.HIGHEST
    dims_of_product = (((n_ids,), (0,)), ((), ()))
    y = lax.dot_general(looked_up, f.b.astype(base.dtype), dims_of_product, precision=precision)
    return arrange_as_gathered(y, dims, f.axes, n_ids)


def look_up_rows(params: dict, indices: Array, x: Array, axes: str) -> Array:
    """Looks up the rows ``(*ids, n)`` of ``x (*in, n)`` that a gather of a kernel takes."""
    dims = params["dimension_numbers"]
    rows, n_ids = positions(axes, IN), indices.ndim - 1
    columns = [k for k, axis in enumerate(dims.start_index_map) if axis in rows]
    return lax.gather(
        x,
        indices if len(columns) == indices.shape[-1] else indices[..., np.array(columns)],
        lax.GatherDimensionNumbers(
            offset_dims=(n_ids,),
            collapsed_slice_dims=tuple(range(len(rows))),
            start_index_map=tuple(rows.index(dims.start_index_map[k]) for k in columns),
        ),
        slice_sizes=(1,) * len(rows) + (x.shape[-1],),
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"],
        mode=params["mode"],
        fill_value=0,  # out of bounds the base's own fill value must remain
    )


def arrange_as_gathered(y: Array, dims: lax.GatherDimensionNumbers, axes: str, n_ids: int) -> Array:
    """Puts ``(*ids, *out)`` in the order of the gather's result; rows that it keeps have size 1."""
    window_axes = [k for k in range(len(axes)) if k not in dims.collapsed_slice_dims]
    row_axes = [p for p, k in zip(dims.offset_dims, window_axes, strict=True) if axes[k] == IN]
    ids, offsets = iter(range(n_ids)), iter(range(n_ids, y.ndim))
    order = [p for p in range(y.ndim + len(row_axes)) if p not in row_axes]
    y = lax.transpose(y, [next(offsets if p in dims.offset_dims else ids) for p in order])
    return lax.expand_dims(y, row_axes)


def _conv_sides(params: dict, which: int, shape: Sequence[int]) -> Sides:
    if params["batch_group_count"] != 1:
        raise Unfactored("convolution with batch groups")
    out = params["dimension_numbers"].rhs_spec[0]
    return Sides(tuple(k for k in range(len(shape)) if k != out))


def _conv(params: dict, vals: Sequence[Any], f: Factors, base: Array, drop: Callable) -> Array:
    """Convolves with ``a`` to ``rank`` channels, then with ``b`` as a 1×1 convolution.

    With ``g`` feature groups each group has its own inputs and outputs but shares ``a``, so that
    there are ``g·rank`` channels in between, and ``b`` is grouped in the same way.
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


def _sparse_sides(params: dict, which: int, shape: Sequence[int]) -> Sides:
    (_, contracting), (_, batch) = params["dimension_numbers"]
    return Sides(tuple(contracting), tuple(batch))


class Use(NamedTuple):
    """A primitive that consumes a kernel.

    Attributes:
      operands: numbers of the operands that may be the kernel.
      sides: function ``sides(params, which, shape)`` that tells how the axes of operand number
        ``which`` are used.
      branch: function ``branch(params, operands, factors, base, drop)`` that computes what ``a·b``
        adds to the result; None if there is no rule for it yet.
    """

    operands: tuple[int, ...]
    sides: Callable[[dict, int, Sequence[int]], Sides]
    branch: Callable | None


USES: dict[str, Use] = {
    "dot_general": Use((0, 1), _dot_sides, _dot),
    "gather": Use((0,), _gather_sides, _gather),
    "ragged_dot_general": Use((1,), _ragged_sides, _ragged),
    "conv_general_dilated": Use((1,), _conv_sides, _conv),
    "bcoo_dot_general": Use((2,), _sparse_sides, None),
}
