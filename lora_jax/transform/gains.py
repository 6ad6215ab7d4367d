"""Gains in the uses of a kernel: ``x·(gain ⊙ W)``, computed from ``x·W``.

Where a use keeps the axes along which the gain varies, the result of the product is scaled. Where
it sums over them, as with a transposed kernel, the other operand is scaled. :data:`GAINS` has for
each primitive the rules, which know where the gain's axes are in the result and in the operand.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.factors import BATCH, IN, OUT, spread, wide_dtype
from lora_jax.transform import uses
from lora_jax.transform.kernel import Kernel, Unfactored, carried_axes
from lora_jax.transform.uses import Factors

Array = jax.Array
Rule = Callable[[dict, Sequence[Any], Factors, Array], Array]


class Gain(NamedTuple):
    """The rules of one primitive.

    Each takes the equation's parameters, its operands, the factors, and the array to be scaled.

    Attributes:
      result: rule that scales the result by a gain that varies over outputs.
      operand: rule that scales the other operand by a gain that varies over inputs; None if such a
        gain scales the result, too.
    """

    result: Rule
    operand: Rule | None


def scale_operand(eqn: JaxprEqn, vals: Sequence[Any], which: int) -> list:
    """Returns the operands for the frozen part, scaled where the use sums over the gain's axes.

    Args:
      eqn: equation of the use.
      vals: operands of the equation.
      which: number of the operand that is a kernel with a gain.

    Raises:
      Unfactored: the gain can't scale the other operand.
    """
    kernel, scale = vals[which], GAINS[eqn.primitive.name].operand
    plain: list[Any] = [v.w if isinstance(v, Kernel) else v for v in vals]
    if scale is None:
        return plain
    sides = uses.USES[eqn.primitive.name].sides(eqn.params, which, kernel.w.shape)
    factors = uses.orient(kernel, sides)
    if factors.gain_side == IN:
        other = 1 if which == 0 else 0
        plain[other] = scale(eqn.params, vals, factors, plain[other])
    return plain


def scale_result(eqn: JaxprEqn, vals: Sequence[Any], factors: Factors, base: Array) -> Array:
    """Scales the product with the frozen part, where the use keeps the axes of the gain.

    Raises:
      Unfactored: the gain can't scale the result.
    """
    rules = GAINS[eqn.primitive.name]
    if factors.gain_side == IN and rules.operand is not None:
        return base
    return rules.result(eqn.params, vals, factors, base)


def _multiply(x: Array, gain: Array) -> Array:
    """Multiplies in the wider precision of the two, and rounds once to that of ``x``."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise Unfactored(f"its gain would scale {x.dtype}")
    dtype = wide_dtype(x.dtype, gain.dtype)
    scale = lambda x, gain: (x.astype(dtype) * gain.astype(dtype)).astype(x.dtype)
    # A gradient keeps what is scaled, and is not to keep a wide copy of it.
    scale = scale if x.dtype == dtype else jax.checkpoint(scale, prevent_cse=False)
    return scale(x, _place_gain(gain, x))


def _require_gain(f: Factors) -> Array:
    if f.gain is None:
        raise ValueError("The factors of a kernel without a gain were given to a rule for gains.")
    return f.gain


def _place_gain(gain: Array, x: Array) -> Array:
    """Gives the gain the explicit sharding of the array that it scales."""
    of_gain, of_x = (getattr(jax.typeof(y), "sharding", None) for y in (gain, x))
    gain_spec, x_spec = ([*getattr(sharding, "spec", ())] for sharding in (of_gain, of_x))
    if of_x is None or all(entry is None for entry in (*gain_spec, *x_spec)):
        return gain
    entries = [entry if gain.shape[k] != 1 else None for k, entry in enumerate(x_spec)]
    return jax.sharding.reshard(gain, NamedSharding(of_x.mesh, PartitionSpec(*entries)))


