"""Control flow: equations with jaxprs of their own, which are evaluated by recursion."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn
from jax.sharding import PartitionSpec

from lora_jax.factors import BATCH, IN, OUT
from lora_jax.transform import forms, interpreter, lookahead
from lora_jax.transform.deferred import Deferred
from lora_jax.transform.forms import Body, vary, varying_axes
from lora_jax.transform.interpreter import Event, FallbackError, Scope, fall_back
from lora_jax.transform.kernel import (
    Kernel,
    Unfactored,
    factor_specs,
    move_rank_inside,
    move_rank_last,
    with_numbers,
)

Array = jax.Array


def evaluate(scope: Scope, body: Body, args: Sequence[Any]) -> list:
    """Evaluates a jaxpr some of whose inputs are kernels; outputs may be kernels too."""
    return interpreter.evaluate(scope, body, args, CONTROL)


# ---- Calls ---------------------------------------------------------------------------------------
#
# A nested `jit` stays one, so that JAX's own caches serve: a function that is called two hundred
# times is evaluated once, and differentiated once. In a call kernels are named by number, so that
# layers with other names share the work. The events of its trace are stored, and recorded again at
# each call.

_CALLS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_MAX_DEPTH = (
    12  # depth of nested calls; deeper ones are evaluated in place, or Python's stack overflows
)


def _jit_body(body: Body, *, is_recorded: bool, **kind: Any) -> tuple[Callable, dict]:
    """Jits a jaxpr as a function of arrays and kernels; also returns the events of traces."""
    # The cache must not keep its own key alive.
    jaxpr, consts = weakref.ref(body.jaxpr), body.consts
    events: dict[Any, dict[tuple, Event]] = {}

    def run(args: list, rate: Any, key: Array | None) -> list:
        events_of_trace: dict[tuple, Event] = {}
        scope = Scope(rate=rate, key=key, events=events_of_trace if is_recorded else None, **kind)
        inner: Any = jaxpr()  # it is alive, since the equation that holds it is being evaluated
        outs = evaluate(scope, Body(inner, consts), args)
        events[jax.tree.structure(args)] = events_of_trace
        return outs

    return jax.jit(run), events


def _call(scope: Scope, eqn: JaxprEqn, vals: Sequence) -> list:
    """Evaluates a nested ``jit``; kernels can go in and come out."""
    body = forms.call(eqn)
    if scope.depth == _MAX_DEPTH:
        return evaluate(scope, body, vals)
    args = [_rename(v, k) for k, v in enumerate(vals)]
    kinds = _CALLS.setdefault(body.jaxpr, {})
    is_recorded = scope.events is not None
    kernels = tuple(isinstance(v, Kernel | Deferred) for v in vals)
    # The uses of the results matter only where a kernel can come out.
    outputs = lookahead.find_kernel_outputs(body.jaxpr, kernels)
    pairs = zip(scope.allows_kernels, outputs, strict=True)
    flags = (scope.strict, scope.varies, scope.in_scan, scope.measures)
    kind = (is_recorded, scope.depth + 1, tuple(map(all, pairs)), *flags)
    if kind not in kinds:
        names_of_flags = ("strict", "varies", "in_scan", "measures")
        names = ("is_recorded", "depth", "allows_kernels", *names_of_flags)
        settings: dict[str, Any] = dict(zip(names, kind, strict=True))
        kinds[kind] = _jit_body(body, **settings)
    run, events = kinds[kind]
    original_names = lambda names: tuple(dict.fromkeys(n for k in names for n in vals[k].names))
    try:
        outs = run(args, scope.rate, scope.key)
    except FallbackError as error:
        event = error.event._replace(names=original_names(error.event.names))
        raise FallbackError(event, error.why) from None
    if scope.events is not None:
        for (*place, _), event in events[jax.tree.structure(args)].items():
            names = original_names(event.names)
            scope.events[(*scope.place, *place, names)] = event._replace(names=names)
    restore_names = lambda x: dataclasses.replace(x, names=original_names(x.names))
    return [restore_names(x) if isinstance(x, Kernel) else x for x in outs]


def _rename(value: Any, number: int) -> Any:
    if not isinstance(value, Kernel):
        return value
    return dataclasses.replace(value, names=(number,))


def _inline(scope: Scope, eqn: JaxprEqn, vals: Sequence) -> list:
    return evaluate(scope, forms.call(eqn), vals)


def _checkpoint(scope: Scope, eqn: JaxprEqn, vals: Sequence) -> list:
    """Evaluates ``jax.checkpoint`` with its policy; the recomputation is factored, too."""
    form = forms.checkpoint(eqn)
    body = lambda *vals: evaluate(scope, form.body, vals)
    if form.is_recomputation and form.prevent_cse:
        # This is the recomputation for a gradient that was taken inside the function. JAX's own
        # lowering puts this barrier there, so that the compiler does not undo the checkpoint.
        return body(*lax.optimization_barrier(tuple(vals)))
    return jax.checkpoint(body, prevent_cse=form.prevent_cse, policy=form.policy)(*vals)


# ---- Loops ---------------------------------------------------------------------------------------


def _scan(scope: Scope, eqn: JaxprEqn, vals: Sequence) -> list:
    """Evaluates ``lax.scan``; kernels may be constants, or be sliced along any axis."""
    form = forms.scan(eqn)
    consts, values, xs = form.split(vals)
    rest, invariants = _hoist(scope, form.body.jaxpr, values, form.n_consts, eqn)
    carry = _make_varying(scope, rest, vals)
    results = lookahead.scan_results(form, scope.allows_kernels)
    slices, joins = zip(*map(_slice_operand, xs), strict=True) if xs else ((), ())

    def body(carry: list, slices: tuple) -> tuple[list, list]:
        step, xs = slices
        xs = [f(x) for f, x in zip(joins, xs, strict=True)]
        inner = dataclasses.replace(scope.child(step, allows_kernels=results), in_scan=True)
        outs = evaluate(inner, form.body, [*consts, *_refill(carry, invariants), *xs])
        reason = "is changed by the loop body"
        carry = [
            fall_back(inner, x, "scan", reason, eqn)
            for k, x in enumerate(outs[: form.n_carry])
            if k not in invariants
        ]
        return carry, outs[form.n_carry :]

    steps = None if scope.key is None else jnp.arange(form.length)
    carry, ys = lax.scan(body, carry, (steps, list(slices)), length=form.length, **form.options)
    # A kernel that every step returns (as NNX does with the state of a layer) is a stack again.
    ys = [dataclasses.replace(y, axes=BATCH + y.axes) if isinstance(y, Kernel) else y for y in ys]
    return [*_refill(carry, invariants), *ys]


def _slice_operand(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Returns what a scan slices of an operand, and a function that makes an operand of a slice.

    Along a batch axis every entry has its own factors. Along an input axis ``a`` is sliced, along
    an output axis ``b``, and the other factor is the same in every step; so is the gain, if it does
    not vary along the axis.
    """
    w = x.w if isinstance(x, Kernel) else x
    if isinstance(w, Deferred) and not w.lead:
        return _slice_operand(with_numbers(x))
    if not isinstance(x, Kernel):
        return x, lambda part: part
    role, axes = x.axes[0], x.axes[1:]
    if role == BATCH:
        return x, lambda part: dataclasses.replace(part, axes=axes)
    sides = {}
    if role == IN:
        sides["a"] = x.a
    elif role == OUT:
        sides["b"] = move_rank_last(x)
    if x.gain is not None and role == x.gain_side:
        sides["gain"] = x.gain
    # Batch axes come first in a factor.
    sides = {name: jnp.moveaxis(side, x.axes.count(BATCH), 0) for name, side in sides.items()}

    def join(part: tuple) -> Kernel:
        w, sides = part
        inside = {"b": move_rank_inside(sides["b"], axes)} if "b" in sides else {}
        return dataclasses.replace(x, w=w, axes=axes, **{**sides, **inside})

    return (x.w, sides), join


