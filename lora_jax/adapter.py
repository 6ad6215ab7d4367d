"""Adapters: small trees that overlay a parameter tree.

At the path of a leaf an adapter holds the node of a method (see :mod:`lora_jax.nodes`), such as
:class:`~lora_jax.lowrank.LowRank`, which changes the kernel there, or a plain array, which replaces
the leaf. An adapter is a nested dictionary with the path components as keys, whatever containers
the parameters use. LoRA, LoRA with a trained head, BitFit, a linear probe and full fine-tuning are
all values of this one type.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import fields, paths
from lora_jax.factors import BATCH, WHOLE
from lora_jax.nodes import (
    Field,
    Node,
    as_node,
    is_adapted,
    is_bound,
    is_node,
    is_static,
    with_array_scale,
)
from lora_jax.quantized import as_array, is_quantized, numbers

PyTree = Any
Tree = TypeVar("Tree")
TRAINABLE, FROZEN = "trainable", "frozen"


def nodes(adapter: PyTree) -> dict[str, Any]:
    """Returns the entries of an adapter by path: nodes of methods, and plain arrays.

    Raises:
      ValueError: this is a bound tree.
    """
    entries = paths.named_leaves(adapter, is_leaf=is_node)
    if bound := [name for name, node in entries.items() if is_bound(node)]:
        raise ValueError(
            f"Got a bound tree where an adapter is expected: {paths.listing(bound)} is already "
            "bound to a kernel. Pass the adapter itself, as it was given to `bind`."
        )
    return {name: _unbox(node) for name, node in entries.items()}


def _unbox(node: Any) -> Any:
    """Takes the arrays of a node out of boxes, as ``jax.tree.map(nnx.Param, adapter)`` makes them.

    :func:`lora_jax.paths.named_leaves` opens the boxes of leaves that are trained in full.
    """
    if not is_adapted(node):
        return node
    boxes = {name: getattr(node, name) for name in node.table if not is_static(node, name)}
    contents = {name: jax.tree.leaves(box) for name, box in boxes.items()}
    unboxed = {n: x[0] for n, x in contents.items() if len(x) == 1 and x[0] is not boxes[n]}
    return dataclasses.replace(node, **unboxed) if unboxed else node


def base_leaves(params: PyTree) -> dict[str, Any]:
    """Returns the leaves of a parameter tree by path.

    Raises:
      ValueError: an adapter is bound to the tree; or as :func:`lora_jax.paths.named_leaves`.
    """
    leaves = paths.named_leaves(params, is_leaf=is_node)
    if bound := [name for name, node in leaves.items() if is_node(node)]:
        if not any(is_bound(leaves[name]) for name in bound):
            raise ValueError(
                f"Got an adapter where the parameters are expected, with nodes at "
                f"{paths.listing(bound)}: the parameters come first, as in bind(params, adapter)."
            )
        raise ValueError(
            f"The parameters are already bound to an adapter, at {paths.listing(bound)}, and a "
            "tree takes one. Pass the parameters themselves; for a second adapter on top of the "
            "first, pass lora.merge(params, first)."
        )
    return leaves


def bind(params: PyTree, adapter: PyTree) -> PyTree:
    """Puts the adapter into the tree: kernels become unevaluated sums ``W_frozen + s·BA``.

    The result has the containers of ``params``, with a node, such as ``LowRank`` or ``Trained``,
    where the adapter has an entry. Call it through :func:`lora_jax.lift`.

    Raises:
      ValueError: the adapter has a path that ``params`` lacks, or a shape that does not fit; or
        ``params`` are already bound, or ``adapter`` is.
    """
    return _overlay(params, adapter, lambda name, leaf, x: as_node(x).bind(leaf, name))


def merge(params: Tree, adapter: PyTree) -> Tree:
    """Rewrites the tree to plain arrays, each adapted kernel being ``W + s·BA``.

    This is the definition of what an adapter means. The result has the structure, shapes and
    dtypes of ``params``, which does not change; the sum is rounded once to the kernel's dtype.
    Quantized leaves become plain arrays, adapted or not.

    Raises:
      ValueError: as :func:`bind`.
    """
    merged = _overlay(params, adapter, lambda name, leaf, x: _merge_leaf(leaf, as_node(x)))
    return jax.tree.map(as_array, merged, is_leaf=is_quantized)


def _merge_leaf(leaf: Any, node: Node) -> jax.Array:
    if not is_quantized(leaf):
        return node.merge(leaf)
    return node.merge(numbers(leaf)).astype(leaf.dtype)  # which alone rounds


def merge_leaf(leaf: Any, entry: Any = None, *, index: Sequence[int] = ()) -> jax.Array:
    """Computes what :func:`merge` makes of one leaf, before it is rounded to the leaf's dtype.

    Args:
      leaf: array, or quantized leaf.
      entry: entry of the adapter; None if it has none for the leaf.
      index: places along the first axes of the leaf, batch axes; none for the whole leaf.

    Returns:
      An array in float32, or in the leaf's dtype if that is wider.
    """
    for k in index:
        leaf = jax.tree.map(lambda x, k=k: x[k], leaf)
        entry = None if entry is None else _take_layer(entry, k)
    whole = numbers(leaf) if is_quantized(leaf) else jnp.asarray(leaf)
    whole = whole.astype(jnp.promote_types(whole.dtype, jnp.float32))
    return whole if entry is None else as_node(entry).merge(whole)


def _take_layer(entry: Any, layer: int) -> Any:
    has_layers = lambda field: field.axes.startswith((BATCH, WHOLE))
    take = lambda name, field, x: x[layer] if has_layers(field) else x
    taken = fields.map_fields(take, entry)
    return dataclasses.replace(taken, axes=taken.axes[1:]) if is_adapted(taken) else taken


def overlay(params: PyTree, adapter: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the leaves of the parameters, and the entries of an adapter for them, by path.

    Raises:
      ValueError: as :func:`bind`.
    """
    entries, leaves = nodes(adapter), base_leaves(params)
    if problems := misfits(leaves, entries):
        raise ValueError("The adapter does not fit the parameters: " + "; ".join(problems) + ".")
    return leaves, entries


