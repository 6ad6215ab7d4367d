"""Reads a checkpoint's tensors into the leaves of a model, one after the other.

The headers of the files tell names, shapes and dtypes, so that mismatches are found before much is
read. Then each leaf is read, transposed and given to JAX before the next one is.
"""

import fnmatch
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lora_jax import files, names
from lora_jax.models import gguf_kernels
from lora_jax.models.families import Family
from lora_jax.models.hub import Checkpoint
from lora_jax.models.quantized_tensors import ADVICE, describe, group, read_settings
from lora_jax.models.read_leaves import DECODED, Part, check_headers, read_leaf
from lora_jax.models.split_tensors import join
from lora_jax.models.weight_files import Stored, open_file
from lora_jax.names import LINEAR, Name, Weight
from lora_jax.paths import matches
from lora_jax.quantization import SKIPPED
from lora_jax.schemes import find_scheme

_log = logging.getLogger("lora_jax.models.checkpoints")
_MAX_PROBLEMS = 30  # number of problems in one message


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
    as one). Kernels that the checkpoint holds quantized stay so; one line tells of those of a GGUF
    file that can't.

    Args:
      checkpoint: the checkpoint that ``resolve`` found.
      shapes: shape and dtype of each leaf of the model, by path.
      table: the rows for the model.
      family: the model's family.
      shardings: sharding of each leaf, by path; None for JAX's default device.
      scheme: scheme of :func:`lora_jax.quantize` for the kernels that are plain in the checkpoint,
        but heads and embeddings, and for those of a GGUF file; "" to leave them as they are, and
        ``DECODED`` to decode all.

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
    joined, incomplete = join(grouped, names.weights(table, shapes), family.prefix)
    tensors, problems = _rename_tensors(joined, known, family)
    problems = damaged + incomplete + problems
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
    leaves: dict[str, list[Part]] = {}
    for (leaf, _), part in parts.items():
        leaves.setdefault(leaf, []).append(part)
    if not scheme:
        _keep_codes(leaves, checkpoint.name)
    result: dict[str, jax.Array | jax.ShapeDtypeStruct] = {}
    for leaf, leaf_parts in leaves.items():
        if leaf in fresh:
            result[leaf] = shapes[leaf]
            continue
        problems += [problem for part in leaf_parts for problem in check_headers(part)]
        place = shardings[leaf] if shardings else None
        own = _choose_scheme(leaf_parts[0].weights[0], scheme)
        value, value_problems = read_leaf(
            leaf_parts, shapes[leaf], place, keep=not problems, scheme=own
        )
        problems += value_problems
        result[leaf] = value
        if problems:  # the rest is only checked, and values are of no more use
            result.clear()
    if problems:
        raise ValueError(
            f"The checkpoint {checkpoint.name!r} in {checkpoint.directory} does not fit the model: "
            f"{join_problems(problems)}. {_advise(checkpoint, tuple(grouped), problems)}"
        )
    return result, fresh


# What stands in the names of tensors that were saved from within something else.
_SIGNS = {
    ".lora_": "It holds LoRA factors that are not merged: merge them (PEFT: merge_and_unload), or "
    "take the base, and the adapter as one.",
    "_orig_mod.": "It was saved with the wrapper of torch.compile: save the model inside.",
    "_fsdp_wrapped_module.": "It was saved with the wrapper of FSDP: save the model inside.",
    "base_model.model.": "It was saved from within a PEFT model: save what merge_and_unload "
    "returns.",
    "pretrained_model.": "It was saved from within a model of TRL with a value head: save its "
    "pretrained_model.",
    "module.": "It was saved with the wrapper of DataParallel or DeepSpeed: save the model inside.",
}


