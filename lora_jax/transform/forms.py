"""Reads the parts of control flow off equations, in the forms that JAX has given them.

JAX promises nothing about the parameters of an equation, and changes them. All that this library
reads of control flow is read and checked here. An equation of a form that is not known raises
:class:`UnknownForm` with the names of its parameters and JAX's version, which ``init`` and
``explain`` report. Forms of jax 0.8 to 0.11 are known.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from lora_jax import products
from lora_jax.transform.kernel import Unfactored


class UnknownForm(Unfactored):
    """An equation of a form that this library does not know, as in another JAX release."""


class Body(NamedTuple):
    """A jaxpr and the arrays that it closes over."""

    jaxpr: Jaxpr
    consts: Sequence[Any]


class Scan(NamedTuple):
    """``lax.scan``: operands are constants, carry, and arrays to be sliced, in this order."""

    body: Body
    n_consts: int
    n_carry: int
    length: int
    options: Mapping[str, Any]

    def split(self, values: Sequence[Any]) -> tuple[Sequence, Sequence, Sequence]:
        """Splits values into constants, carry, and arrays to be sliced."""
        first, second = self.n_consts, self.n_consts + self.n_carry
        return values[:first], values[first:second], values[second:]


class While(NamedTuple):
    """``lax.while_loop``: operands are constants of the test, of the body, and the carry."""

    test: Body
    body: Body
    n_test: int
    n_body: int

    def split(self, values: Sequence[Any]) -> tuple[Sequence, Sequence, Sequence]:
        """Splits values into constants of the test, constants of the body, and carry."""
        first, second = self.n_test, self.n_test + self.n_body
        return values[:first], values[first:second], values[second:]


class Checkpoint(NamedTuple):
    """``jax.checkpoint``; a gradient that is taken inside the function has recomputations."""

    body: Body
    prevent_cse: Any
    policy: Callable[..., Any] | None
    is_recomputation: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardMap:
    """``jax.shard_map``, with the specs of each operand and result."""

    body: Body
    mesh: Mesh | AbstractMesh
    in_specs: Sequence[PartitionSpec]
    out_specs: Sequence[PartitionSpec]
    axis_names: Collection[str]
    check_vma: bool


def describe_unknown(eqn: JaxprEqn, why: object = "") -> str:
    """Says that an equation has an unknown form, with what somebody needs to mend it."""
    text = repr(why) if isinstance(why, Exception) else str(why)
    detail = f" ({text})" if text else ""
    return (
        f"the primitive {eqn.primitive.name!r} has parameters {sorted(eqn.params)} in jax "
        f"{jax.__version__}, a form that this version of lora_jax does not know{detail}"
    )


def source(eqn: JaxprEqn) -> str:
    """Returns file and line of an equation in the user's code; empty if JAX does not say."""
    return source_info_util.summarize(eqn.source_info)


def varying_axes(x: Any) -> frozenset:
    """Returns the mesh axes of a ``shard_map`` over which the type of a value varies."""
    return frozenset().union(*(varying_axes_of(jax.typeof(part)) for part in jax.tree.leaves(x)))


def has_places(x: Any) -> bool:
    """Tells whether types in a tree of arrays name axes of a mesh over which these lie."""
    specs = [
        getattr(getattr(jax.typeof(y), "sharding", None), "spec", ()) for y in jax.tree.leaves(x)
    ]
    return bool(varying_axes(x)) or any(entry is not None for spec in specs for entry in spec)


def vary(x: Any, axes: frozenset) -> Any:
    """Makes a value vary over more axes of a ``shard_map``'s mesh."""
    missing = tuple(sorted(axes - varying_axes(x)))
    if not missing:
        return x
    if hasattr(lax, "pcast"):
        return lax.pcast(x, missing, to="varying")
    pvary: Callable = getattr(lax, "pvary")  # noqa: B009  of jax before 0.9
    return pvary(x, missing)


def varying_axes_of(type_: Any) -> frozenset:
    """Returns the mesh axes of a ``shard_map`` over which a type says that its values vary."""
    axes = getattr(getattr(type_, "manual_axis_type", None), "varying", None)
    return frozenset(getattr(type_, "vma", ()) if axes is None else axes)


def rebind(eqn: JaxprEqn, x: jax.Array, **params: Any) -> jax.Array:
    """Binds the equation to another operand, with some parameters changed."""
    out = eqn.primitive.bind(x, **{**eqn.params, **params})
    return out[0] if eqn.primitive.multiple_results else out


def is_literal(atom: Var | Literal) -> bool:
    """Tells whether an operand is a number written into the jaxpr."""
    return isinstance(atom, Literal)


