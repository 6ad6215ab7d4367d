"""Adapter directories of either format, for the programs: this library's own, and PEFT's."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import peft
from lora_jax.lowrank import LowRank
from lora_jax.models import checkpoints
from lora_jax.models.families import SEQ2SEQ_LM

PyTree = Any


def load(
    directory: str | Path, loaded: checkpoints.Loaded
) -> tuple[dict[str, Any], lora.LoRAConfig]:
    """Reads an adapter for a base, with factors of at least float32.

    Raises:
      FileNotFoundError, ValueError: as :func:`lora_jax.load` and :func:`lora_jax.peft.load_peft`;
        and where the base lacks what the adapter does not bring.
    """
    if not peft.is_peft(directory):
        return lora.load(directory, loaded.params, base=loaded.base_id)
    table = checkpoints.names(loaded)
    adapter, config = peft.load_peft(directory, loaded.params, names=table)
    random = untold(adapter, loaded)
    if random:
        raise ValueError(
            f"The adapter in {directory} brings no {', '.join(random)}, and neither does the base "
            f"{loaded.checkpoint.name}: they would be random. Give the base that it was trained "
            "on, with --model."
        )
    return jax.tree.map(_wide, adapter, is_leaf=lambda x: isinstance(x, LowRank)), config


def untold(adapter: PyTree, loaded: checkpoints.Loaded) -> list[str]:
    """Leaves that neither the checkpoint nor the adapter has: freshly drawn ones."""
    known = set(adapters.nodes(adapter))
    return [name for name in loaded.fresh if f"params/{name}" not in known]


def save_peft(
    directory: str | Path,
    loaded: checkpoints.Loaded,
    adapter: PyTree,
    config: lora.LoRAConfig,
    *,
    base: str | None,
) -> None:
    """Writes an adapter for a classifier in PEFT's format.

    Args:
      directory: to write.
      loaded: the base.
      adapter: for it.
      config: its own.
      base: the base's name, for the file; None keeps the one that came with the adapter.

    Raises:
      ValueError: as :func:`lora_jax.peft.save_peft`; or leaves were freshly drawn for the base and
        are not in the adapter, so that nobody else could know them.
    """
    random = untold(adapter, loaded)
    if random:
        raise ValueError(
            f"{', '.join(random)} is in neither the checkpoint {loaded.checkpoint.name} nor the "
            "adapter, so an adapter file would not be complete: train it (lora.train), or export "
            "with --merged."
        )
    about = {} if base is None else {"base_model_name_or_path": base}
    if not config.origin and "params/classifier/kernel" in adapters.nodes(adapter):
        head = adapters.nodes(adapter)["params/classifier/kernel"]
        about |= {} if isinstance(head, LowRank) else {"task_type": "SEQ_CLS"}
    if not config.origin and loaded.head == SEQ2SEQ_LM:
        about |= {"task_type": "SEQ_2_SEQ_LM"}
    table = checkpoints.names(loaded)
    peft.save_peft(directory, loaded.params, adapter, config, names=table, **about)


def _wide(node: Any) -> Any:
    """16-bit files are upcast, as PEFT does, so that training on from them is sound."""
    if not isinstance(node, LowRank):
        return node
    dtype = jnp.promote_types(node.a.dtype, jnp.float32)
    return LowRank(node.a.astype(dtype), node.b.astype(dtype), node.scale, axes=node.axes)
