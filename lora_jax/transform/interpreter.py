"""Evaluates a jaxpr some of whose inputs are low-rank sums, keeping them factored.

An equation without such an input goes to JAX unchanged. One with such an input goes to its rule, in
:mod:`.moves` or :mod:`.uses`, or is recursed into by :mod:`.control` if it is control flow. Where
there is no rule, or it does not fit, ``W + s·BA`` is formed there and the equation goes to JAX with
plain arrays: never wrong, at worst slower. So a new JAX release can cost speed, not correctness.

The files of this package are the only ones that know jaxprs, and they use public names of JAX
alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.dropout import dropout
from lora_jax.factors import BATCH
from lora_jax.transform import (
    ahead,
    combinations,
    deferred,
    forms,
    gains,
    kernel,
    moves,
    rearrangements,
    uses,
)
from lora_jax.transform.ahead import Wanted
from lora_jax.transform.deferred import Deferred
from lora_jax.transform.forms import Body, vary, varying_axes
from lora_jax.transform.kernel import Kernel, Unfactored

Array = jax.Array


class Event(NamedTuple):
    """One use of one kernel, or of several that were joined, seen during a trace.

    Attributes:
      names: the paths of the parameters.
      primitive: what used it.
      reason: why it was formed in full there; empty if it stayed factored.
      source: file and line in the user's code.
    """

    names: tuple
    primitive: str
    reason: str = ""
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Scope:
    """What holds at one place of the evaluation.

    Attributes:
      strict: a fallback is an error.
      rate: dropout rate of all low-rank branches; None for the rate of each kernel.
      key: the PRNG key of this place; each equation folds in its position.
      events: where uses are recorded, by place, so that tracing a loop body twice counts once; None
        if nobody asks.
      place: the equations around this one.
      depth: the number of nested calls around this one.
      keeps: of each result of this equation, whether whatever uses it takes kernels.
      varies: in a ``shard_map``, factors vary over devices over which their kernels do not, and so
        do values that the user's equations were made for as constant.
      in_scan: this is the body of a loop, of which the gradient is a loop of its own.
    """

    strict: bool = False
    rate: Any = None
    key: Array | None = None
    events: dict[tuple, Event] | None = None
    place: tuple = ()
    depth: int = 0
    keeps: tuple[bool, ...] = ()
    varies: bool = False
    in_scan: bool = False

    def at(self, index: Any, place: Any = None, keeps: tuple[bool, ...] = ()) -> "Scope":
        """The scope of the equation (or loop iteration) number ``index``."""
        key = None if self.key is None else jax.random.fold_in(self.key, index)
        places = (*self.place, place)
        # Once for each equation: `dataclasses.replace` takes three times as long.
        return Scope(
            self.strict,
            self.rate,
            key,
            self.events,
            places,
            self.depth,
            keeps,
            self.varies,
            self.in_scan,
        )

    def record(self, event: Event) -> None:
        """Notes the use of a kernel at this place; of two of one kernel, that which forms it."""
        place = (*self.place, event.names)
        if self.events is not None and not getattr(self.events.get(place), "reason", ""):
            self.events[place] = event


Control = Callable[["Scope", Any, Sequence[Any]], list]


def evaluate(scope: Scope, body: Body, args: Sequence[Any], control: Mapping[str, Control]) -> list:
    """Evaluates a jaxpr some of whose inputs are kernels; outputs may be kernels too.

    Args:
      scope: what holds here.
      body: the jaxpr.
      args: arrays and kernels.
      control: the rules of control flow, by primitive, which call this function again.
    """
    env: dict[Any, Any] = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
    env.update(zip(body.jaxpr.invars, args, strict=True))
    read = lambda atom: atom.val if forms.is_literal(atom) else env[atom]
    wanted = ahead.wanted(body.jaxpr, scope.keeps)
    index = -1
    for eqn in body.jaxpr.eqns:
        # Not counted, so that dropout is the same on a mesh, where a model may have them.
        index += eqn.primitive.name != "sharding_constraint"
        vals = [read(atom) for atom in eqn.invars]
        has_kernel = any(isinstance(v, Kernel | Deferred) for v in vals)
        in_control = scope.varies and forms.name_of(eqn) in control
        if has_kernel or (in_control and _vary_anew(eqn, vals)):
            inner = scope.at(index, id(eqn), wanted.keeps(eqn.outvars))
            outs = _factored(inner, eqn, vals, wanted, control)
        else:
            outs = plain(eqn, vary_alike(eqn, vals) if scope.varies else vals, wanted.used)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in body.jaxpr.outvars]


def plain(eqn: Any, vals: Sequence[Any], used: set | None = None) -> list:
    """Hands one equation to JAX, as a jaxpr of its own: nothing of JAX is re-implemented here."""
    if eqn.primitive.name == "pvary":
        # An operand may vary over devices already, where an adapter does and the base does not.
        axes = tuple(a for a in eqn.params["axes"] if a not in varying_axes(vals[0]))
        return [forms.rebound(eqn, vals[0], axes=axes)] if axes else [*vals]
    variables = {
        atom: v for atom, v in zip(eqn.invars, vals, strict=True) if not forms.is_literal(atom)
    }
    kept = [k for k, v in enumerate(eqn.outvars) if used is None or v in used]
    outvars = [eqn.outvars[k] for k in kept]
    jaxpr = _empty().replace(
        invars=list(variables), outvars=outvars, eqns=[eqn], effects=eqn.effects
    )
    results = dict(zip(kept, jax.core.eval_jaxpr(jaxpr, (), *variables.values()), strict=True))
    return [results.get(k) for k in range(len(eqn.outvars))]


@functools.cache
def _empty() -> Any:
    """A jaxpr without anything in it, to be filled with one equation."""
    return forms.body_of(jax.make_jaxpr(lambda: ())()).jaxpr


def _vary_anew(eqn: Any, vals: Sequence[Any]) -> bool:
    known = [forms.varying_axes_of(atom.aval) for atom in eqn.invars]
    return any(varying_axes(v) - axes for v, axes in zip(vals, known, strict=True))


def vary_alike(eqn: Any, vals: Sequence[Any]) -> list:
    """Operands that vary over the same axes, as most primitives want them."""
    if forms.bodies(eqn) or eqn.primitive.name == "pvary":
        return [*vals]
    axes = frozenset().union(*map(varying_axes, vals)) if vals else frozenset()
    return [vary(v, axes) for v in vals]


def _factored(
    scope: Scope, eqn: Any, vals: Sequence, wanted: Wanted, control: Mapping[str, Control]
) -> list:
    name = forms.name_of(eqn)
    rule = control.get(name)
    try:
        if rule:
            return rule(scope, eqn, vals)
        with eqn.ctx.manager:
            if not any(isinstance(v, Kernel) for v in vals):
                return _quantized(scope, eqn, vals, wanted)
            if name in moves.MOVES:
                return _move(eqn, vals, wanted)
            if name in uses.USES:
                return _use(scope, eqn, vals, wanted)
        raise Unfactored("no rule keeps a low-rank sum factored here")
    except Unfactored as why:
        reason = str(why)
    except (KeyError, TypeError, AttributeError) as error:
        reason = forms.unknown(eqn, error)
    return plain(eqn, [formed(scope, v, name, reason, eqn) for v in vals], wanted.used)


def _frozen(vals: Sequence) -> list:
    return [v.w if isinstance(v, Kernel) else v for v in vals]


def _quantized(scope: Scope, eqn: Any, vals: Sequence, wanted: Wanted) -> list:
    """An equation that has quantized operands, none of which is adapted."""
    if (moved := deferred.move(eqn, vals)) is not None:
        return moved
    if eqn.primitive.name in uses.USES:
        return _plain_at_use(scope, eqn, vals, wanted.used)
    return plain(eqn, [deferred.form(v) for v in vals], wanted.used)


def _plain_at_use(scope: Scope, eqn: Any, vals: Sequence, used: set | None = None) -> list:
    """Hands a product to JAX; the numbers of a quantized operand are made for it, in each pass."""
    run = lambda vals: plain(eqn, vals, used)
    # In a loop the passes are apart anyway, and what the backward pass computes again for other
    # reasons is the same.
    return deferred.evaluate(run, vals, prevent_cse=not scope.in_scan)


def _move(eqn: Any, vals: Sequence, wanted: Wanted) -> list:
    if eqn.primitive.name in moves.WITH_AN_ARRAY:
        arrays = [v for v in vals if isinstance(v, Kernel) or jnp.ndim(v)]
        if len(arrays) > 1 and not set(eqn.outvars) <= wanted.as_kernels:
            raise Unfactored("the result is used as an activation, or changed entry by entry")
    w = deferred.move(eqn, _frozen(vals))
    if w is None:
        vals = [kernel.with_numbers(v) for v in vals]
        w = plain(eqn, _frozen(vals))
    return moves.MOVES[forms.name_of(eqn)](eqn, vals, w)


def _use(scope: Scope, eqn: Any, vals: Sequence, wanted: Wanted) -> list:
    use = uses.USES[eqn.primitive.name]
    vals = [deferred.form(v) for v in vals]  # of what is not adapted
    if scope.varies:
        vals = _kernels_vary_alike(eqn, vals)
    kernels = [k for k, v in enumerate(vals) if isinstance(v, Kernel)]
    if use.branch is None:
        raise Unfactored("no rule keeps a low-rank sum factored here")
    is_product = eqn.primitive.name == "dot_general" and len(kernels) == 2
    has_gain = any(vals[k].gain is not None for k in kernels)
    if is_product and not has_gain and set(eqn.outvars) <= wanted.as_kernels:
        vals = [kernel.with_numbers(v) for v in vals]
        return combinations.product(eqn, vals, plain(eqn, _frozen(vals)))
    if len(kernels) > 1:
        # One of them is formed: the smaller, which is an input more often.
        first = min(kernels, key=lambda k: vals[k].w.size)
        reason = "the other operand is a low-rank sum too"
        array = formed(scope, vals[first], eqn.primitive.name, reason, eqn)
        return _use(scope, eqn, [array if k == first else v for k, v in enumerate(vals)], wanted)
    if kernels[0] not in use.operands:
        raise Unfactored(f"it is operand {kernels[0]}; the rule wants one of {use.operands}")
    operands = gains.scale_operand(eqn, vals, kernels[0]) if has_gain else _frozen(vals)
    sum_ = vals[kernels[0]]
    sides = use.sides(eqn.params, kernels[0], sum_.w.shape)
    if eqn.primitive.name == "gather" and {sum_.axes[k] for k in sides.inputs} == {BATCH}:
        (base,) = deferred.move(eqn, operands) or _plain_at_use(scope, eqn, operands)
        return rearrangements.picked(eqn, sum_, vals[1], base, sides.inputs)
    (base,) = _plain_at_use(scope, eqn, operands)
    factors = uses.oriented(sum_, sides)
    if has_gain:
        base = gains.scale_result(eqn, vals, factors, base)
    branch = use.branch(eqn.params, vals, factors, base, functools.partial(_drop, scope, sum_))
    scope.record(Event(sum_.names, eqn.primitive.name, source=forms.source(eqn)))
    return [base + branch.astype(base.dtype)]


def _kernels_vary_alike(eqn: Any, vals: Sequence) -> list:
    arrays = vary_alike(eqn, _frozen(vals))
    pairs = zip(vals, arrays, strict=True)
    return [dataclasses.replace(v, w=x) if isinstance(v, Kernel) else x for v, x in pairs]


def _drop(scope: Scope, sum_: Kernel, x: Array, shape: Sequence[int] | None = None) -> Array:
    rate = sum_.rate or None if scope.rate is None else scope.rate
    if rate is None:
        return x
    key = scope.key
    for axis in sorted(varying_axes(x)):  # each device of a shard_map has rows of its own
        key = jax.random.fold_in(key, lax.axis_index(axis))
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and jax.typeof(key).sharding.mesh != mesh:
        # The equation is one of a part with automatic axes in a function with explicit ones.
        key = jax.sharding.reshard(key, NamedSharding(mesh, PartitionSpec()))
    return dropout(x, rate, key, shape)


def formed(scope: Scope, value: Any, primitive: str, reason: str, eqn: Any = None) -> Any:
    """Falls back to ``W + s·BA`` if ``value`` is a kernel; makes numbers of one that is frozen."""
    if not isinstance(value, Kernel):
        return deferred.form(value)
    source = "" if eqn is None else forms.source(eqn)
    scope.record(Event(value.names, primitive, reason=reason, source=source))
    # What the function returns is no product: its sum has no input to drop anything of.
    drops = (scope.rate is not None or value.rate) and primitive != OUTPUT
    if drops or scope.strict:
        why = "dropout needs it factored" if drops else "strict=True forbids it"
        raise FallbackError(Event(value.names, primitive, reason, source), why)
    return kernel.form(value)


OUTPUT = "output"


class FallbackError(ValueError):
    """A kernel would be formed in full where that is forbidden."""

    def __init__(self, event: Event, why: str) -> None:
        self.event, self.why = event, why
        where = f" at {event.source}" if event.source else ""
        super().__init__(
            f"The kernel {' + '.join(map(str, event.names))!r} would be formed in full as "
            f"W + s·BA by {event.primitive!r}{where} ({event.reason}), but {why}. Leave it out of "
            "the targets, train it in full, or change that use."
        )
