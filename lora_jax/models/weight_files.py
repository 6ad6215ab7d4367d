"""Files of weights, of whichever format: safetensors or GGUF."""

from pathlib import Path

import numpy as np

from lora_jax import files
from lora_jax.models import gguf, gguf_models
from lora_jax.models.gguf import GGUFTensor

Stored = files.Stored | GGUFTensor  # a tensor in a file, not read yet


def open_file(path: str | Path) -> dict[str, Stored]:
    """Lists the tensors of a file by Hugging Face's names; reads its header alone.

    Raises:
      ValueError: it is damaged, or holds what is not read here.
    """
    is_gguf = gguf.is_gguf(path)
    return {**(gguf_models.open_tensors(path) if is_gguf else files.open_safetensors(path))}


def read_tensor(stored: Stored) -> np.ndarray:
    """Reads one tensor, and no other of its file."""
    return gguf.read_tensor(stored) if isinstance(stored, GGUFTensor) else files.read_tensor(stored)