def _hoist(
    scope: Scope, body: Jaxpr, carry: Sequence, offset: int, eqn: JaxprEqn
) -> tuple[list, dict[int, Kernel | Deferred]]:
    """Splits the carry of a loop: kernels that the body leaves unchanged become constants."""
    invariants, rest = {}, []
    for k, value in enumerate(carry):
        if isinstance(value, Kernel | Deferred) and body.outvars[k] is body.invars[offset + k]:
            invariants[k] = value
        else:
            reason = "is changed by the loop body"
            rest.append(fall_back(scope, value, eqn.primitive.name, reason, eqn))
    return rest, invariants


def _refill(rest: Sequence, invariants: Mapping[int, Kernel | Deferred]) -> Iterator:
    """Puts the constants that :func:`_hoist` took out of a carry back in their places."""
    values = iter(rest)
    for k in range(len(rest) + len(invariants)):
        yield invariants[k] if k in invariants else next(values)


def _make_varying(scope: Scope, carry: Sequence[Any], vals: Sequence[Any]) -> list:
    """Makes a carry vary over the devices of a ``shard_map`` wherever an operand does."""
    if not scope.varies:
        return [*carry]
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(vals)))
    is_number = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    return [vary(x, axes) if is_number(x) else x for x in carry]


def _while(scope: Scope, eqn: JaxprEqn, vals: Sequence) -> list:
    """Evaluates ``lax.while_loop``; kernels may be constants."""
    form = forms.while_loop(eqn)
    test_consts, body_consts, carry = form.split(vals)
    carry, invariants = _hoist(scope, form.body.jaxpr, carry, form.n_body, eqn)
    carry = _make_varying(scope, carry, vals)

    def run(place: str, body: Body, consts: Sequence, state: tuple) -> list:
        step, carry = state
        return evaluate(scope.child(step, place), body, [*consts, *_refill(carry, invariants)])

    def step(state: tuple) -> tuple:
        outs = run("body", form.body, body_consts, state)
        inner, reason = scope.child(state[0], "body"), "is an output of the loop body"
        rest = [x for k, x in enumerate(outs) if k not in invariants]
        return state[0] + 1, [fall_back(inner, x, "while", reason, eqn) for x in rest]

    test = lambda state: run("test", form.test, test_consts, state)[0]
    _, carry = lax.while_loop(test, step, (jnp.int32(0), carry))
    return list(_refill(carry, invariants))


