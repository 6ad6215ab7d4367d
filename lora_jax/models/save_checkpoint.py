"""Saves models as directories that ``transformers`` opens, one tensor after the other."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lora_jax import adapter as adapters
from lora_jax import names as tables
from lora_jax.files import write_atomically
from lora_jax.models import shards
from lora_jax.models.architectures import eval_shapes, find_model, read_config
from lora_jax.models.families import CLASSIFIER, Family
from lora_jax.models.hub import Checkpoint
from lora_jax.models.load_weights import join_problems
from lora_jax.models.split_tensors import Piece, list_pieces
from lora_jax.models.tokenizer import read_files, tokenizer_files
from lora_jax.names import Name, Weight

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """The options of :func:`save_hf`.

    Attributes:
      labels: name of each class of a classifier, in the order of the logits.
      adapter: adapter to merge into the parameters, kernel by kernel; None for none.
      dtype: dtype of the tensors, "bfloat16", "float16" or "float32"; "" for the one that the
        checkpoint's config states, or float32 if it states none of these, as GGUF files do.
      shard_size: largest number of bytes of a file, a number or such as "5GB"; a larger tensor has
        a file of its own.
      tokenizer: directory of the tokenizer, if it is another than the checkpoint's.
    """

    labels: Sequence[str] = ()
    adapter: PyTree = None
    dtype: str = ""
    shard_size: int | str = shards.SHARD_SIZE
    tokenizer: str | Path = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """What the tensors of a directory are made of.

    Attributes:
      leaves: leaves of the model by path, arrays or quantized.
      entries: entries of the adapter by path.
      dtype: dtype of the tensors.
    """

    leaves: Mapping[str, Any]
    entries: Mapping[str, Any]
    dtype: np.dtype


def save_hf(
    directory: str | Path, params: PyTree, checkpoint: Checkpoint, *, head: str, **options: Any
) -> None:
    """Writes a model as a directory that ``transformers`` opens.

    Each tensor is made, merged with its part of the adapter, rounded and written before the next
    one, so that memory holds one tensor (one layer of a stack) beyond what is given. All are made
    twice: first to see that their numbers are finite, so that nothing is written otherwise.

    Args:
      directory: directory of the files; it is made if it does not exist.
      params: variables of the model, plain or quantized, with the layers stacked or not.
      checkpoint: the base, which has the config and the tokenizer.
      head: as in :func:`lora_jax.models.checkpoints.load`.
      **options: the fields of :class:`SaveOptions`.

    Raises:
      TypeError: an option does not exist.
      ValueError: the parameters are not this model's, or not finite in the dtype, or the labels,
        the dtype or the size of a shard do not fit; nothing is written.
      OSError: a file can't be written; each file that existed before is intact.
    """
    directory, opts = Path(directory), SaveOptions(**options)
    labels, dtype = list(opts.labels), opts.dtype or stated_dtype(checkpoint)
    _check_options(labels, head, dtype)
    shards.parse_size(opts.shard_size)
    family, config = read_config(checkpoint)
    model_class = find_model(family, head, checkpoint)
    model = model_class(config, num_labels=len(labels)) if labels else model_class(config)
    source = _make_source(params, opts.adapter, shards.DTYPES[dtype])
    table = _find_table(family, config, head, source.leaves)
    architecture = family.architectures[head]
    # A tied weight is stored once, under its first name.
    weights = tables.weights([row._replace(tied=()) for row in table], source.leaves)
    shapes = _find_shapes(model, table, family.inputs(head))
    _check(source, weights, shapes, architecture=architecture)
    directory.mkdir(parents=True, exist_ok=True)
    own = opts.tokenizer
    for name, content in (read_files(own) if own else tokenizer_files(checkpoint)).items():
        write_atomically(directory / name, content)
    by_name = {piece.name: piece for weight in weights for piece in list_pieces(weight)}
    sizes = {name: piece.shape for name, piece in by_name.items()}
    plan = shards.plan_shards(sizes, source.dtype, opts.shard_size)
    shards.write_shards(directory, plan, lambda name: _make_tensor(source, by_name[name]))
    # The config is written last, so that a directory that has one is complete.
    config_json = _make_config_json(checkpoint.config, architecture, labels, dtype=dtype)
    text = json.dumps(config_json, indent=2) + "\n"
    write_atomically(directory / "config.json", text.encode())


def _check_options(labels: Sequence[str], head: str, dtype: str) -> None:
    if len(set(labels)) < len(labels) or bool(labels) != (head == CLASSIFIER):
        raise ValueError(
            "labels must be one different name for each class of a classifier, and none for "
            f"another head; got {labels} for the head {head!r}."
        )
    if dtype not in shards.DTYPES:
        raise ValueError(f"dtype must be one of {[*shards.DTYPES]}, got {dtype!r}.")


def stated_dtype(checkpoint: Checkpoint) -> str:
    """Returns the dtype that a checkpoint's config states, or float32.

    It is "bfloat16", "float16" or "float32"; of a quantized checkpoint that of the numbers.
    """
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    name = str(stated).removeprefix("torch.")
    return name if name in shards.DTYPES else "float32"


def _make_source(params: PyTree, adapter: PyTree, dtype: np.dtype) -> _Source:
    leaves, entries = adapters.overlay(params, {} if adapter is None else adapter)
    inner = lambda tree: {name.removeprefix("params/"): x for name, x in tree.items()}
    if "params" in params:
        leaves, entries = inner(leaves), inner(entries)
    return _Source(leaves=leaves, entries=entries, dtype=dtype)


def _make_tensor(source: _Source, piece: Piece) -> np.ndarray:
    """Makes a tensor, rounded once from float32 or wider."""
    leaf = piece.weight.leaf
    value = adapters.merge_leaf(source.leaves[leaf], source.entries.get(leaf), index=piece.places)
    tensor = piece.take(np.asarray(value))
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for what is not finite
        return tensor.astype(source.dtype)


def _make_config_json(
    base: Mapping[str, Any], architecture: str, labels: list[str], *, dtype: str
) -> dict[str, Any]:
    config = {**base, "architectures": [architecture], "torch_dtype": dtype}
    config.pop("dtype", None)  # the newer key for torch_dtype, which would win
    for name in ("quantization_config", "compression_config"):
        config.pop(name, None)  # of the base; what is written is plain
    if labels:
        config["id2label"] = {str(k): label for k, label in enumerate(labels)}
        config["label2id"] = {label: k for k, label in enumerate(labels)}
        config.pop("problem_type", None)  # belongs to the head of the base
        config.pop("num_labels", None)  # follows from id2label
    return config


def _find_table(family: Family, config: Any, head: str, leaves: Mapping[str, Any]) -> list[Name]:
    """Finds the table that fits the leaves, with stacked layers or without."""
    both = [family.names(config, head=head, scan_layers=scan) for scan in (False, True)]
    return max(both, key=lambda table: sum(row.flax in leaves for row in table))


def _find_shapes(
    model: nn.Module, table: Sequence[Name], inputs: Sequence[jax.ShapeDtypeStruct]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the model's leaves that the table knows."""
    scan_layers = any(tables.STACK in row.hf for row in table)
    expected = eval_shapes(model.clone(scan_layers=scan_layers), inputs)
    return {row.flax: expected[row.flax].shape for row in table if row.flax in expected}