def _overlay(params: PyTree, adapter: PyTree, put: Callable) -> PyTree:
    leaves, entries = overlay(params, adapter)
    merged = [put(n, x, entries[n]) if n in entries else x for n, x in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_quantized), merged)


def misfits(
    leaves: Mapping[str, Any], entries: Mapping[str, Any], stacked: tuple[int, ...] = ()
) -> list[str]:
    """Says where an adapter's entries do not fit the leaves of a parameter tree.

    Args:
      leaves: leaves of the parameters by path.
      entries: entries of the adapter by path.
      stacked: leading axes of each array of the adapter, with one entry for each adapter.
    """
    unknown = [name for name in entries if name not in leaves]
    hint = _describe_level(unknown, leaves)
    problems = [_misfit(n, leaves[n], x, stacked) for n, x in entries.items() if n in leaves]
    if unknown:
        problems.append(
            f"no parameter at {paths.listing(unknown)}; parameters here: {paths.listing(leaves)}"
            f"{hint}"
        )
    problems = [p for p in problems if p]
    if problems and not stacked and (axes := leading_axes(entries)):
        problems.append(
            f"the adapter is a stack with leading axes {axes}: map over it with jax.vmap, or take "
            "one of it with jax.tree.map(lambda x: x[0], adapter)"
        )
    return problems


def _describe_level(unknown: Sequence[str], leaves: Mapping[str, Any]) -> str:
    """Says by which component all paths of two trees differ; "" if it is not one."""
    if not unknown:
        return ""
    first = unknown[0].split("/")[0]
    if all(name.partition("/")[2] in leaves for name in unknown):
        return f". These are the adapter's without {first!r}: pass {{{first!r}: params}}"
    for top in dict.fromkeys(name.split("/")[0] for name in leaves):
        if all(f"{top}/{name}" in leaves for name in unknown):
            return f". These are the adapter's below {top!r}: pass params[{top!r}]"
    return ""


