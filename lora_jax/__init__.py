"""Low-rank adaptation (LoRA) of any JAX function, as a pure transform of its parameter tree.

An adapter overlays a parameter tree: ``merge(params, adapter)`` says what it means, and
``lift(fn)(bind(params, adapter), ...)`` computes the same without forming the merged weights.
"""

from lora_jax import peft as peft
from lora_jax import registration as registration
from lora_jax import sharding as sharding
from lora_jax.activation_directions import init_from_activations
from lora_jax.adapter import bind, labels, mask, merge, summary
from lora_jax.config import LoRAConfig
from lora_jax.explain import Explanation, explain
from lora_jax.gradient_directions import init_from_gradients
from lora_jax.initial import init, tabulate
from lora_jax.lowrank import LowRank
from lora_jax.modules import from_keras, from_nnx, update_keras, update_nnx
from lora_jax.quantization import quantize
from lora_jax.quantization_residuals import init_from_residuals
from lora_jax.serialize import load, save
from lora_jax.transform.lift import lift
from lora_jax.version import __version__

__all__ = [
    "Explanation",
    "LoRAConfig",
    "LowRank",
    "__version__",
    "bind",
    "explain",
    "from_keras",
    "from_nnx",
    "init",
    "init_from_activations",
    "init_from_gradients",
    "init_from_residuals",
    "labels",
    "lift",
    "load",
    "mask",
    "merge",
    "peft",
    "quantize",
    "save",
    "sharding",
    "summary",
    "tabulate",
    "update_keras",
    "update_nnx",
]


def __dir__() -> list[str]:
    """Lists what this library promises, and not the modules within."""
    return __all__
