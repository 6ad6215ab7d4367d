"""PEFT's directory format: ``adapter_model.safetensors`` and ``adapter_config.json``.

PEFT and this library compute the same thing with the same files. This package is the only place
with PEFT's words. Features of PEFT that this library lacks are refused by name; nothing
is ignored in silence.
"""

from lora_jax.peft.config import describe_quantization, guess_plain_base, read_words
from lora_jax.peft.directory_files import find_unknown
from lora_jax.peft.initial_values import COMPUTED
from lora_jax.peft.load import is_peft, list_trained, load_peft
from lora_jax.peft.producers import describe_files
from lora_jax.peft.save import save_peft
from lora_jax.peft.weights_file import tensor_shapes

__all__ = [
    "COMPUTED",
    "describe_files",
    "describe_quantization",
    "find_unknown",
    "guess_plain_base",
    "is_peft",
    "list_trained",
    "load_peft",
    "read_words",
    "save_peft",
    "tensor_shapes",
]