# ---- Branches ------------------------------------------------------------------------------------


def _cond(scope: Scope, eqn: JaxprEqn, vals: Sequence) -> list:
    """Evaluates ``lax.cond`` and ``lax.switch``."""
    if isinstance(vals[0], Kernel):
        raise Unfactored("the kernel decides which branch is taken")
    bodies = forms.cond(eqn)

    def branch(number: int, body: Body) -> Callable:
        def run(*vals: Any) -> list:
            inner = scope.child(number, number)
            outs = evaluate(inner, body, vals)
            outs = [x for k, x in enumerate(outs) if k not in unchanged]
            outs = [fall_back(inner, x, "cond", "is an output of a branch", eqn) for x in outs]
            return _make_varying(scope, outs, vals)

        return run

    unchanged = _find_unchanged([body.jaxpr for body in bodies], vals[1:])
    branches = [branch(k, body) for k, body in enumerate(bodies)]
    rest = lax.switch(vals[0], branches, *vals[1:])
    return list(_refill(rest, unchanged))


def _find_unchanged(jaxprs: Sequence[Jaxpr], vals: Sequence) -> dict[int, Kernel | Deferred]:
    """Finds the outputs that are the same kernel of the inputs, whichever branch is taken."""
    kernels = {}
    for k in range(len(jaxprs[0].outvars)):
        for n, value in enumerate(vals):
            if isinstance(value, Kernel | Deferred) and all(
                j.outvars[k] is j.invars[n] for j in jaxprs
            ):
                kernels[k] = value
    return kernels


# ---- Several devices -----------------------------------------------------------------------------


def _shard_map(scope: Scope, eqn: JaxprEqn, vals: Sequence) -> list:
    """Evaluates ``jax.shard_map``; an axis of a factor is split as the kernel's is."""
    form = forms.shard_map(eqn)
    vals = [with_numbers(v) for v in vals]  # a spec is for axes that the parts do not have
    specs = [_specs(v, spec) for v, spec in zip(vals, form.in_specs, strict=True)]
    extra = [x for x in (scope.rate, scope.key) if x is not None]

    def body(extra: list, *vals: Any) -> list:
        changes = dict(zip(("rate", "key"), extra, strict=False))
        inner = dataclasses.replace(scope, allows_kernels=(), **changes)
        outs = evaluate(inner, form.body, vals)
        reason = "leaves the shard_map"
        return [fall_back(inner, x, "shard_map", reason, eqn) for x in outs]

    run = jax.shard_map(
        body,
        mesh=form.mesh,
        in_specs=([PartitionSpec()] * len(extra), *specs),
        out_specs=list(form.out_specs),
        axis_names=set(form.axis_names),
        check_vma=form.check_vma,
    )
    return run(extra, *vals)


def _specs(value: Any, spec: Any) -> Any:
    if not isinstance(value, Kernel):
        return spec
    specs: dict[str, Any] = {"w": spec, **factor_specs(value, spec)}
    return dataclasses.replace(value, **specs)


def _custom_jvp(scope: Scope, eqn: JaxprEqn, vals: Sequence) -> list:
    raise Unfactored("its own derivative rule takes plain arrays")


def _custom_vjp(scope: Scope, eqn: JaxprEqn, vals: Sequence) -> list:
    raise Unfactored(
        "its own derivative rule takes plain arrays; if it is a solver's, give it the bound "
        "parameters, and lift the function that it calls"
    )


CONTROL: dict[str, interpreter.Control] = {
    "jit": _call,
    "pjit": _call,
    "closed_call": _inline,
    "eval_jaxpr": _inline,
    "core_call": _inline,
    "checkpoint": _checkpoint,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
}
