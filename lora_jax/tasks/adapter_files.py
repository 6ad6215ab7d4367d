"""Adapter directories in this library's format and in PEFT's, for the programs."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
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
from lora_jax.models.hub import split_revision
from lora_jax.models.load_weights import find_narrowest_dtype
from lora_jax.nodes import is_adapted
from lora_jax.quantized import is_quantized
from lora_jax.tasks import adapter_bases, from_config, text_files

PyTree = Any

_TASK_TYPES = {CAUSAL_LM: "CAUSAL_LM", SEQ2SEQ_LM: "SEQ_2_SEQ_LM"}  # PEFT's words


def load(
    directory: str | Path, loaded: checkpoints.Loaded
) -> tuple[dict[str, Any], lora.LoRAConfig]:
    """Reads an adapter for a base, with factors of at least float32.

    Args:
      directory: directory of the adapter, in either format.
      loaded: the base.

    Returns:
      The adapter and its settings.

    Raises:
      FileNotFoundError, ValueError: as :func:`lora_jax.load` and :func:`lora_jax.peft.load_peft`;
        or some leaves are in neither the base nor the adapter.
    """
    if not adapter_bases.is_peft(directory):
        like = jax.eval_shape(_widen_params, loaded.params)  # leaves trained in full are float32
        return lora.load(directory, like, base=loaded.base_id)
    _check_head(directory, loaded)
    table, params = checkpoints.names(loaded), loaded.params
    if any(map(_is_narrow, paths.named_leaves(params).values())):
        # The file may have more digits than the base: find out of which leaves.
        shapes = jax.eval_shape(_widen_params, params)
        params = _widen_params(params, peft.list_trained(directory, shapes, names=table))
    adapter, config = peft.load_peft(directory, params, names=table)
    missing = missing_leaves(adapter, loaded)
    if missing:
        raise ValueError(
            f"The adapter in {directory} brings no {', '.join(missing)}, and neither does the base "
            f"{loaded.checkpoint.name}: they would be random. Give the base that it was trained "
            "on, with --model."
        )
    # 16-bit files are upcast, as PEFT does, so that they can be trained further.
    widen_node = lambda x: fields.widen(x) if is_adapted(x) else x
    return jax.tree.map(widen_node, adapter, is_leaf=is_adapted), config


def _check_head(directory: str | Path, loaded: checkpoints.Loaded) -> None:
    """Raises ValueError if the adapter is for another head than the base has been loaded with."""
    task_type = peft.read_words(directory)["task_type"]
    if task_type is not None and adapter_bases.HEADS.get(task_type) != loaded.head:
        raise ValueError(
            f"The adapter in {directory} has task_type {task_type!r}, and the base "
            f"{loaded.checkpoint.name} is used here with the head {loaded.head!r}: use a program "
            "for the adapter's task (predict classifies, chat replies)."
        )


def _is_narrow(x: Any) -> bool:
    return jnp.promote_types(x.dtype, jnp.float32) != x.dtype


def narrow(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options of loading with the narrowest dtype of parameters that changes no number.

    An adapter is merged into such a base leaf by leaf, by
    :func:`lora_jax.models.checkpoints.save_hf`.

    Args:
      name: name or directory of the base.
      options: options of :func:`lora_jax.models.checkpoints.load`; "param_dtype" is the dtype to
        which the adapter's run rounded the base, float32 if it did not.

    Raises:
      FileNotFoundError, ValueError: there is no such base, or it is damaged.
    """
    if options.get("param_dtype", jnp.float32) != jnp.float32:
        return dict(options)
    return {**options, "param_dtype": find_narrowest_dtype(checkpoints.resolve(name))}


def widen(loaded: checkpoints.Loaded) -> checkpoints.Loaded:
    """Returns the model with its parameters in float32 or wider, of the same values.

    An adapter that is merged into bfloat16 kernels would be rounded with them, which it is not in
    training.
    """
    return dataclasses.replace(loaded, params=_widen_params(loaded.params))


def _widen_params(params: PyTree, names: Collection[str] | None = None) -> PyTree:
    """Widens all leaves, or those of these names."""
    leaves = paths.named_leaves(params)
    wide = [_widen_leaf(x) if names is None or n in names else x for n, x in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_quantized), wide)


def _widen_leaf(x: Any) -> Any:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return dataclasses.replace(x, dtype=dtype) if is_quantized(x) else x.astype(dtype)


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
      FileNotFoundError, ValueError: as :func:`read_initial`.
    """
    settings = from_config.lora_config(config)
    if not config.adapter:
        return InitialAdapter(None, settings)
    initial = read_initial(config.adapter, loaded)
    files = text_files.find(config.adapter, loaded.checkpoint)
    own = ["its own tokenizer is not used: training takes that of the base"]
    told = [
        *adapter_bases.find_differences(config.adapter, loaded),
        *(own if files.tokenizer is not loaded.checkpoint else []),
        *adapter_bases.describe_files(config.adapter),
    ]
    return initial._replace(
        config=dataclasses.replace(initial.config, dropout=settings.dropout),
        source="; ".join([f"going on from: {config.adapter}, with its settings", *told]),
    )


def add_notes(initial: InitialAdapter, notes: Iterable[str]) -> tuple[str, ...]:
    """Puts the lines on the adapter that a run starts from around those of its task's report."""
    return tuple(line for line in (initial.source, *notes, initial.fresh_head) if line)


