"""Facts that follow from the table of a class of nodes: shapes, names in files, counts, specs.

Each function takes an entry of an adapter: the node of a method, or a leaf that is trained in full.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax.factors import WHOLE, places, shape_of, spec_of, wide_dtype
from lora_jax.nodes import (
    Adapted,
    Field,
    Node,
    Trained,
    as_node,
    is_adapted,
    is_node,
    is_static,
    saved_array,
)


def map_fields(change: Callable[[str, Field, Any], Any], x: Any) -> Any:
    """Puts ``change(name, field, value)`` in place of each array of an adapter's entry.

    Numbers of the structure stay as they are. The result is a plain array if ``x`` is one.
    """
    node = as_node(x)
    names = [name for name in node.table if not is_static(node, name)]
    values = {name: change(name, node.table[name], getattr(node, name)) for name in names}
    changed = dataclasses.replace(node, **values)
    return changed.value if isinstance(changed, Trained) and not is_node(x) else changed


def tensors(path: str, x: Any) -> dict[str, Any]:
    """Returns the arrays of an adapter's entry by the names that they have in a file.

    >>> list(tensors("head/bias", jnp.zeros(2)))
    ['head/bias']
    """
    node = as_node(x)
    return {tensor_name(path, type(node), name): saved_array(node, name) for name in node.table}


def tensor_name(path: str, cls: type[Node], name: str) -> str:
    """Returns the name of a field in a file: the leaf's path, and the field's name behind it."""
    return path if cls.table[name].axes == WHOLE else f"{path}/{name}"


def _axes(node: Node, ndim: int) -> str:
    return node.axes if is_adapted(node) else WHOLE * ndim


def sizes(node: Node) -> dict[str, int]:
    """Returns the sizes, by letter, of the axes that the node's arrays have of their own.

    Each size is read off the first array that has the axis.
    """
    by_letter: dict[str, int] = {}
    if not is_adapted(node):
        return by_letter
    for name, field in node.table.items():
        axes, shape = places(field.axes, node.axes), np.shape(getattr(node, name))
        for k, place in enumerate(axes):
            index = k - len(axes)
            if isinstance(place, str):
                by_letter.setdefault(place, shape[index] if len(shape) >= -index else 0)
    return by_letter


def shapes(x: Any, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that the arrays of an entry must have for a leaf of the given shape."""
    node = as_node(x)
    axes, own_sizes = _axes(node, len(shape)), sizes(node)
    fields = node.table.items()
    return {name: shape_of(field.axes, axes, shape, own_sizes) for name, field in fields}


def leading_axes(node: Adapted) -> tuple[int, ...]:
    """Returns the axes that the node's arrays have before their own, as in a stack of adapters."""
    name, field = next(iter(node.table.items()))
    shape = np.shape(getattr(node, name))
    return shape[: max(len(shape) - len(places(field.axes, node.axes)), 0)]


def is_consistent(node: Adapted, stacked: tuple[int, ...]) -> bool:
    """Tells whether the shapes of a node belong together, after the leading axes of a stack."""
    known_sizes: dict[int | str, int] = {}
    for name, field in node.table.items():
        shape, axes = np.shape(getattr(node, name)), places(field.axes, node.axes)
        if field.scales and shape == ():
            continue
        if field.is_index:  # it is the same for every adapter of a stack
            shape = (*stacked, *shape)
        leading, rest = shape[: len(stacked)], shape[len(stacked) :]
        if leading != stacked or len(rest) != len(axes):
            return False
        if any(known_sizes.setdefault(p, n) != n for p, n in zip(axes, rest, strict=True)):
            return False
    return True


def specs(x: Any, spec: PartitionSpec) -> Any:
    """Returns the specs of the arrays of an adapter's entry, for a leaf with the given spec."""
    axes = _axes(as_node(x), len(spec))
    return map_fields(lambda name, field, value: spec_of(field.axes, axes, spec), x)


def widen(node: Adapted) -> Adapted:
    """Casts the factors of a node to one precision, float32 at least."""
    is_real = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    arrays = [getattr(node, name) for name, field in node.table.items() if _is_array(field)]
    dtype = wide_dtype(*(x.dtype for x in arrays if is_real(x)))
    cast = lambda name, field, x: x.astype(dtype) if is_real(x) and not field.scales else x
    return map_fields(cast, node)


def _is_array(field: Field) -> bool:
    return not (field.scales or field.is_index)


def count(x: Any) -> tuple[int, int]:
    """Counts the numbers of an entry that are trained, and those that the base does not have."""
    node = as_node(x)
    size = lambda name: int(np.prod(np.shape(getattr(node, name)), dtype=np.int64))
    arrays = {name: field for name, field in node.table.items() if _is_array(field)}
    trained = sum(size(name) for name, field in arrays.items() if field.is_trained)
    added = sum(size(name) for name, field in arrays.items() if field.axes != WHOLE)
    return trained, added
