"""Reads the leaves of a model: each of one tensor, or of one for each layer of a stack."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lora_jax import names, sharding
from lora_jax.models.quantized_tensors import QuantizedTensor, expected_shape, read_quantized
from lora_jax.models.split_tensors import JoinedTensor, read
from lora_jax.models.weight_files import Stored
from lora_jax.names import Weight
from lora_jax.quantized import Quantized, decode, is_quantized
from lora_jax.schemes import encode

DECODED = "none"  # in place of a scheme: what is stored as codes is decoded, too


class Part(NamedTuple):
    """A leaf, or one layer of it, and the tensors that it can be read from.

    Attributes:
      weights: the tensors that a checkpoint may hold; several if the weight is tied.
      stored: those that this checkpoint holds, with their names.
    """

    weights: list[Weight]
    stored: list[tuple[str, Stored | QuantizedTensor | JoinedTensor]]


def check_headers(part: Part) -> list[str]:
    """Lists the mismatches of a part that headers tell."""
    if not part.stored:
        return [f"{part.weights[0].hf} is missing"]
    problems = []
    for name, stored in part.stored:
        weight = next((w for w in part.weights if w.hf == name), part.weights[0])
        shape = names.tensor_shape(weight)
        if isinstance(stored, QuantizedTensor) and names.axes(weight):
            shape = expected_shape(weight)
        if tuple(stored.shape) != shape:
            problems.append(f"{name} has shape {stored.shape} instead of {shape}")
        if not jnp.issubdtype(stored.dtype, jnp.floating):
            problems.append(f"{name} has dtype {stored.dtype}, which is no floating-point type")
        elif stored.dtype.itemsize < 2:
            problems.append(f"{name} has dtype {stored.dtype}, and there are no scales for it")
    return problems


def read_leaf(
    parts: Sequence[Part],
    shape: jax.ShapeDtypeStruct,
    place: NamedSharding | None,
    *,
    keep: bool,
    scheme: str = "",
) -> tuple[Any, list[str]]:
    """Reads a leaf, and lists problems of its values.

    Args:
      parts: the leaf's layers, or its one part.
      shape: shape and dtype of the leaf.
      place: sharding of the leaf; None for JAX's default device.
      keep: whether to make an array; without it, values are only checked.
      scheme: scheme that it is quantized with unless it is stored so; "" for none, and
        ``DECODED`` to decode what is stored as codes.
    """
    problems: list[str] = []
    values = _read_values(parts, problems, shape.dtype, keep=keep)
    if not keep:
        for _ in values:
            pass
        return None, problems
    first, is_stacked = parts[0].weights[0], parts[0].weights[0].layer is not None
    has_codes = any(isinstance(x, QuantizedTensor) for p in parts for _, x in p.stored)
    if scheme == DECODED:
        values = (np.asarray(decode(x)) if is_quantized(x) else x for x in values)
    elif scheme or has_codes:
        layers = [_encode(first, x, scheme, shape) for x in values]
        joined = None if problems else _join_layers(layers, place, is_stacked=is_stacked)
        if joined is None and not problems:
            problems.append(
                f"{first.row.hf} is quantized in another way in some layers than in others, which "
                "can't be stacked: load it with scan_layers=False"
            )
        return joined, problems
    if is_stacked:
        return _none_after(problems, _stack_layers(values, shape, place)), problems
    (value,) = values
    return _none_after(problems, _put_value(value, shape, place)), problems


def _none_after(problems: list[str], value: Any) -> Any:
    return None if problems else value


def _encode(weight: Weight, value: Any, scheme: str, like: jax.ShapeDtypeStruct) -> Any:
    """Makes numpy arrays of codes and scales of a kernel, unless it is stored so."""
    if value is None or is_quantized(value) or not scheme:
        return value
    leaf = encode(jnp.asarray(value), scheme, names.axes(weight), dtype=like.dtype)
    return jax.tree.map(np.asarray, leaf)


def _join_layers(
    layers: Sequence[Any], place: NamedSharding | None, *, is_stacked: bool
) -> Quantized | None:
    """Puts one leaf of the layers of a stack, or of the one there is, onto the devices.

    Returns None if the layers have no form in common.
    """
    if len({jax.tree.structure(x) for x in layers}) > 1:
        return None
    leaf = jax.tree.map(lambda *x: np.stack(x), *layers) if is_stacked else layers[0]
    return jax.tree.map(jnp.asarray, leaf) if place is None else sharding.put(leaf, place)


def _read_values(
    parts: Sequence[Part], problems: list[str], dtype: Any, *, keep: bool
) -> Iterator[Any]:
    """Reads the value of each part; None after a problem, which is added to the list."""
    for part in parts:
        value = None
        if any(isinstance(stored, QuantizedTensor) for _, stored in part.stored):
            yield _read_quantized_value(part, problems, dtype)
            continue
        plain = [(n, s) for n, s in part.stored if not isinstance(s, QuantizedTensor)]
        floating = [(n, s) for n, s in plain if jnp.issubdtype(s.dtype, jnp.floating)]
        for name, stored in floating:
            tensor = read(stored)
            if not np.isfinite(tensor).all():
                problems.append(f"{name} holds NaN or infinity")
            elif name != floating[0][0]:
                problems += _check_tied(tensor, name, floating[0])
            elif keep:
                value = names.from_tensor(part.weights[0], tensor)
        yield None if problems else value


def _read_quantized_value(part: Part, problems: list[str], dtype: Any) -> Any:
    (name, stored), *rest = part.stored
    try:
        if rest or not isinstance(stored, QuantizedTensor):
            raise ValueError("is quantized, and tied to another tensor")
        return read_quantized(stored, part.weights[0], dtype)
    except ValueError as error:
        problems.append(f"{name} {error}")
        return None


def _put_value(
    value: np.ndarray | None, shape: jax.ShapeDtypeStruct, place: NamedSharding | None
) -> jax.Array | None:
    if value is None:
        return None
    if place is not None:
        return sharding.put(value, place, shape.dtype)
    # It is made contiguous in the right dtype, so that JAX does not copy it once more.
    return jnp.asarray(np.ascontiguousarray(value, shape.dtype))


def _stack_layers(
    values: Iterator[np.ndarray | None], shape: jax.ShapeDtypeStruct, place: NamedSharding | None
) -> jax.Array:
    zeros = np.broadcast_to(np.zeros((), shape.dtype), shape.shape[1:])  # after a problem
    layers = (zeros if value is None else value for value in values)
    if place is not None:
        return sharding.put_layers(shape.shape, shape.dtype, layers, place)
    stack = np.empty(shape.shape, shape.dtype)
    for k, layer in enumerate(layers):
        stack[k] = layer
    return jnp.asarray(stack)


def _check_tied(
    tensor: np.ndarray, name: str, first: tuple[str, Stored | JoinedTensor]
) -> list[str]:
    """Lists a tied weight that is stored twice, with different values."""
    is_same = tensor.shape == first[1].shape and np.array_equal(tensor, read(first[1]))
    return [] if is_same else [f"{name} differs from {first[0]}, to which it is tied"]
