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
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.dropout import dropout
from lora_jax.factors import BATCH
from lora_jax.transform import (
    combinations,
    deferred,
    forms,
    gains,
    input_moments,
    lookahead,
    moves,
    rearrangements,
    uses,
)
from lora_jax.transform.deferred import Deferred
from lora_jax.transform.forms import Body, vary, varying_axes
from lora_jax.transform.kernel import Kernel, Unfactored, materialize, with_numbers
from lora_jax.transform.lookahead import Demand

Array = jax.Array


class Event(NamedTuple):
    """One use of one kernel, or of several that were joined, seen during a trace.

    Attributes:
      names: paths of the parameters.
      primitive: name of the primitive that uses it.
      reason: reason why it is formed in full there; empty if it stays factored.
      source: file and line in the user's code.
    """

    names: tuple
    primitive: str
    reason: str = ""
    source: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """The settings at one place of the evaluation.

    Attributes:
      strict: whether a fallback is an error.
      rate: dropout rate of all low-rank branches; None for the rate of each kernel.
      key: PRNG key of this place, into which each equation folds its position.
      events: record of uses by place, so that tracing a loop body twice counts once; None if no
        record is wanted.
      place: identities of the equations around this one.
      depth: number of nested calls around this one.
      allows_kernels: for each result of this equation, whether all that uses it takes kernels.
      varies: whether factors vary over devices of a ``shard_map`` over which their kernels do not,
        so that values vary, too, which are constant in the user's equations.
      in_scan: whether this is the body of a loop, of which the gradient is a loop of its own.
      measures: whether low-rank terms add nothing, and the gradient of ``a`` is what
        :mod:`lora_jax.transform.input_moments` says of the inputs.
    """

    strict: bool = False
    rate: Array | float | None = None
    key: Array | None = None
    events: dict[tuple, Event] | None = None
    place: tuple = ()
    depth: int = 0
    allows_kernels: tuple[bool, ...] = ()
    varies: bool = False
    in_scan: bool = False
    measures: bool = False

    def child(
        self, index: Any, place: Any = None, allows_kernels: tuple[bool, ...] = ()
    ) -> "Scope":
        """Returns the scope of the equation (or loop iteration) number ``index``."""
        key = None if self.key is None else jax.random.fold_in(self.key, index)
        places = (*self.place, place)
        # This runs for each equation, and `dataclasses.replace` takes three times as long.
        return Scope(
            strict=self.strict,
            rate=self.rate,
            key=key,
            events=self.events,
            place=places,
            depth=self.depth,
            allows_kernels=allows_kernels,
            varies=self.varies,
            in_scan=self.in_scan,
            measures=self.measures,
        )

    def record(self, event: Event) -> None:
        """Records a use of a kernel at this place; a fallback is never overwritten."""
        place = (*self.place, event.names)
        if self.events is not None and not getattr(self.events.get(place), "reason", ""):
            self.events[place] = event


Control = Callable[["Scope", JaxprEqn, Sequence[Any]], list]


def evaluate(scope: Scope, body: Body, args: Sequence[Any], control: Mapping[str, Control]) -> list:
    """Evaluates a jaxpr some of whose inputs are kernels; outputs may be kernels too.

    Args:
      scope: scope of the jaxpr.
      body: jaxpr with its arrays.
      args: arrays and kernels.
      control: rules of control flow by primitive, which call this function again.
    """
    env: dict[Any, Any] = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
    env.update(zip(body.jaxpr.invars, args, strict=True))
    read = lambda atom: atom.val if forms.is_literal(atom) else env[atom]
    demand = lookahead.find_demand(body.jaxpr, scope.allows_kernels)
    index = -1
    for eqn in body.jaxpr.eqns:
        # Constraints do not count, so that dropout is the same with a mesh and without.
        index += eqn.primitive.name != "sharding_constraint"
        vals = [read(atom) for atom in eqn.invars]
        has_kernel = any(isinstance(v, Kernel | Deferred) for v in vals)
        in_control = scope.varies and forms.name_of(eqn) in control
        if has_kernel or (in_control and _has_new_varying_axes(eqn, vals)):
            inner = scope.child(index, id(eqn), demand.allows_kernels(eqn.outvars))
            outs = _evaluate_factored(inner, eqn, vals, demand, control)
        else:
            outs = evaluate_plain(eqn, vary_alike(eqn, vals) if scope.varies else vals, demand.used)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in body.jaxpr.outvars]


