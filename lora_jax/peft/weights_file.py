"""``adapter_model.safetensors``: the tensors of an adapter, by the names that PEFT writes."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lora_jax.files import read_safetensors
from lora_jax.peft.adapter_tensors import PREFIX
from lora_jax.peft.producers import describe_files

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_MAX_HEADER = 16 << 20
# In a state dict the name of the adapter stands behind that of the factor.
_FACTOR = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)([^.]+)(?=\.|$)"
)


def read(directory: Path, most: int) -> dict[str, np.ndarray]:
    """Reads the tensors, after it has checked the sizes of the file and of its header.

    Raises:
      FileNotFoundError: there is no weights file that is read here.
      ValueError: it is damaged, or has more than ``most`` bytes.
    """
    path = _find(directory)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{path} has {size} bytes, more than the whole base model.")
        _read_header_length(path, file)
        file.seek(0)
        data = file.read()
    try:
        tensors = read_safetensors(data)
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}.") from error
    new_names = standardize_names(tensors)
    return {new_names[name]: value for name, value in tensors.items()}


def tensor_shapes(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """Reads the shapes of the tensors in the weights file, by their names in the torch model.

    Raises:
      FileNotFoundError, ValueError: there is no weights file, or its header is damaged.
    """
    path = _find(Path(directory))
    with path.open("rb") as file:
        length = _read_header_length(path, file)
        try:
            header = json.loads(file.read(length))
            shapes = {n: tuple(x["shape"]) for n, x in header.items() if n != "__metadata__"}
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"The header of {path} is damaged: {error}.") from error
    new_names = standardize_names(shapes)
    return {new_names[n].removeprefix(PREFIX): shape for n, shape in shapes.items()}


def standardize_names(names: Iterable[str]) -> dict[str, str]:
    """Removes the adapter's name, which a state dict has in its names and PEFT's file has not.

    >>> standardize_names(["q.lora_A.default.weight", "head.modules_to_save.default.bias"])
    {'q.lora_A.default.weight': 'q.lora_A.weight', 'head.modules_to_save.default.bias': 'head.bias'}
    """
    names = list(names)
    adapters = {match[2] for name in names for match in _FACTOR.finditer(name)}
    if len(adapters) != 1:
        return {name: name for name in names}
    (adapter,) = adapters
    module = f".modules_to_save.{adapter}."
    new = {name: _FACTOR.sub(r".\1", name).replace(module, ".") for name in names}
    return new if len(set(new.values())) == len(names) else {name: name for name in names}


def _find(directory: Path) -> Path:
    path = directory / WEIGHTS
    if path.is_file():
        return path
    hint = ""
    if (directory / PICKLE).is_file():
        hint = (
            f" A pickled {PICKLE} can run code when opened, and is not read here; convert it "
            "once with PEFT: load the adapter, and save_pretrained(new, "
            "safe_serialization=True)."
        )
    elif found := describe_files(directory):
        hint = f" {found}"
    raise FileNotFoundError(f"The weights file {path} of the adapter is missing.{hint}")


def _read_header_length(path: Path, file: BinaryIO) -> int:
    """Reads the length of the header, and checks that the file can hold it."""
    size, start = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(start, "little")
    if start == b"version ":
        raise ValueError(
            f"{path} is a pointer of Git LFS instead of the content (git lfs pull fetches it)."
        )
    if length > min(size, _MAX_HEADER):
        raise ValueError(f"{path} is damaged: a header of {length} bytes, in {size} in all.")
    return length
