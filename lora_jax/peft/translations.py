"""Between the tensors of a PEFT file and those of each module, where a file holds them otherwise.

Most methods have in the file what each node has. VeRA has two projections that all modules share:
when a file is read, each module gets its part of them, by a name that no file has. AdaLoRA leaves
out the triplets that it has pruned, and here they are zeros.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lora_jax.factors import RANK
from lora_jax.methods.vera import draw_projections
from lora_jax.peft.config import KEPT
from lora_jax.peft.parts import PREFIX, Part

Tensors = dict[str, np.ndarray]
Words = dict[str, Any]
Expand = Callable[[Mapping[str, Any], Mapping[str, Part], Mapping[str, np.ndarray]], Tensors]
Collapse = Callable[
    [Mapping[str, Any], Mapping[str, Part], Mapping[str, np.ndarray]], tuple[Words, Tensors]
]
SHARED = {"a": "base_model.vera_A", "b": "base_model.vera_B"}
_SIDES = {"a": 1, "b": 0}  # axis of each that the rank is not
_TRIPLET = ("a", "b", "e")
_TAKEN = {"a": "inputs", "b": "outputs"}


def keep(
    words: Mapping[str, Any], parts: Mapping[str, Part], tensors: Mapping[str, np.ndarray]
) -> Tensors:
    """Returns the tensors as they are, where a file has those of each module."""
    return dict(tensors)


def keep_all(
    words: Mapping[str, Any], parts: Mapping[str, Part], tensors: Mapping[str, np.ndarray]
) -> tuple[Words, Tensors]:
    """Returns words and tensors as they are, where a file has those of each module."""
    return dict(words), dict(tensors)


def share_projections(
    words: Mapping[str, Any], parts: Mapping[str, Part], tensors: Mapping[str, np.ndarray]
) -> Tensors:
    """Gives each module its part of the projections of VeRA.

    They are in the file, or are drawn again from the key that its words have.

    Raises:
      ValueError: they are not in the file although the words say so, or have another shape.
    """
    rest = {n: x for n, x in tensors.items() if n not in SHARED.values()}
    if any(n in tensors and tensors[n].shape != part.shape for n, part in parts.items()):
        return rest  # which is told of
    shapes = _find_shared_shapes(parts)
    if not any(shapes.values()):
        return rest
    shared = {field: tensors[name] for field, name in SHARED.items() if name in tensors}
    if not shared and not words["save_projection"]:
        drawn = _draw(words, shapes)
        shared = dict(zip(SHARED, drawn, strict=True))
    for field, name in SHARED.items():
        if field not in shared:
            raise ValueError(f"tensor {name} is missing, and save_projection says that it is there")
        if shared[field].shape != shapes[field]:
            raise ValueError(
                f"tensor {name} has shape {shared[field].shape} instead of {shapes[field]}"
            )
    of_modules = {n: part for n, part in parts.items() if part.role in SHARED}
    return rest | {n: _take(part, shared[part.role]) for n, part in of_modules.items()}


def _find_shared_shapes(parts: Mapping[str, Part]) -> dict[str, tuple[int, ...]]:
    """Finds the shapes that hold the part of each module."""
    shapes = {f: [part.shape for part in parts.values() if part.role == f] for f in SHARED}
    largest = lambda field: max(shapes[field], key=lambda shape: shape[_SIDES[field]], default=())
    return {field: largest(field) for field in SHARED}


def _draw(
    words: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray]:
    (rank, n_in), (n_out, _) = shapes["a"], shapes["b"]
    return draw_projections(words["projection_prng_key"], rank, n_in, n_out)


def _take(part: Part, shared: np.ndarray) -> np.ndarray:
    rows, columns = part.shape
    return shared[:rows, :columns]


def join_projections(
    words: Mapping[str, Any], parts: Mapping[str, Part], tensors: Mapping[str, np.ndarray]
) -> tuple[Words, Tensors]:
    """Inverts :func:`share_projections`: returns the words and tensors of the file.

    Raises:
      ValueError: modules have parts of different projections, or biases are trained.
    """
    if words["bias"] != "none":
        raise ValueError("biases are trained, and PEFT saves none with VeRA")
    shapes = _find_shared_shapes(parts)
    if len({part.shape[0] for part in parts.values() if part.role == "a"}) > 1:
        raise ValueError("its ranks differ, and PEFT has one rank for all kernels of VeRA")
    of_modules = {n: part for n, part in parts.items() if part.role in SHARED}
    shared = {}
    for field in SHARED:
        names = [n for n, part in of_modules.items() if part.role == field]
        whole = next(tensors[n] for n in names if tensors[n].shape == shapes[field])
        for name in names:
            if not np.array_equal(_take(parts[name], whole), tensors[name]):
                raise ValueError(
                    f"its kernels have different projections of their {_TAKEN[field]}, and PEFT "
                    "has one for all kernels of VeRA"
                )
        shared[field] = whole
    rest = {n: x for n, x in tensors.items() if n not in of_modules}
    same = zip(shared.values(), _draw(words, shapes), strict=True)
    if not words["save_projection"] and all(np.array_equal(x, y) for x, y in same):
        return dict(words), rest
    named = {SHARED[field]: np.ascontiguousarray(x) for field, x in shared.items()}
    return dict(words) | {"save_projection": True}, rest | named


# ---- Pruned triplets -----------------------------------------------------------------------------


def restore_triplets(
    words: Mapping[str, Any], parts: Mapping[str, Part], tensors: Mapping[str, np.ndarray]
) -> Tensors:
    """Puts zeros in place of the triplets of AdaLoRA that a file lacks.

    Raises:
      ValueError: the words do not say of each module which triplets its file has.
    """
    if not words["rank_pattern"]:
        return dict(tensors)
    masks = {n.removesuffix(".default"): x for n, x in words["rank_pattern"].items()}
    of_modules = {n: f"{_module(n)}.lora_E" for n, part in parts.items() if part.role in _TRIPLET}
    wrong = sorted(set(of_modules.values()) ^ set(masks))
    if wrong:
        raise ValueError(f"rank_pattern and the adapted modules differ in {wrong[0]}")
    restored = dict(tensors)
    for name, key in of_modules.items():
        mask, part = np.array(masks[key], bool), parts[name]
        axis = part.letters.index(RANK)
        if len(mask) != part.shape[axis]:
            raise ValueError(
                f"rank_pattern[{key!r}] has {len(mask)} entries, not {part.shape[axis]}"
            )
        if name in tensors:
            restored[name] = _scatter(name, tensors[name], part, mask)
    return restored


def _module(name: str) -> str:
    return name.removeprefix(PREFIX).rpartition(".")[0]


def _scatter(name: str, tensor: np.ndarray, part: Part, mask: np.ndarray) -> np.ndarray:
    """Puts the triplets of a tensor where the mask is true, and zeros elsewhere."""
    axis = part.letters.index(RANK)
    shape = _with_size(part, axis, mask.sum())
    if tensor.shape != shape:
        raise ValueError(f"tensor {name} has shape {tensor.shape} instead of {shape}")
    whole = np.zeros(part.shape, tensor.dtype)
    np.moveaxis(whole, axis, 0)[mask] = np.moveaxis(tensor, axis, 0)
    return whole


def _with_size(part: Part, axis: int, size: int) -> tuple[int, ...]:
    return (*part.shape[:axis], int(size), *part.shape[axis + 1 :])


def drop_triplets(
    words: Mapping[str, Any], parts: Mapping[str, Part], tensors: Mapping[str, np.ndarray]
) -> tuple[Words, Tensors]:
    """Inverts :func:`restore_triplets`: leaves out the triplets that change nothing.

    An adapter that changes nothing at all, as one does at first, keeps them all.
    """
    used = {
        f"{_module(n)}.lora_E": tensors[n].ravel() != 0
        for n, part in parts.items()
        if part.role == "e"
    }
    pattern = words.get(KEPT) or {}
    if not _is_superset(pattern, used):
        pattern = {key: mask.tolist() for key, mask in used.items()}
    if all(map(all, pattern.values())) or not any(map(np.any, used.values())):
        return dict(words) | {KEPT: None}, dict(tensors)
    left = dict(tensors)
    for name, part in parts.items():
        if part.role in _TRIPLET:
            mask = np.array(pattern[f"{_module(name)}.lora_E"], bool)
            axis = part.letters.index(RANK)
            left[name] = np.ascontiguousarray(np.compress(mask, tensors[name], axis))
    return dict(words) | {KEPT: pattern}, left


def _is_superset(pattern: Mapping[str, list[bool]], used: Mapping[str, np.ndarray]) -> bool:
    """Tells whether a pattern keeps all triplets that are used."""
    if set(pattern) != set(used) or any(len(pattern[n]) != len(x) for n, x in used.items()):
        return False
    return not any(np.any(x & ~np.array(pattern[n], bool)) for n, x in used.items())
