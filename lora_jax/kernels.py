"""Finds out which leaves of a parameter tree are kernels: every leaf has roles, or a reason."""

import dataclasses
import html
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import factors, paths
from lora_jax.config import ALL_LINEAR, LoRAConfig
from lora_jax.display import make_html_table
from lora_jax.quantized import abstract, is_quantized
from lora_jax.transform.findings import LOOKUP, Findings, Use, has_two_sides
from lora_jax.transform.lift import trace_roles
from lora_jax.transform.origins import DATA, FIXED

PyTree = Any
KERNEL, TABLE, OTHER = "kernel", "lookup", "other"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One leaf of a parameter tree, and how the function uses it.

    Attributes:
      shape: shape of the leaf; None if it is no array.
      dtype: dtype of the leaf; None if it is no array.
      kind: "kernel" if it is contracted or convolved with what depends on the inputs, "lookup" if
        rows of it are looked up and nothing else, "other" if it can't be adapted.
      axes: role of each axis, as in :mod:`lora_jax.factors`; empty for the kind "other".
      is_weight: whether "all-linear" may choose it. Variables of other collections than "params",
        and of other types than ``nnx.Param``, are adapted only if a target names them.
      reason: reason why it can't be adapted, or why "all-linear" leaves it out.
      hidden_in: name of the primitive that uses it, if that can't be looked into.
      is_looked_up: whether rows of it are looked up, also if it is contracted elsewhere.
    """

    shape: tuple[int, ...] | None
    dtype: Any
    kind: str
    axes: str = ""
    is_weight: bool = True
    reason: str = ""
    hidden_in: str = ""
    is_looked_up: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """Every leaf by name, and the equations that could not be understood."""

    leaves: Mapping[str, Leaf]
    unknown: tuple[str, ...] = ()

    def adaptable(self) -> dict[str, Leaf]:
        """Returns the leaves that have roles."""
        return {name: leaf for name, leaf in self.leaves.items() if leaf.axes}


def find_kernels(
    fn: Callable,
    params: PyTree,
    args: tuple,
    kwargs: Mapping[str, Any],
    config: LoRAConfig,
    *,
    leaves: Mapping[str, Any],
) -> Kernels:
    """Tells of every leaf of ``params`` what it is to ``fn(params, *args, **kwargs)``.

    ``fn`` is traced, never run. The result does not depend on the sizes of the inputs.

    Args:
      fn: any function that JAX can trace.
      params: its parameters.
      args: its other arguments.
      kwargs: its keyword arguments.
      config: gives roles, and the names of leaves that are adapted although they are state.
      leaves: the leaves of ``params`` by name.

    Raises:
      ValueError: roles that the config gives do not fit the leaf that they are for.
    """
    named = [entry for entry in config.targets if entry != ALL_LINEAR]
    is_named = lambda name: any(paths.matches(entry, name) for entry in named)
    states = {n: why for n, why in _find_states(leaves, params).items() if not is_named(n)}
    roles_of = _select_roles(leaves, config)
    followed_names = {
        k: name
        for k, (name, x) in enumerate(leaves.items())
        if _is_followed(x) and name not in states
    }
    plain = jax.tree.map(abstract, params, is_leaf=is_quantized)
    findings = trace_roles(fn, plain, args, dict(kwargs), names=followed_names)
    describe = lambda name, x: _describe_leaf(name, x, findings, states.get(name, ""))
    result = {n: _assign_roles(describe(n, x), roles_of.get(n)) for n, x in leaves.items()}
    return Kernels(leaves=result, unknown=tuple(findings.unknown))


def _is_followed(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact) and len(x.shape) > 1


def is_real(x: Any) -> bool:
    """Tells whether ``x`` is an array, or a shape, of floating-point numbers."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _select_roles(leaves: Mapping[str, Any], config: LoRAConfig) -> dict[str, str]:
    hits = paths.select(config.roles, leaves, what="roles")
    roles: dict[str, str] = {}
    for pattern, names in hits.items():
        for name in names:
            axes, shape = config.roles[pattern], getattr(leaves[name], "shape", ())
            if len(axes) != len(shape):
                raise ValueError(
                    f"roles[{pattern!r}] is {axes!r}, for {len(axes)} axes, but {name} has shape "
                    f"{tuple(shape)}. Give one letter for each axis: i (input), o (output), b "
                    "(batch)."
                )
            if not is_real(leaves[name]):
                raise ValueError(
                    f"roles[{pattern!r}] is for {name}, which holds {leaves[name].dtype}: only "
                    "floating-point numbers can be adapted."
                )
            roles.setdefault(name, axes)
    return roles


def _assign_roles(leaf: Leaf, axes: str | None) -> Leaf:
    if axes is None:
        return leaf
    return dataclasses.replace(leaf, kind=KERNEL, axes=axes, reason="", hidden_in="")


def _describe_leaf(name: str, x: Any, findings: Findings, state: str) -> Leaf:
    if not hasattr(x, "dtype"):
        return Leaf(shape=None, dtype=None, kind=OTHER, reason="is no array")
    shape, uses = tuple(x.shape), findings.uses.get(name, [])
    best = min((u for u in uses if has_two_sides(u.roles)), key=_priority, default=None)
    make = lambda kind, axes="", reason="": Leaf(
        shape=shape, dtype=x.dtype, kind=kind, axes=axes, is_weight=not state, reason=reason
    )
    if best is None:
        leaf = make(OTHER, reason=_explain_other(x, uses, findings.losses.get(name, []), state))
        return dataclasses.replace(leaf, hidden_in=findings.hidden.get(name, ""))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return make(
            OTHER,
            reason=f"is a kernel with roles {best.roles!r}, but of complex numbers ({x.dtype}), "
            "which can't be adapted: keep its real and imaginary parts as two leaves, and join "
            "them in the function (jax.lax.complex)",
        )
    products = [u for u in uses if u.primitive != LOOKUP and has_two_sides(u.roles)]
    leaf = make(KERNEL if products else TABLE, best.roles, state)
    return dataclasses.replace(leaf, is_looked_up=best.primitive == LOOKUP)


