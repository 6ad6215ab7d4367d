"""The base of a task as it was before it was quantized."""

from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from lora_jax.models import checkpoints
from lora_jax.models.read_leaves import DECODED
from lora_jax.tasks.adapter_files import narrow

PyTree = Any


def make_loader(config: ConfigDict, loaded: checkpoints.Loaded) -> Callable[[], PyTree] | None:
    """Returns a function that loads the base as the checkpoint has it; None if that is what it is.

    It reads the checkpoint again, into the memory of the host.

    Args:
      config: config of the run.
      loaded: the base, as the config wants it.
    """
    if config.model.quantize in ("", DECODED):
        return None

    def load() -> PyTree:
        options = {"scan_layers": loaded.model.scan_layers, "quantize": DECODED}
        name = loaded.checkpoint.name
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return checkpoints.load(name, head=loaded.head, **narrow(name, options)).params

    return load