def body_of(jaxpr: Jaxpr | ClosedJaxpr) -> Body:
    """Returns a jaxpr with its arrays, which up to jax 0.10 stand beside it in a closed jaxpr."""
    inner: Any = getattr(jaxpr, "jaxpr", jaxpr)
    consts = getattr(jaxpr, "consts", ())
    if not hasattr(inner, "eqns") or len(consts) != len(inner.constvars):
        raise UnknownForm(f"a jaxpr of an unknown form in jax {jax.__version__}: {type(jaxpr)}")
    return Body(inner, consts)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def bodies(eqn: JaxprEqn) -> list[Body]:
    """Returns all jaxprs among the parameters of an equation, also of unknown primitives."""
    params = dict(eqn.params)
    hidden = getattr(params.get("_prim"), "params", {})  # `call_hi_primitive` of jax 0.10 and later
    values = [*params.values(), *(hidden.values() if isinstance(hidden, Mapping) else ())]
    flat = [x for v in values for x in (v if isinstance(v, tuple | list) else (v,))]
    return [body_of(x) for x in flat if _is_jaxpr(x)]


def matching_body(eqn: JaxprEqn) -> Body | None:
    """Returns a jaxpr among the parameters that takes the operands of the equation, or None."""
    operands = [_shape(x) for x in eqn.invars]
    for body in bodies(eqn):
        inputs = [_shape(x) for x in body.jaxpr.invars]
        same = [len(a) == len(b) for a, b in zip(inputs, operands, strict=False)]
        if len(inputs) == len(operands) and all(same):
            return body
    return None


def _shape(atom: Var | Literal) -> tuple:
    return tuple(getattr(atom.aval, "shape", ()))


def _require(eqn: JaxprEqn, *names: str) -> list[Any]:
    missing = [name for name in names if name not in eqn.params]
    if missing:
        raise UnknownForm(describe_unknown(eqn, f"there is no {', '.join(map(repr, missing))}"))
    return [eqn.params[name] for name in names]


def _check_arity(eqn: JaxprEqn, body: Body, n_in: int, n_out: int) -> Body:
    """Returns the body, after checking its numbers of inputs and outputs."""
    arity = len(body.jaxpr.invars), len(body.jaxpr.outvars)
    if arity != (n_in, n_out):
        raise UnknownForm(
            describe_unknown(eqn, f"its body has {arity} inputs and outputs, not {n_in, n_out}")
        )
    return body


def call(eqn: JaxprEqn) -> Body:
    """Reads a nested ``jit``, and calls like it."""
    jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if jaxpr is None:
        (jaxpr,) = _require(eqn, "jaxpr")
    return _check_arity(eqn, body_of(jaxpr), len(eqn.invars), len(eqn.outvars))


def view_product(eqn: JaxprEqn) -> JaxprEqn:
    """Returns the ``dot_general`` that a call of :mod:`lora_jax.products` makes of its operands.

    The result has the operands and results of the call, and says which axes are summed over; it is
    not for evaluation, since the dtype of the result and the gradient are those of the call. Any
    other equation is returned as it is.
    """
    if eqn.params.get("name") != products.NAME or eqn.primitive.name not in ("jit", "pjit"):
        return eqn
    jaxpr, outer = call(eqn).jaxpr, list(eqn.invars)
    inputs: list[Var | Literal] = [*jaxpr.invars]
    if len(jaxpr.eqns) == 1 and (inner := bodies(jaxpr.eqns[0])):
        outer = [outer[inputs.index(x)] for x in jaxpr.eqns[0].invars]
        jaxpr = inner[0].jaxpr
        inputs = [*jaxpr.invars]
    if not jaxpr.eqns:  # nobody uses the result
        return eqn
    dot, *rest = jaxpr.eqns
    is_plain = dot.primitive.name == "dot_general" and set(dot.invars) == set(jaxpr.invars)
    if not is_plain or any(x.primitive.name != "convert_element_type" for x in rest):
        return eqn
    operands = [outer[inputs.index(x)] for x in dot.invars]
    return dot.replace(invars=operands, outvars=eqn.outvars, source_info=eqn.source_info)


def scan(eqn: JaxprEqn) -> Scan:
    """Reads ``lax.scan``: up to jax 0.10 by numbers of operands, later by trees of them."""
    jaxpr, length, reverse, unroll = _require(eqn, "jaxpr", "length", "reverse", "unroll")
    if "num_consts" in eqn.params:
        n_consts, n_carry = _require(eqn, "num_consts", "num_carry")
    else:
        parts = _require(eqn, "ft_in")[0].unpack()
        if len(parts) != 3 or sum(map(len, parts)) != len(eqn.invars):
            raise UnknownForm(
                describe_unknown(eqn, "its operands are not constants, carry and slices")
            )
        n_consts, n_carry = len(parts[0]), len(parts[1])
    options = {"reverse": reverse, "unroll": unroll}
    if eqn.params.get("_split_transpose"):
        options["_split_transpose"] = True
    body = _check_arity(eqn, body_of(jaxpr), len(eqn.invars), len(eqn.outvars))
    return Scan(body, n_consts, n_carry, length, options)


