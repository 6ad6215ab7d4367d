"""Looks ahead in a jaxpr: which arrays are used as kernels alone, and which are not used at all.

A kernel to which an array is added is a kernel again, and an activation to which one is added is an
activation. The uses of a result tell which of them it is: a sum stays factored if each of its uses
moves kernels, or is a product.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn

from lora_jax.transform import forms, moves, uses
from lora_jax.transform.forms import Body, UnknownForm


class Demand(NamedTuple):
    """Variables of a jaxpr that something uses, and those that are used as kernels alone."""

    used: set
    kernels_only: set

    def allows_kernels(self, variables: Sequence[Any]) -> tuple[bool, ...]:
        """Tells for each variable whether it may stay a kernel."""
        return tuple(v in self.kernels_only or v not in self.used for v in variables)


_DEMANDS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def find_demand(jaxpr: Jaxpr, results: tuple[bool, ...] = ()) -> Demand:
    """Finds out which variables of a jaxpr are used, and which are used as kernels alone.

    Args:
      jaxpr: jaxpr without its arrays.
      results: for each output, whether it may stay a kernel; none may if this is empty.
    """
    cached = _DEMANDS.setdefault(jaxpr, {})
    if results not in cached:
        cached[results] = _compute_demand(jaxpr, results or (False,) * len(jaxpr.outvars))
    return cached[results]


def _compute_demand(jaxpr: Jaxpr, results: Sequence[bool]) -> Demand:
    pairs = zip(jaxpr.outvars, results, strict=True)
    outputs = [(v, keep) for v, keep in pairs if not forms.is_literal(v)]
    demand = Demand({v for v, _ in outputs}, set())
    other = {v for v, keep in outputs if not keep}
    demand.kernels_only.update(demand.used - other)
    for eqn in reversed(jaxpr.eqns):
        allowed = _operands(eqn, demand.allows_kernels(eqn.outvars))
        for v, keep in zip(eqn.invars, allowed, strict=True):
            if not forms.is_literal(v):
                demand.used.add(v)
                (demand.kernels_only if keep else other).add(v)
        demand.kernels_only.difference_update(other)
    return demand


_KERNEL_OUTPUTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def find_kernel_outputs(jaxpr: Jaxpr, kernels: tuple[bool, ...]) -> tuple[bool, ...]:
    """Tells for each output of a jaxpr whether it may be a kernel, by the kernels among inputs."""
    cached = _KERNEL_OUTPUTS.setdefault(jaxpr, {})
    if kernels not in cached:
        pairs = zip(jaxpr.invars, kernels, strict=True)
        kernel_variables = {v for v, is_kernel in pairs if is_kernel}
        is_kernel_variable = lambda atom: not forms.is_literal(atom) and atom in kernel_variables
        for eqn in jaxpr.eqns:
            inputs = tuple(map(is_kernel_variable, eqn.invars))
            if any(inputs):
                results = zip(eqn.outvars, _results(eqn, inputs), strict=True)
                kernel_variables.update(v for v, result in results if result)
        cached[kernels] = tuple(map(is_kernel_variable, jaxpr.outvars))
    return cached[kernels]


def _results(eqn: JaxprEqn, kernels: tuple[bool, ...]) -> Sequence[bool]:
    eqn = forms.view_product(eqn)
    name = forms.name_of(eqn)
    if name in ("jit", "pjit"):
        return find_kernel_outputs(forms.call(eqn).jaxpr, kernels)
    is_product = name in uses.USES and sum(kernels) > 1
    # A gather of batch entries is a kernel again.
    may_be = is_product or name in (*moves.MOVES, *_CONTROL, "gather")
    return [may_be] * len(eqn.outvars)


def _operands(eqn: JaxprEqn, results: tuple[bool, ...]) -> Sequence[bool]:
    """Tells for each operand whether it may stay a kernel, given that of each result."""
    eqn = forms.view_product(eqn)
    name = forms.name_of(eqn)
    if name in _CONTROL:
        try:
            return _CONTROL[name](eqn, results)
        except UnknownForm:
            return [False] * len(eqn.invars)
    return [name in uses.USES or (name in moves.MOVES and all(results))] * len(eqn.invars)


def _inputs(body: Body, results: tuple[bool, ...] = ()) -> tuple[bool, ...]:
    return find_demand(body.jaxpr, results).allows_kernels(body.jaxpr.invars)


def _call(eqn: JaxprEqn, results: tuple[bool, ...]) -> Sequence[bool]:
    return _inputs(forms.call(eqn), results)


def _checkpoint(eqn: JaxprEqn, results: tuple[bool, ...]) -> Sequence[bool]:
    return _inputs(forms.checkpoint(eqn).body, results)


def scan_results(form: forms.Scan, results: tuple[bool, ...]) -> tuple[bool, ...]:
    """Tells for each output of a scan's body whether it may stay a kernel."""
    unchanged = is_unchanged(form.body.jaxpr, form.n_consts, form.n_carry)
    carry = [a and b for a, b in zip(unchanged, results, strict=False)]
    return (*carry, *results[form.n_carry :])


def is_unchanged(body: Jaxpr, offset: int, n: int) -> list[bool]:
    """Tells for each of the ``n`` carried values of a loop whether the body leaves it unchanged."""
    return [body.outvars[k] is body.invars[offset + k] for k in range(n)]


def _scan(eqn: JaxprEqn, results: tuple[bool, ...]) -> Sequence[bool]:
    form = forms.scan(eqn)
    inner = _inputs(form.body, scan_results(form, results))
    consts, carry, xs = form.split(inner)
    unchanged = is_unchanged(form.body.jaxpr, form.n_consts, form.n_carry)
    return [*consts, *(a and b for a, b in zip(carry, unchanged, strict=True)), *xs]


def _while(eqn: JaxprEqn, results: tuple[bool, ...]) -> Sequence[bool]:
    form = forms.while_loop(eqn)
    unchanged = is_unchanged(form.body.jaxpr, form.n_body, len(results))
    body_results = tuple(a and b for a, b in zip(unchanged, results, strict=True))
    test, body = _inputs(form.test), _inputs(form.body, body_results)
    triples = zip(unchanged, test[form.n_test :], body[form.n_body :], strict=True)
    return [*test[: form.n_test], *body[: form.n_body], *map(all, triples)]


def _cond(eqn: JaxprEqn, results: tuple[bool, ...]) -> Sequence[bool]:
    inner = [_inputs(body) for body in forms.cond(eqn)]
    return [False, *map(all, zip(*inner, strict=True))]


def _shard_map(eqn: JaxprEqn, results: tuple[bool, ...]) -> Sequence[bool]:
    return _inputs(forms.shard_map(eqn).body)


_CONTROL: dict[str, Callable[[JaxprEqn, tuple[bool, ...]], Sequence[bool]]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "eval_jaxpr"), _call),
    "checkpoint": _checkpoint,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
