"""Between the tensors of a PEFT file and those of each module, where a file holds them otherwise.

Most methods have in the file what each node has. VeRA has two projections that all modules share:
when a file is read, each module gets its part of them, by a name that no file has.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lora_jax.methods.vera import draw_projections
from lora_jax.peft.parts import Part

Tensors = dict[str, np.ndarray]
Words = dict[str, Any]
Expand = Callable[[Mapping[str, Any], Mapping[str, Part], Mapping[str, np.ndarray]], Tensors]
Collapse = Callable[
    [Mapping[str, Any], Mapping[str, Part], Mapping[str, np.ndarray]], tuple[Words, Tensors]
]
SHARED = {"a": "base_model.vera_A", "b": "base_model.vera_B"}
_SIDES = {"a": 1, "b": 0}  # axis of each that the rank is not
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
