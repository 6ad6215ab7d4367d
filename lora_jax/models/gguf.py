"""GGUF files (versions 2 and 3, little-endian): metadata, the table of tensors, and their numbers.

A file is read as what a stranger sent: whatever is in it, memory stays within a small multiple of
its size, and what does not fit is an error. (The package ``gguf``, by those who made the format,
reads an array of any length that a damaged file claims; so this is a reader of its own.)
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lora_jax.models import ggml
from lora_jax.models.ggml import Codes, Layout

SUFFIX = ".gguf"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_FLOAT, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
# Far more than any model has, so that a damaged number is an error at once.
_MOST_KEYS, _MOST_TENSORS, _MOST_ELEMENTS = 1 << 16, 1 << 17, 1 << 24
_LONGEST_NAME, _LONGEST_STRING = 1 << 16, 1 << 26
_CHUNK = 1 << 22  # numbers that are decoded at a time


class GGUFTensor(NamedTuple):
    """A tensor in a GGUF file, not read yet.

    Attributes:
      path: path of the file.
      layout: layout of its numbers in blocks.
      shape: shape as NumPy has it, outputs before inputs.
      offset: number of bytes before it in the file.
      heads: number of heads whose halves the file interleaves, as llama.cpp rotates pairs of
        neighbours where transformers rotates halves; 0 for none.
      shift: number that the file adds to every value.
      dtype: dtype of the numbers that are read.
    """

    path: Path
    layout: Layout
    shape: tuple[int, ...]
    offset: int
    heads: int = 0
    shift: float = 0.0
    dtype: np.dtype = np.dtype(np.float32)


class GGUF(NamedTuple):
    """What the header of a file says.

    Attributes:
      path: path of the file.
      metadata: values by key: bool, int, float, str, list of str, or array.
      tensors: tensors by the names in the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def is_gguf(path: str | Path) -> bool:
    """Returns whether a file's name is that of a GGUF file.

    >>> is_gguf("model.Q4_0.gguf")
    True
    """
    return Path(path).suffix.lower() == SUFFIX


