"""Moves: the primitives that take a kernel that is a low-rank sum, and give back such kernels.

The frozen part goes through the very equation of the user's function, whatever its parameters are.
A rule computes only the new factors. It takes the equation, its operands, and the equation's
results for the frozen parts, and returns the results: kernels, or plain arrays where there are no
factors. It raises :class:`Unfactored` with the reason if the result is not a low-rank sum.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from lora_jax.factors import BATCH, OUT
from lora_jax.transform import combinations, placement, rearrangements
from lora_jax.transform.kernel import (
    Kernel,
    Unfactored,
    assign_roles,
    carried_axes,
    is_free,
    move_rank_inside,
    move_rank_last,
    require_kernel,
    widen,
)

Array = jax.Array
Rule = Callable[[JaxprEqn, Sequence[Any], Sequence[Array]], list]


def _convert(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    """Casts the frozen part; factors keep their precision until they meet an activation."""
    kernel, dtype = require_kernel(vals), w[0].dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Unfactored(f"conversion to {dtype}")
    if jnp.finfo(dtype).bits < 16 and dtype != kernel.w.dtype:
        raise Unfactored(f"rounding to {dtype}: the sum is rounded, not its parts")
    return [dataclasses.replace(kernel, w=w[0])]


def _reduce_precision(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    kernel = require_kernel(vals)
    if eqn.params["mantissa_bits"] < jnp.finfo(jnp.bfloat16).nmant:
        raise Unfactored("rounding to few bits: the sum is rounded, not its parts")
    a, b = (eqn.primitive.bind(x, **eqn.params) for x in (kernel.a, kernel.b))
    return [dataclasses.replace(kernel, w=w[0], a=a, b=b)]


def _stop_gradient(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    kernel = require_kernel(vals)
    a, b = (lax.stop_gradient(x) for x in (kernel.a, kernel.b))
    gain = None if kernel.gain is None else lax.stop_gradient(kernel.gain)
    return [dataclasses.replace(kernel, w=w[0], a=a, b=b, gain=gain)]


def _negative(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    kernel = require_kernel(vals)
    return [dataclasses.replace(kernel, w=w[0], b=-kernel.b)]


def _mul(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    which = 0 if isinstance(vals[0], Kernel) else 1
    return [_scale(require_kernel(vals, which), vals[1 - which], w[0], jnp.multiply)]


def _div(eqn: JaxprEqn, vals: Sequence, w: Sequence[Array]) -> list[Kernel]:
    if not isinstance(vals[0], Kernel):
        raise Unfactored("divides something by the kernel")
    return [_scale(require_kernel(vals), vals[1], w[0], jnp.divide)]


def _scale(
    kernel: Kernel, scale: Array, w: Array, change: Callable[[Array, Array], Array]
) -> Kernel:
    """Multiplies or divides by a number, or by an array that varies along one side only."""
    if jnp.ndim(scale) == 0:
        b = change(kernel.b, jnp.asarray(scale, kernel.b.dtype))
        return dataclasses.replace(kernel, w=w, b=b)
    kernel = widen(kernel, w)
    varying = [k for k, n in enumerate(scale.shape) if n != 1]
    free = {k for k in varying if is_free(kernel, k)}
    roles = {kernel.axes[k] for k in varying if k not in free} - {BATCH}
    if len(roles) > 1:
        raise Unfactored("multiplied or divided by an array that varies over inputs and outputs")
    side = roles.pop() if roles else OUT
    kernel = assign_roles(
        kernel, "".join(side if k in free else role for k, role in enumerate(kernel.axes))
    )
    factor = move_rank_last(kernel) if side == OUT else kernel.a
    axes = carried_axes(kernel.axes, side)
    scale_of_side = lax.squeeze(scale, [k for k in range(scale.ndim) if k not in axes])
    ordered = sorted(axes)
    scale_of_side = lax.transpose(scale_of_side, [ordered.index(k) for k in axes])
    scale_of_side = lax.expand_dims(scale_of_side, [scale_of_side.ndim])
    factor = change(factor, scale_of_side.astype(factor.dtype))
    if side == OUT:
        return dataclasses.replace(kernel, w=w, b=move_rank_inside(factor, kernel.axes))
    return dataclasses.replace(kernel, w=w, a=factor)


MOVES: dict[str, Rule] = {
    "transpose": rearrangements.transpose,
    "reshape": rearrangements.reshape,
    "squeeze": rearrangements.squeeze,
    "broadcast_in_dim": rearrangements.broadcast,
    "slice": rearrangements.slice_,
    "dynamic_slice": rearrangements.dynamic_slice,
    "rev": rearrangements.reverse,
    "pad": rearrangements.pad,
    "tile": rearrangements.tile,
    "split": rearrangements.split,
    "unstack": rearrangements.unstack,
    "convert_element_type": _convert,
    "reduce_precision": _reduce_precision,
    "stop_gradient": _stop_gradient,
    "neg": _negative,
    "mul": _mul,
    "div": _div,
    "add": combinations.add,
    "add_any": combinations.add,
    "sub": combinations.sub,
    "select_n": combinations.select,
    "concatenate": combinations.concatenate,
    "stack": combinations.stack,
    "sharding_constraint": placement.replace_frozen,
    "pvary": placement.replace_frozen,
    "pcast": placement.replace_frozen,
    "name": placement.replace_frozen,
    "copy": placement.replace_frozen,
    "copy_p": placement.replace_frozen,
    "optimization_barrier": placement.replace_frozen,
    "reshard": placement.reshard,
    "device_put": placement.device_put,
    "all_gather": placement.all_gather,
    "all_gather_invariant": placement.all_gather,
}

# With another array these make a kernel of a kernel, or an activation of an activation. The uses of
# the result tell which.
AMBIGUOUS = {"add", "add_any", "sub", "mul", "div"}
