"""Reads a checkpoint's tensors into the leaves of a model, one after the other.

The headers of the files tell names, shapes and dtypes, so that what does not fit is known before
much is read; then each leaf is read, turned and handed to JAX before the next.
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
from lora_jax.models.weight_files import Stored, open_file, read_tensor
from lora_jax.names import Name, Weight

_log = logging.getLogger("lora_jax.models.checkpoints")
_MOST = 30  # problems shown in one message


class _Part(NamedTuple):
    """A leaf, or one layer of it: the tensors it may be read from, and the one there is."""

    weights: list[Weight]  # more than one where the weight is tied
    stored: list[tuple[str, Stored]]


def load_params(
    checkpoint: Checkpoint,
    shapes: Mapping[str, Any],
    table: Sequence[Name],
    family: Family,
    *,
    places: Mapping[str, NamedSharding] | None = None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads the leaves that a table names.

    What is left out of the checkpoint, and what has to be made afresh, is logged. Host memory holds
    one tensor more than the result (without ``places``, the layers of a stacked leaf count as one).

    Args:
      checkpoint: as found by ``resolve``.
      shapes: ``jax.ShapeDtypeStruct`` by path: what the model needs, and in which dtype.
      table: the rows for the model.
      family: the model's family.
      places: where each leaf goes, by path; None for JAX's default device.

    Returns:
      Arrays by path, with ``jax.ShapeDtypeStruct`` for the leaves of optional modules that the
      checkpoint lacks entirely (or of a head with another number of labels), and the paths of
      those leaves.

    Raises:
      ValueError: damaged files; tensors missing, unexpected, of a wrong shape or dtype, or not
        finite, all in one message.
    """
    parts = _parts(table, shapes)
    known = _known_names(table, shapes)
    tensors, problems = _standard_names(open_tensors(checkpoint), known, family)
    for part in parts.values():
        part.stored.extend((w.hf, tensors[w.hf]) for w in part.weights if w.hf in tensors)
        other = part.weights[0].row.otherwise
        if not part.stored and other in tensors:
            part.stored.append((other, tensors[other]))
    reasons = _fresh_modules(parts, family)
    for module, reason in reasons.items():
        _log.warning("%s: %s is freshly initialised, since %s", checkpoint.name, module, reason)
    below = tuple(f"{module}/" for module in reasons)
    fresh = tuple(row.flax for row in table if row.flax in shapes and row.flax.startswith(below))
    leaves: dict[str, list[_Part]] = {}
    for (leaf, _), part in parts.items():
        leaves.setdefault(leaf, []).append(part)
    result: dict[str, Any] = {}
    for leaf, some in leaves.items():
        if leaf in fresh:
            result[leaf] = shapes[leaf]
            continue
        found = [p for part in some for p in _unfit(part)]
        place = places[leaf] if places else None
        value, more = _read(some, shapes[leaf], place, keep=not problems + found)
        problems += found + more
        result[leaf] = value
        if problems:  # which are all looked for; the values are of no more use
            result.clear()
    if problems:
        raise ValueError(
            f"The checkpoint {checkpoint.name!r} in {checkpoint.directory} does not fit the model: "
            f"{shown(problems)}. Check that its weights are those of its config.json, or copy "
            "them again."
        )
    return result, fresh


def shown(problems: Sequence[str]) -> str:
    """The problems in one sentence, or the first of them."""
    more = f"; and {len(problems) - _MOST} more" if len(problems) > _MOST else ""
    return "; ".join(problems[:_MOST]) + more


def _parts(table: Sequence[Name], shapes: Mapping[str, Any]) -> dict[tuple, _Part]:
    parts: dict[tuple, _Part] = {}
    for weight in names.weights(table, shapes):
        parts.setdefault((weight.leaf, weight.layer), _Part([], [])).weights.append(weight)
    return parts


def open_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The tensors of all files by name; only headers are read.

    Raises:
      ValueError: damaged files, or a tensor in two of them.
    """
    tensors: dict[str, Stored] = {}
    damaged = []
    for path in checkpoint.weights:
        try:
            more = open_file(path)
        except ValueError as error:
            damaged.append(f"{path}: {error}")
            continue
        if twice := sorted(set(more) & set(tensors)):
            damaged.append(f"{path}: holds {shown(twice)}, which another file holds, too")
        tensors |= more
    if damaged:
        raise ValueError(
            f"The checkpoint {checkpoint.name!r} has damaged files (truncated or changed): "
            f"{'; '.join(damaged)}. Download or copy them again."
        )
    return tensors


def _known_names(table: Sequence[Name], shapes: Mapping[str, Any]) -> dict[str, str]:
    """The table's name of a tensor by each name that it may have."""
    new, old = (names.weights(table, shapes, older=flag) for flag in (False, True))
    older = {w.hf: standard.hf for w, standard in zip(old, new, strict=True)}
    return older | {w.hf: w.hf for w in new}


def _standard_names(
    tensors: Mapping[str, Stored], known: Mapping[str, str], family: Family
) -> tuple[dict[str, Stored], list[str]]:
    """Brings the layouts in use to the one of the table; also returns problems.

    A bare backbone lacks the family's prefix; transformers has renamed some tensors; the oldest
    files call a norm's parameters gamma and beta.
    """
    standard: dict[str, Stored] = {}
    problems, left_out = [], []
    for name, stored in tensors.items():
        new = next((known[c] for c in _candidates(name, family.prefix) if c in known), None)
        if new is None and _is_ignored(name, family, known):
            left_out.append(name)
        elif new is None:
            problems.append(f"{name} is unexpected")
        elif new in standard:
            problems.append(f"{new} is there twice, once as {name}")
        else:
            standard[new] = stored
    if left_out:
        _log.info("Left out of the checkpoint: %s", ", ".join(left_out))
    return standard, sorted(problems)


