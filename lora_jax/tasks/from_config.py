"""The parts of a config that every task has: the adapter's settings, dtypes, options of loading."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.models import attention
from lora_jax.schemes import SCHEMES
from lora_jax.training import mesh, training_config

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def check(config: ConfigDict, least: Mapping[str, int]) -> None:
    """Checks the fields that every task has, the adapter's settings and the dtypes included.

    Args:
      config: config of a run.
      least: least values of the task's own fields, such as ``{"data.max_length": 1}``.

    Raises:
      ValueError: names the fields that are wrong.
    """
    check_adapter_and_dtypes(config)
    training_config.check(config, least)


def check_adapter_and_dtypes(config: ConfigDict) -> None:
    """Checks the section ``lora``, and the dtypes of the model.

    Raises:
      ValueError: names the first field that is wrong.
    """
    lora_config(config)
    dtypes(config.model)


def lora_config(config: ConfigDict) -> lora.LoRAConfig:
    """Makes the library's config from the section ``lora`` of a run's config."""
    return lora.LoRAConfig.from_dict(config.lora.to_dict())


def to_config(config: lora.LoRAConfig) -> ConfigDict:
    """Inverts :func:`lora_config`, so that a run's directory has the settings that hold in it."""
    fields = {n: x for n, x in config.to_dict().items() if n != "origin"}
    return ConfigDict({n: tuple(x) if isinstance(x, list) else x for n, x in fields.items()})


def dtype(name: str, field: str = "dtype") -> DTypeLike:
    """Returns the dtype called ``name``, the value of a field of the section ``model``.

    Raises:
      ValueError: there is no such dtype; the message names the field.
    """
    if name not in DTYPES:
        raise ValueError(f"model.{field} must be one of {sorted(DTYPES)}, got {name!r}.")
    return DTYPES[name]


def dtypes(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options of loading: what a config's, or an adapter's, section ``model`` says.

    They are the dtypes, and the scheme that kernels are quantized with, if there is one.
    """
    names = {field: model.get(field, "float32") for field in ("dtype", "param_dtype")}
    return {field: dtype(name, field) for field, name in names.items()} | _read_scheme(model)


def _read_scheme(model: Mapping[str, Any]) -> dict[str, str]:
    scheme = model.get("quantize", "")
    if scheme not in ("", *SCHEMES):
        raise ValueError(f"model.quantize must be one of {[*SCHEMES]}, or '', got {scheme!r}.")
    return {"quantize": scheme} if scheme else {}


def load_options(config: ConfigDict, devices: mesh.Devices | None = None) -> dict[str, Any]:
    """Returns options of loading a model to train: dtypes, memory of the step, and its mesh.

    Args:
      config: config of the run.
      devices: devices of the run; by default those that the config describes.
    """
    devices = mesh.find(config) if devices is None else devices
    model = config.model
    options = {"remat": model.remat, "attention": model.attention, "mesh": mesh.base_mesh(devices)}
    return dtypes(model) | options


def describe_attention(
    config: ConfigDict, model: nn.Module, length: int, *, has_segments: bool = False
) -> str:
    """Says how the attention of a training step is computed, for the report at the start.

    Args:
      config: config of the run.
      model: the model.
      length: number of tokens of the longest rows.
      has_segments: whether rows hold several texts.

    Raises:
      ValueError: it can't be computed as the config wants it.
    """
    case = attention.Case(
        heads=model.config.heads,
        batch=config.batch_size // config.accumulate,
        queries=length,
        dtype=model.dtype,
        deterministic=False,
        has_segments=has_segments,
    )
    return attention.describe(case, model.attention)
