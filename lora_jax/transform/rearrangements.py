"""Moves of one kernel that rearrange its axes: each factor is rearranged by itself.

The rules of :mod:`.moves` that are called for transposes, reshapes, slices and the like.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.factors import BATCH, OUT
from lora_jax.transform.kernel import (
    SAME,
    Kernel,
    Unfactored,
    assign_roles,
    axis_groups,
    broadcast_kernel,
    is_free,
    map_factors,
    refuse_gain,
    require_kernel,
)

Array = jax.Array


def transpose(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Transposes as ``lax.transpose``."""
    return [_transpose_kernel(require_kernel(vals), w[0], eqn.params["permutation"])]


def _transpose_kernel(kernel: Kernel, w: Array, order: Sequence[int]) -> Kernel:
    def change(x: Array, old: list[int], new: list[int]) -> Array:
        return lax.transpose(x, [old.index(order[k]) for k in new] + [x.ndim - 1])

    return map_factors(kernel, w, "".join(kernel.axes[k] for k in order), change)


def reshape(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Reshapes as ``lax.reshape``, if it splits and joins axes within one role only."""
    kernel, shape, order = require_kernel(vals), w[0].shape, eqn.params.get("dimensions")
    if order is not None:
        kernel = _transpose_kernel(kernel, lax.transpose(kernel.numbers, order), order)
    groups = axis_groups(kernel.w.shape, shape)
    axes = [SAME] * len(shape)
    for old, new in groups:
        role = _find_group_role(kernel, old)
        # An axis along which nothing changes takes the role of the axes that it is joined with.
        joined = [role if is_free(kernel, k) and k in old else x for k, x in enumerate(kernel.axes)]
        if role != SAME and any(kernel.axes[k] == SAME and kernel.w.shape[k] != 1 for k in old):
            kernel = assign_roles(kernel, "".join(joined))
        for k in new:
            axes[k] = role
    return [_reshape_kernel(kernel, w[0], "".join(axes), eqn.params.get("sharding"))]


def _find_group_role(kernel: Kernel, group: Sequence[int]) -> str:
    roles = {kernel.axes[k] for k in group if not is_free(kernel, k)}
    if len(roles) > 1:
        raise Unfactored("reshape joins axes of different sides (input, output, batch)")
    rest = [kernel.axes[k] for k in group if kernel.axes[k] != SAME]
    return roles.pop() if roles else (rest or [SAME])[0]


def _reshape_kernel(
    kernel: Kernel, w: Array, axes: str, sharding: NamedSharding | None = None
) -> Kernel:
    def change(x: Array, old: list[int], new: list[int]) -> Array:
        sizes = [*(w.shape[k] for k in new), x.shape[-1]]
        out_sharding = None if sharding is None else _factor_sharding(sharding, new)
        return jnp.reshape(x, sizes, out_sharding=out_sharding)

    return map_factors(kernel, w, axes, change)


def _factor_sharding(sharding: NamedSharding, axes: Sequence[int]) -> NamedSharding:
    """Returns the sharding of a factor whose last axis is its rank, which stays whole."""
    entries = _entries(sharding.spec, max(axes, default=-1) + 1)
    return NamedSharding(sharding.mesh, PartitionSpec(*(entries[k] for k in axes), None))


def _entries(spec: PartitionSpec, ndim: int) -> list:
    return [*spec, *[None] * (ndim - len(spec))]


def squeeze(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Squeezes as ``lax.squeeze``: axes with one entry go, whatever their role."""
    kernel = require_kernel(vals)
    removed = {k % kernel.w.ndim for k in eqn.params["dimensions"]}
    axes = "".join(axis for k, axis in enumerate(kernel.axes) if k not in removed)
    return [_reshape_kernel(kernel, w[0], axes)]


def broadcast(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Broadcasts as ``lax.broadcast_in_dim``: the sum is constant along new and widened axes."""
    kernel, dims = require_kernel(vals), eqn.params["broadcast_dimensions"]
    if eqn.params.get("sharding") is not None:
        raise Unfactored("broadcast to an explicit sharding")
    return [broadcast_kernel(kernel, w[0], dims)]


def slice_(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Slices as ``lax.slice``: rows of ``a`` for input axes, columns of ``b`` for output axes."""
    kernel = require_kernel(vals)
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * kernel.w.ndim
    return [_slice_kernel(kernel, w[0], start, limit, strides)]


def _slice_kernel(
    kernel: Kernel, w: Array, start: Sequence, limit: Sequence, strides: Sequence
) -> Kernel:
    def change(x: Array, old: list[int], new: list[int]) -> Array:
        pick = lambda values, last: [values[k] for k in old] + [last]
        return lax.slice(x, pick(start, 0), pick(limit, x.shape[-1]), pick(strides, 1))

    return map_factors(kernel, w, kernel.axes, change)


def dynamic_slice(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Slices as ``lax.dynamic_slice``, from places that are data; see :func:`slice_`."""
    kernel, sizes, indices = require_kernel(vals), eqn.params["slice_sizes"], vals[1:]

    def change(x: Array, old: list[int], new: list[int]) -> Array:
        start = [indices[k] for k in old] + [jnp.zeros_like(indices[0])]
        return lax.dynamic_slice(x, start, [sizes[k] for k in old] + [x.shape[-1]])

    return [map_factors(kernel, w[0], kernel.axes, change)]


def reverse(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Reverses as ``lax.rev``."""
    kernel, turned_axes = require_kernel(vals), eqn.params["dimensions"]

    def change(x: Array, old: list[int], new: list[int]) -> Array:
        return lax.rev(x, [old.index(k) for k in turned_axes if k in old])

    return [map_factors(kernel, w[0], kernel.axes, change)]


def pad(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Pads as ``lax.pad``: the frozen part with the value, factors with 0, and a gain with 1."""
    kernel, config = require_kernel(vals), eqn.params["padding_config"]
    side = OUT if kernel.gain is None else kernel.gain_side
    is_padded = lambda k: tuple(config[k]) != (0, 0, 0)
    free = [k for k in range(kernel.w.ndim) if is_padded(k) and is_free(kernel, k)]
    kernel = assign_roles(
        kernel, "".join(side if k in free else role for k, role in enumerate(kernel.axes))
    )
    grown = [k for k, widths in enumerate(config) if max(widths) > 0]
    is_scaled = any(kernel.axes[k] not in (BATCH, side) for k in grown)
    if is_scaled and not _is_zero(vals[1]):
        refuse_gain([kernel], "pads a side of a kernel with a number that may not be zero")

    def fill_with(make: Callable) -> Callable:
        def change(x: Array, old: list[int], new: list[int]) -> Array:
            return lax.pad(x, make((), x.dtype), [*(config[k] for k in old), (0, 0, 0)])

        return change

    zeros, ones = fill_with(jnp.zeros), fill_with(jnp.ones)
    return [map_factors(kernel, w[0], kernel.axes, zeros, change_gain=ones)]


def _is_zero(x: Any) -> bool:
    """Tells whether a number is known to be zero while the function is traced."""
    return not isinstance(x, jax.core.Tracer) and not np.any(x)


def tile(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Tiles as ``jnp.tile``: entries of a factor are repeated along the axes that it carries."""
    kernel, reps = require_kernel(vals), eqn.params["reps"]

    def change(x: Array, old: list[int], new: list[int]) -> Array:
        return jnp.tile(x, (*(reps[k] for k in old), 1))

    return [map_factors(kernel, w[0], kernel.axes, change)]


def split(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Splits as ``jnp.split``: a slice for each result."""
    kernel, axis = require_kernel(vals), eqn.params["axis"]
    parts, start = [], [0] * kernel.w.ndim
    for size, part in zip(map(int, eqn.params["sizes"]), w, strict=True):
        limit = list(kernel.w.shape)
        limit[axis] = start[axis] + size
        parts.append(_slice_kernel(kernel, part, list(start), limit, [1] * kernel.w.ndim))
        start[axis] += size
    return parts


def unstack(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Unstacks as ``jnp.unstack`` and iteration do: an entry of one axis for each result."""
    kernel, axis = require_kernel(vals), eqn.params["axis"]
    axes = kernel.axes[:axis] + kernel.axes[axis + 1 :]
    rows = []
    for k, part in enumerate(w):
        start, limit = [0] * kernel.w.ndim, list(kernel.w.shape)
        start[axis], limit[axis] = k, k + 1
        w_row = lax.expand_dims(part, [axis])
        row = _slice_kernel(kernel, w_row, start, limit, [1] * kernel.w.ndim)
        rows.append(_reshape_kernel(row, part, axes))
    return rows


def pick_entries(
    eqn: JaxprEqn, kernel: Kernel, indices: Array, w: Array, rows: Sequence[int]
) -> list[Kernel]:
    """Gathers entries of batch axes, as ``lax.gather``: each index has a kernel and factors.

    Models use it to pick experts for each token, or layers by number.
    """
    dims, n_ids = eqn.params["dimension_numbers"], indices.ndim - 1
    columns = [k for k, axis in enumerate(dims.start_index_map) if axis in rows]
    window_axes = iter(k for k in range(len(kernel.axes)) if k not in dims.collapsed_slice_dims)
    ids = iter(range(n_ids))
    # What each axis of the result is: an axis of the indices, or of the kernel.
    labels = [
        ("kernel", next(window_axes)) if p in dims.offset_dims else ("ids", next(ids))
        for p in range(w.ndim)
    ]
    roles = {("ids", k): BATCH for k in range(n_ids)}
    roles |= {("kernel", k): SAME if k in rows else role for k, role in enumerate(kernel.axes)}
    axes = "".join(roles[label] for label in labels)

    def change(x: Array, old: list[int], new: list[int], fill: float = 0) -> Array:
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
            fill_value=fill,  # out of bounds the base's own fill value must remain
        )
        gathered = [*(("ids", k) for k in range(n_ids)), *(("kernel", k) for k in rest)]
        return lax.transpose(y, [*(gathered.index(labels[p]) for p in new), len(gathered)])

    return [map_factors(kernel, w, axes, change, change_gain=functools.partial(change, fill=1))]