def read_header(path: str | Path) -> GGUF:
    """Reads the metadata and the table of tensors.

    Raises:
      ValueError: no whole GGUF file, another version or byte order, or a type of tensors that is
        not read here; the message names the file.
      OSError: it can't be opened.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            return _header(path, file, path.stat().st_size)
        except ValueError as error:
            raise ValueError(f"{path} can't be read as a GGUF file: {error}.") from error


def _header(path: Path, file: BinaryIO, size: int) -> GGUF:
    if (magic := file.read(4)) != b"GGUF":
        raise ValueError(f"it begins with {magic!r} instead of b'GGUF'")
    _check_version(_number(file, "I"))
    tensors = _bounded(_number(file, "Q"), _MOST_TENSORS, "tensors")
    keys = _bounded(_number(file, "Q"), _MOST_KEYS, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        name = _string(file, size, _LONGEST_NAME)
        if name in metadata:
            raise ValueError(f"the key {name!r} is there twice")
        metadata[name] = _value(file, size, _number(file, "I"), name)
    table: dict[str, GGUFTensor] = {}
    for _ in range(tensors):
        name = _string(file, size, _LONGEST_NAME)
        if name in table:
            raise ValueError(f"the tensor {name!r} is there twice")
        table[name] = _entry(path, file, name)
    step = _alignment(metadata)
    start = -(-file.tell() // step) * step
    placed = {name: x._replace(offset=start + x.offset) for name, x in table.items()}
    _check_places(placed, start, step, size)
    return GGUF(path, metadata, placed)


def _check_version(version: int) -> None:
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        what = "big-endian" if swapped else f"of version {version}"
        raise ValueError(f"it is {what}; versions {_VERSIONS}, little-endian, are read here")


def _bounded(number: int, most: int, what: str) -> int:
    if number > most:
        raise ValueError(f"it claims {number} {what}; at most {most} are read")
    return number


def _take(file: BinaryIO, count: int) -> bytes:
    found = file.read(count)
    if len(found) < count:
        raise ValueError("it ends within its header")
    return found


def _number(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(f"<{kind}", _take(file, struct.calcsize(f"<{kind}")))[0]


def _string(file: BinaryIO, size: int, longest: int) -> str:
    length = int.from_bytes(_take(file, 8), "little")
    if length > min(longest, size):
        raise ValueError(f"it claims a string of {length} bytes in its header")
    return str(_take(file, length), "utf-8")  # UnicodeDecodeError is a ValueError


def _value(file: BinaryIO, size: int, kind: int, name: str) -> Any:
    if kind == _FLOAT:  # the shortest decimal: 1e-05 rather than 9.999999747378752e-06
        return float(str(np.float32(_number(file, "f"))))
    if kind in _SCALARS:
        return _number(file, _SCALARS[kind])
    if kind == _STRING:
        return _string(file, size, _LONGEST_STRING)
    if kind == _BOOL:
        return bool(_number(file, "B"))
    if kind == _ARRAY:
        return _array(file, size, name)
    raise ValueError(f"the value of {name} is of type {kind}, which GGUF has not")


def _array(file: BinaryIO, size: int, name: str) -> list[str] | np.ndarray:
    kind, count = _number(file, "I"), _number(file, "Q")
    _bounded(count, min(_MOST_ELEMENTS, size), f"elements of {name}")
    if kind == _STRING:
        return [_string(file, size, _LONGEST_STRING) for _ in range(count)]
    if kind != _BOOL and kind not in _SCALARS:
        raise ValueError(f"{name} is an array of elements of type {kind}, which is not read here")
    dtype = np.dtype("?" if kind == _BOOL else f"<{_SCALARS[kind]}")
    _bounded(count * dtype.itemsize, size, f"bytes of {name}")
    return np.frombuffer(_take(file, count * dtype.itemsize), dtype)


def _entry(path: Path, file: BinaryIO, name: str) -> GGUFTensor:
    axes = _number(file, "I")
    if not 1 <= axes <= 4:
        raise ValueError(f"the tensor {name!r} has {axes} axes; GGUF has 1 to 4")
    sizes = [_number(file, "Q") for _ in range(axes)]
    try:
        layout = ggml.layout(_number(file, "I"))
    except ValueError as error:
        raise ValueError(f"{error}; {name!r} is one") from error
    if min(sizes) < 1 or sizes[0] % layout.block:
        raise ValueError(
            f"the tensor {name!r} has sizes {sizes}; of type {layout.name} the first must be a "
            f"multiple of {layout.block}, and all at least 1"
        )
    return GGUFTensor(path, layout, tuple(reversed(sizes)), _number(file, "Q"))


def _alignment(metadata: dict[str, Any]) -> int:
    step = metadata.get("general.alignment", 32)
    if type(step) is not int or not 8 <= step <= 1 << 20 or step & (step - 1):
        raise ValueError(
            f"general.alignment must be a power of two of at least 8, got {step!r:.60}"
        )
    return step


def _check_places(table: dict[str, GGUFTensor], start: int, step: int, size: int) -> None:
    """Sees that every tensor is within the file, aligned, and no two share a byte."""
    end, last = start, ""
    for name, tensor in sorted(table.items(), key=lambda item: item[1].offset):
        if tensor.offset % step:
            raise ValueError(f"the tensor {name!r} does not begin at a multiple of {step} bytes")
        if tensor.offset < end:
            raise ValueError(f"the tensors {last!r} and {name!r} overlap")
        end, last = tensor.offset + count_bytes(tensor), name
        if end > size:
            raise ValueError(f"the tensor {name!r} ends at byte {end}, and the file at {size}")


def count_bytes(tensor: GGUFTensor) -> int:
    """Counts the bytes of a tensor in its file."""
    return math.prod(tensor.shape) // tensor.layout.block * tensor.layout.size


def read_tensor(tensor: GGUFTensor) -> np.ndarray:
    """Reads and decodes one tensor, float32, as transformers has it: rows in its order, no shift.

    Raises:
      OSError: the file has become shorter.
    """
    rows, inputs = _matrix(tensor)
    values = np.empty((rows, inputs), np.float32)
    order = _order(tensor)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is said by the caller
        for piece, blocks in _pieces(tensor):
            values[order[piece]] = tensor.layout.decode(blocks).reshape(-1, inputs)
    return (values - np.float32(tensor.shift) if tensor.shift else values).reshape(tensor.shape)


def read_codes(tensor: GGUFTensor) -> Codes:
    """Reads a matrix as codes, scales and offsets, rows in the order that transformers has.

    Raises:
      ValueError: the tensor is not of a type that has codes with a scale for each 32 inputs, or it
        is no matrix.
      OSError: the file has become shorter.
    """
    layout, (rows, inputs) = tensor.layout, _matrix(tensor)
    if layout.split is None or tensor.shift or len(tensor.shape) != 2:
        raise ValueError(f"a tensor {tensor.shape} of type {layout.name} can't be had as codes")
    order = _order(tensor)
    whole: list[Any] = []
    for piece, blocks in _pieces(tensor):
        parts = layout.split(blocks)
        if not whole:
            width = lambda x: (rows, inputs // layout.block * x.shape[1])
            whole = [None if x is None else np.empty(width(x), x.dtype) for x in parts]
        for all_rows, part in zip(whole, parts, strict=True):
            if part is not None:
                all_rows[order[piece]] = part.reshape(len(order[piece]), -1)
    codes, scales, shifts = whole
    return Codes(codes, scales, shifts, layout.bits)


def _matrix(tensor: GGUFTensor) -> tuple[int, int]:
    """Rows and what is in each; a vector is one row, unless its elements change places."""
    if len(tensor.shape) == 1 and tensor.heads:
        return tensor.shape[0], 1
    return math.prod(tensor.shape[:-1]), tensor.shape[-1]


def _order(tensor: GGUFTensor) -> np.ndarray:
    """The row of the result that each row of the file becomes."""
    rows, _ = _matrix(tensor)
    if not tensor.heads:
        return np.arange(rows)
    pairs = np.arange(rows).reshape(tensor.heads, 2, -1)
    return pairs.swapaxes(1, 2).reshape(-1)


def _pieces(tensor: GGUFTensor) -> Iterator[tuple[slice, np.ndarray]]:
    """The blocks ``(n, size)`` of some rows after the other, so that few are decoded at a time."""
    rows, inputs = _matrix(tensor)
    layout = tensor.layout
    width, step = inputs // layout.block * layout.size, max(1, _CHUNK // inputs)
    for begin in range(0, rows, step):
        piece = slice(begin, min(begin + step, rows))
        count = (piece.stop - begin) * width
        raw = np.fromfile(tensor.path, np.uint8, count, offset=tensor.offset + begin * width)
        if raw.size < count:
            raise OSError(f"{tensor.path} has become shorter while it was read")
        yield piece, raw.reshape(-1, layout.size)
