"""A trained classifier, rebuilt from an adapter directory alone."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers

import lora_jax as lora
from experiments import classification, data
from lora_jax import serialize
from lora_jax.models import checkpoints

PyTree = Any


class Classifier(NamedTuple):
    """A base model with an adapter."""

    loaded: checkpoints.Loaded
    adapter: PyTree
    tokenizer: tokenizers.Tokenizer
    labels: tuple[str, ...]
    max_length: int
    buckets: tuple[int, ...]


def load(directory: str | Path, *, model: str | None = None) -> Classifier:
    """Loads an adapter and the base that it was made for.

    Args:
      directory: of the adapter, as training leaves it.
      model: name or directory of the base, where it is no longer found under its old name.

    Raises:
      FileNotFoundError, ValueError: adapter or base is missing, damaged, or they do not belong
        together.
    """
    about = serialize.read_metadata(directory)
    _check_metadata(directory, about)
    kind = about["model"]
    loaded = checkpoints.load_bert_classifier(
        model or kind["name"],
        num_labels=len(kind["labels"]),
        dtype=classification.dtype(kind["dtype"]),
    )
    adapter, _ = lora.load(directory, loaded.params, base=loaded.base_id)
    return Classifier(
        loaded,
        adapter,
        checkpoints.load_tokenizer(loaded.checkpoint),
        tuple(kind["labels"]),
        about["max_length"],
        tuple(about["buckets"]),
    )


_KINDS = {"task": str, "model": dict, "max_length": int, "buckets": list}
_MODEL_KINDS = {"name": str, "labels": list, "dtype": str}


def _check_metadata(directory: str | Path, about: dict[str, Any]) -> None:
    model = about.get("model") if isinstance(about.get("model"), dict) else {}
    wrong = [name for name, kind in _KINDS.items() if not isinstance(about.get(name), kind)]
    wrong += [
        f"model.{n}" for n, kind in _MODEL_KINDS.items() if not isinstance(model.get(n), kind)
    ]
    if wrong or about["task"] != "text-classification":
        raise ValueError(
            f"The adapter in {directory} is not one that experiments.sst2 has saved: its metadata "
            f"has task {about.get('task')!r}, and lacks {', '.join(wrong) or 'nothing'}."
        )


def probabilities(classifier: Classifier, sentences: list[str]) -> np.ndarray:
    """Class probabilities ``(len(sentences), num_labels)`` float32, through the merged weights."""
    examples = data.Examples(tuple(sentences), np.zeros(len(sentences), np.int32))
    tokens = data.tokenize(examples, classifier.tokenizer, max_length=classifier.max_length)
    params = lora.merge(classifier.loaded.params, classifier.adapter)
    model = classifier.loaded.model
    step = jax.jit(
        lambda params, batch: jax.nn.softmax(classification.apply(model, params, batch, None))
    )
    result = np.zeros((len(sentences), len(classifier.labels)), np.float32)
    size = min(64, len(sentences))
    for batch in data.eval_batches(tokens, batch_size=size, buckets=classifier.buckets):
        real = batch["weights"] > 0
        result[batch["index"][real]] = np.asarray(step(params, batch))[real]
    return result
