"""Reads a checkpoint's tensors into the leaves of a model, one after the other.

The headers of the files tell names, shapes and dtypes, so that mismatches are found before much is
read. Then each leaf is read, transposed and given to JAX before the next one is.
"""

import fnmatch
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lora_jax import names, sharding
from lora_jax.models.families import Family
from lora_jax.models.hub import Checkpoint
from lora_jax.models.quantized_tensors import (
    QuantizedTensor,
    expected_shape,
    group,
    read_quantized,
    read_settings,
)
from lora_jax.models.weight_files import Stored, open_file, read_tensor
from lora_jax.names import LINEAR, Name, Weight
from lora_jax.paths import matches
from lora_jax.quantization import SKIPPED
from lora_jax.quantized import Quantized, is_quantized
from lora_jax.schemes import encode, find_scheme

_log = logging.getLogger("lora_jax.models.checkpoints")
_MAX_PROBLEMS = 30  # number of problems in one message


class _Part(NamedTuple):
    """A leaf, or one layer of it, and the tensors that it can be read from.

    Attributes:
      weights: the tensors that a checkpoint may hold; several if the weight is tied.
      stored: those that this checkpoint holds, with their names.
    """

    weights: list[Weight]
    stored: list[tuple[str, Stored | QuantizedTensor]]


