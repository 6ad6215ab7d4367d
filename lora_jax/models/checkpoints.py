"""Loads and saves Hugging Face checkpoints by a family's table of names."""

import json
import logging
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers

from lora_jax import paths
from lora_jax.files import read_safetensors, write_atomically
from lora_jax.models import bert, hub
from lora_jax.models.bert import Name
from lora_jax.models.hub import Checkpoint, resolve

PyTree = Any
_log = logging.getLogger(__name__)

# Tensors that some checkpoints carry and this model has no use for: a buffer of positions, and the
# masked-language-model and next-sentence heads.
_IGNORED = ("embeddings.position_ids", "cls.")
# Modules that may be absent, as in an encoder without a head; they are then made afresh.
_OPTIONAL = ("classifier", "bert/pooler")


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
      num_labels: outputs of the head.
      key: PRNG key of what the checkpoint lacks (usually the head): kernels are drawn from
        ``N(0, initializer_range²)``, biases are zero. ``jax.random.key(0)`` by default.
      dtype: of the activations.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it can't be read, or does not fit; all mismatches are in one message.
    """
    checkpoint = resolve(name)
    config = bert.BertConfig.from_hf(checkpoint.config)
    model = bert.BertForSequenceClassification(config, num_labels=num_labels, dtype=dtype)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids, ids)["params"]
    params, fresh = load_params(checkpoint, shapes, bert.names(config))
    key = jax.random.key(0) if key is None else key
    params = _fill(params, fresh, key=key, stddev=config.initializer_range)
    if fresh:
        _log.warning("%s lacks %s: freshly initialised", name, paths.listing(fresh))
    tree = jax.tree.map(jnp.asarray, paths.nest(params))
    base_id = f"sha256:{hub.sha256(checkpoint.weights)}"
    return Loaded(model, {"params": tree}, checkpoint, base_id, fresh)


def load_params(
    checkpoint: Checkpoint, shapes: PyTree, names: Sequence[Name]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads the leaves that a table names.

    Args:
      checkpoint: as found by ``resolve``.
      shapes: tree of ``jax.ShapeDtypeStruct``: what the model needs.
      names: the family's table.

    Returns:
      Arrays by path, with ``jax.ShapeDtypeStruct`` for the leaves of an optional module that the
      checkpoint lacks entirely, and the paths of those leaves.

    Raises:
      ValueError: damaged files; tensors missing, unexpected, of a wrong shape or dtype, or not
        finite, all in one message.
    """
    tensors = _standard_names(_read(checkpoint), names)
    wanted = paths.named_leaves(shapes)
    fresh = _fresh(names, tensors)
    expected = {row.hf for row in names if row.flax not in fresh}
    problems = [f"{hf} is missing" for hf in sorted(expected - set(tensors))]
    problems += [f"{hf} is unexpected" for hf in sorted(set(tensors) - expected)]
    params: dict[str, Any] = {}
    for row in names:
        if row.flax in fresh:
            params[row.flax] = wanted[row.flax]
        elif row.hf in tensors:
            value = tensors[row.hf].T if row.transpose else tensors[row.hf]
            problems += _unfit(row, value, wanted[row.flax].shape)
            params[row.flax] = value
    if problems:
        shown = "; ".join(problems[:30]) + (f"; and {len(problems) - 30} more" * (len(problems) > 30))
        raise ValueError(
            f"The checkpoint {checkpoint.name!r} in {checkpoint.directory} does not fit the model: "
            f"{shown}. Is it the architecture that its config.json says, with as many labels as asked "
            "for?"
        )
    return {n: x if n in fresh else x.astype(wanted[n].dtype) for n, x in params.items()}, fresh


