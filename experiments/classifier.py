"""A trained classifier, rebuilt from an adapter directory alone."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers

import lora_jax as lora
from experiments import adapters, classification, data, text_to_text
from lora_jax import peft, serialize
from lora_jax.models import checkpoints
from lora_jax.models.families import SEQ2SEQ_LM

PyTree = Any


class Classifier(NamedTuple):
    """A base model with an adapter; ``notes`` say what was assumed where a file is silent."""

    loaded: checkpoints.Loaded
    adapter: PyTree
    config: lora.LoRAConfig
    tokenizer: tokenizers.Tokenizer
    labels: tuple[str, ...]
    max_length: int
    buckets: tuple[int, ...]
    notes: tuple[str, ...] = ()


def load(directory: str | Path, *, model: str | None = None) -> Classifier:
    """Loads an adapter and the base that it was made for.

    Args:
      directory: of the adapter, as training leaves it or in PEFT's format.
      model: name or directory of the base, where it is no longer found under its old name.

    Raises:
      FileNotFoundError, ValueError: adapter or base is missing, damaged, or they do not belong
        together.
    """
    if peft.is_peft(directory):
        return _load_peft(directory, model)
    about = serialize.read_metadata(directory)
    _check_metadata(directory, about)
    kind = about["model"]
    loaded = classification.load_model(
        model or kind["name"],
        num_labels=len(kind["labels"]),
        dtype=classification.dtype(kind["dtype"]),
    )
    adapter, config = adapters.load(directory, loaded)
    return Classifier(
        loaded,
        adapter,
        config,
        checkpoints.load_tokenizer(loaded.checkpoint),
        tuple(kind["labels"]),
        about["max_length"],
        tuple(about["buckets"]),
    )


_BUCKETS = (32, 64, 128, 256, 512)


def _load_peft(directory: str | Path, model: str | None) -> Classifier:
    """A PEFT directory names its base, perhaps, and says nothing of labels and lengths."""
    words = peft.read_words(directory)
    name = model or words["base_model_name_or_path"]
    if not name:
        raise ValueError(
            f"The adapter in {directory} does not name its base; give it with --model."
        )
    base = checkpoints.resolve(name).config
    said = _said_labels(base)
    shape = peft.tensor_shapes(directory).get("classifier.bias", ())
    count = shape[0] if len(shape) == 1 else len(said) or 2  # transformers' default
    labels = said if len(said) == count else tuple(f"LABEL_{k}" for k in range(count))
    source = "those of the base" if labels is said else "the base has none for them"
    loaded = classification.load_model(name, num_labels=count)
    if loaded.head == SEQ2SEQ_LM:
        labels, source = text_to_text.LABELS, "words that the model may write"
    adapter, config = adapters.load(directory, loaded)
    tokenizer = checkpoints.load_tokenizer(loaded.checkpoint)
    positions = classification.longest(loaded)
    longest = positions or _BUCKETS[-1]
    buckets = (*(b for b in _BUCKETS if b < longest), longest)
    notes = (
        f"base {name}, from {loaded.checkpoint.origin}",
        f"labels {', '.join(labels)} ({source})",
        f"at most {longest} tokens"
        + (", all that the base has positions for" if positions else ""),
    )
    return Classifier(loaded, adapter, config, tokenizer, labels, longest, buckets, notes)


def _said_labels(config: dict[str, Any]) -> tuple[str, ...]:
    """The names of the classes in a config.json, if it has any."""
    names = config.get("id2label")
    if isinstance(names, dict) and all(isinstance(x, str) for x in names.values()):
        by_number = {str(k): x for k, x in names.items()}
        found = tuple(by_number.get(str(k)) for k in range(len(by_number)))
        if found and None not in found and len(set(found)) == len(found):
            return found
    return ()


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
    ways = classification.scoring(classifier.loaded, classifier.labels, classifier.tokenizer)
    tokens = data.tokenize(
        ways.prompts(examples), classifier.tokenizer, max_length=classifier.max_length
    )
    params = lora.merge(classifier.loaded.params, classifier.adapter)
    step = jax.jit(lambda params, batch: jax.nn.softmax(ways.apply(params, batch, None)))
    result = np.zeros((len(sentences), len(classifier.labels)), np.float32)
    size = min(64, len(sentences))
    for batch in data.eval_batches(tokens, batch_size=size, buckets=classifier.buckets):
        real = batch["weights"] > 0
        result[batch["index"][real]] = np.asarray(step(params, batch))[real]
    return result
