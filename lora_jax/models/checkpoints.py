"""Loads and saves Hugging Face checkpoints by a family's table of names."""

import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from lora_jax import paths
from lora_jax.files import read_safetensors, write_atomically
from lora_jax.models import bert, hub
from lora_jax.models.bert import Name
from lora_jax.models.hub import Checkpoint, base_id, resolve
from lora_jax.models.tokenizer import load_tokenizer

__all__ = [
    "Checkpoint",
    "Loaded",
    "base_id",
    "load_bert_classifier",
    "load_params",
    "load_tokenizer",
    "redraw",
    "resolve",
    "save_hf",
]

PyTree = Any
_log = logging.getLogger(__name__)

# Tensors that some checkpoints carry and this model has no use for: a buffer of positions, and the
# masked-language-model and next-sentence heads.
_IGNORED = ("embeddings.position_ids", "cls.")
# Modules that may be absent, as in an encoder without a head; they are then made afresh.
_OPTIONAL = ("classifier", "bert/pooler", "pooler")
_MOST = 30  # problems shown in one message


class Loaded(NamedTuple):
    """A model with pretrained parameters.

    Attributes:
      model: the Linen module.
      params: its variables, ``{"params": ...}``, float32.
      checkpoint: where they came from.
      base_id: content hash of the weights, "sha256:...".
      fresh: paths of the leaves that the checkpoint lacks, freshly initialised.
    """

    model: bert.BertForSequenceClassification
    params: PyTree
    checkpoint: Checkpoint
    base_id: str
    fresh: tuple[str, ...]


def load_bert_classifier(
    name: str | Path, *, num_labels: int = 2, key: jax.Array | None = None, dtype: Any = jnp.float32
) -> Loaded:
    """Loads BERT with a classification head.

    Args:
      name: a directory or a model name; see :func:`lora_jax.models.hub.resolve`.
      num_labels: outputs of the head. A head in the checkpoint is used if it has as many.
      key: PRNG key of what the checkpoint lacks (usually the head): kernels are drawn from
        ``N(0, initializer_range²)``, biases are zero. ``jax.random.key(0)`` by default.
      dtype: of the activations.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it can't be read, or does not fit; all mismatches are in one message.
    """
    if not isinstance(num_labels, int) or num_labels < 1:
        raise ValueError(f"num_labels must be a whole number of at least 1, got {num_labels!r}.")
    checkpoint = resolve(name)
    config = _config(checkpoint)
    model = bert.BertForSequenceClassification(config, num_labels=num_labels, dtype=dtype)
    params, fresh = load_params(checkpoint, _shapes(model), bert.names(config))
    key = jax.random.key(0) if key is None else key
    params = _fill(params, fresh, key=key, stddev=config.initializer_range)
    tree = jax.tree.map(jnp.asarray, paths.nest(params))
    return Loaded(model, {"params": tree}, checkpoint, base_id(checkpoint), fresh)


def redraw(loaded: Loaded, key: jax.Array) -> PyTree:
    """The parameters with what the checkpoint lacks drawn from another key; all else is shared."""
    leaves = paths.named_leaves(loaded.params["params"])
    stddev = loaded.model.config.initializer_range
    return {"params": paths.nest(_fill(leaves, loaded.fresh, key=key, stddev=stddev))}


def _config(checkpoint: Checkpoint) -> bert.BertConfig:
    try:
        return bert.BertConfig.from_hf(checkpoint.config)
    except ValueError as error:
        raise ValueError(f"{checkpoint.directory / 'config.json'}: {error}") from error


def _shapes(model: bert.BertForSequenceClassification) -> PyTree:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids, ids)["params"]


