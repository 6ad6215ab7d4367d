"""The golden model in each form in which bitsandbytes stores it, and copies of it with changes."""

import shutil

import safetensors.numpy

from lora_jax import files
from lora_jax.models import checkpoints
from lora_jax.paths import named_leaves
from lora_jax.quantized import is_quantized
from tests.helpers import places

GOLDENS = places.GOLDENS / "quantized"
NAME = "model.layers.1.mlp.down_proj.weight"


def load(directory, **options):
    return checkpoints.load(directory, head="causal-lm", **options)


def quantized(params):
    return {n: x for n, x in named_leaves(params).items() if is_quantized(x)}


def read(path):
    """Tensors, bfloat16 among them, which safetensors' own reader does not give."""
    stored = files.open_safetensors(path)
    return {name: files.read_tensor(x) for name, x in stored.items()}


def changed(tmp_path, kind, change):
    """A copy of a golden checkpoint with other tensors."""
    directory = shutil.copytree(GOLDENS / kind, tmp_path / "changed")
    (directory / "model.safetensors").unlink()
    tensors = read(GOLDENS / kind / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory
