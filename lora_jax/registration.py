"""Makes classes of nodes known: to JAX as pytrees, to files by kind, to ``jax.export`` and Flax.

An exported function can take an adapter as an argument, and ``flax.serialization`` writes and reads
adapters, alone or in a state that holds them. Flax, with all that it imports, is not imported for
that: the classes are registered with it when a node is made after something else has imported it.
"""

import dataclasses
import json
import sys
from collections.abc import Container, Iterable
from typing import Any, TypeVar

import jax
import jax.export

from lora_jax import nodes
from lora_jax.nodes import Node

N = TypeVar("N", bound=Node)


def register(cls: type[N]) -> type[N]:
    """Registers a class of nodes; a decorator of the dataclass.

    Raises:
      ValueError: its fields are not those of its table and of :class:`lora_jax.nodes.Adapted`, or
        another class has its kind.
    """
    fields = [f.name for f in dataclasses.fields(cls)]
    expected = [*_leaf_fields(cls, ()), *_structure_fields(cls)]
    if fields != expected:
        raise ValueError(f"{cls.__name__} has the fields {fields}, and its table says {expected}.")
    if cls.kind in nodes.KINDS:
        raise ValueError(
            f"{cls.__name__} has the kind {cls.kind!r}, which is that of "
            f"{nodes.KINDS[cls.kind].__name__}; choose another."
        )
    nodes.KINDS[cls.kind] = cls
    setattr(cls, "__repr__", Node.__repr__)  # noqa: B010  in place of that of the dataclass
    jax.tree_util.register_pytree_with_keys(
        cls, _flatten_with_keys, lambda rest, children: _unflatten(cls, rest, children), _flatten
    )
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"lora_jax.{cls.__name__}",
        serialize_auxdata=_aux_to_bytes,
        deserialize_auxdata=_aux_from_bytes,
    )
    nodes.observe(lambda: _register_with_flax(cls))
    return cls


def _structure_fields(cls: type[Node]) -> tuple[str, ...]:
    """Returns the fields that belong to the structure of the tree."""
    return ("axes", "name", "dropout") if issubclass(cls, nodes.Adapted) else ()


def _leaf_fields(cls: type[Node], numbers: Container[str]) -> list[str]:
    """Returns the fields that are leaves: all arrays except those in ``numbers``."""
    kernel = ["w"] if issubclass(cls, nodes.Adapted) else []
    return [*(name for name in cls.table if name not in numbers), *kernel]


# ---- Pytrees -------------------------------------------------------------------------------------


def _flatten(node: Node) -> tuple[tuple, tuple]:
    names, rest = _parts(node)
    return tuple(getattr(node, name) for name in names), rest


def _flatten_with_keys(node: Node) -> tuple[tuple, tuple]:
    names, rest = _parts(node)
    return tuple((jax.tree_util.GetAttrKey(n), getattr(node, n)) for n in names), rest


def _parts(node: Node) -> tuple[list[str], tuple]:
    """Returns names of leaves and values of the structure, None for a scale that is a leaf."""
    cls, names = type(node), _number_fields(type(node))
    numbers = {name: getattr(node, name) for name in names if nodes.is_static(node, name)}
    structure = [getattr(node, name) for name in _structure_fields(cls)]
    return _leaf_fields(cls, numbers), (*map(numbers.get, names), *structure)


def _number_fields(cls: type[Node]) -> list[str]:
    """Returns the fields that may be numbers of the structure."""
    return [*nodes.scales(cls), *nodes.indices(cls)]


def _unflatten(cls: type[N], rest: tuple, children: Iterable[Any]) -> N:
    """Puts any objects into the places of the leaves: no check, no conversion."""
    nodes.notify_observers()
    values = dict(zip([*_number_fields(cls), *_structure_fields(cls)], rest, strict=True))
    leaf_scales = tuple(name for name in nodes.scales(cls) if values[name] is None)
    numbers = set(_number_fields(cls)).difference(leaf_scales)
    node = object.__new__(cls)
    node.__dict__.update(values)  # the dataclass is frozen
    node.__dict__.update(zip(_leaf_fields(cls, numbers), children, strict=True))
    if leaf_scales:
        node.__dict__[nodes.LEAF_SCALES] = leaf_scales
    return node


def _aux_to_bytes(aux: tuple) -> bytes:
    return json.dumps(aux).encode()  # floats have a text that gives back the same float


def _aux_from_bytes(data: bytes) -> tuple:
    return tuple(tuple(x) if isinstance(x, list) else x for x in json.loads(data))


# ---- Flax ----------------------------------------------------------------------------------------


def _register_with_flax(cls: type[Node]) -> bool:
    """Registers a class with ``flax.serialization``; returns False if that is not imported yet."""
    serialization: Any = sys.modules.get("flax.serialization")
    if not hasattr(serialization, "from_bytes"):  # or is being imported
        return False
    serialization.register_serialization_state(cls, _to_state_dict, _from_state_dict, override=True)
    return True


def _state_names(node: Node) -> list[str]:
    """Returns the fields of the state: all arrays and scales, and the kernel of a bound node."""
    return [n for n in _leaf_fields(type(node), ()) if n != "w" or getattr(node, n) is not None]


def _to_state_dict(node: Node) -> dict[str, Any]:
    from flax import serialization

    is_index = lambda name: name in nodes.indices(type(node))
    value = lambda name: nodes.saved_array(node, name) if is_index(name) else getattr(node, name)
    return {name: serialization.to_state_dict(value(name)) for name in _state_names(node)}


def _from_state_dict(node: Node, state: dict[str, Any]) -> Node:
    """Fills a node with the arrays and scales of a state; shapes must be those of the node.

    Raises:
      ValueError: the state is not one of such a node.
    """
    from flax import serialization

    wanted = _state_names(node)
    if set(state) != set(wanted):
        raise ValueError(
            f"The state of a node of the kind {node.kind!r} has the entries {sorted(wanted)}, and "
            f"this one has {sorted(state)}."
        )
    indices = {name: state[name] for name in nodes.indices(type(node))}
    values: dict[str, Any] = indices | {
        name: serialization.from_state_dict(getattr(node, name), state[name], name=name)
        for name in wanted
        if name not in indices
    }
    static = [name for name in nodes.scales(type(node)) if nodes.is_static(node, name)]
    return dataclasses.replace(node, **values | {name: float(values[name]) for name in static})


register(nodes.Trained)
