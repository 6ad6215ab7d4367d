"""The record of the search for roles: uses of parameters, and places where they are lost."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jax.extend.core import JaxprEqn

from lora_jax import factors
from lora_jax.transform import forms, origins, uses
from lora_jax.transform.forms import Body
from lora_jax.transform.kernel import Unfactored
from lora_jax.transform.origins import Value

LOOKUP = "gather"


class Use(NamedTuple):
    """One use of one parameter.

    Attributes:
      primitive: name of the primitive that uses it; "gather" for a lookup.
      roles: one letter for each axis.
      level: dependence of the other operand; ``PAIRED`` if it is another parameter.
      is_picked: whether rows of it were picked before, by something that depends on the inputs.
      source: file and line in the user's code.
    """

    primitive: str
    roles: str
    level: int
    is_picked: bool
    source: str


PAIRED = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """The results of a walk.

    Attributes:
      uses: uses of each parameter, in the order of the code.
      losses: places where each parameter ceases to be one, with the reasons.
      hidden: primitive that can't be looked into, for each parameter that goes into one.
      unknown: equations of a form that is not known, with JAX's version.
    """

    uses: Mapping[str, list[Use]]
    losses: Mapping[str, list[str]]
    hidden: Mapping[str, str]
    unknown: list[str]


class Pair(NamedTuple):
    """A product of two arrays that both come from parameters: one kernel and its input, or two."""

    name: str
    eqn: JaxprEqn
    values: tuple[Value, Value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """The state of a walk through a jaxpr.

    Attributes:
      uses: uses of each parameter, as in :class:`Findings`, and of each pair.
      losses: as in :class:`Findings`.
      hidden: as in :class:`Findings`.
      unknown: as in :class:`Findings`.
      pairs: products of two parameters, in the order of the code.
      seen: values of the outputs of a jaxpr, by jaxpr and values of the inputs.
      numbers: numbers for the names of pairs.
      enter: function that walks an inner jaxpr, given the values of its inputs.
      is_final: whether uses are recorded for good; they are not while a loop's carry converges.
    """

    uses: dict[str, list[Use]]
    losses: dict[str, list[str]]
    hidden: dict[str, str]
    unknown: list[str]
    pairs: list[Pair]
    seen: dict[tuple, list[Value]]
    numbers: Iterator[int]
    enter: Callable[["Walk", Body, Sequence[Value]], list[Value]]
    is_final: bool = True


def lose(walk: Walk, eqn: JaxprEqn, values: Sequence[Value], why: str) -> None:
    """Records that the parameters among the values are not followed beyond an equation."""
    if not walk.is_final:
        return
    where = forms.source(eqn)
    reason = f"{why} at {where}" if where else why
    for value in values:
        for name in origins.names(value.axes):
            reasons = walk.losses.setdefault(name, [])
            if reason not in reasons:
                reasons.append(reason)


def hide(walk: Walk, eqn: JaxprEqn, values: Sequence[Value]) -> None:
    """Records that parameters go into a primitive that can't be looked into."""
    lose(walk, eqn, values, f"goes into {eqn.primitive.name!r}, which can't be looked into")
    for value in values if walk.is_final else ():
        walk.hidden.update(dict.fromkeys(origins.names(value.axes), eqn.primitive.name))


def record(walk: Walk, eqn: JaxprEqn, operand: int, value: Value, level: int) -> None:
    """Records a use of the parameters of one operand; ``level`` is that of the other operands."""
    if value.is_mixed and eqn.primitive.name in ("dot_general", LOOKUP):
        return  # it was used by the product with the constant, unless it is a resized convolution's
    try:
        sides = sides_of(eqn, operand)
    except Unfactored as why:
        lose(
            walk, eqn, [value], f"is used by {eqn.primitive.name!r} in a form without sides: {why}"
        )
        return
    for name, roles in roles_of(value.axes or (), sides).items():
        use = Use(eqn.primitive.name, roles, level, value.is_picked, forms.source(eqn))
        _add_use(walk, name, use)


def sides_of(eqn: JaxprEqn, operand: int) -> uses.Sides:
    """Returns how an equation uses the axes of one of its operands.

    Raises:
      Unfactored: the operand does not have two sides there.
    """
    shape = origins.shape(eqn.invars[operand])
    return uses.USES[eqn.primitive.name].sides(eqn.params, operand, shape)


def _add_use(walk: Walk, name: str, use: Use) -> None:
    known = walk.uses.setdefault(name, [])
    if walk.is_final and use not in known:
        known.append(use)


def roles_of(axes: origins.Axes, sides: uses.Sides) -> dict[str, str]:
    """Returns the roles of the axes of each parameter in one use.

    An axis that is no longer there was stacked: a scan or an index took one entry of it.
    """
    by_name: dict[str, list[set[str]]] = {}
    for k, axis in enumerate(axes):
        role = _role_of(k, sides)
        for origin in axis:
            known = by_name.setdefault(origin.name, [set() for _ in range(origin.ndim)])
            known[origin.axis].add(role)
    # An axis that is used in two ways has no role.
    is_clear = lambda axes: all(len(roles) < 2 for roles in axes)
    join = lambda axes: "".join(roles.pop() if roles else factors.BATCH for roles in axes)
    return {name: join(axes) for name, axes in by_name.items() if is_clear(axes)}


def _role_of(axis: int, sides: uses.Sides) -> str:
    if axis in sides.inputs:
        return factors.IN
    return factors.BATCH if axis in sides.batch else factors.OUT


def has_two_sides(roles: str) -> bool:
    """Tells whether there are inputs and outputs."""
    return factors.IN in roles and factors.OUT in roles