def evaluate_plain(eqn: JaxprEqn, vals: Sequence[Any], used: set | None = None) -> list:
    """Hands one equation to JAX, as a jaxpr of its own: nothing of JAX is re-implemented here."""
    if eqn.primitive.name == "pvary":
        # An operand may vary over devices already, where an adapter does and the base does not.
        axes = tuple(a for a in eqn.params["axes"] if a not in varying_axes(vals[0]))
        return [forms.rebind(eqn, vals[0], axes=axes)] if axes else [*vals]
    variables = {
        atom: v for atom, v in zip(eqn.invars, vals, strict=True) if not forms.is_literal(atom)
    }
    used_outputs = [k for k, v in enumerate(eqn.outvars) if used is None or v in used]
    outvars = [eqn.outvars[k] for k in used_outputs]
    jaxpr = _empty_jaxpr().replace(
        invars=list(variables), outvars=outvars, eqns=[eqn], effects=eqn.effects
    )
    outs = jax.core.eval_jaxpr(jaxpr, (), *variables.values())
    results = dict(zip(used_outputs, outs, strict=True))
    return [results.get(k) for k in range(len(eqn.outvars))]


@functools.cache
def _empty_jaxpr() -> Any:
    """Makes a jaxpr without anything in it, to be filled with one equation."""
    return forms.body_of(jax.make_jaxpr(lambda: ())()).jaxpr


def _has_new_varying_axes(eqn: JaxprEqn, vals: Sequence[Any]) -> bool:
    expected = [forms.varying_axes_of(atom.aval) for atom in eqn.invars]
    return any(varying_axes(v) - axes for v, axes in zip(vals, expected, strict=True))


def vary_alike(eqn: JaxprEqn, vals: Sequence[Any]) -> list:
    """Makes operands vary over the same axes, as most primitives want them."""
    if forms.bodies(eqn) or eqn.primitive.name == "pvary":
        return [*vals]
    axes = frozenset().union(*map(varying_axes, vals)) if vals else frozenset()
    return [vary(v, axes) for v in vals]


def _evaluate_factored(
    scope: Scope, eqn: JaxprEqn, vals: Sequence, demand: Demand, control: Mapping[str, Control]
) -> list:
    view = forms.view_product(eqn)
    name = forms.name_of(view)
    rule = control.get(name)
    try:
        if rule:
            return rule(scope, eqn, vals)
        with eqn.ctx.manager:
            if not any(isinstance(v, Kernel) for v in vals):
                return _evaluate_quantized(scope, eqn, vals, demand)
            if name in moves.MOVES:
                return _apply_move(eqn, vals, demand)
            if name in uses.USES:
                run = functools.partial(_evaluate_use, scope, eqn)
                return _apply_use(scope, view, vals, demand, run)
        raise Unfactored("no rule keeps a low-rank sum factored here")
    except Unfactored as why:
        reason = str(why)
    except (KeyError, TypeError, AttributeError) as error:
        reason = forms.describe_unknown(eqn, error)
    return evaluate_plain(eqn, [fall_back(scope, v, name, reason, eqn) for v in vals], demand.used)


def _frozen_parts(vals: Sequence) -> list:
    return [v.w if isinstance(v, Kernel) else v for v in vals]


def _evaluate_quantized(scope: Scope, eqn: JaxprEqn, vals: Sequence, demand: Demand) -> list:
    """Evaluates an equation that has quantized operands, none of which is adapted."""
    if (moved := deferred.move(eqn, vals)) is not None:
        return moved
    if forms.view_product(eqn).primitive.name in uses.USES:
        return _evaluate_use(scope, eqn, vals, demand.used)
    return evaluate_plain(eqn, [deferred.materialize(v) for v in vals], demand.used)


def _evaluate_use(scope: Scope, eqn: JaxprEqn, vals: Sequence, used: set | None = None) -> list:
    """Hands a product to JAX; the numbers of a quantized operand are made for it, in each pass."""
    run = lambda vals: evaluate_plain(eqn, vals, used)
    # In a loop the passes are apart anyway, and what the backward pass computes again for other
    # reasons is the same.
    return deferred.evaluate(run, vals, prevent_cse=not scope.in_scan)


def _apply_move(eqn: JaxprEqn, vals: Sequence, demand: Demand) -> list:
    if eqn.primitive.name in moves.AMBIGUOUS:
        arrays = [v for v in vals if isinstance(v, Kernel) or jnp.ndim(v)]
        if len(arrays) > 1 and not set(eqn.outvars) <= demand.kernels_only:
            raise Unfactored("the result is used as an activation, or changed entry by entry")
    w = deferred.move(eqn, _frozen_parts(vals))
    if w is None:
        vals = [with_numbers(v) for v in vals]
        w = evaluate_plain(eqn, _frozen_parts(vals))
    return moves.MOVES[forms.name_of(eqn)](eqn, vals, w)


