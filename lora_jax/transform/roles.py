"""Finds out which parameters of a function are kernels, and what each of their axes is.

The jaxpr is walked, not evaluated: :mod:`.origins` says where the axes of each array come from, and
where an array whose axes come from parameters meets the inputs in a product, the axes that are
summed over are its inputs ("i"), those that are paired with axes of the other operand are batch
axes ("b"), as are those of which one entry was taken before, and the rest are outputs ("o").

An array keeps its origins only through operations whose other operands come from parameters and
constants. So the findings do not depend on the shapes of the inputs: a position embedding that is
added to a batch of one example becomes an activation there.

A jaxpr of a form that is not known is never passed over: its name is among the findings.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from lora_jax.transform import forms, origins, pairs, uses
from lora_jax.transform.findings import LOOKUP, Findings, Walk, hide, lose, record, sides_of
from lora_jax.transform.forms import Body, UnknownForm
from lora_jax.transform.nested import CONTROL
from lora_jax.transform.origins import DATA, FIXED, NOISE, Value


def find_roles(
    jaxpr: Jaxpr | ClosedJaxpr, values: Sequence[Value], *, consts_are_data: bool = False
) -> Findings:
    """Walks a closed jaxpr, given the values of its inputs.

    Args:
      jaxpr: closed jaxpr that ``jax.make_jaxpr`` has made.
      values: one for each input; parameters as :func:`origins.parameter_value` makes them.
      consts_are_data: whether arrays that the function closes over count as inputs.
    """
    walk = Walk(
        uses={},
        losses={},
        hidden={},
        unknown=[],
        pairs=[],
        seen={},
        numbers=itertools.count(),
        enter=_walk,
    )
    body = forms.body_of(jaxpr)
    _walk(walk, body, values, consts=origins.INPUT if consts_are_data else origins.CONSTANT)
    for pair in reversed(walk.pairs):  # a pair may be a side of a later one
        pairs.resolve(walk, pair)
    return Findings(uses=walk.uses, losses=walk.losses, hidden=walk.hidden, unknown=walk.unknown)


def _walk(
    walk: Walk, body: Body, values: Sequence[Value], consts: Value = origins.CONSTANT
) -> list:
    """Walks a jaxpr, and returns the values of its outputs."""
    key = (id(body.jaxpr), walk.is_final, tuple(values))
    if key not in walk.seen:  # a function that is called twice with the same arrays
        env = dict.fromkeys(body.jaxpr.constvars, consts)
        env.update(zip(body.jaxpr.invars, values, strict=True))
        read = lambda atom: origins.CONSTANT if forms.is_literal(atom) else env[atom]
        for eqn in body.jaxpr.eqns:
            outs = _walk_equation(walk, eqn, [read(x) for x in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        walk.seen[key] = [read(x) for x in body.jaxpr.outvars]
    return walk.seen[key]


def _walk_equation(walk: Walk, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    level = max((v.level for v in values), default=FIXED)
    if all(v.axes is None for v in values):
        return [Value(level=level)] * len(eqn.outvars)
    try:
        eqn = forms.view_product(eqn)
        name = forms.name_of(eqn)
        if name in CONTROL:
            return CONTROL[name](walk, eqn, values)
        if name in uses.USES and (name != LOOKUP or values[1].level == DATA):
            return _walk_use(walk, eqn, values)
        if name == LOOKUP:
            record(walk, eqn, 0, values[0], FIXED)
        if name not in origins.REARRANGEMENTS and (body := forms.matching_body(eqn)):
            outs = _walk(walk, body, values)
            if len(outs) == len(eqn.outvars):
                return outs
        return _follow(walk, eqn, values)
    except UnknownForm as why:
        reason = str(why)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = forms.describe_unknown(eqn, error)
    if reason not in walk.unknown:
        walk.unknown.append(reason)
    lose(walk, eqn, values, f"goes into an equation that is not understood: {reason}")
    return [Value(level=level)] * len(eqn.outvars)


def _follow(walk: Walk, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Follows a rearrangement or an elementwise operation, whose results may be parameters."""
    if eqn.primitive.name in origins.ONE_TO_ONE and len(values) == len(eqn.outvars):
        return values
    level = max(v.level for v in values)
    if _is_opaque(eqn):
        hide(walk, eqn, values)
        return [Value(level=level)] * len(eqn.outvars)
    values = _drop_tables_beside_picked(walk, eqn, values)
    values = _drop_mixed_beside_whole(values)
    reason = _find_obstacle(eqn, values)
    if reason:
        lose(walk, eqn, values, reason)
        return [Value(level=level)] * len(eqn.outvars)
    axes = origins.rearranged_axes(eqn, values)
    if axes is None:
        axes = origins.elementwise_axes(eqn, _drop_pairs(eqn, values))
        if not any(axes):
            lose(walk, eqn, values, f"goes into {eqn.primitive.name!r}")
    common = origins.derive(values, level=level)
    is_picked = common.is_picked or _is_picked_by_data(eqn, values)
    common = dataclasses.replace(common, is_picked=is_picked)
    return [_make_result(eqn, var, a, common) for var, a in zip(eqn.outvars, axes, strict=True)]


def _is_opaque(eqn: JaxprEqn) -> bool:
    """Tells whether a primitive is unknown and not elementwise: nobody can tell what it does."""
    if forms.name_of(eqn) in (*origins.REARRANGEMENTS, *origins.REDUCTIONS):
        return False
    shapes = [origins.shape(x) for x in (*eqn.invars, *eqn.outvars) if hasattr(x.aval, "shape")]
    full = [shape for shape in shapes if shape]
    return len({len(shape) for shape in full}) > 1 or any(
        len({n for n in sizes if n != 1}) > 1 for sizes in zip(*full, strict=True)
    )