def read_initial(directory: str | Path, loaded: checkpoints.Loaded) -> InitialAdapter:
    """Reads an adapter to train on from.

    If it was made for another number of labels, the head is that of ``loaded``, and all else is the
    adapter's.

    Raises:
      FileNotFoundError, ValueError: as :func:`load`; or the head that is not taken has low-rank
        factors.
    """
    if not loaded.family.label_module:
        return InitialAdapter(*load(directory, loaded))
    wanted = loaded.model.num_labels
    stored = count_labels(directory, loaded.checkpoint.config)
    if stored in (0, wanted):
        return InitialAdapter(*load(directory, loaded))
    other = checkpoints.load(loaded.checkpoint.name, head=loaded.head, num_labels=stored)
    adapter, config = load(directory, other)
    module = f"params/{loaded.family.label_module.partition('/')[0]}/"
    nodes, leaves = adapters.nodes(adapter), paths.named_leaves(loaded.params)
    head = [name for name in nodes if name.startswith(module)]
    if any(is_adapted(nodes[name]) for name in head):
        raise ValueError(
            f"The adapter in {directory} has low-rank factors on a head of {stored} labels, and "
            f"{wanted} are wanted here: start from one whose head is trained in full."
        )
    new = nodes | {name: leaves[name] for name in head}
    reason = f"fresh head: that of the adapter has {stored} labels"
    return InitialAdapter(paths.nest(new), config, fresh_head=reason)


def count_labels(directory: str | Path, base: dict[str, Any]) -> int:
    """Returns the number of labels that an adapter was made for; 0 if its files do not say.

    Args:
      directory: directory of the adapter, in either format.
      base: content of the config.json of its base.
    """
    if not adapter_bases.is_peft(directory):
        model = serialize.read_metadata(directory).get("model")
        labels = model.get("labels") if isinstance(model, dict) else None
        return len(labels) if isinstance(labels, list) else 0
    shapes = peft.tensor_shapes(directory)
    head = registry.find(base).label_module.replace("/", ".")
    head_shapes = (shapes.get(f"{head}.{name}") for name in ("weight", "bias"))
    return next((shape[0] for shape in head_shapes if shape), 0)


def missing_leaves(adapter: PyTree, loaded: checkpoints.Loaded) -> list[str]:
    """Returns names of freshly drawn leaves, which neither checkpoint nor adapter has."""
    known = set(adapters.nodes(adapter))
    return [name for name in loaded.fresh if f"params/{name}" not in known]


def save_peft(
    directory: str | Path,
    loaded: checkpoints.Loaded,
    adapter: PyTree,
    config: lora.LoRAConfig,
    *,
    base: str | None,
    init: str = "",
) -> None:
    """Writes an adapter in PEFT's format.

    Args:
      directory: directory to write.
      loaded: the base.
      adapter: the adapter.
      config: settings of the adapter.
      base: name of the base for the file, with its revision if it has one; None keeps the one that
        came with the adapter. A path is written as an absolute one.
      init: as in :func:`lora_jax.peft.save_peft`.

    Raises:
      ValueError: as :func:`lora_jax.peft.save_peft`; or leaves were freshly drawn for the base and
        are not in the adapter, so that its files would not be complete.
    """
    missing = missing_leaves(adapter, loaded)
    if missing:
        raise ValueError(
            f"{', '.join(missing)} is in neither the checkpoint {loaded.checkpoint.name} nor the "
            "adapter, so an adapter file would not be complete: train it (lora.train), or export "
            "with --merged."
        )
    about = _describe_base_words(base, config)
    head = adapters.nodes(adapter).get(f"params/{loaded.family.label_module}/kernel")
    if not config.origin and head is not None and not is_adapted(head):
        about |= {"task_type": "SEQ_CLS"}
    if not config.origin and loaded.head in _TASK_TYPES:
        about |= {"task_type": _TASK_TYPES[loaded.head]}
    table = checkpoints.names(loaded)
    peft.save_peft(directory, loaded.params, adapter, config, names=table, init=init, **about)


def _describe_base_words(base: str | None, config: lora.LoRAConfig) -> dict[str, Any]:
    """Makes PEFT's words for the base."""
    if base is None:
        old = config.origin.get("words", {}).get("base_model_name_or_path")
        return {"base_model_name_or_path": adapter_bases.make_absolute(old)} if old else {}
    name, revision = split_revision(adapter_bases.make_absolute(base))
    return {"base_model_name_or_path": name, "revision": revision}
