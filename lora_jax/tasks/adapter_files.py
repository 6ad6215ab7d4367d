"""Adapter directories of either format, for the programs: this library's own, and PEFT's."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import fields, paths, peft, serialize
from lora_jax.models import checkpoints, registry
from lora_jax.models.families import CAUSAL_LM, SEQ2SEQ_LM
from lora_jax.nodes import is_adapted
from lora_jax.tasks import from_config

PyTree = Any

_TASK_TYPES = {CAUSAL_LM: "CAUSAL_LM", SEQ2SEQ_LM: "SEQ_2_SEQ_LM"}  # PEFT's words


def load(
    directory: str | Path, loaded: checkpoints.Loaded
) -> tuple[dict[str, Any], lora.LoRAConfig]:
    """Reads an adapter for a base, with factors of at least float32.

    Raises:
      FileNotFoundError, ValueError: as :func:`lora_jax.load` and :func:`lora_jax.peft.load_peft`;
        and where the base lacks what the adapter does not bring.
    """
    if not peft.is_peft(directory):
        like = jax.eval_shape(_wide_params, loaded.params)  # what is trained in full is float32
        return lora.load(directory, like, base=loaded.base_id)
    table = checkpoints.names(loaded)
    adapter, config = peft.load_peft(directory, loaded.params, names=table)
    random = untold(adapter, loaded)
    if random:
        raise ValueError(
            f"The adapter in {directory} brings no {', '.join(random)}, and neither does the base "
            f"{loaded.checkpoint.name}: they would be random. Give the base that it was trained "
            "on, with --model."
        )
    # 16-bit files are upcast, as PEFT does, so that training on from them is sound.
    wide = lambda x: fields.widen(x) if is_adapted(x) else x
    return jax.tree.map(wide, adapter, is_leaf=is_adapted), config


def widened(loaded: checkpoints.Loaded) -> checkpoints.Loaded:
    """The model with its parameters, of the values that they have, in float32 or wider.

    An adapter merged into bfloat16 kernels would be rounded with them, where training did not.
    """
    return dataclasses.replace(loaded, params=_wide_params(loaded.params))


def _wide_params(params: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params)


class InitialAdapter(NamedTuple):
    """The adapter that a run starts from.

    Attributes:
      adapter: the adapter; None for one that is drawn at the start.
      config: settings of the adapter.
      source: line of the report that names where the adapter comes from; "" for a drawn one.
      fresh_head: reason why the head is not the adapter's; "" if it is.
    """

    adapter: PyTree | None
    config: lora.LoRAConfig
    source: str = ""
    fresh_head: str = ""


def load_initial(config: ConfigDict, loaded: checkpoints.Loaded) -> InitialAdapter:
    """Reads the adapter that a run starts from, if its config names one.

    The settings are then that adapter's, but for the dropout.

    Raises:
      FileNotFoundError, ValueError: as :func:`start`.
    """
    settings = from_config.lora_config(config)
    if not config.adapter:
        return InitialAdapter(None, settings)
    initial = start(config.adapter, loaded)
    return initial._replace(
        config=dataclasses.replace(initial.config, dropout=settings.dropout),
        source=f"going on from: {config.adapter}, with its settings",
    )


def add_notes(initial: InitialAdapter, notes: Iterable[str]) -> tuple[str, ...]:
    """Puts the lines on the adapter that a run starts from around those of its task's report."""
    return tuple(line for line in (initial.source, *notes, initial.fresh_head) if line)


def start(directory: str | Path, loaded: checkpoints.Loaded) -> InitialAdapter:
    """Reads an adapter to train on from.

    If it was made for another number of labels, the head is that of ``loaded``, and all else is the
    adapter's.

    Raises:
      FileNotFoundError, ValueError: as :func:`load`; or the head that is not taken has low-rank
        factors.
    """
    if not loaded.family.label_module:
        return InitialAdapter(*load(directory, loaded))
    ours, theirs = loaded.model.num_labels, count_labels(directory, loaded.checkpoint.config)
    if theirs in (0, ours):
        return InitialAdapter(*load(directory, loaded))
    other = checkpoints.load(loaded.checkpoint.name, head=loaded.head, num_labels=theirs)
    adapter, config = load(directory, other)
    module = f"params/{loaded.family.label_module.partition('/')[0]}/"
    nodes, own = adapters.nodes(adapter), paths.named_leaves(loaded.params)
    head = [name for name in nodes if name.startswith(module)]
    if any(is_adapted(nodes[name]) for name in head):
        raise ValueError(
            f"The adapter in {directory} has low-rank factors on a head of {theirs} labels, and "
            f"{ours} are wanted here: start from one whose head is trained in full."
        )
    new = nodes | {name: own[name] for name in head}
    reason = f"fresh head: that of the adapter has {theirs} labels"
    return InitialAdapter(paths.nest(new), config, fresh_head=reason)


def count_labels(directory: str | Path, base: dict[str, Any]) -> int:
    """The labels that an adapter was made for, of either format; 0 if its files do not say.

    Args:
      directory: of the adapter.
      base: the config.json of its base.
    """
    if not peft.is_peft(directory):
        model = serialize.read_metadata(directory).get("model")
        labels = model.get("labels") if isinstance(model, dict) else None
        return len(labels) if isinstance(labels, list) else 0
    shapes = peft.tensor_shapes(directory)
    head = registry.find(base).label_module.replace("/", ".")
    found = (shapes.get(f"{head}.{name}") for name in ("weight", "bias"))
    return next((shape[0] for shape in found if shape), 0)


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
    """Writes an adapter in PEFT's format.

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
    head = adapters.nodes(adapter).get(f"params/{loaded.family.label_module}/kernel")
    if not config.origin and head is not None and not is_adapted(head):
        about |= {"task_type": "SEQ_CLS"}
    if not config.origin and loaded.head in _TASK_TYPES:
        about |= {"task_type": _TASK_TYPES[loaded.head]}
    table = checkpoints.names(loaded)
    peft.save_peft(directory, loaded.params, adapter, config, names=table, **about)
