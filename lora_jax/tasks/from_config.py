"""What every task reads of a config: the adapter's settings, dtypes, options of loading."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.schemes import SCHEMES
from lora_jax.training.mesh import base_mesh

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


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
    """Options of loading, by what a config, or an adapter's metadata, says of the model.

    Dtypes, and the scheme that kernels are quantized with.
    """
    wanted = {name: model.get(name, "float32") for name in ("dtype", "param_dtype")}
    return {field: dtype(name, field) for field, name in wanted.items()} | _quantize(model)


def _quantize(model: Mapping[str, Any]) -> dict[str, str]:
    scheme = model.get("quantize", "")
    if scheme not in ("", *SCHEMES):
        raise ValueError(f"model.quantize must be one of {[*SCHEMES]}, or '', got {scheme!r}.")
    return {"quantize": scheme} if scheme else {}


def load_options(config: ConfigDict) -> dict[str, Any]:
    """Options of loading a model to train: dtypes, rematerialisation, the mesh it is split over."""
    remat, mesh = config.model.remat, base_mesh(config)
    return dtypes(config.model) | {"remat": remat, "mesh": mesh}