def _make_result(eqn: JaxprEqn, var: Var, axes: origins.Axes | None, like: Value) -> Value:
    if axes is None:
        return Value(level=like.level)
    larger = _size(var) > max((_size(x) for x in eqn.invars), default=0)
    is_repeated = like.is_repeated or (eqn.primitive.name in origins.REPETITIONS and larger)
    return dataclasses.replace(like, axes=axes, is_repeated=is_repeated)


def _size(atom: Var | Literal) -> int:
    size = 1
    for n in origins.shape(atom) if hasattr(atom.aval, "shape") else ():
        size = size * n if isinstance(n, int) else size
    return size


def _drop_tables_beside_picked(walk: Walk, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Drops a table that is added to picked rows (positions to words), which are inputs."""
    if not any(v.axes is not None and v.is_picked for v in values):
        return values
    is_table = lambda v: v.axes is not None and not v.is_picked
    lose(walk, eqn, [v for v in values if is_table(v)], _describe_meeting(eqn))
    return [origins.CONSTANT if is_table(v) else v for v in values]


def _drop_mixed_beside_whole(values: list[Value]) -> list[Value]:
    """Drops what a constant matrix was multiplied with beside a parameter: it is no kernel."""
    if all(v.is_mixed for v in values if v.axes is not None):
        return values
    return [Value(level=v.level) if v.is_mixed else v for v in values]


def _drop_pairs(eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Drops products of two parameters at functions that are not linear."""
    if eqn.primitive.name in ("add", "sub", "add_any", "neg", "mul", "div"):
        return values
    is_pair = lambda v: any(n.startswith(pairs.PAIR) for n in origins.names(v.axes))
    return [Value(level=v.level) if is_pair(v) else v for v in values]


def _find_obstacle(eqn: JaxprEqn, values: Sequence[Value]) -> str:
    """Says why the results are no parameters any more; returns an empty text if they still are."""
    for value, atom in zip(values, eqn.invars, strict=True):
        if value.axes is not None or value.level == FIXED or not hasattr(atom.aval, "shape"):
            continue
        if atom is eqn.invars[0] and _is_choice(eqn, values):
            continue
        masks = value.level == NOISE and eqn.primitive.name in origins.MULTIPLICATIVE
        if origins.shape(atom) != () and not masks:
            return _describe_meeting(eqn)
    return ""


def _is_choice(eqn: JaxprEqn, values: Sequence[Value]) -> bool:
    """Tells whether the first operand chooses among parameters: a ``switch`` under ``vmap``."""
    is_fixed = lambda v: v.axes is not None or v.level == FIXED
    return eqn.primitive.name == "select_n" and all(map(is_fixed, values[1:]))


def _describe_meeting(eqn: JaxprEqn) -> str:
    return f"is combined by {eqn.primitive.name!r} with what depends on the inputs"


def _is_picked_by_data(eqn: JaxprEqn, values: Sequence[Value]) -> bool:
    return eqn.primitive.name == "dynamic_slice" and any(v.level == DATA for v in values[1:])


# ---- Uses ----------------------------------------------------------------------------------------


def _walk_use(walk: Walk, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    allowed = uses.USES[eqn.primitive.name].operands
    kernels = [k for k in allowed if values[k].axes is not None]
    whole = [k for k in kernels if not values[k].is_picked and not values[k].is_mixed]
    if len(whole) == 2:
        return [pairs.follow(walk, eqn, (values[0], values[1]))]
    # Picked rows that meet a parameter are its input, as the rows of an embedding are.
    chosen = whole or (kernels if len(kernels) == 1 else [])
    if chosen and (mixed := _mix_with_constant(eqn, values, chosen[0])):
        if not pairs.is_table(walk, mixed):
            record(walk, eqn, chosen[0], values[chosen[0]], FIXED)
        return [mixed]
    for k in chosen:
        others = max((v.level for n, v in enumerate(values) if n != k), default=FIXED)
        record(walk, eqn, k, values[k], others)
    rest = [Value() if k in chosen else v for k, v in enumerate(values)]
    lose(walk, eqn, rest, f"is the input of {eqn.primitive.name!r}")
    if eqn.primitive.name == LOOKUP:
        (axes,) = origins.rearranged_axes(eqn, values) or (None,)
        return [Value(axes=axes, level=DATA, is_picked=True)]
    return [Value(level=max(v.level for v in values))] * len(eqn.outvars)


def _mix_with_constant(eqn: JaxprEqn, values: Sequence[Value], which: int) -> Value | None:
    """Returns the product with a constant matrix, which changes the basis of one axis, or None."""
    if eqn.primitive.name != "dot_general" or values[1 - which].level != FIXED:
        return None
    sides, matrix = sides_of(eqn, which), origins.shape(eqn.invars[1 - which])
    if len(matrix) != 2 or len(sides.inputs) != 1 or sides.batch:
        return None
    (free,) = {0, 1} - set(sides_of(eqn, 1 - which).inputs)
    if matrix[free] == 1:  # a power iteration, rather
        return None
    axes, (changed,) = values[which].axes or (), sides.inputs
    rest = tuple(axis for k, axis in enumerate(axes) if k != changed)
    axes = (*rest, axes[changed]) if which == 0 else (axes[changed], *rest)
    return dataclasses.replace(values[which], axes=axes, is_mixed=True)


def input_value(x: Any) -> Value:
    """Returns the value of an array that is no parameter: PRNG keys are noise, the rest is data."""
    return Value(level=NOISE if _is_key(x) else DATA)


def _is_key(x: Any) -> bool:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return True
    return x.dtype == "uint32" and x.shape[-1:] == (2,)  # the older form
