"""Files: written whole or not at all, and safetensors read into numpy."""

import contextlib
import os
import tempfile
from pathlib import Path

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


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors in the content of a safetensors file.

    Raises:
      ValueError: not a safetensors file, or a dtype that has no counterpart in numpy.
    """
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"no safetensors file: {error}") from error
    unknown = sorted({entry["dtype"] for _, entry in entries} - set(_DTYPES))
    if unknown:
        raise ValueError(f"tensors of dtype {unknown}, where {sorted(_DTYPES)} are read")
    return {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries
    }


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` through a temporary file, fsync and rename.

    Args:
      path: in a directory that exists.
      data: the whole content.

    Raises:
      OSError: no space, no permission, ...; the file that was there before is intact.
    """
    path = Path(path)
    try:
        _replace(path, data)
    except OSError as error:
        state = "the file that was there is intact" if path.exists() else "nothing was left there"
        raise OSError(
            error.errno, f"Could not write {path} ({error.strerror or error}); {state}"
        ) from error


def _replace(path: Path, data: bytes) -> None:
    # In the same directory, because a rename is atomic within one file system only.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
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
