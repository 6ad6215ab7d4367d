"""Adapters: small trees that overlay a parameter tree.

At the path of a leaf an adapter holds a :class:`~lora_jax.lowrank.LowRank` node, which is added to
the kernel there, or a plain array, which replaces the leaf. An adapter is a nested dictionary with
the path components as keys, whatever containers the parameters use. LoRA, LoRA with a trained
head, BitFit, a linear probe and full fine-tuning are all values of this one type.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import lowrank, paths
from lora_jax.lowrank import LowRank, Trained

PyTree = Any
Array = jax.Array
TRAINABLE, FROZEN = "trainable", "frozen"


def nodes(adapter: PyTree) -> dict[str, Any]:
    """The nodes of an adapter by path: ``LowRank`` or a plain array."""
    return paths.named_leaves(adapter, is_leaf=lowrank.is_node)


def bind(params: PyTree, adapter: PyTree) -> PyTree:
    """Puts the adapter into the tree: kernels become unevaluated sums ``W_frozen + s·BA``.

    The result has the containers of ``params``, with a ``LowRank`` or ``Trained`` node where the
    adapter has an entry. Call it through :func:`lora_jax.lift`.

    Raises:
      ValueError: the adapter has a path that ``params`` lacks, or a shape that does not fit.
    """
    return _overlay(params, adapter, _bound)


def merge(params: PyTree, adapter: PyTree) -> PyTree:
    """Rewrites the tree to plain arrays, each adapted kernel being ``W + s·BA``.

    This is the definition of what an adapter means. The result has the structure, shapes and
    dtypes of ``params``, which is left as it is; the sum is rounded once to the kernel's dtype.

    Raises:
      ValueError: the adapter has a path that ``params`` lacks, or a shape that does not fit.
    """
    return _overlay(params, adapter, _merged)


def _bound(name: str, leaf: Array, node: Any) -> Any:
    if isinstance(node, LowRank):
        return dataclasses.replace(node, w=leaf, name=name)
    return Trained(node)


def _merged(name: str, leaf: Array, node: Any) -> Array:
    return lowrank.merged(leaf, node) if isinstance(node, LowRank) else node


def _overlay(params: PyTree, adapter: PyTree, put: Callable) -> PyTree:
    entries = nodes(adapter)
    leaves = paths.named_leaves(params)
    problems = misfits(leaves, entries)
    if problems:
        raise ValueError("The adapter does not fit the parameters: " + "; ".join(problems) + ".")
    new = [put(n, x, entries[n]) if n in entries else x for n, x in leaves.items()]
    return jax.tree.structure(params).unflatten(new)


def misfits(leaves: Mapping[str, Any], entries: Mapping[str, Any]) -> list[str]:
    """Says where an adapter's entries do not fit the leaves of a parameter tree."""
    unknown = [name for name in entries if name not in leaves]
    problems = [_misfit(n, leaves[n], x) for n, x in entries.items() if n in leaves]
    if unknown:
        problems.append(
            f"no parameter at {paths.listing(unknown)}; parameters here: {paths.listing(leaves)}"
        )
    return [p for p in problems if p]


def _misfit(name: str, leaf: Any, node: Any) -> str:
    if not isinstance(node, LowRank):
        fits = jnp.shape(node) == jnp.shape(leaf)
        return "" if fits else f"{name} has shape {jnp.shape(leaf)}, not {jnp.shape(node)}"
    if node.w is not None:
        return f"{name} is already bound to a kernel; pass the adapter itself"
    shape = jnp.shape(leaf)
    if len(node.axes) != len(shape):
        return (
            f"{name} has shape {shape}, but its adapter is for {len(node.axes)} axes {node.axes!r}"
        )
    rank = (jnp.shape(node.a) or (0,))[-1]
    want = (*lowrank.factor_shapes(shape, node.axes, rank), ())
    have = jnp.shape(node.a), jnp.shape(node.b), jnp.shape(node.scale)
    fits = want == have
    return "" if fits else f"{name} of shape {shape} needs a, b and scale of {want}, not {have}"


def labels(tree: PyTree) -> PyTree:
    """Labels each leaf "trainable" or "frozen", for ``optax.multi_transform``.

    Takes an adapter or a bound tree. Factors and leaves trained in full are trainable; scales,
    and in a bound tree the base, are frozen.

    >>> node = LowRank(jnp.zeros((3, 1)), jnp.zeros((1, 2)), jnp.ones(()))
    >>> jax.tree.leaves(labels({"kernel": node, "bias": jnp.zeros(2)}))
    ['trainable', 'trainable', 'trainable', 'frozen']
    """
    bound = any(
        isinstance(x, Trained) or (isinstance(x, LowRank) and x.w is not None)
        for x in jax.tree.leaves(tree, is_leaf=lowrank.is_node)
    )

    def label(node: Any) -> Any:
        if isinstance(node, LowRank):
            w = None if node.w is None else FROZEN
            return dataclasses.replace(node, a=TRAINABLE, b=TRAINABLE, scale=FROZEN, w=w)
        if isinstance(node, Trained):
            return Trained(TRAINABLE)
        return FROZEN if bound else TRAINABLE

    return jax.tree.map(label, tree, is_leaf=lowrank.is_node)


def mask(tree: PyTree) -> PyTree:
    """True for each trainable leaf, for ``optax.masked``; see :func:`labels`."""
    return jax.tree.map(lambda label: label == TRAINABLE, labels(tree))


def summary(params: PyTree, adapter: PyTree) -> str:
    """Counts parameters, in PEFT's words.

    Factors are trainable and added to the total; a leaf trained in full is counted once, where
    PEFT counts it twice (frozen original and copy).

    >>> params = {"kernel": jnp.zeros((1024, 1024))}
    >>> node = LowRank(jnp.zeros((1024, 8)), jnp.zeros((8, 1024)), jnp.ones(()))
    >>> summary(params, {"kernel": node})
    'trainable params: 16,384 || all params: 1,064,960 || trainable%: 1.5385'
    """
    entries = nodes(adapter).values()
    added = sum(_size(x.a) + _size(x.b) for x in entries if isinstance(x, LowRank))
    trained = added + sum(_size(x) for x in entries if not isinstance(x, LowRank))
    # Modules of some libraries hold functions and flags beside their arrays.
    total = added + sum(_size(x) for x in jax.tree.leaves(params) if hasattr(x, "shape"))
    return (
        f"trainable params: {trained:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trained / max(total, 1):.4f}"
    )


def _size(x: Any) -> int:
    return int(np.prod(jnp.shape(x), dtype=np.int64))
