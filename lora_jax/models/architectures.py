"""Which model a checkpoint is of: its family, the config and class there, and its shapes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from lora_jax import paths
from lora_jax.models import registry
from lora_jax.models.families import Family
from lora_jax.models.gguf import is_gguf
from lora_jax.models.hub import Checkpoint


def read_config(checkpoint: Checkpoint) -> tuple[Family, Any]:
    """Finds the checkpoint's family, and reads its config.

    Raises:
      ValueError: there is no such family here, or the config is damaged.
    """
    try:
        family = registry.find(checkpoint.config)
        return family, family.config.from_hf(checkpoint.config)
    except (ValueError, TypeError, OverflowError) as error:  # the last two: values of odd types
        raise ValueError(f"{config_file(checkpoint)}: {error}") from error


def config_file(checkpoint: Checkpoint) -> Path:
    """Returns the path of the file that holds a checkpoint's config."""
    whole = is_gguf(checkpoint.directory)
    return checkpoint.directory if whole else checkpoint.directory / "config.json"


def find_model(family: Family, head: str, checkpoint: Checkpoint) -> Callable[..., nn.Module]:
    """Finds the class of a family's model with a head.

    Raises:
      ValueError: the family has no such head.
    """
    if head not in family.models:
        raise ValueError(
            f"The checkpoint {checkpoint.name!r} is of type {checkpoint.config['model_type']!r}, "
            f"which has no head {head!r} here; it has {', '.join(map(repr, family.models))}."
        )
    return family.models[head]


def eval_shapes(
    model: nn.Module, inputs: Sequence[jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Computes shapes and dtypes of a model's parameters, by path, without making them."""
    return paths.named_leaves(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