def while_loop(eqn: JaxprEqn) -> While:
    """Reads ``lax.while_loop``."""
    test, body, n_test, n_body = _require(
        eqn, "cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"
    )
    n_carry = len(eqn.outvars)
    body = _check_arity(eqn, body_of(body), n_body + n_carry, n_carry)
    return While(_check_arity(eqn, body_of(test), n_test + n_carry, 1), body, n_test, n_body)


def cond(eqn: JaxprEqn) -> list[Body]:
    """Reads the branches of ``lax.cond`` and ``lax.switch``; the first operand chooses one."""
    (branches,) = _require(eqn, "branches")
    n_in, n_out = len(eqn.invars) - 1, len(eqn.outvars)
    return [_check_arity(eqn, body_of(branch), n_in, n_out) for branch in branches]


def name_of(eqn: JaxprEqn) -> str:
    """Returns the name of the primitive, or of the operation that it holds as a value.

    In jax 0.10 and later ``checkpoint`` and ``checkpoint_name`` are such with ``JAX_REMAT3=1``.
    """
    name = eqn.primitive.name
    hidden = getattr(eqn.params.get("_prim"), "params", ())
    if name in ("remat", "remat2") or {"jaxpr", "policy"} <= set(hidden):
        return "checkpoint"
    return "name" if set(hidden) == {"name"} else name


def checkpoint(eqn: JaxprEqn) -> Checkpoint:
    """Reads ``jax.checkpoint``."""
    params = getattr(eqn.params.get("_prim"), "params", eqn.params)
    if not {"jaxpr", "policy"} <= set(params):
        raise UnknownForm(describe_unknown(eqn))
    body = _check_arity(eqn, body_of(params["jaxpr"]), len(eqn.invars), len(eqn.outvars))
    recomputes = bool(params.get("differentiated", False))
    return Checkpoint(body, params.get("prevent_cse", True), params["policy"], recomputes)


def shard_map(eqn: JaxprEqn) -> ShardMap:
    """Reads ``jax.shard_map``."""
    jaxpr, mesh, in_specs, out_specs = _require(eqn, "jaxpr", "mesh", "in_specs", "out_specs")
    axes = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes"))
    if axes is None:
        (axes,) = _require(eqn, "newly_manual_axes")
    (check_vma,) = _require(eqn, "check_vma")
    if len(in_specs) != len(eqn.invars) or len(out_specs) != len(eqn.outvars):
        raise UnknownForm(
            describe_unknown(eqn, "its specs are not one for each operand and result")
        )
    body = _check_arity(eqn, body_of(jaxpr), len(eqn.invars), len(eqn.outvars))
    return ShardMap(
        body=body,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=axes,
        check_vma=check_vma,
    )


def linear_solve(eqn: JaxprEqn) -> list[tuple[Body | None, int]]:
    """Reads the functions of ``lax.custom_linear_solve``, each with its number of constants."""
    jaxprs, lengths = _require(eqn, "jaxprs", "const_lengths")
    pairs = zip(jaxprs, lengths, strict=True)
    return [(None if jaxpr is None else body_of(jaxpr), n or 0) for jaxpr, n in pairs]


def pallas(eqn: JaxprEqn) -> tuple[Body, list[int]]:
    """Reads ``pallas_call``: its body, and which operand each of the body's first references is."""
    jaxpr, grid = _require(eqn, "jaxpr", "grid_mapping")
    skipped = grid.num_dynamic_grid_bounds
    body = body_of(jaxpr)
    operands = list(range(skipped, len(eqn.invars)))
    if len(body.jaxpr.invars) < len(operands):
        raise UnknownForm(
            describe_unknown(eqn, "its body has fewer references than there are operands")
        )
    return body, operands


def block_axes(eqn: JaxprEqn, operand: int) -> list[int]:
    """Returns the axes of an operand of ``pallas_call`` that its blocks have, unsqueezed."""
    number = operand - eqn.params["grid_mapping"].num_index_operands
    sizes = eqn.params["grid_mapping"].block_mappings[number].block_shape
    return [k for k, n in enumerate(sizes) if n is not None and type(n).__name__ != "Squeezed"]
