"""A trained classifier, rebuilt from an adapter directory alone."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

import lora_jax as lora
from lora_jax import peft, serialize
from lora_jax.data import batches, examples, tokenization
from lora_jax.models import checkpoints
from lora_jax.models.families import SEQ2SEQ_LM
from lora_jax.tasks import adapter_files, classification, from_config
from lora_jax.tasks.glue import find

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
    """A base model with an adapter.

    Attributes:
      loaded: the base.
      adapter: for it.
      config: the adapter's.
      tokenizer: the base's.
      labels: names of the classes; a single one is that of a number, of a regression.
      max_length: in tokens.
      buckets: lengths that batches are padded to.
      pairs: whether it takes pairs of sentences, parted by a tab; None for both.
      glue: name of the task.
      notes: what was assumed where a file is silent.
    """

    loaded: checkpoints.Loaded
    adapter: PyTree
    config: lora.LoRAConfig
    tokenizer: tokenizers.Tokenizer
    labels: tuple[str, ...]
    max_length: int
    buckets: tuple[int, ...]
    pairs: bool | None = False
    glue: str = "sst2"
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
        key=classification.head_key(about["seed"]),
        **from_config.dtypes(kind),
    )
    loaded = adapter_files.widened(loaded)
    adapter, config = adapter_files.load(directory, loaded)
    return Classifier(
        loaded=loaded,
        adapter=adapter,
        config=config,
        tokenizer=checkpoints.load_tokenizer(loaded.checkpoint),
        labels=tuple(kind["labels"]),
        max_length=about["max_length"],
        buckets=tuple(about["buckets"]),
        pairs=about.get("pairs", False),
        glue=about.get("glue", "sst2"),
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
    count = adapter_files.count_labels(directory, base) or len(said) or 2  # transformers' default
    labels = said if len(said) == count else tuple(f"LABEL_{k}" for k in range(count))
    source = "those of the base" if labels is said else "the base has none for them"
    loaded = classification.load_model(name, num_labels=count)
    pairs: bool | None = None
    inputs = "two sentences where there is a tab between them"
    if loaded.head == SEQ2SEQ_LM:
        pairs, inputs = False, "asked as for SST-2"
        labels, source = find("sst2").labels, "the words of SST-2"
    adapter, config = adapter_files.load(directory, loaded)
    tokenizer = checkpoints.load_tokenizer(loaded.checkpoint)
    positions = loaded.model.config.positions
    longest = positions or _BUCKETS[-1]
    buckets = (*(b for b in _BUCKETS if b < longest), longest)
    notes = (
        f"base {name}, from {loaded.checkpoint.origin}",
        f"labels {', '.join(labels)} ({source})",
        f"at most {longest} tokens" + ", all that the base has positions for" * bool(positions),
        inputs,
    )
    return Classifier(
        loaded=loaded,
        adapter=adapter,
        config=config,
        tokenizer=tokenizer,
        labels=labels,
        max_length=longest,
        buckets=buckets,
        pairs=pairs,
        notes=notes,
    )


def _said_labels(config: dict[str, Any]) -> tuple[str, ...]:
    """The names of the classes in a config.json, if it has any."""
    names = config.get("id2label")
    if isinstance(names, dict) and all(isinstance(x, str) for x in names.values()):
        by_number = {str(k): x for k, x in names.items()}
        found = tuple(by_number.get(str(k)) for k in range(len(by_number)))
        if found and None not in found and len(set(found)) == len(found):
            return found
    return ()


_KINDS = {"task": str, "model": dict, "max_length": int, "buckets": list, "seed": int}
_MODEL_KINDS = {"name": str, "labels": list, "dtype": str}


def _check_metadata(directory: str | Path, about: dict[str, Any]) -> None:
    model = about.get("model") if isinstance(about.get("model"), dict) else {}
    wrong = [name for name, kind in _KINDS.items() if not isinstance(about.get(name), kind)]
    wrong += [
        f"model.{n}" for n, kind in _MODEL_KINDS.items() if not isinstance(model.get(n), kind)
    ]
    if wrong or about["task"] != "text-classification":
        raise ValueError(
            f"The adapter in {directory} is not one that experiments.sst2 or experiments.glue has "
            f"saved: its metadata has task {about.get('task')!r}, and lacks "
            f"{', '.join(wrong) or 'nothing'}."
        )


def outputs(classifier: Classifier, sentences: list[str]) -> np.ndarray:
    """Class probabilities ``(len(sentences), num_labels)`` float32, through the merged weights.

    With a single label, the model's number itself.

    Raises:
      ValueError: sentences that are to be pairs, and have not one tab each.
    """
    ways = classification.scoring(
        classifier.loaded, classifier.labels, classifier.tokenizer, task=find(classifier.glue)
    )
    tokens = tokenization.tokenize(
        ways.prompts(_examples(classifier, sentences)),
        classifier.tokenizer,
        max_length=classifier.max_length,
        types=classification.has_types(classifier.loaded),
    )
    activation = jax.nn.softmax if len(classifier.labels) > 1 else lambda logits: logits
    params = lora.merge(classifier.loaded.params, classifier.adapter)
    step = jax.jit(lambda params, batch: activation(ways.apply(params, batch, None)))
    result = np.zeros((len(sentences), len(classifier.labels)), np.float32)
    size = min(64, len(sentences))
    for batch in batches.eval_batches(tokens, batch_size=size, buckets=classifier.buckets):
        real = batch["weights"] > 0
        result[batch["index"][real]] = np.asarray(step(params, batch))[real]
    return result


def _examples(classifier: Classifier, sentences: list[str]) -> examples.Examples:
    tabs = [sentence.count("\t") for sentence in sentences]
    pairs = classifier.pairs
    if pairs is None:
        pairs = all(count == 1 for count in tabs)
    labels = np.zeros(len(sentences), np.int32)
    if not pairs:
        return examples.Examples(tuple(sentences), labels)
    wrong = [sentence for sentence, count in zip(sentences, tabs, strict=True) if count != 1]
    if wrong:
        raise ValueError(
            f"This adapter takes pairs of sentences, parted by one tab; {wrong[0]!r} is none."
        )
    first, second = zip(*(sentence.split("\t") for sentence in sentences), strict=True)
    return examples.Examples(first, labels, second)
