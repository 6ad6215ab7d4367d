"""Says where the tensors of an adapter file are not those that its words ask for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import names
from lora_jax.peft import adapter_tensors
from lora_jax.peft.adapter_tensors import BASE, PREFIX, TRAINED, Part
from lora_jax.peft.producers import describe_tensors

_REAL = (np.float64, np.float32, np.float16, jnp.bfloat16)
_MAX_NAMES = 12  # names of one kind in a message
# Wrappers whose name stands in the names of all tensors when the wrapped model is saved.
_WRAPPERS = {
    "_orig_mod.": "of torch.compile",
    "_fsdp_wrapped_module.": "of FSDP",
    "_checkpoint_wrapped_module.": "of activation checkpointing",
    "_forward_module.": "of Lightning",
    "module.": "of DataParallel or DeepSpeed",
}


def find_misfits(
    parts: Mapping[str, Part], tensors: Mapping[str, np.ndarray], leaves: Mapping[str, Any]
) -> list[str]:
    """Lists missing, unexpected and misshapen tensors, those of wrong dtypes, and NaN."""
    if not tensors:
        return [
            "its file holds no tensor at all, as one has that was saved where shards of ZeRO-3 or "
            "FSDP were not gathered"
        ]
    missing = [n for n in parts if n not in tensors]
    extra = sorted(set(tensors) - set(parts))
    problems = _describe_names(missing, extra)
    most = 1 if problems else _MAX_NAMES  # the rest is told already
    problems += _list_names("is missing", missing, lambda n: "", most)
    problems += _list_names("is unexpected", extra, _hint, most)
    for name, part in parts.items():
        if name in tensors:
            problems += _describe_tensor(name, part, tensors[name], leaves)
    return problems


def _list_names(
    what: str, found: Sequence[str], hint: Callable[[str], str], most: int
) -> list[str]:
    lines = [f"tensor {n} {what}{hint(n)}" for n in found[:most]]
    more = len(found) - most
    if more > 0:
        lines.append(f"and so {'is 1 more' if more == 1 else f'are {more} more'}")
    return lines


def _hint(name: str) -> str:
    if not name.startswith(PREFIX):
        return f" (all names start with {PREFIX!r})"
    if "lora_magnitude_vector" in name:
        return " (of DoRA, which the words do not ask for: use_dora is not true, or not the module)"
    for word, what in (("lora_diag", "KaSA"),):
        if word in name:
            return f" (of {what}, which is not supported)"
    if ".base_layer.lora_" in name:
        return (
            " (of a bare parameter in a module with several, which target_parameters does not name)"
        )
    if "token_adapter" in name:
        return " (of trained tokens, which trainable_token_indices does not name)"
    return ""


def _describe_names(missing: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Says what all names of a file have in common, if they are not those of PEFT's files."""
    if not extra:
        return []
    prefixes = find_prefixes(missing, extra)
    if prefixes is None:
        producer = describe_tensors(n for n in extra if not n.startswith(PREFIX))
        return [producer] if producer else []
    found, wanted = prefixes
    line = f"its names begin with {found!r} where this base has {wanted!r}, as {extra[0]}"
    twice = found.count(PREFIX) > 1
    wrapper = next(
        (text for key, text in _WRAPPERS.items() if key in found.replace(wanted, "")), ""
    )
    if twice:
        line += " (a PEFT model within a PEFT model: save the inner one)"
    elif wrapper:
        line += f" (the wrapper {wrapper} was saved with it: save the model inside)"
    else:
        line += " (the adapter of a part of the model, or of one that contains it)"
    return [line]


