"""Kernels of experts that a checkpoint holds in several tensors, one for each expert and part.

A table of names has them as :attr:`lora_jax.names.Name.stored`. They are read and written one after
the other: the kernel of a layer is in memory once.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from lora_jax import names
from lora_jax.models.quantized_tensors import QuantizedTensor
from lora_jax.models.weight_files import Stored, read_tensor
from lora_jax.names import EXPERT, STACK, Weight


class Piece(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
      name: its name.
      weight: weight of one expert that it is part of, or the whole of.
      places: places of it along the leading axes of the leaf: layer and expert.
      part: number of the part that it is.
      parts: number of parts of the weight.
    """

    name: str
    weight: Weight
    places: tuple[int, ...]
    part: int = 0
    parts: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        whole = names.tensor_shape(self.weight)
        return (whole[0] // self.parts, *whole[1:]) if self.parts > 1 else whole

    def take(self, value: np.ndarray) -> np.ndarray:
        """Makes the tensor of the numbers that the leaf has in these places."""
        tensor = names.to_tensor(self.weight, value)
        return np.split(tensor, self.parts)[self.part] if self.parts > 1 else tensor


class JoinedTensor(NamedTuple):
    """A kernel ``(experts, out, in)`` whose pieces are in files, not read yet.

    Attributes:
      pieces: parts of each expert, in the order of their rows.
      shape: shape of the kernel.
      dtype: dtype that holds the numbers of all pieces.
    """

    pieces: tuple[tuple[Stored, ...], ...]
    shape: tuple[int, ...]
    dtype: np.dtype


def list_pieces(weight: Weight) -> list[Piece]:
    """Lists the tensors that a checkpoint has of a weight."""
    places = () if weight.layer is None else (weight.layer,)
    stored = weight.row.stored or (weight.hf,)
    stored = tuple(name.replace(STACK, str(weight.layer)) for name in stored)
    batch = names.batch_shape(weight)
    if not batch or EXPERT not in stored[0]:
        return [Piece(name, weight, places, k, len(stored)) for k, name in enumerate(stored)]
    (count,) = batch
    row = weight.row._replace(axes=weight.row.axes[1:])
    one = weight._replace(shape=weight.shape[1:], row=row)
    return [
        Piece(name.replace(EXPERT, str(e)), one, (*places, e), k, len(stored))
        for e in range(count)
        for k, name in enumerate(stored)
    ]


def join(
    tensors: Mapping[str, Stored | QuantizedTensor], weights: Iterable[Weight], prefix: str
) -> tuple[dict[str, Stored | QuantizedTensor | JoinedTensor], list[str]]:
    """Puts the pieces of each kernel together under its one name; also returns problems.

    Args:
      tensors: tensors of a checkpoint by name.
      weights: weights of the model.
      prefix: prefix that the names lack in the checkpoint of a bare backbone.
    """
    joined: dict[str, Stored | QuantizedTensor | JoinedTensor] = dict(tensors)
    problems: list[str] = []
    for weight in weights:
        pieces = list_pieces(weight)
        found = {p.name: _find_name(p.name, prefix, tensors) for p in pieces}
        if len(pieces) < 2 or not any(found.values()):
            continue
        parts = {p.name: tensors[found[p.name]] for p in pieces if found[p.name]}
        joined = {n: x for n, x in joined.items() if n not in found.values()}
        wrong = [problem for p in pieces if (problem := _describe(p, parts.get(p.name)))]
        if _find_name(weight.hf, prefix, tensors):
            wrong.append(f"{weight.hf} is there twice, once as {pieces[0].name}")
        problems += wrong
        if not wrong:
            joined[weight.hf] = _make(pieces, parts, names.tensor_shape(weight))
        else:  # told of; zeros in its place, so that nothing else is said of it
            joined[weight.hf] = JoinedTensor((), names.tensor_shape(weight), np.dtype(np.float32))
    return joined, problems


def _find_name(name: str, prefix: str, tensors: Mapping[str, object]) -> str:
    return next((n for n in (name, name.removeprefix(prefix)) if n in tensors), "")


def _describe(piece: Piece, stored: Stored | QuantizedTensor | None) -> str:
    if stored is None:
        return f"{piece.name} is missing"
    if isinstance(stored, QuantizedTensor):
        return f"{piece.name} is quantized, each expert by itself, which is not read"
    if tuple(stored.shape) != piece.shape:
        return f"{piece.name} has shape {tuple(stored.shape)} instead of {piece.shape}"
    return ""


def _make(
    pieces: list[Piece], stored: Mapping[str, Stored | QuantizedTensor], shape: tuple[int, ...]
) -> JoinedTensor:
    own = [x for p in pieces if not isinstance(x := stored[p.name], QuantizedTensor)]
    n = pieces[0].parts
    rows = tuple(tuple(own[k : k + n]) for k in range(0, len(own), n))
    return JoinedTensor(rows, shape, np.result_type(*{x.dtype for x in own}))


def read(stored: Stored | JoinedTensor) -> np.ndarray:
    """Reads a tensor, piece by piece if it has several."""
    if not isinstance(stored, JoinedTensor):
        return read_tensor(stored)
    whole = np.zeros(stored.shape, stored.dtype)
    matrices = whole.reshape(-1, *stored.shape[-2:])
    for matrix, parts in zip(matrices, stored.pieces, strict=bool(stored.pieces)):
        size = math.ceil(len(matrix) / len(parts))
        for k, part in enumerate(parts):
            matrix[k * size : (k + 1) * size] = read_tensor(part)
    return whole