def _check(
    source: _Source,
    weights: Sequence[Weight],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    architecture: str,
) -> None:
    """Raises ValueError unless the leaves are all of the model's, with its shapes, and finite."""
    leaves, known = source.leaves, {weight.leaf for weight in weights}
    problems = [f"{name} is missing" for name in sorted(set(shapes) - set(leaves))]
    problems += [f"{name} is unexpected" for name in leaves if name not in known]
    misshapen = {n: np.shape(x) for n, x in leaves.items() if np.shape(x) != shapes.get(n, ())}
    misshapen = {n: shape for n, shape in misshapen.items() if n in shapes}
    problems += [f"{n} has shape {x} instead of {shapes[n]}" for n, x in misshapen.items()]
    sound = [p for w in weights if w.leaf not in misshapen for p in list_pieces(w)]
    problems += list(dict.fromkeys(x for p in sound if (x := _find_infinity(source, p))))
    if problems:
        raise ValueError(
            f"Nothing is saved, since the parameters are not those of {architecture} with this "
            f"config and these labels, or not finite: {join_problems(problems)}. Merge an adapter "
            "into them first, and give one label for each output of a classifier."
        )


def _find_infinity(source: _Source, piece: Piece) -> str:
    """Says whether a tensor is not finite, and whether its dtype is the reason."""
    if np.isfinite(_make_tensor(source, piece)).all():
        return ""
    wide = _make_tensor(dataclasses.replace(source, dtype=np.dtype(np.float64)), piece)
    if not np.isfinite(wide).all():
        return f"{piece.weight.leaf} holds NaN or infinity"
    return (
        f"{piece.name} holds numbers of up to {np.abs(wide).max():.4g}, which {source.dtype} "
        "can't: save it in bfloat16 (--dtype=bfloat16)"
    )
