"""What every task reads of a config: the adapter's settings, dtypes, options of loading."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

import lora_jax as lora
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
    """The library's config from the ``lora`` part of an experiment's."""
    return lora.LoRAConfig.from_dict(config.lora.to_dict())


def to_config(config: lora.LoRAConfig) -> ConfigDict:
    """The inverse of :func:`lora_config`: for the run's directory, what holds in the run."""
    fields = {n: x for n, x in config.to_dict().items() if n != "origin"}
    return ConfigDict({n: tuple(x) if isinstance(x, list) else x for n, x in fields.items()})


def dtype(name: str, field: str = "dtype") -> Any:
    """The dtype called ``name``, as a field of a config's model says."""
    if name not in DTYPES:
        raise ValueError(f"model.{field} must be one of {sorted(DTYPES)}, got {name!r}.")
    return DTYPES[name]


def dtypes(model: Mapping[str, Any]) -> dict[str, Any]:
    """Options of loading, by what a config, or an adapter's metadata, says of the model."""
    wanted = {name: model.get(name, "float32") for name in ("dtype", "param_dtype")}
    return {field: dtype(name, field) for field, name in wanted.items()}


def load_options(config: ConfigDict, devices: mesh.Devices | None = None) -> dict[str, Any]:
    """Returns options of loading a model to train: dtypes, rematerialization, and its mesh.

    Args:
      config: config of the run.
      devices: devices of the run; by default those that the config describes.
    """
    devices = mesh.find(config) if devices is None else devices
    options = {"remat": config.model.remat, "mesh": mesh.base_mesh(devices)}
    return dtypes(config.model) | options