def find_prefixes(missing: Iterable[str], extra: Sequence[str]) -> tuple[str, str] | None:
    """Finds the prefix of most unexpected names that stands in place of another, if one does.

    What stands behind it is at least the name of a module and of a factor.

    >>> find_prefixes(["a.q.lora_A", "a.q.lora_B"], ["a.b.q.lora_A", "a.b.q.lora_B"])
    ('a.b.', 'a.')
    """
    missing = set(missing)
    by_ending: dict[str, str] = {}
    for name in sorted(missing):
        parts = name.split(".")
        for k in range(len(parts)):
            by_ending.setdefault(".".join(parts[k:]), name)
    first = next((n for n in extra if ".lora_" in n), "")
    parts = first.split(".")
    for k in range(len(parts)):
        ending = ".".join(parts[k:])
        if ending in by_ending and ".lora_" in ending:
            found = first.removesuffix(ending)
            wanted = by_ending[ending].removesuffix(ending)
            if not wanted and ending.startswith(PREFIX):  # it stands there twice
                found, wanted = found + PREFIX, PREFIX
            new = {wanted + n.removeprefix(found) for n in extra if n.startswith(found)}
            return (found, wanted) if len(new & missing) * 2 > len(extra) else None
    return None


def _describe_tensor(
    name: str, part: Part, value: np.ndarray, leaves: Mapping[str, Any]
) -> list[str]:
    problems = []
    if value.shape != part.shape:
        problems.append(_describe_shape(name, part, value.shape))
    if value.dtype not in _REAL:
        problems.append(f"tensor {name} has dtype {value.dtype}, which is no real number")
    elif not np.all(np.isfinite(value)):
        problems.append(f"NaN or infinity in tensor {name}")
    elif jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        problems.append(f"tensor {name} is 64 bits wide; set jax_enable_x64 to load it exactly")
    if problems or part.role not in (BASE, TRAINED):
        return problems
    leaf = leaves[part.weight.leaf]
    if part.role == TRAINED and not is_exact(value, leaf.dtype):
        return [f"tensor {name} has dtype {value.dtype}, and {part.weight.leaf} has {leaf.dtype}"]
    if part.role == BASE and has_values(leaf) and not is_copy(value, part, leaves):
        return [f"it was made for another base: its copy of the frozen {name} differs from it"]
    return []


def _describe_shape(name: str, part: Part, shape: tuple[int, ...]) -> str:
    """Says that a shape is not the base's; of a vocabulary, what the two sizes mean."""
    problem = f"tensor {name} has shape {shape} instead of {part.shape}"
    if 0 in shape:
        return f"{problem}: it is empty, as where shards of ZeRO-3 or FSDP were not gathered"
    different = [k for k, (x, y) in enumerate(zip(shape, part.shape, strict=False)) if x != y]
    axis = adapter_tensors.find_token_axis(part)
    if len(shape) != len(part.shape) or axis is None or different != [axis]:
        return problem
    found, wanted = shape[axis], part.shape[axis]
    return (
        f"{problem}: the adapter's vocabulary has {found} entries and that of the base {wanted}, "
        "so one of them was resized (tokens added, or rows padded); give a base whose embedding "
        f"has {found} rows, as transformers' model.resize_token_embeddings({found}) makes it"
    )


def has_values(leaf: Any) -> bool:
    """Tells whether a leaf of the base is an array, of which more is known than its shape."""
    return isinstance(leaf, np.ndarray | jax.Array)


def is_exact(value: np.ndarray, dtype: Any) -> bool:
    """Tells whether the values are the same in another dtype."""
    with np.errstate(over="ignore"):
        return np.array_equal(value.astype(dtype).astype(value.dtype), value)


def is_copy(value: np.ndarray, part: Part, leaves: Mapping[str, Any]) -> bool:
    """Tells whether a tensor is the base's, rounded to the narrower of the two dtypes."""
    own = base_tensor(part, leaves)
    with np.errstate(over="ignore"):
        return np.array_equal(value, own.astype(value.dtype)) or np.array_equal(
            value.astype(own.dtype), own
        )


def base_tensor(part: Part, leaves: Mapping[str, Any]) -> np.ndarray:
    """Converts a weight of the base to a tensor of the file."""
    value = np.asarray(leaves[part.weight.leaf])
    value = value if part.weight.layer is None else value[part.weight.layer]
    return names.to_tensor(part.weight, value)