def _dot_result(params: dict, vals: Sequence[Any], f: Factors, y: Array) -> Array:
    which = 0 if isinstance(vals[0], Kernel) else 1
    contracting, batch = (dims[which] for dims in params["dimension_numbers"])
    free = [k for k in range(len(f.axes)) if k not in (*contracting, *batch)]
    first = len(batch) if which == 0 else y.ndim - len(free)
    places = {k: n for n, k in enumerate(batch)} | {k: first + n for n, k in enumerate(free)}
    where = [places[k] for k in carried_axes(f.axes, OUT)]
    return _multiply(y, spread(_require_gain(f), where, y.ndim))


def _dot_operand(params: dict, vals: Sequence[Any], f: Factors, x: Array) -> Array:
    which = 0 if isinstance(vals[0], Kernel) else 1
    contracting, batch = params["dimension_numbers"]
    kernel_dims, operand_dims = ((*contracting[k], *batch[k]) for k in (which, 1 - which))
    places, gain_axes = dict(zip(kernel_dims, operand_dims, strict=True)), carried_axes(f.axes, IN)
    if not set(gain_axes) <= set(places):
        raise Unfactored("its input would be scaled by a gain for each kernel of a stack")
    return _multiply(x, spread(_require_gain(f), [places[k] for k in gain_axes], x.ndim))


def _ragged(params: dict, vals: Sequence[Any], f: Factors, x: Array) -> Array:
    """Scales each row, ``(rows, in)`` or ``(rows, out)``, by the gain of its expert."""
    if x.ndim != 2 or f.axes != "bio":
        raise Unfactored("a ragged product of other than (rows, in) and (experts, in, out)")
    gain = _require_gain(f)
    return _multiply(x, jnp.repeat(gain, vals[2], axis=0, total_repeat_length=x.shape[0]))


def _gather(params: dict, vals: Sequence[Any], f: Factors, y: Array) -> Array:
    """Scales rows by the gain of the outputs, or each row by its own."""
    if BATCH in f.axes:
        raise Unfactored("gather from a stack of tables")
    indices, n_ids = vals[1], vals[1].ndim - 1
    n_out = f.axes.count(OUT)

    def of_rows(x: Array) -> Array:
        rows = uses.look_up_rows(params, indices, lax.expand_dims(x, [x.ndim]), f.axes)
        rows = lax.reshape(rows, (*rows.shape[:-1], *[1] * n_out))
        return uses.arrange_as_gathered(rows, params["dimension_numbers"], f.axes, n_ids)

    if f.gain_side == IN:
        gain = of_rows(_require_gain(f))
    else:
        gain = lax.expand_dims(_require_gain(f), range(n_ids))
        gain = uses.arrange_as_gathered(gain, params["dimension_numbers"], f.axes, n_ids)
    if params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return _multiply(y, gain)
    # Values that fill rows of indices out of bounds are not scaled. They may be NaN, which would
    # spoil the gradient of the gain, so that they must not get into the product.
    sizes = [n for n, role in zip(vals[0].w.shape, f.axes, strict=True) if role == IN]
    is_row = jnp.broadcast_to(of_rows(jnp.ones(sizes, bool)), y.shape)
    return jnp.where(is_row, _multiply(jnp.where(is_row, y, jnp.zeros_like(y)), gain), y)


def _conv_result(params: dict, vals: Sequence[Any], f: Factors, y: Array) -> Array:
    if f.axes.count(OUT) != 1 or BATCH in f.axes:
        raise Unfactored("convolution with a kernel whose output axis is not its only output")
    where = [params["dimension_numbers"].out_spec[1]]
    return _multiply(y, spread(_require_gain(f), where, y.ndim))


def _conv_operand(params: dict, vals: Sequence[Any], f: Factors, x: Array) -> Array:
    raise Unfactored("convolution that sums over the outputs of a kernel with a gain")


GAINS: dict[str, Gain] = {
    "dot_general": Gain(_dot_result, _dot_operand),
    "ragged_dot_general": Gain(_ragged, _ragged),
    "gather": Gain(_gather, None),
    "conv_general_dilated": Gain(_conv_result, _conv_operand),
}
