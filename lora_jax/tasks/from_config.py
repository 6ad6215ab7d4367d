"""The parts of a config that every task has: the adapter's settings, dtypes, options of loading."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.methods.initial_values import FROM_ACTIVATIONS, FROM_GRADIENTS, FROM_RESIDUALS
from lora_jax.models import attention, fast_dtype
from lora_jax.models.read_leaves import DECODED
from lora_jax.schemes import SCHEMES
from lora_jax.training import mesh, training_config, workdirs

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
    _check_idle(config)
    if config.lora.get("init") == FROM_RESIDUALS and config.model.quantize in ("", DECODED):
        raise ValueError(
            f"lora.init={FROM_RESIDUALS!r} makes up for what model.quantize takes away, and that "
            f"is {config.model.quantize!r}: give it a scheme such as 'nf4', or choose another init."
        )


# Fields that act with some values of a field of `lora` alone; `workdirs.ADDED` has their defaults.
_ACTING = {
    "optimizer.orthogonality": ("method", ("adalora",)),
    "optimizer.budget": ("method", ("adalora",)),
    "init_batches": ("init", (FROM_GRADIENTS, FROM_ACTIVATIONS)),
}


def _check_idle(config: ConfigDict) -> None:
    """Refuses fields that would change nothing.

    Raises:
      ValueError: such a field has another value than its default.
    """
    get: Callable[[Any, str], Any] = lambda c, name: c and c.get(name)
    read = lambda field: functools.reduce(get, field.split("."), config)
    for field, default in workdirs.ADDED.items():
        acting = next((x for start, x in _ACTING.items() if field.startswith(start)), None)
        if acting is None or isinstance(default, dict) or read(field) in (None, default):
            continue
        name, values = acting
        if config.lora.get(name) not in values:
            raise ValueError(
                f"{field} is {read(field)!r}, and acts with lora.{name}="
                f"{' or '.join(map(repr, values))} alone; this run has {config.lora.get(name)!r}. "
                f"Leave it at {default!r}."
            )


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

    The field ``dtype`` may be "auto": see :mod:`lora_jax.models.fast_dtype`.

    Raises:
      ValueError: there is no such dtype; the message names the field.
    """
    if field == "dtype" and name == fast_dtype.AUTO:
        name = fast_dtype.choose().dtype
    if name not in DTYPES:
        names = [*sorted(DTYPES), *([fast_dtype.AUTO] if field == "dtype" else [])]
        raise ValueError(f"model.{field} must be one of {names}, got {name!r}.")
    return DTYPES[name]


def settle_dtype(config: ConfigDict, file: Path) -> str:
    """Replaces the dtype "auto" in a config, so that a run goes on as it began.

    Args:
      config: config of a run, or the base config of a sweep; it is changed.
      file: file in which an earlier start of the same run, or sweep, has left its config.

    Returns:
      What was chosen and why; "" if there was nothing to choose.
    """
    model = config.get("model") or {}
    if model.get("dtype") != fast_dtype.AUTO:
        return ""
    stored = _read_stored_dtype(file)
    if stored == fast_dtype.AUTO:  # whoever wrote the file left it open, and the two must be equal
        return fast_dtype.choose().describe()
    choice = fast_dtype.choose() if stored is None else None
    with config.unlocked():
        config.model.dtype = stored if choice is None else choice.dtype
    return f"activations in {stored}, as before" if choice is None else choice.describe()


def _read_stored_dtype(file: Path) -> str | None:
    """Reads the dtype of a run or of a sweep; None if there is none, or the file is damaged."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        name = stored.get("config", stored)["model"]["dtype"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # whoever reads the file next says what is wrong with it
    return name if name in (*DTYPES, fast_dtype.AUTO) else None


def dtypes(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options of loading: what a config's, or an adapter's, section ``model`` says.

    They are the dtypes, and the scheme that kernels are quantized with, if there is one.
    """
    names = {field: model.get(field, "float32") for field in ("dtype", "param_dtype")}
    return {field: dtype(name, field) for field, name in names.items()} | _read_scheme(model)


def _read_scheme(model: Mapping[str, Any]) -> dict[str, str]:
    scheme = model.get("quantize", "")
    if scheme not in ("", DECODED, *SCHEMES):
        raise ValueError(
            f"model.quantize must be one of {[*SCHEMES]}, {DECODED!r} (decode what is stored as "
            f"codes), or '', got {scheme!r}."
        )
    return {"quantize": scheme} if scheme else {}


def load_options(config: ConfigDict, devices: mesh.Devices | None = None) -> dict[str, Any]:
    """Returns options of loading a model to train: dtypes, memory of the step, layers, mesh.

    Args:
      config: config of the run.
      devices: devices of the run; by default those that the config describes.
    """
    devices = mesh.find(config) if devices is None else devices
    model = config.model
    options = {name: model[name] for name in ("scan_layers", "remat", "attention")}
    return dtypes(model) | options | {"mesh": mesh.base_mesh(devices)}


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
