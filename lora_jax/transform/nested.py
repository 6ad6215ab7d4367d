"""Follows parameters through equations with jaxprs of their own: calls, loops, branches, blocks."""

import dataclasses
from collections.abc import Callable, Sequence

from jax.extend.core import JaxprEqn

from lora_jax.transform import forms, origins
from lora_jax.transform.findings import Walk, lose
from lora_jax.transform.forms import UnknownForm
from lora_jax.transform.origins import DATA, FIXED, Value


def _call(walk: Walk, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    return walk.enter(walk, forms.call(eqn), values)


def _branches(walk: Walk, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Follows a result that is a parameter in each branch, whatever chooses the branch."""
    level = values[0].level
    outs = [walk.enter(walk, body, values[1:]) for body in forms.cond(eqn)]
    return [_join(branches, level) for branches in zip(*outs, strict=True)]


def _join(values: Sequence[Value], level: int = FIXED) -> Value:
    level = max(level, *(v.level for v in values))
    axes = [v.axes for v in values if v.axes is not None]
    lost = not axes or any(v.axes is None and v.level == DATA for v in values)
    if lost or len({len(a) for a in axes}) > 1:
        return Value(level=level)
    return origins.derive(values, axes=origins.union(axes), level=max(v.level for v in values))


def _find_fixed_point(
    walk: Walk, carry: list[Value], step: Callable[[Walk, list[Value]], list[Value]]
) -> list[Value]:
    """Finds out what is known of a loop's carry in every iteration."""
    silent = dataclasses.replace(
        walk, is_final=False, uses={}, losses={}, hidden={}, unknown=[], pairs=[]
    )
    while True:
        pairs = zip(carry, step(silent, carry), strict=True)
        after = [_join_iterations(old, new) for old, new in pairs]
        if after == carry:
            return carry
        carry = after


def _join_iterations(old: Value, new: Value) -> Value:
    """Joins a carry of two iterations; one that becomes another parameter is not followed."""
    level = max(old.level, new.level)
    if old.axes is None or old.axes != new.axes:
        return Value(level=level)
    return origins.derive([old, new], axes=old.axes, level=level)


def _scan(walk: Walk, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    form = forms.scan(eqn)
    consts, carry, xs = form.split(values)
    slices = [v if v.axes is None else dataclasses.replace(v, axes=v.axes[1:]) for v in xs]
    step = lambda walk, carry: walk.enter(walk, form.body, [*consts, *carry, *slices])
    step_carry = lambda walk, carry: step(walk, carry)[: len(carry)]
    before = list(carry)
    carry = _find_fixed_point(walk, list(carry), step_carry)
    _lose_changed(walk, eqn, before, carry)
    outs = step(walk, carry)
    stacked = [
        v if v.axes is None else dataclasses.replace(v, axes=(frozenset(), *v.axes))
        for v in outs[len(carry) :]
    ]
    return [*carry, *stacked]


def _lose_changed(walk: Walk, eqn: JaxprEqn, before: list[Value], after: list[Value]) -> None:
    lost = [b for b, a in zip(before, after, strict=True) if a.axes is None]
    lose(walk, eqn, lost, f"is changed by the body of {eqn.primitive.name!r}")


def _while(walk: Walk, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    form = forms.while_loop(eqn)
    test_consts, body_consts, before = form.split(values)
    step = lambda walk, carry: walk.enter(walk, form.body, [*body_consts, *carry])
    carry = _find_fixed_point(walk, list(before), step)
    _lose_changed(walk, eqn, list(before), carry)
    walk.enter(walk, form.test, [*test_consts, *carry])
    step(walk, carry)
    return carry


def _linear_solve(walk: Walk, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Walks ``lax.custom_linear_solve``: the matrix is a constant of functions of a vector."""
    rest = values
    for body, n_consts in forms.linear_solve(eqn):
        consts, rest = rest[:n_consts], rest[n_consts:]
        if body is not None:
            walk.enter(
                walk, body, [*consts, *[origins.INPUT] * (len(body.jaxpr.invars) - n_consts)]
            )
    return [Value(level=max(v.level for v in values))] * len(eqn.outvars)


def _pallas(walk: Walk, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Walks ``pallas_call``: the body reads blocks through references, and writes to others."""
    body, operands = forms.pallas(eqn)
    refs = []
    for operand, ref in zip(operands, body.jaxpr.invars, strict=False):
        value = values[operand]
        axes_of_blocks = [] if value.axes is None else forms.block_axes(eqn, operand)
        fits = value.axes is None or len(axes_of_blocks) == len(origins.shape(ref))
        known = value.axes if fits else None
        axes = tuple(known[k] for k in axes_of_blocks) if known and axes_of_blocks else None
        refs.append(dataclasses.replace(value, axes=axes))
        if not fits:
            lose(walk, eqn, [value], "is read by 'pallas_call' in blocks of fewer axes")
    refs += [origins.INPUT] * (len(body.jaxpr.invars) - len(refs))
    walk.enter(walk, body, refs)
    return [Value(level=max(v.level for v in values))] * len(eqn.outvars)


def _read_reference(walk: Walk, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    axes, n = values[0].axes, len(origins.shape(eqn.outvars[0]))
    if axes is None:
        return [Value(level=values[0].level)]
    # Entries of leading axes may be picked by number.
    picked = len(axes) - n
    trailing = origins.shape(eqn.invars[0])[picked:] == origins.shape(eqn.outvars[0])
    if picked < 0 or (picked and not trailing):
        raise UnknownForm(forms.describe_unknown(eqn, "a block with other axes"))
    return [dataclasses.replace(values[0], axes=axes[picked:])]


CONTROL: dict[str, Callable[[Walk, JaxprEqn, list[Value]], list[Value]]] = {
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "cond": _branches,
    "scan": _scan,
    "while": _while,
    "custom_linear_solve": _linear_solve,
    "pallas_call": _pallas,
    "get": _read_reference,
    "masked_load": _read_reference,
    "load": _read_reference,
}