def _candidates(name: str, prefix: str) -> list[str]:
    new = name
    for old, word in (("gamma", "weight"), ("beta", "bias")):
        if name.endswith(f".{old}"):
            new = name.removesuffix(old) + word
    return [c for n in (name, new) for c in (n, f"{prefix}{n}", n.removeprefix(prefix))]


def _is_ignored(name: str, family: Family, known: Mapping[str, str]) -> bool:
    """Whether a pattern leaves the tensor out; one for a head that is loaded does not count."""
    loaded = lambda p: p.endswith("*") and any(k.startswith(p[:-1]) for k in known)
    patterns = [p for p in family.ignored if not loaded(p)]
    bare = name.removeprefix(family.prefix)
    return any(fnmatch.fnmatchcase(n, p) for p in patterns for n in (name, bare))


def _fresh_modules(parts: Mapping[tuple, _Part], family: Family) -> dict[str, str]:
    """The modules to make afresh, each with the reason."""
    reasons = {}
    for module in family.optional:
        some = [part for (leaf, _), part in parts.items() if leaf.startswith(f"{module}/")]
        if some and not any(part.stored for part in some):
            reasons[module] = "the checkpoint has none"
    head = [p for (leaf, _), p in parts.items() if leaf.startswith(f"{family.labelled}/")]
    if family.labelled and head and all(part.stored for part in head):
        wanted = [names.tensor_shape(part.weights[0]) for part in head]
        has = [part.stored[0][1].shape for part in head]
        labels, count = wanted[0][0], has[0][0] if has[0] else 0
        # A whole head of another size; anything else about it is a mismatch like any other.
        if count != labels and has == [(count, *shape[1:]) for shape in wanted]:
            reasons[family.labelled] = f"the checkpoint's has {count} labels, not {labels}"
    return reasons


def _unfit(part: _Part) -> list[str]:
    """What the headers tell against a part."""
    if not part.stored:
        return [f"{part.weights[0].hf} is missing"]
    problems = []
    for name, stored in part.stored:
        weight = next((w for w in part.weights if w.hf == name), part.weights[0])
        shape = names.tensor_shape(weight)
        if stored.shape != shape:
            problems.append(f"{name} has shape {stored.shape} instead of {shape}")
        if not jnp.issubdtype(stored.dtype, jnp.floating):
            problems.append(f"{name} has dtype {stored.dtype}, which is no floating-point type")
    return problems


def _read(
    parts: Sequence[_Part],
    shape: jax.ShapeDtypeStruct,
    place: NamedSharding | None,
    *,
    keep: bool,
) -> tuple[jax.Array | None, list[str]]:
    """A leaf, and what its values tell against it; it is put together only to ``keep`` it."""
    problems: list[str] = []
    values = _values(parts, problems, keep=keep)
    if not keep:
        for _ in values:
            pass
        return None, problems
    if parts[0].weights[0].layer is not None:
        value = _stacked(values, shape, place)
    else:
        value = _single(*values, shape, place)
    return (None if problems else value), problems


def _values(
    parts: Sequence[_Part], problems: list[str], *, keep: bool
) -> Iterator[np.ndarray | None]:
    """The value of each part, to ``keep`` it; None after a problem, which goes into the list."""
    for part in parts:
        value = None
        floating = [(n, s) for n, s in part.stored if jnp.issubdtype(s.dtype, jnp.floating)]
        for name, stored in floating:
            tensor = read_tensor(stored)
            if not np.isfinite(tensor).all():
                problems.append(f"{name} holds NaN or infinity")
            elif name != floating[0][0]:
                problems += _differs(tensor, name, floating[0])
            elif keep:
                value = names.from_tensor(part.weights[0], tensor)
        yield None if problems else value


def _single(
    value: np.ndarray | None, shape: jax.ShapeDtypeStruct, place: NamedSharding | None
) -> jax.Array | None:
    if value is None or place is not None:
        return None if value is None else sharding.put(value, place, shape.dtype)
    # Contiguous in the dtype that is wanted, so that JAX has no reason to copy it once more.
    return jnp.asarray(np.ascontiguousarray(value, shape.dtype))


def _stacked(
    values: Iterator[np.ndarray | None], shape: jax.ShapeDtypeStruct, place: NamedSharding | None
) -> jax.Array:
    nothing = np.broadcast_to(np.zeros((), shape.dtype), shape.shape[1:])  # after a problem
    layers = (nothing if value is None else value for value in values)
    if place is not None:
        return sharding.put_layers(shape.shape, shape.dtype, layers, place)
    whole = np.empty(shape.shape, shape.dtype)
    for k, layer in enumerate(layers):
        whole[k] = layer
    return jnp.asarray(whole)


def _differs(tensor: np.ndarray, name: str, first: tuple[str, Stored]) -> list[str]:
    """Tied weights may be stored twice, but then with the same values."""
    same = tensor.shape == first[1].shape and np.array_equal(tensor, read_tensor(first[1]))
    return [] if same else [f"{name} differs from {first[0]}, to which it is tied"]
