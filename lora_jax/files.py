"""Files: written whole or not at all, and safetensors read into numpy."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

# safetensors' own numpy reader has no bfloat16, which numpy gets from ml_dtypes through JAX.
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# Dtypes that need scales of their own in a model's weights, for which the caller has to look.
_FLOAT8 = {
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
    "F8_E8M0": jnp.float8_e8m0fnu,
}


def read_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object; a missing one is an empty object.

    Raises:
      ValueError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. Download or copy it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object. Download or copy it again.")
    return content


def read_safetensors(data: bytes, *, float8: bool = False) -> dict[str, np.ndarray]:
    """Reads the tensors in the content of a safetensors file.

    Args:
      data: content of the file.
      float8: whether to read dtypes of 8-bit floats, too.

    Raises:
      ValueError: this is not a safetensors file, or a dtype has no counterpart in numpy.
    """
    _check_pointer(data)
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"no safetensors file: {error}") from error
    dtypes = _DTYPES | (_FLOAT8 if float8 else {})
    unknown = sorted({entry["dtype"] for _, entry in entries} - set(dtypes))
    if unknown:
        raise ValueError(f"tensors of dtype {unknown}, where {sorted(dtypes)} are read")
    return {
        name: np.frombuffer(entry["data"], dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries
    }


def _check_pointer(start: bytes) -> None:
    """Raises ValueError if a file begins as Git LFS has it where the content was not fetched."""
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("a pointer of Git LFS instead of the content (git lfs pull fetches it)")


class UnreadDtypeError(ValueError):
    """Tensors of a whole safetensors file have dtypes that have no counterpart in numpy."""


class Stored(NamedTuple):
    """A tensor in a safetensors file, not read yet; ``offset`` is in bytes from the start."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


def open_safetensors(path: str | Path) -> dict[str, Stored]:
    """Lists the tensors of a safetensors file by name; only the header is read.

    Raises:
      UnreadDtypeError: a dtype has no counterpart in numpy.
      ValueError: this is not a whole safetensors file.
    """
    path = Path(path)
    with path.open("rb") as file:
        _check_pointer(file.read(64))
    try:
        with safetensors.safe_open(path, "numpy"):
            pass  # checks the header, and that the file is as long as it says
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"no safetensors file: {error}") from error
    header.pop("__metadata__", None)
    dtypes = _DTYPES | _FLOAT8
    unknown = sorted({entry["dtype"] for entry in header.values()} - set(dtypes))
    if unknown:
        raise UnreadDtypeError(f"tensors of dtype {unknown}, where {sorted(dtypes)} are read")
    return {
        name: Stored(
            path,
            np.dtype(dtypes[entry["dtype"]]),
            tuple(entry["shape"]),
            8 + size + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def read_tensor(stored: Stored) -> np.ndarray:
    """Reads one tensor, and no other of its file."""
    count = math.prod(stored.shape) * stored.dtype.itemsize
    raw = np.fromfile(stored.path, np.uint8, count, offset=stored.offset)
    if raw.size < count:
        raise OSError(f"{stored.path} has become shorter while it was read")
    return raw.view(stored.dtype).reshape(stored.shape)


def safetensors_pieces(
    shapes: Mapping[str, Any],
    values: Iterable[np.ndarray],
    metadata: Mapping[str, str],
    *,
    dtype: Any = np.float32,
) -> Iterable[bytes | memoryview]:
    """Yields the content of a safetensors file of tensors of one dtype in pieces, to save memory.

    Args:
      shapes: shapes of the tensors by name.
      values: tensors in the same order; each is requested when the one before has been written.
      metadata: strings for the header.
      dtype: dtype of the tensors.
    """
    dtype = np.dtype(dtype)
    kind = next(kind for kind, known in _DTYPES.items() if np.dtype(known) == dtype)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    yield len(text).to_bytes(8, "little") + text
    for value in values:
        yield np.ascontiguousarray(value, dtype).reshape(-1).view(np.uint8).data


def write_atomically(path: str | Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes ``data`` to ``path`` through a temporary file, fsync and rename.

    Args:
      path: file in a directory that exists.
      data: whole content, at once or in pieces.

    Raises:
      OSError: there is no space, no permission, ...; the previous file is intact.
    """
    path = Path(path)
    try:
        _replace(path, data)
    except OSError as error:
        state = "the file that was there is intact" if path.exists() else "nothing was left there"
        raise OSError(
            error.errno, f"Could not write {path} ({error.strerror or error}); {state}"
        ) from error


def _replace(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    # In the same directory, because a rename is atomic within one file system only.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private to the user
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(directory: Path) -> None:
    """Makes the rename itself durable, where the system can."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