def load_params(
    checkpoint: Checkpoint,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    table: Sequence[Name],
    family: Family,
    *,
    shardings: Mapping[str, NamedSharding] | None = None,
    scheme: str = "",
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads the leaves that a table names.

    It logs the tensors that are left out, and the modules that must be initialized. Host memory
    holds one tensor more than the result (without ``shardings``, the layers of a stacked leaf count
    as one). Kernels that the checkpoint holds quantized stay so.

    Args:
      checkpoint: the checkpoint that ``resolve`` found.
      shapes: shape and dtype of each leaf of the model, by path.
      table: the rows for the model.
      family: the model's family.
      shardings: sharding of each leaf, by path; None for JAX's default device.
      scheme: scheme of :func:`lora_jax.quantize` for the kernels that are plain in the checkpoint,
        but heads and embeddings; "" to leave them so.

    Returns:
      Arrays by path, and the paths of fresh leaves, for which the shape stands instead: those of
      optional modules that the checkpoint lacks entirely, and of a head with another number of
      labels.

    Raises:
      ValueError: files are damaged, or tensors are missing, unexpected, not finite, or of a wrong
        shape or dtype; all are in one message.
    """
    settings = read_settings(checkpoint.config, checkpoint.name)
    parts = _make_parts(table, shapes)
    known = _map_known_names(table, shapes)
    grouped, damaged = group(open_tensors(checkpoint), settings)
    tensors, problems = _rename_tensors(grouped, known, family)
    problems = damaged + problems
    for part in parts.values():
        part.stored.extend((w.hf, tensors[w.hf]) for w in part.weights if w.hf in tensors)
        other = part.weights[0].row.otherwise
        if not part.stored and other in tensors:
            part.stored.append((other, tensors[other]))
    reasons = _find_fresh_modules(parts, family)
    for module, reason in reasons.items():
        _log.warning("%s: %s is freshly initialised, since %s", checkpoint.name, module, reason)
    prefixes = tuple(f"{module}/" for module in reasons)
    fresh = tuple(row.flax for row in table if row.flax in shapes and row.flax.startswith(prefixes))
    leaves: dict[str, list[_Part]] = {}
    for (leaf, _), part in parts.items():
        leaves.setdefault(leaf, []).append(part)
    result: dict[str, jax.Array | jax.ShapeDtypeStruct] = {}
    for leaf, leaf_parts in leaves.items():
        if leaf in fresh:
            result[leaf] = shapes[leaf]
            continue
        problems += [problem for part in leaf_parts for problem in _check_headers(part)]
        place = shardings[leaf] if shardings else None
        own = scheme if _is_kernel(leaf_parts[0].weights[0], scheme) else ""
        value, value_problems = _read_leaf(
            leaf_parts, shapes[leaf], place, keep=not problems, scheme=own
        )
        problems += value_problems
        result[leaf] = value
        if problems:  # the rest is only checked, and values are of no more use
            result.clear()
    if problems:
        raise ValueError(
            f"The checkpoint {checkpoint.name!r} in {checkpoint.directory} does not fit the model: "
            f"{join_problems(problems)}. Check that its weights are those of its config.json, or "
            "copy them again."
        )
    return result, fresh


def join_problems(problems: Sequence[str]) -> str:
    """Joins problems, or the first of many, to one sentence."""
    parts = list(problems[:_MAX_PROBLEMS])
    if len(problems) > _MAX_PROBLEMS:
        parts.append(f"and {len(problems) - _MAX_PROBLEMS} more")
    return "; ".join(parts)


def _make_parts(
    table: Sequence[Name], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[tuple[str, int | None], _Part]:
    """Makes the parts of all leaves, by leaf and layer."""
    parts: dict[tuple[str, int | None], _Part] = {}
    for weight in names.weights(table, shapes):
        parts.setdefault((weight.leaf, weight.layer), _Part([], [])).weights.append(weight)
    return parts


def open_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Finds the tensors of all files by name; it reads only headers.

    Raises:
      ValueError: files are damaged, or a tensor is in two of them.
    """
    tensors: dict[str, Stored] = {}
    damaged = []
    for path in checkpoint.weights:
        try:
            file_tensors = open_file(path)
        except ValueError as error:
            damaged.append(f"{path}: {error}")
            continue
        if duplicates := sorted(set(file_tensors) & set(tensors)):
            shared = join_problems(duplicates)
            damaged.append(f"{path}: holds {shared}, which another file holds, too")
        tensors |= file_tensors
    if damaged:
        raise ValueError(
            f"The checkpoint {checkpoint.name!r} has damaged files (truncated or changed): "
            f"{'; '.join(damaged)}. Download or copy them again."
        )
    return tensors


def _map_known_names(
    table: Sequence[Name], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, str]:
    """Maps each name that a tensor may have to its name in the table."""
    new, old = (names.weights(table, shapes, older=flag) for flag in (False, True))
    older = {w.hf: standard.hf for w, standard in zip(old, new, strict=True)}
    return older | {w.hf: w.hf for w in new}


def _rename_tensors(
    tensors: Mapping[str, Any], known: Mapping[str, str], family: Family
) -> tuple[dict[str, Any], list[str]]:
    """Gives tensors the names of the table; also returns problems.

    A bare backbone lacks the family's prefix, transformers has renamed some tensors, and the oldest
    files call a norm's parameters gamma and beta.
    """
    standard: dict[str, Any] = {}
    problems, ignored = [], []
    for name, stored in tensors.items():
        new = next((known[n] for n in _list_names(name, family.prefix) if n in known), None)
        if new is None and _is_ignored(name, family, known):
            ignored.append(name)
        elif new is None:
            problems.append(f"{name} is unexpected")
        elif new in standard:
            problems.append(f"{new} is there twice, once as {name}")
        else:
            standard[new] = stored
    if ignored:
        _log.info("Left out of the checkpoint: %s", ", ".join(ignored))
    return standard, sorted(problems)


def _list_names(name: str, prefix: str) -> list[str]:
    """Lists the names that a tensor may have in a table."""
    renamed = name
    for old, new in (("gamma", "weight"), ("beta", "bias")):
        if name.endswith(f".{old}"):
            renamed = name.removesuffix(old) + new
    return [x for n in (name, renamed) for x in (n, f"{prefix}{n}", n.removeprefix(prefix))]


def _is_ignored(name: str, family: Family, known: Mapping[str, str]) -> bool:
    """Tells if a pattern leaves the tensor out; that of a head that is loaded does not count."""
    is_loaded = lambda p: p.endswith("*") and any(k.startswith(p[:-1]) for k in known)
    patterns = [p for p in family.ignored if not is_loaded(p)]
    bare = name.removeprefix(family.prefix)
    return any(fnmatch.fnmatchcase(n, p) for p in patterns for n in (name, bare))


def _find_fresh_modules(
    parts: Mapping[tuple[str, int | None], _Part], family: Family
) -> dict[str, str]:
    """Finds the modules that must be initialized, each with the reason."""
    reasons = {}
    for module in family.optional:
        module_parts = _select_parts(parts, module)
        if module_parts and not any(part.stored for part in module_parts):
            reasons[module] = "the checkpoint has none"
    head = _select_parts(parts, family.label_module)
    if head and all(part.stored for part in head):
        expected = [names.tensor_shape(part.weights[0]) for part in head]
        shapes = [part.stored[0][1].shape for part in head]
        labels, count = expected[0][0], shapes[0][0] if shapes[0] else 0
        # The whole head is of another size; any other difference is an ordinary mismatch.
        if count != labels and shapes == [(count, *shape[1:]) for shape in expected]:
            reasons[family.label_module] = f"the checkpoint's has {count} labels, not {labels}"
    return reasons


def _select_parts(parts: Mapping[tuple[str, int | None], _Part], module: str) -> list[_Part]:
    """Selects the parts of a module; there are none of the module ""."""
    return [part for (leaf, _), part in parts.items() if leaf.startswith(f"{module}/")]


def _check_headers(part: _Part) -> list[str]:
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


def _is_kernel(weight: Weight, scheme: str) -> bool:
    """Tells whether a kernel is one to quantize: no head, no embedding, and not below a block."""
    if not scheme or names.kind(weight) != LINEAR or not names.axes(weight):
        return False
    size = int(np.prod(weight.shape))
    is_spared = any(matches(pattern, weight.leaf) for pattern in SKIPPED)
    return not is_spared and size >= find_scheme(scheme).block


def _read_leaf(
    parts: Sequence[_Part],
    shape: jax.ShapeDtypeStruct,
    place: NamedSharding | None,
    *,
    keep: bool,
    scheme: str = "",
) -> tuple[Any, list[str]]:
    """Reads a leaf, and lists problems of its values; without ``keep`` it makes no array."""
    problems: list[str] = []
    values = _read_values(parts, problems, shape.dtype, keep=keep)
    if not keep:
        for _ in values:
            pass
        return None, problems
    first, is_stacked = parts[0].weights[0], parts[0].weights[0].layer is not None
    if scheme or any(isinstance(x, QuantizedTensor) for p in parts for _, x in p.stored):
        layers = [_encode(first, x, scheme, shape) for x in values]
        value = None if problems else _join_layers(layers, place, is_stacked=is_stacked)
        if value is None and not problems:
            problems.append(
                f"{first.row.hf} is quantized in another way in some layers than in others, which "
                "can't be stacked: load it with scan_layers=False"
            )
    elif is_stacked:
        value = _stack_layers(values, shape, place)
    else:
        value = _put_value(*values, shape, place)
    return (None if problems else value), problems


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
    parts: Sequence[_Part], problems: list[str], dtype: Any, *, keep: bool
) -> Iterator[Any]:
    """Reads the value of each part; None after a problem, which is added to the list."""
    for part in parts:
        value = None
        if any(isinstance(stored, QuantizedTensor) for _, stored in part.stored):
            yield _read_quantized_value(part, problems, dtype)
            continue
        floating = [(n, s) for n, s in part.stored if jnp.issubdtype(s.dtype, jnp.floating)]
        for name, stored in floating:
            tensor = read_tensor(stored)
            if not np.isfinite(tensor).all():
                problems.append(f"{name} holds NaN or infinity")
            elif name != floating[0][0]:
                problems += _check_tied(tensor, name, floating[0])
            elif keep:
                value = names.from_tensor(part.weights[0], tensor)
        yield None if problems else value


def _read_quantized_value(part: _Part, problems: list[str], dtype: Any) -> Any:
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
    if value is None or place is not None:
        return None if value is None else sharding.put(value, place, shape.dtype)
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


def _check_tied(tensor: np.ndarray, name: str, first: tuple[str, Stored]) -> list[str]:
    """Lists a tied weight that is stored twice, with different values."""
    is_same = tensor.shape == first[1].shape and np.array_equal(tensor, read_tensor(first[1]))
    return [] if is_same else [f"{name} differs from {first[0]}, to which it is tied"]