def load_params(
    checkpoint: Checkpoint, shapes: PyTree, names: Sequence[Name]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads the leaves that a table names.

    What is left out of the checkpoint, and what has to be made afresh, is logged.

    Args:
      checkpoint: as found by ``resolve``.
      shapes: tree of ``jax.ShapeDtypeStruct``: what the model needs.
      names: the family's table.

    Returns:
      Arrays by path, with ``jax.ShapeDtypeStruct`` for the leaves of a head or pooler that the
      checkpoint lacks entirely (or of a head with another number of labels), and the paths of
      those leaves.

    Raises:
      ValueError: damaged files; tensors missing, unexpected, of a wrong shape or dtype, or not
        finite, all in one message.
    """
    wanted = paths.named_leaves(shapes)
    tensors, problems = _standard_names(_read(checkpoint), names)
    reasons = _fresh_modules(tensors, names, wanted)
    fresh = tuple(row.flax for row in names if _module_of(row) in reasons)
    for module, reason in reasons.items():
        _log.warning("%s: %s is freshly initialised, since %s", checkpoint.name, module, reason)
    rows = [row for row in names if row.flax not in fresh]
    problems += [f"{row.hf} is missing" for row in rows if row.hf not in tensors]
    problems += [f"{hf} is unexpected" for hf in sorted(set(tensors) - {row.hf for row in names})]
    values = {row: tensors[row.hf] for row in rows if row.hf in tensors}
    problems += [p for row, x in values.items() for p in _unfit(row, x, wanted[row.flax].shape)]
    if problems:
        raise ValueError(
            f"The checkpoint {checkpoint.name!r} in {checkpoint.directory} does not fit the model: "
            f"{_shown(problems)}. Check that its weights are those of its config.json, or copy "
            "them again."
        )
    params = {
        row.flax: (x.T if row.transpose else x).astype(wanted[row.flax].dtype)
        for row, x in values.items()
    }
    return params | {name: wanted[name] for name in fresh}, fresh


def _shown(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - _MOST} more" if len(problems) > _MOST else ""
    return "; ".join(problems[:_MOST]) + more


def _read(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    damaged = []
    for path in checkpoint.weights:
        try:
            tensors |= read_safetensors(path.read_bytes())
        except ValueError as error:
            damaged.append(f"{path}: {error}")
    if damaged:
        raise ValueError(
            f"The checkpoint {checkpoint.name!r} has damaged files (truncated or changed): "
            f"{'; '.join(damaged)}. Download or copy them again."
        )
    return tensors


def _standard_names(
    tensors: Mapping[str, Any], names: Sequence[Name]
) -> tuple[dict[str, Any], list[str]]:
    """Brings the layouts in use to the one of the table; also returns problems.

    A bare encoder lacks the prefix ``bert.``; the oldest files call a norm's parameters gamma and
    beta. A bare encoder's table has no head, so that a head is left out.
    """
    known = {row.hf for row in names}
    ignored = _IGNORED if "classifier.weight" in known else (*_IGNORED, "classifier.")
    left_out = [n for n in tensors if n.removeprefix("bert.").startswith(ignored)]
    if left_out:
        _log.info("Left out of the checkpoint: %s", ", ".join(left_out))
    standard: dict[str, Any] = {}
    problems = []
    for name in [n for n in tensors if n not in left_out]:
        new = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        new = new.replace("LayerNorm.beta", "LayerNorm.bias")
        candidates = (new, f"bert.{new}", new.removeprefix("bert."))
        new = next((c for c in candidates if c in known), name)
        if new in standard:
            problems.append(f"{new} is there twice, once as {name}")
        standard[new] = tensors[name]
    return standard, problems


def _fresh_modules(
    tensors: Mapping[str, Any], names: Sequence[Name], wanted: Mapping[str, Any]
) -> dict[str, str]:
    """The modules to make afresh, each with the reason."""
    reasons = {}
    for module in _OPTIONAL:
        rows = [row for row in names if _module_of(row) == module]
        if rows and not any(row.hf in tensors for row in rows):
            reasons[module] = "the checkpoint has none"
    has = [tensors[n].shape for n in ("classifier.weight", "classifier.bias") if n in tensors]
    if len(has) == 2 and "classifier/kernel" in wanted:
        hidden, labels = wanted["classifier/kernel"].shape
        # A whole head of another size; anything else about it is a mismatch like any other.
        if has[0] != (labels, hidden) and has == [(*has[1], hidden), has[1]]:
            reasons["classifier"] = f"the checkpoint's has {has[1][0]} labels, not {labels}"
    return reasons


def _module_of(row: Name) -> str | None:
    return next((m for m in _OPTIONAL if row.flax.startswith(f"{m}/")), None)


def _unfit(row: Name, value: np.ndarray, shape: tuple[int, ...]) -> list[str]:
    problems = []
    shape = shape[::-1] if row.transpose else shape
    if value.shape != shape:
        problems.append(f"{row.hf} has shape {value.shape} instead of {shape}")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        problems.append(f"{row.hf} has dtype {value.dtype}, which is no floating-point type")
    elif not np.all(np.isfinite(value)):
        problems.append(f"{row.hf} holds NaN or infinity")
    return problems


def _fill(
    params: Mapping[str, Any], fresh: Sequence[str], *, key: jax.Array, stddev: float
) -> dict[str, Any]:
    """Initialises the fresh leaves: kernels from a normal distribution, biases with zero."""

    def draw(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if name.endswith("/bias"):
            return jnp.zeros(shape.shape, shape.dtype)
        # By name, so that one leaf's draw does not depend on which others are fresh.
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return stddev * jax.random.normal(own, shape.shape, shape.dtype)

    return {name: draw(name, x) if name in fresh else x for name, x in params.items()}


def save_hf(
    directory: str | Path, params: PyTree, checkpoint: Checkpoint, *, labels: Sequence[str]
) -> None:
    """Writes a classifier as a directory that ``transformers`` opens.

    Args:
      directory: made if need be.
      params: plain variables of ``BertForSequenceClassification`` (merge an adapter first); saved
        in float32.
      checkpoint: the base, for its config and tokeniser.
      labels: name of each class, in the order of the logits.

    Raises:
      ValueError: parameters that are not this model's, or not finite; labels that do not fit.
      OSError: a file can't be written; each file that was there is intact.
    """
    directory, labels = Path(directory), list(labels)
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(f"labels must be one different name for each class, got {labels}.")
    tensors = _tensors(params, _config(checkpoint), len(labels))
    config = {
        **checkpoint.config,
        "architectures": ["BertForSequenceClassification"],
        "id2label": {str(k): label for k, label in enumerate(labels)},
        "label2id": {label: k for k, label in enumerate(labels)},
        "torch_dtype": "float32",
    }
    config.pop("dtype", None)  # the newer word for torch_dtype, which would win
    config.pop("problem_type", None)  # of the base's own head
    config.pop("num_labels", None)  # said by id2label
    directory.mkdir(parents=True, exist_ok=True)
    for source in (checkpoint.directory / name for name in hub.TOKENIZER_FILES):
        if source.is_file():
            write_atomically(directory / source.name, source.read_bytes())
    weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    write_atomically(directory / hub.WEIGHTS, weights)
    # Last, so that a directory with a config is complete.
    write_atomically(directory / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def _tensors(params: PyTree, config: bert.BertConfig, num_labels: int) -> dict[str, np.ndarray]:
    """The tensors by Hugging Face name, checked."""
    names = {row.flax: row for row in bert.names(config)}
    leaves = paths.named_leaves(params.get("params", params))
    model = bert.BertForSequenceClassification(config, num_labels=num_labels)
    wanted = paths.named_leaves(_shapes(model))
    problems = [f"{name} is missing" for name in names if name not in leaves]
    problems += [f"{name} is unexpected" for name in leaves if name not in names]
    values = {n: np.asarray(x, np.float32) for n, x in leaves.items() if n in names}
    for name, x in values.items():
        if x.shape != wanted[name].shape:
            problems.append(f"{name} has shape {x.shape} instead of {wanted[name].shape}")
        elif not np.all(np.isfinite(x)):
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        raise ValueError(
            f"Nothing is saved, since the parameters are not those of BERT with {num_labels} "
            f"labels: {_shown(problems)}. Merge an adapter into them first, and give one label for "
            "each output of the classifier."
        )
    flip = lambda name, x: np.ascontiguousarray(x.T if names[name].transpose else x)
    return {names[name].hf: flip(name, x) for name, x in values.items()}
