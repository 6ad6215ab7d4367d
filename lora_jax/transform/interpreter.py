"""Evaluates a jaxpr some of whose inputs are low-rank sums, keeping them factored.

An equation without such an input goes to JAX unchanged. One with such an input goes to its rule, in
:mod:`.moves` or :mod:`.uses`, or is recursed into if it is control flow. Where
there is no rule, or it does not fit, ``W + s·BA`` is formed there and the equation goes to JAX with
plain arrays: never wrong, at worst slower. So a new JAX release can cost speed, not correctness.

This file and the rules are the only ones that know jaxprs, and they use public names of JAX alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core, source_info_util

from lora_jax import lowrank
from lora_jax.dropout import dropout
from lora_jax.transform import moves, uses
from lora_jax.transform.moves import Kernel, Unfactored

Array = jax.Array


class Event(NamedTuple):
    """One use of one kernel, seen during a trace.

    Attributes:
      name: the kernel's path.
      primitive: what used it.
      reason: why it was formed in full there; empty if it stayed factored.
      roles: role of each original axis in this use; only while roles are being found.
      source: file and line in the user's code.
    """

    name: str
    primitive: str
    reason: str = ""
    roles: str = ""
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Scope:
    """What holds at one place of the evaluation.

    Attributes:
      strict: a fallback is an error.
      rate: dropout rate of all low-rank branches; None for the rate of each kernel.
      key: the PRNG key of this place; each equation folds in its position.
      events: where uses are recorded, by place, so that tracing a loop body twice counts once.
      place: the equations around this one.
    """

    strict: bool = False
    rate: Any = None
    key: Array | None = None
    events: dict[tuple, Event] = dataclasses.field(default_factory=dict)
    place: tuple = ()

    def at(self, index: Any, place: Any = None) -> "Scope":
        """The scope of the equation (or loop iteration) number ``index``."""
        key = None if self.key is None else jax.random.fold_in(self.key, index)
        return dataclasses.replace(self, key=key, place=(*self.place, place))

    def record(self, event: Event) -> None:
        """Notes the use of a kernel at this place."""
        self.events[(*self.place, event.name)] = event


def evaluate(scope: Scope, jaxpr: Any, consts: Sequence, args: Sequence) -> list:
    """Evaluates a jaxpr some of whose inputs are kernels; outputs may be kernels too."""
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else env[atom]
    index = -1
    for eqn in jaxpr.eqns:
        # Not counted, so that dropout is the same on a mesh, where a model may have them.
        index += eqn.primitive.name != "sharding_constraint"
        vals = [read(atom) for atom in eqn.invars]
        if any(isinstance(v, Kernel) for v in vals):
            outs = _factored(scope.at(index, id(eqn)), eqn, vals)
        else:
            outs = _plain(eqn, vals)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _plain(eqn: Any, vals: Sequence) -> list:
    """Hands one equation to JAX, as a jaxpr of its own: nothing of JAX is re-implemented here."""
    variables = {
        atom: v
        for atom, v in zip(eqn.invars, vals, strict=True)
        if not isinstance(atom, core.Literal)
    }
    kept = [k for k, v in enumerate(eqn.outvars) if not isinstance(v, core.DropVar)]
    outvars = [eqn.outvars[k] for k in kept]
    debug = core.DebugInfo("lift", eqn.primitive.name, None, None)
    jaxpr = core.Jaxpr((), list(variables), outvars, [eqn], eqn.effects, debug)
    results = dict(zip(kept, jax.core.eval_jaxpr(jaxpr, (), *variables.values()), strict=True))
    return [results.get(k) for k in range(len(eqn.outvars))]


def _factored(scope: Scope, eqn: Any, vals: Sequence) -> list:
    name = eqn.primitive.name
    try:
        if name in _CONTROL:
            return _CONTROL[name](scope, eqn, vals)
        if name in moves.MOVES:
            return moves.MOVES[name](eqn.params, *vals)
        if name in uses.USES:
            return [_use(scope, eqn, each, uses.USES[name]) for each in _one_by_one(vals)][:1]
        raise Unfactored("no rule keeps a low-rank sum factored here")
    except Unfactored as why:
        reason = str(why)
    except (KeyError, TypeError) as error:
        # An equation of a form that the rule does not know, as another JAX release may have.
        reason = f"the rule does not know this form ({error!r})"
    outs = _plain(eqn, [formed(scope, v, name, reason, eqn) for v in vals])
    return _traced_through(eqn, vals, outs)


def _traced_through(eqn: Any, vals: Sequence, outs: list) -> list:
    """While roles are being found, a kernel is still itself after an operation on each entry.

    So a kernel that is normalised, masked or scaled by columns before its product can be adapted,
    by the fallback.
    """
    kernels = [v for v in vals if isinstance(v, Kernel)]
    known = eqn.primitive.name in uses.USES or any(k.a is not None for k in kernels)
    # A callback has no output; one that nobody uses is None.
    if known or len(outs) != 1 or outs[0] is None:
        return outs
    alike = lambda x: x.shape == outs[0].shape and jnp.issubdtype(x.dtype, jnp.floating)
    if not alike(outs[0]) or not all(alike(k.w) for k in kernels):
        return outs
    return [moves.without_factors(outs[0], kernels)]


def _one_by_one(vals: Sequence) -> list[list]:
    """While roles are being found, both factors of a product of two kernels have theirs."""
    kernels = [k for k, v in enumerate(vals) if isinstance(v, Kernel)]
    if any(vals[k].a is not None for k in kernels):
        return [list(vals)]
    return [[v.w if n in kernels and n != k else v for n, v in enumerate(vals)] for k in kernels]


def _use(scope: Scope, eqn: Any, vals: Sequence, use: uses.Use) -> Array:
    which, sides = use.sides(eqn.params, vals)
    kernel = vals[which]
    (base,) = _plain(eqn, [v.w if v is kernel else v for v in vals])
    event = Event(kernel.name, eqn.primitive.name, source=_source(eqn))
    if kernel.a is None:
        for name, roles in _roles(kernel, sides).items():
            scope.record(event._replace(name=name, roles=roles))
        return base
    factors = uses.oriented(kernel, sides)
    branch = use.branch(eqn.params, vals, factors, base, functools.partial(_drop, scope, kernel))
    scope.record(event)
    return base + branch.astype(base.dtype)


def _drop(scope: Scope, kernel: Kernel, x: Array, shape: Sequence[int] | None = None) -> Array:
    rate = kernel.rate or None if scope.rate is None else scope.rate
    return x if rate is None else dropout(x, rate, scope.key, shape)


def _roles(kernel: Kernel, sides: uses.Sides) -> dict[str, str]:
    """Roles of the original axes of the kernel (or kernels, concatenated) in one use.

    An axis that is no longer there was stacked: a scan or an index took one entry of it.
    """
    found: dict[str, list[set[str]]] = {}
    for k, axis in enumerate(kernel.axes):
        role = (
            lowrank.IN if k in sides.inputs else lowrank.BATCH if k in sides.batch else lowrank.OUT
        )
        for name, original, ndim in axis:
            found.setdefault(name, [set() for _ in range(ndim)])[original].add(role)
    # An axis that is used in two ways has no role.
    clear = {name: axes for name, axes in found.items() if all(len(roles) < 2 for roles in axes)}
    return {
        name: "".join(roles.pop() if roles else lowrank.BATCH for roles in axes)
        for name, axes in clear.items()
    }


def formed(scope: Scope, value: Any, primitive: str, reason: str, eqn: Any = None) -> Any:
    """Falls back to ``W + s·BA`` if ``value`` is a kernel."""
    if not isinstance(value, Kernel):
        return value
    source = "" if eqn is None else _source(eqn)
    scope.record(Event(value.name, primitive, reason=reason, source=source))
    if (scope.rate is not None or value.rate) and value.a is not None:
        raise ValueError(_cannot(value, primitive, reason, source, "dropout needs it factored"))
    if scope.strict:
        raise ValueError(_cannot(value, primitive, reason, source, "strict=True forbids it"))
    return moves.materialise(value)


def _cannot(kernel: Kernel, primitive: str, reason: str, source: str, why: str) -> str:
    where = f" at {source}" if source else ""
    return (
        f"The kernel {kernel.name!r} would be formed in full as W + s·BA by {primitive!r}{where} "
        f"({reason}), but {why}. Leave it out of the targets, train it in full, or change that use."
    )


def _source(eqn: Any) -> str:
    return source_info_util.summarize(eqn.source_info)


# ---- Control flow, by recursion ------------------------------------------------------------------


def _call(scope: Scope, eqn: Any, vals: Sequence) -> list:
    """A nested ``jit``: evaluated in place, so that a kernel can go in and come out."""
    closed = eqn.params["jaxpr"]
    return evaluate(scope, closed.jaxpr, closed.consts, vals)


def _checkpoint(scope: Scope, eqn: Any, vals: Sequence) -> list:
    """``jax.checkpoint``, with its policy: the recomputation is factored like the computation."""
    params = eqn.params
    body = lambda *vals: evaluate(scope, params["jaxpr"], (), vals)
    if params["differentiated"] and params["prevent_cse"]:
        # The recomputation of a gradient taken inside the function; JAX's own lowering puts this
        # barrier there, so that the compiler does not undo the checkpoint.
        return body(*lax.optimization_barrier(tuple(vals)))
    return jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])(*vals)


def _scan(scope: Scope, eqn: Any, vals: Sequence) -> list:
    """``lax.scan``: kernels may be constants, or be stacked along the scanned axis."""
    params, closed = eqn.params, eqn.params["jaxpr"]
    n_consts, n_carry = params["num_consts"], params["num_carry"]
    consts = list(vals[:n_consts])
    carry, kept = _hoisted(scope, closed.jaxpr, vals[n_consts : n_consts + n_carry], n_consts, eqn)
    xs = [_scannable(scope, x, eqn) for x in vals[n_consts + n_carry :]]

    def body(carry: list, slices: tuple) -> tuple[list, list]:
        step, xs = slices
        xs = [_with_axes(x, lambda axes: axes[1:]) for x in xs]
        inner = scope if step is None else scope.at(step)
        outs = evaluate(inner, closed.jaxpr, closed.consts, [*consts, *_refill(carry, kept), *xs])
        reason = "is changed by the loop body"
        carry = [
            formed(inner, x, "scan", reason, eqn)
            for k, x in enumerate(outs[:n_carry])
            if k not in kept
        ]
        return carry, outs[n_carry:]

    steps = None if scope.key is None else jnp.arange(params["length"])
    options = {
        k: params[k] for k in ("length", "reverse", "unroll", "_split_transpose") if k in params
    }
    carry, ys = lax.scan(body, carry, (steps, xs), **options)
    # A kernel that every step hands out (as NNX does with the state of a layer) is a stack again.
    stack = lambda y: lambda axes: (frozenset() if y.a is None else lowrank.BATCH, *axes)
    ys = [_with_axes(y, stack(y)) for y in ys]
    return [*_refill(carry, kept), *ys]


def _scannable(scope: Scope, x: Any, eqn: Any) -> Any:
    """A kernel can be scanned along an axis of which every entry has its own factors."""
    if not isinstance(x, Kernel) or x.a is None or x.axes[0] == lowrank.BATCH:
        return x
    return formed(scope, x, "scan", f"scans over an axis with role {x.axes[0]!r}", eqn)


def _with_axes(x: Any, change: Callable[[tuple], tuple]) -> Any:
    return dataclasses.replace(x, axes=change(x.axes)) if isinstance(x, Kernel) else x


def _hoisted(
    scope: Scope, body: Any, carry: Sequence, offset: int, eqn: Any
) -> tuple[list, dict[int, Kernel]]:
    """Splits the carry of a loop: kernels that the body hands on unchanged become constants."""
    kept, rest = {}, []
    for k, value in enumerate(carry):
        if isinstance(value, Kernel) and body.outvars[k] is body.invars[offset + k]:
            kept[k] = value
        else:
            reason = "is changed by the loop body"
            rest.append(formed(scope, value, eqn.primitive.name, reason, eqn))
    return rest, kept


def _refill(rest: Sequence, kept: dict[int, Kernel]) -> Iterator:
    """Puts the constants that :func:`_hoisted` took out of a carry back in their places."""
    values = iter(rest)
    for k in range(len(rest) + len(kept)):
        yield kept[k] if k in kept else next(values)


def _while(scope: Scope, eqn: Any, vals: Sequence) -> list:
    """``lax.while_loop``: kernels may be constants."""
    params = eqn.params
    n_test, n_body = params["cond_nconsts"], params["body_nconsts"]
    test_consts, body_consts = vals[:n_test], vals[n_test : n_test + n_body]
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    carry, kept = _hoisted(scope, body.jaxpr, vals[n_test + n_body :], n_body, eqn)

    def run(place: str, closed: Any, consts: Sequence, state: tuple) -> list:
        step, carry = state
        inner = scope.at(step, place)
        args = [*consts, *_refill(carry, kept)]
        outs = evaluate(inner, closed.jaxpr, closed.consts, args)
        return (
            [
                x if k in kept else formed(inner, x, "while", "is an output of the loop body", eqn)
                for k, x in enumerate(outs)
            ]
            if place == "body"
            else outs
        )

    def step(state: tuple) -> tuple:
        outs = run("body", body, body_consts, state)
        return state[0] + 1, [x for k, x in enumerate(outs) if k not in kept]

    go_on = lambda state: run("test", test, test_consts, state)[0]
    _, carry = lax.while_loop(go_on, step, (jnp.int32(0), carry))
    return list(_refill(carry, kept))


def _cond(scope: Scope, eqn: Any, vals: Sequence) -> list:
    """``lax.cond`` and ``lax.switch``."""
    if isinstance(vals[0], Kernel):
        raise Unfactored("the kernel decides which branch is taken")

    def branch(number: int, closed: Any) -> Callable:
        def run(*vals: Any) -> list:
            inner = scope.at(number, number)
            outs = evaluate(inner, closed.jaxpr, closed.consts, vals)
            outs = [x for k, x in enumerate(outs) if k not in unchanged]
            return [formed(inner, x, "cond", "is an output of a branch", eqn) for x in outs]

        return run

    jaxprs = [closed.jaxpr for closed in eqn.params["branches"]]
    unchanged = _handed_on(jaxprs, vals[1:])
    branches = [branch(k, closed) for k, closed in enumerate(eqn.params["branches"])]
    rest = lax.switch(vals[0], branches, *vals[1:])
    return list(_refill(rest, unchanged))


def _handed_on(jaxprs: Sequence, vals: Sequence) -> dict[int, Kernel]:
    """The outputs that are, whichever branch is taken, one and the same kernel that went in."""
    kernels = {}
    for k in range(len(jaxprs[0].outvars)):
        for n, value in enumerate(vals):
            if isinstance(value, Kernel) and all(j.outvars[k] is j.invars[n] for j in jaxprs):
                kernels[k] = value
    return kernels


def _custom(scope: Scope, eqn: Any, vals: Sequence) -> list:
    """A function with its own derivative rule: its rule is for arrays, so it gets arrays.

    While roles are being found it is looked into, so that a kernel that is only used inside (a
    quantised product, say) can still be adapted, by the fallback.
    """
    kernels = [v for v in vals if isinstance(v, Kernel)]
    if any(k.a is not None for k in kernels):
        raise Unfactored("its own derivative rule takes plain arrays")
    closed = eqn.params["call_jaxpr"]
    return evaluate(scope, closed.jaxpr, closed.consts, vals)


_CONTROL = {
    "jit": _call,
    "closed_call": lambda scope, eqn, vals: evaluate(
        scope, eqn.params["call_jaxpr"].jaxpr, eqn.params["call_jaxpr"].consts, vals
    ),
    "checkpoint": _checkpoint,
    "remat2": _checkpoint,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_jvp_call": _custom,
    "custom_vjp_call": _custom,
}