def _read(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in checkpoint.weights:
        try:
            tensors |= read_safetensors(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"The checkpoint file {path} is damaged (truncated or changed): {error}. "
                "Download or copy it again."
            ) from error
    return tensors


def _standard_names(tensors: Mapping[str, Any], names: Sequence[Name]) -> dict[str, Any]:
    """Brings the layouts in use to the one of the table.

    A bare encoder lacks the prefix ``bert.``; the oldest files call a norm's parameters gamma and
    beta.
    """
    standard = {}
    known = {row.hf for row in names}
    for name, value in tensors.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name.removeprefix("bert.").startswith(_IGNORED):
            continue
        standard[f"bert.{name}" if f"bert.{name}" in known else name] = value
    return standard


def _fresh(names: Sequence[Name], tensors: Mapping[str, Any]) -> tuple[str, ...]:
    fresh: list[str] = []
    for module in _OPTIONAL:
        rows = [row for row in names if row.flax.startswith(f"{module}/")]
        if not any(row.hf in tensors for row in rows):
            fresh += [row.flax for row in rows]
    return tuple(fresh)


def _unfit(row: Name, value: np.ndarray, shape: tuple[int, ...]) -> list[str]:
    problems = []
    if value.shape != shape:
        order = lambda s: tuple(reversed(s)) if row.transpose else tuple(s)
        problems.append(f"{row.hf} has shape {order(value.shape)} instead of {order(shape)}")
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
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return stddev * jax.random.normal(own, shape.shape, shape.dtype)

    return {name: draw(name, x) if name in fresh else x for name, x in params.items()}


def load_tokenizer(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """The checkpoint's own tokeniser, from tokenizer.json or vocab.txt, without padding.

    Raises:
      ValueError: there is neither file, or it is damaged.
    """
    fast, vocabulary = (checkpoint.directory / n for n in ("tokenizer.json", "vocab.txt"))
    try:
        if fast.is_file():
            tokenizer = tokenizers.Tokenizer.from_file(str(fast))
        elif vocabulary.is_file():
            tokenizer = _wordpiece(checkpoint.directory)
        else:
            raise ValueError("neither tokenizer.json nor vocab.txt is there")
    except Exception as error:  # the Rust library raises bare Exception for a damaged file
        raise ValueError(f"No tokeniser could be read in {checkpoint.directory}: {error}.") from error
    tokenizer.no_padding()  # the data pipeline pads to its own lengths
    tokenizer.no_truncation()
    return tokenizer


def _wordpiece(directory: Path) -> tokenizers.Tokenizer:
    settings = directory / "tokenizer_config.json"
    options = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    return tokenizers.Tokenizer.from_str(
        tokenizers.BertWordPieceTokenizer(
            str(directory / "vocab.txt"), lowercase=options.get("do_lower_case", True)
        ).to_str()
    )


def save_hf(
    directory: str | Path, params: PyTree, checkpoint: Checkpoint, *, labels: Sequence[str]
) -> None:
    """Writes a classifier as a directory that ``transformers`` opens.

    Args:
      directory: made if need be.
      params: plain variables of ``BertForSequenceClassification`` (merge an adapter first).
      checkpoint: the base, for its config and tokeniser.
      labels: name of each class.

    Raises:
      OSError: a file can't be written; files that were there are intact.
    """
    directory = Path(directory)
    config = bert.BertConfig.from_hf(checkpoint.config)
    leaves = paths.named_leaves(params["params"])
    tensors = {}
    for row in bert.names(config):
        value = np.asarray(leaves[row.flax])
        tensors[row.hf] = np.ascontiguousarray(value.T if row.transpose else value)
    about = {
        **checkpoint.config,
        "architectures": ["BertForSequenceClassification"],
        "id2label": {str(k): label for k, label in enumerate(labels)},
        "label2id": {label: k for k, label in enumerate(labels)},
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (checkpoint.directory / name).is_file():
            shutil.copyfile(checkpoint.directory / name, directory / name)
    weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    write_atomically(directory / hub.WEIGHTS, weights)
    # Last, so that a directory with a config is complete.
    write_atomically(directory / "config.json", (json.dumps(about, indent=2) + "\n").encode())