def _advise(checkpoint: Checkpoint, names: Sequence[str], problems: Sequence[str]) -> str:
    """Says why a checkpoint is likely not to fit, and what to do."""
    advice = "Check that its weights are those of its config.json, or copy them again."
    classes = checkpoint.config.get("architectures")
    if all("not read" in problem for problem in problems):  # they are sound
        advice = ADVICE
    elif sign := next((x for x in _SIGNS if any(x in f".{name}" for name in names)), None):
        advice = _SIGNS[sign]
    elif any("to which it is tied" in problem for problem in problems):
        advice = (
            'Set "tie_word_embeddings" to false in its config.json if each was trained by itself '
            "(as PEFT's modules_to_save does); otherwise save it again."
        )
    elif any("is missing" in problem for problem in problems) and classes:
        advice = f"Its config.json says that it is of {classes}. {advice}"
    said = describe(checkpoint.config)
    return f"{said} {advice}" if said else advice


def join_problems(problems: Sequence[str]) -> str:
    """Joins problems, or the first of many, to one sentence."""
    parts = list(problems[:_MAX_PROBLEMS])
    if len(problems) > _MAX_PROBLEMS:
        parts.append(f"and {len(problems) - _MAX_PROBLEMS} more")
    return "; ".join(parts)


def _make_parts(
    table: Sequence[Name], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[tuple[str, int | None], Part]:
    """Makes the parts of all leaves, by leaf and layer."""
    parts: dict[tuple[str, int | None], Part] = {}
    for weight in names.weights(table, shapes):
        parts.setdefault((weight.leaf, weight.layer), Part([], [])).weights.append(weight)
    return parts


def open_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Finds the tensors of all files by name; it reads only headers.

    Raises:
      ValueError: files are damaged, or of a dtype that is not read, or a tensor is in two of them.
    """
    tensors: dict[str, Stored] = {}
    damaged = []
    for path in checkpoint.weights:
        try:
            file_tensors = open_file(path)
        except files.UnreadDtypeError as error:
            raise ValueError(
                f"The checkpoint {checkpoint.name!r} is stored, or quantized, in a way that is not "
                f"read here: {path} holds {error}. {ADVICE}"
            ) from error
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


def find_narrowest_dtype(checkpoint: Checkpoint) -> np.dtype:
    """Returns the dtype of all tensors if that is bfloat16 or float16, and float32 otherwise.

    Parameters of this dtype are those of the files, to the bit.

    Raises:
      ValueError: as :func:`open_tensors`.
    """
    found = {stored.dtype for stored in open_tensors(checkpoint).values()}
    halves = [np.dtype(x) for x in (jnp.bfloat16, jnp.float16) if found == {np.dtype(x)}]
    return halves[0] if halves else np.dtype(np.float32)


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
    parts: Mapping[tuple[str, int | None], Part], family: Family
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


def _select_parts(parts: Mapping[tuple[str, int | None], Part], module: str) -> list[Part]:
    """Selects the parts of a module; there are none of the module ""."""
    return [part for (leaf, _), part in parts.items() if leaf.startswith(f"{module}/")]


def _keep_codes(leaves: Mapping[str, Sequence[Part]], name: str) -> None:
    """Has the kernels of a GGUF file be read as codes, and says of which it can't be done."""
    count, types = 0, set[Any]()
    for parts in leaves.values():
        there = gguf_kernels.find_types(parts)
        if there and _is_kernel(parts[0].weights[0]) and not gguf_kernels.keep_codes(parts):
            count, types = count + len(parts), types | there
    if count:
        _log.warning(
            "%s: %d kernels are decoded, since not all of the types %s can be kept as codes; "
            "quantize (--config.model.quantize) stores them in fewer bits",
            name,
            count,
            ", ".join(sorted(types)),
        )


def _is_kernel(weight: Weight) -> bool:
    """Tells whether a leaf is the kernel of a linear layer that is no head."""
    is_linear = names.kind(weight) == LINEAR and bool(names.axes(weight))
    return is_linear and not any(matches(pattern, weight.leaf) for pattern in SKIPPED)


def _choose_scheme(weight: Weight, scheme: str) -> str:
    """Returns the scheme for a leaf; "" for what is no kernel, or smaller than a block."""
    if scheme in ("", DECODED):
        return scheme
    is_large = math.prod(weight.shape) >= find_scheme(scheme).block
    return scheme if is_large and _is_kernel(weight) else ""