def leading_axes(entries: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the axes that every factor has before its own: those of a stack of adapters.

    >>> from lora_jax.lowrank import LowRank
    >>> node = LowRank(jnp.zeros((5, 3, 1)), jnp.zeros((5, 1, 2)), 2.0)
    >>> leading_axes({"kernel": node})
    (5,)
    """
    axes = {fields.leading_axes(x) for x in entries.values() if is_adapted(x)}
    return axes.pop() if len(axes) == 1 else ()


def _misfit(name: str, leaf: Any, x: Any, stacked: tuple[int, ...]) -> str:
    node, shape = as_node(x), jnp.shape(leaf)
    if is_adapted(node) and len(node.axes) != len(shape):
        return (
            f"{name} has shape {shape}, but its adapter is for {len(node.axes)} axes {node.axes!r}"
        )
    # Numbers of the structure are the same for every adapter of a stack.
    leading = lambda n: () if node.table[n].is_index else stacked
    expected = {n: (*leading(n), *sizes) for n, sizes in fields.shapes(node, shape).items()}
    actual = {n: np.shape(getattr(node, n)) for n in expected}
    is_number = lambda n: actual[n] == () and node.table[n].scales
    if all(actual[n] == expected[n] or is_number(n) for n in expected):
        problem = node.describe_misfit(shape)
        return f"{name} of shape {shape} can't have this adapter: {problem}" if problem else ""
    if not is_adapted(node):
        return f"{name} has shape {expected['value']}, not {actual['value']}"
    *names, last = expected
    return (
        f"{name} of shape {shape} needs {', '.join(names)} and {last} of "
        f"{(*expected.values(),)}, not {(*actual.values(),)}"
    )


def as_data(adapter: PyTree) -> PyTree:
    """Turns the scales of an adapter into arrays, and removes its rates of dropout.

    Adapters that differ in alpha and dropout then have the same structure, so that they can be
    stacked and mapped over in one compiled program; rates are an argument of
    :func:`lora_jax.lift`. The scales become leaves, which :func:`lora_jax.labels` calls frozen.

    >>> from lora_jax.lowrank import LowRank
    >>> node = LowRank(jnp.zeros((3, 1)), jnp.zeros((1, 2)), 2.0, dropout=0.1)
    >>> made = as_data({"kernel": node})["kernel"]
    >>> made.scale, made.dropout
    (Array(2., dtype=float32), 0.0)
    """

    def convert(x: Any) -> Any:
        if not is_adapted(x):
            return x
        return dataclasses.replace(with_array_scale(x), dropout=0.0)

    return jax.tree.map(convert, adapter, is_leaf=is_node)


def labels(tree: PyTree) -> PyTree:
    """Labels each leaf "trainable" or "frozen", for ``optax.multi_transform``.

    The tree is an adapter or a bound tree, and the result has its structure. Factors and leaves
    that are trained in full are trainable; in a bound tree the base is frozen, and so are scales
    that are arrays. An adapter from :func:`lora_jax.init` has no frozen leaf and needs no labels.

    >>> from lora_jax.lowrank import LowRank
    >>> node = LowRank(jnp.zeros((3, 1)), jnp.zeros((1, 2)), 2.0)
    >>> jax.tree.leaves(labels({"kernel": node, "bias": jnp.zeros(2)}))
    ['trainable', 'trainable', 'trainable']
    >>> jax.tree.leaves(labels(bind({"kernel": jnp.zeros((3, 2))}, {"kernel": node})))
    ['trainable', 'trainable', 'frozen']
    """
    bound = any(map(is_bound, jax.tree.leaves(tree, is_leaf=is_node)))

    def label(x: Any) -> Any:
        if bound and not is_node(x):
            return FROZEN
        labelled = fields.map_fields(_label, x)
        if not is_adapted(x):
            return labelled
        return dataclasses.replace(labelled, w=_label_arrays(x.w, FROZEN))

    return jax.tree.map(label, tree, is_leaf=is_node)


def _label(name: str, field: Field, value: Any) -> Any:
    return _label_arrays(value, TRAINABLE if field.is_trained else FROZEN)


def _label_arrays(value: Any, label: str) -> Any:
    """Puts a label in place of each array, which may be in a box; an absent kernel stays None."""
    return jax.tree.map(lambda _: label, value)


def mask(tree: PyTree) -> PyTree:
    """Marks each trainable leaf with True, for ``optax.masked``; see :func:`lora_jax.labels`."""
    return jax.tree.map(lambda label: label == TRAINABLE, labels(tree))


def summary(params: PyTree, adapter: PyTree) -> str:
    """Counts parameters, in PEFT's words.

    Factors are trainable and are added to the total; a leaf that is trained in full counts once,
    where PEFT counts it twice (as the frozen original and as its copy).

    Raises:
      ValueError: ``params`` or ``adapter`` are a bound tree.

    >>> from lora_jax.lowrank import LowRank
    >>> params = {"kernel": jnp.zeros((1024, 1024))}
    >>> node = LowRank(jnp.zeros((1024, 8)), jnp.zeros((8, 1024)), 2.0)
    >>> summary(params, {"kernel": node})
    'trainable params: 16,384 || all params: 1,064,960 || trainable%: 1.5385'
    """
    counts = [fields.count(x) for x in nodes(adapter).values()]
    trained, added = (sum(numbers) for numbers in zip(*counts, strict=True)) if counts else (0, 0)
    # Modules of some libraries hold functions and flags beside their arrays.
    total = added + sum(_size(x) for x in base_leaves(params).values() if hasattr(x, "shape"))
    return (
        f"trainable params: {trained:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trained / max(total, 1):.4f}"
    )


def _size(x: Any) -> int:
    return int(np.prod(jnp.shape(x), dtype=np.int64))