def _priority(use: Use) -> int:
    """Ranks a use: of several uses, the first with the smallest number gives a leaf its roles.

    Experts that are looked up by token and then contracted have the roles of the product. A tied
    embedding has those of its lookup. Products with what depends on the inputs come before those
    of a power iteration over state, and products with another parameter come last.
    """
    is_lookup, is_data = use.primitive == LOOKUP, use.level == DATA
    order = [
        is_data and not is_lookup and use.is_picked,
        is_data and is_lookup,
        is_data,
        use.level >= FIXED and not is_lookup,
        is_lookup,
        True,
    ]
    return order.index(True)


def _explain_other(x: Any, uses: list[Use], losses: list[str], state: str) -> str:
    if state:
        return state
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return f"holds {x.dtype}, not floating-point numbers"
    if len(x.shape) < 2:
        return "is a vector or a number: it has no two sides" if is_real(x) else f"is {x.dtype}"
    sided = [f"is used by {u.primitive!r} with roles {u.roles!r}: one side only" for u in uses]
    return "; ".join(dict.fromkeys([*sided, *losses])) or "is not used by the function"


# ---- Leaves that are state -----------------------------------------------------------------------


def _find_states(leaves: Mapping[str, Any], params: PyTree) -> dict[str, str]:
    """Finds the leaves that are state of a model (statistics, caches), and says what each is."""
    by_collection = _find_other_collections(leaves)
    return by_collection | _find_other_variables(list(leaves), params)


def _find_other_collections(names: Iterable[str]) -> dict[str, str]:
    """Finds the leaves of Linen's other collections, which stand beside "params"."""
    parts = {name: name.split("/") for name in names}
    parents = {tuple(p[: p.index("params")]) for p in parts.values() if "params" in p[:-1]}
    collections = {
        name: p[len(parent)]
        for name, p in parts.items()
        for parent in parents
        if tuple(p[: len(parent)]) == parent and p[len(parent)] != "params"
    }
    return {
        name: f"is in the collection {collection!r}, not in 'params': adapted only if named"
        for name, collection in collections.items()
    }


def _find_other_variables(names: list[str], params: PyTree) -> dict[str, str]:
    """Finds NNX variables of other types than ``nnx.Param``."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return {}
    is_variable = lambda x: isinstance(x, nnx.Variable)
    kinds: list[str] = []
    for x in jax.tree.leaves(params, is_leaf=lambda x: is_variable(x) or is_quantized(x)):
        n = len(jax.tree.leaves(x, is_leaf=is_quantized)) if is_variable(x) else 1
        state = is_variable(x) and not isinstance(x, nnx.Param)
        kinds += [type(x).__name__ if state else ""] * n
    pairs = zip(names, kinds, strict=True)
    return {
        name: f"is a variable of type {kind}, not nnx.Param: adapted only if named"
        for name, kind in pairs
        if kind
    }


# ---- Tables --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A leaf, with what a config makes of it.

    Attributes:
      leaf: leaf of the parameters.
      action: "adapted", "trained", "tokens" (some rows of it are trained), or "frozen".
      rank: rank of its adapter; 0 if it has none.
      note: remark for the reader: a rank that was lowered, a reason.
    """

    leaf: Leaf
    action: str
    rank: int = 0
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Table:
    """Every leaf of a parameter tree, and what becomes of it.

    Prints as a table, where layers that are alike are one row.
    """

    rows: Mapping[str, Row]
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [_HEADS, *self._lines()]
        widths = [max(len(line[k]) for line in lines) for k in range(len(_HEADS) - 1)]
        pad = lambda line: [cell.ljust(n) for cell, n in zip(line, widths, strict=False)]
        text = [" ".join([*pad(line), line[-1]]).rstrip() for line in lines]
        return "\n".join([*text, *self._misses()])

    __repr__ = __str__  # so that the prompt shows the table

    def _repr_html_(self) -> str:
        """Returns the table for a notebook."""
        lost = "".join(f"<p>{html.escape(text)}</p>" for text in self._misses())
        return make_html_table(_HEADS, self._lines()) + lost

    def _lines(self) -> list[tuple[str, ...]]:
        return [_make_line(*row) for row in paths.fold_alike(self.rows)]

    def _misses(self) -> list[str]:
        return [f"not understood: {text}" for text in self.unknown]


_HEADS = ("leaf", "shape", "kind", "axes", "action", "rank", "")


def _make_line(name: str, count: int, row: Row) -> tuple[str, ...]:
    leaf, name = row.leaf, f"{name} ({count} times)" if count > 1 else name
    shape = "" if leaf.shape is None else "×".join(map(str, leaf.shape))
    rank = str(row.rank) if row.rank else ""
    return name, shape, leaf.kind, leaf.axes, row.action, rank, row.note


def adapted_shape(leaf: Leaf) -> tuple[int, ...]:
    """Returns the shape of a leaf that has roles."""
    if leaf.shape is None:
        raise ValueError("A leaf that is no array has no shape.")
    return leaf.shape


def max_rank(leaf: Leaf) -> int:
    """Returns the largest rank that the change of the kernel can have."""
    return factors.max_rank(leaf.shape or (), leaf.axes)
