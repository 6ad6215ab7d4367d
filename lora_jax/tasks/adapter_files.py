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
from lora_jax.models.load_weights import find_narrowest_dtype
from lora_jax.nodes import is_adapted
from lora_jax.quantized import is_quantized
from lora_jax.tasks import from_config

PyTree = Any

_TASK_TYPES = {CAUSAL_LM: "CAUSAL_LM", SEQ2SEQ_LM: "SEQ_2_SEQ_LM"}  # PEFT's words


def find_base(directory: str | Path, model: str | None = None) -> str:
    """Returns the name of the base of an adapter in PEFT's format.

    Args:
      directory: directory of the adapter.
      model: name or directory of the base, if it is not to be that in the adapter's files.

    Raises:
      FileNotFoundError: there is no such checkpoint here; the message says what to give instead.
      ValueError: the adapter does not name its base, or is damaged, or its base is.
    """
    words = peft.read_words(directory)
    name = model or words["base_model_name_or_path"]
    if not name:
        raise ValueError(
            f"The adapter in {directory} does not name its base; give it with --model."
        )
    try:
        checkpoints.resolve(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{_advise(name, words)}") from error
    return name


def _advise(name: str, words: dict[str, Any]) -> str:
    """Says what to give as the base, if it is a quantized checkpoint that is not here."""
    if name != words["base_model_name_or_path"] or not peft.describe_quantization(words):
        return ""
    return (
        f"\nThe adapter was trained over {name!r}, which is quantized. Give --model=DIRECTORY of "
        "that checkpoint, whose codes are kept, or --model of its original (by its name "
        f"{peft.guess_plain_base(words)!r}), which differs by what quantizing lost; a program that "
        "trains quantizes it with --config.model.quantize=nf4_double."
    )


def describe_base(directory: str | Path, loaded: checkpoints.Loaded) -> tuple[str, ...]:
    """Says which base an adapter in PEFT's format has got, and what differs from its training."""
    base = f"base {loaded.checkpoint.name}, from {loaded.checkpoint.origin}"
    quantization = peft.describe_quantization(peft.read_words(directory))
    leaves = paths.named_leaves(loaded.params).values()
    if not quantization or any(map(is_quantized, leaves)):
        return (base,)
    return (base, f"plain numbers of it, though the adapter's was quantized ({quantization})")


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
    if not peft.is_peft(directory):
        like = jax.eval_shape(_widen_params, loaded.params)  # leaves trained in full are float32
        return lora.load(directory, like, base=loaded.base_id)
    table = checkpoints.names(loaded)
    adapter, config = peft.load_peft(directory, loaded.params, names=table)
    if trained := _list_narrow_leaves(adapter):  # the file may have more digits than the base
        params = _widen_params(loaded.params, trained)
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


def _list_narrow_leaves(adapter: PyTree) -> list[str]:
    """Lists the leaves that are trained in full in less than float32."""
    trained = {n: x for n, x in adapters.nodes(adapter).items() if not is_adapted(x)}
    return [n for n, x in trained.items() if jnp.promote_types(x.dtype, jnp.float32) != x.dtype]


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
    return jax.tree.structure(params, is_leaf=is_quantized).unflatten(wide)


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
    return initial._replace(
        config=dataclasses.replace(initial.config, dropout=settings.dropout),
        source=f"going on from: {config.adapter}, with its settings",
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
    if not peft.is_peft(directory):
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
) -> None:
    """Writes an adapter in PEFT's format.

    Args:
      directory: directory to write.
      loaded: the base.
      adapter: the adapter.
      config: settings of the adapter.
      base: name of the base for the file; None keeps the one that came with the adapter.

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
    about = {} if base is None else {"base_model_name_or_path": base}
    head = adapters.nodes(adapter).get(f"params/{loaded.family.label_module}/kernel")
    if not config.origin and head is not None and not is_adapted(head):
        about |= {"task_type": "SEQ_CLS"}
    if not config.origin and loaded.head in _TASK_TYPES:
        about |= {"task_type": _TASK_TYPES[loaded.head]}
    table = checkpoints.names(loaded)
    peft.save_peft(directory, loaded.params, adapter, config, names=table, **about)