def _apply_use(
    scope: Scope,
    eqn: JaxprEqn,
    vals: Sequence,
    demand: Demand,
    run: Callable[[Sequence], list],
) -> list:
    """Applies the rule of a use; ``run`` evaluates the equation with plain operands."""
    use = uses.USES[eqn.primitive.name]
    vals = [deferred.materialize(v) for v in vals]  # of what is not adapted
    if scope.varies:
        vals = _vary_kernels_alike(eqn, vals)
    kernels = [k for k, v in enumerate(vals) if isinstance(v, Kernel)]
    if use.branch is None:
        raise Unfactored("no rule keeps a low-rank sum factored here")
    is_product = eqn.primitive.name == "dot_general" and len(kernels) == 2
    has_gain = any(vals[k].gain is not None for k in kernels)
    if is_product and not has_gain and set(eqn.outvars) <= demand.kernels_only:
        vals = [with_numbers(v) for v in vals]
        return combinations.product(eqn, vals, run(_frozen_parts(vals)))
    if len(kernels) > 1:
        # The smaller of them is formed: it is more often an input.
        first = min(kernels, key=lambda k: vals[k].w.size)
        reason = "the other operand is a low-rank sum too"
        array = fall_back(scope, vals[first], eqn.primitive.name, reason, eqn)
        operands = [array if k == first else v for k, v in enumerate(vals)]
        return _apply_use(scope, eqn, operands, demand, run)
    if kernels[0] not in use.operands:
        raise Unfactored(f"it is operand {kernels[0]}; the rule wants one of {use.operands}")
    operands = gains.scale_operand(eqn, vals, kernels[0]) if has_gain else _frozen_parts(vals)
    kernel = vals[kernels[0]]
    sides = use.sides(eqn.params, kernels[0], kernel.w.shape)
    if eqn.primitive.name == "gather" and {kernel.axes[k] for k in sides.inputs} == {BATCH}:
        (base,) = deferred.move(eqn, operands) or run(operands)
        return rearrangements.pick_entries(eqn, kernel, vals[1], base, sides.inputs)
    (base,) = run(operands)
    factors = uses.orient(kernel, sides)
    if has_gain:
        base = gains.scale_result(eqn, vals, factors, base)
    if scope.measures:
        branch = input_moments.measure(eqn, vals, factors, base)
    else:
        drop = functools.partial(_drop_inputs, scope, kernel)
        branch = use.branch(eqn.params, vals, factors, base, drop)
    scope.record(Event(kernel.names, eqn.primitive.name, source=forms.source(eqn)))
    return [_add(base, branch)]


def _add(base: Array, branch: Array) -> Array:
    """Adds in the wider precision of the two, and rounds once to that of ``base``."""
    is_wider = jnp.issubdtype(branch.dtype, jnp.floating) and (
        jnp.promote_types(base.dtype, branch.dtype) == branch.dtype
    )
    return (
        (base.astype(branch.dtype) + branch).astype(base.dtype)
        if is_wider
        else base + branch.astype(base.dtype)
    )


def _vary_kernels_alike(eqn: JaxprEqn, vals: Sequence) -> list:
    arrays = vary_alike(eqn, _frozen_parts(vals))
    pairs = zip(vals, arrays, strict=True)
    return [dataclasses.replace(v, w=x) if isinstance(v, Kernel) else x for v, x in pairs]


def _drop_inputs(
    scope: Scope, kernel: Kernel, x: Array, shape: Sequence[int] | None = None
) -> Array:
    rate = _choose_rate(scope, kernel)
    if rate is None:
        return x
    key: Any = scope.key  # `lift` has checked that there is one
    for axis in sorted(varying_axes(x)):  # each device of a shard_map has rows of its own
        key = jax.random.fold_in(key, lax.axis_index(axis))
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and jax.typeof(key).sharding.mesh != mesh:
        # The equation is in a part with automatic axes of a function with explicit ones.
        key = jax.sharding.reshard(key, NamedSharding(mesh, PartitionSpec()))
    return dropout(x, rate, key, shape)


def _choose_rate(scope: Scope, kernel: Kernel) -> Any:
    """Returns the rate of dropout on the input of a kernel's branch; None if there is none."""
    if kernel.rate is None:
        return None
    return kernel.rate or None if scope.rate is None else scope.rate


def fall_back(
    scope: Scope, value: Any, primitive: str, reason: str, eqn: JaxprEqn | None = None
) -> Any:
    """Falls back to ``W + s·BA`` if ``value`` is a kernel; makes numbers of one that is frozen."""
    if not isinstance(value, Kernel):
        return deferred.materialize(value)
    source = "" if eqn is None else forms.source(eqn)
    scope.record(Event(value.names, primitive, reason=reason, source=source))
    # A kernel that the function returns has no input, of which dropout could drop entries.
    drops = _choose_rate(scope, value) is not None and primitive != OUTPUT
    if drops or scope.strict:
        why = "dropout needs it factored" if drops else "strict=True forbids it"
        raise FallbackError(Event(value.names, primitive, reason, source), why)
    return materialize(value)


OUTPUT = "output"


class FallbackError(ValueError):
    """An attempt to form a kernel in full where that is forbidden."""

    def __init__(self, event: Event, why: str) -> None:
        self.event, self.why = event, why
        where = f" at {event.source}" if event.source else ""
        super().__init__(
            f"The kernel {' + '.join(map(str, event.names))!r} would be formed in full as "
            f"W + s·BA by {event.primitive!r}{where} ({event.reason}), but {why}. Leave it out of "
            "the targets, train it in full, or change that use."
        )
