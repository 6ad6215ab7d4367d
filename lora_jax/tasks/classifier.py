"""A trained classifier, rebuilt from an adapter directory alone."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

import lora_jax as lora
from lora_jax import serialize
from lora_jax.data import batches, examples, tokenization
from lora_jax.files import read_object
from lora_jax.models import checkpoints, token_ids
from lora_jax.models.families import SEQ2SEQ_LM
from lora_jax.tasks import (
    adapter_bases,
    adapter_files,
    classification,
    from_config,
    own_texts,
    task_file,
    text_files,
)
from lora_jax.tasks.glue import find
from lora_jax.tasks.text_task import TextTask

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
    """A base model with an adapter.

    Attributes:
      loaded: the base.
      adapter: the adapter.
      config: settings of the adapter.
      tokenizer: the adapter's own tokenizer, or that of the base; None if it was not asked for.
      labels: names of the classes; for a regression, a single name for the number.
      max_length: largest number of tokens of a text.
      buckets: lengths that batches are padded to.
      pairs: whether it takes pairs of sentences, separated by a tab; None for either.
      glue: name of the task of GLUE, or "classify" for a user's own texts.
      columns: names of the columns of a table that it was trained on the texts of, if it was.
      notes: assumptions about what a file does not say.
    """

    loaded: checkpoints.Loaded
    adapter: PyTree
    config: lora.LoRAConfig
    tokenizer: tokenizers.Tokenizer | None
    labels: tuple[str, ...]
    max_length: int
    buckets: tuple[int, ...]
    pairs: bool | None = False
    glue: str = "sst2"
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load(
    directory: str | Path,
    *,
    model: str | None = None,
    wide: bool = True,
    with_tokenizer: bool = True,
) -> Classifier:
    """Loads an adapter and the base that it was made for.

    Args:
      directory: directory of the adapter, in this library's format or in PEFT's.
      model: name or directory of the base, if it is no longer found under its old name.
      wide: whether the base is to be float32, so that an adapter can be merged into all of it at
        once; without it, it has the narrowest dtype that changes nothing.
      with_tokenizer: whether the tokenizer is read; only :func:`predict` needs it.

    Raises:
      FileNotFoundError, ValueError: adapter or base is missing, damaged, or they do not belong
        together.
    """
    if adapter_bases.is_peft(directory):
        return _load_peft(directory, model, wide=wide, with_tokenizer=with_tokenizer)
    metadata = serialize.read_metadata(directory)
    _check_metadata(directory, metadata)
    about_model, own = metadata["model"], metadata.get("classify", {})
    name, options = model or about_model["name"], from_config.dtypes(about_model)
    options["scan_layers"] = about_model.get("scan_layers", False)
    loaded = classification.load_model(
        name,
        num_labels=len(about_model["labels"]),
        key=classification.head_key(metadata["seed"]),
        **(options if wide else adapter_files.narrow(name, options)),
    )
    loaded = adapter_files.widen(loaded) if wide else loaded
    adapter, config = adapter_files.load(directory, loaded)
    files = text_files.find(directory, loaded.checkpoint)
    tokenizer = text_files.load_tokenizer(files) if with_tokenizer else None
    return Classifier(
        loaded=loaded,
        adapter=adapter,
        config=config,
        tokenizer=tokenizer,
        labels=tuple(about_model["labels"]),
        max_length=metadata["max_length"],
        buckets=tuple(metadata["buckets"]),
        pairs=metadata.get("pairs", False),
        glue=own_texts.NAME if own else metadata.get("glue", "sst2"),
        columns=tuple(own.get("text", ())),
        notes=(
            *adapter_bases.describe(directory, loaded),
            *files.notes,
            *_compare_sizes(tokenizer, loaded),
        ),
    )


def _compare_sizes(
    tokenizer: tokenizers.Tokenizer | None, loaded: checkpoints.Loaded
) -> tuple[str, ...]:
    if tokenizer is None:
        return ()
    return token_ids.describe(tokenizer, checkpoints.find_table(loaded))


def _find_task(classifier: Classifier) -> TextTask:
    """Finds what the model was asked of texts."""
    if classifier.glue != own_texts.NAME:
        return find(classifier.glue)
    is_regression = len(classifier.labels) == 1
    texts = 1 + bool(classifier.pairs)
    return own_texts.make_task(classifier.labels, texts=texts, is_regression=is_regression)


_BUCKETS = (32, 64, 128, 256, 512)


def describe_task(classifier: Classifier) -> dict[str, Any]:
    """Returns what :mod:`lora_jax.tasks.task_file` keeps of a classifier in PEFT's directories."""
    values = {name: getattr(classifier, name) for name in task_file.KEYS}
    return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}


def _load_peft(
    directory: str | Path, model: str | None, *, wide: bool, with_tokenizer: bool
) -> Classifier:
    """Loads an adapter in PEFT's format, and notes what its files do not say."""
    name = adapter_bases.find_base(directory, model)
    base = checkpoints.resolve(name).config
    about = task_file.read(directory)
    count = adapter_files.count_labels(directory, base)
    labels, source = _choose_labels(directory, about, count, base)
    options = {} if wide else adapter_files.narrow(name, {})
    loaded = classification.load_model(name, num_labels=len(labels), **options)
    pairs = about.get("pairs")
    inputs: tuple[str, ...] = ("two sentences where there is a tab between them",)
    if about:
        inputs = ()
    elif loaded.head == SEQ2SEQ_LM:
        pairs, inputs = False, ("asked as for SST-2",)
        labels, source = find("sst2").labels, "the words of SST-2"
    adapter, config = adapter_files.load(directory, loaded)
    files = text_files.find(directory, loaded.checkpoint)
    tokenizer = text_files.load_tokenizer(files) if with_tokenizer else None
    longest, limit = _choose_length(about, loaded.model.config.positions)
    buckets = (*(b for b in about.get("buckets", _BUCKETS) if b < longest), longest)
    notes = (
        *adapter_bases.describe(directory, loaded),
        *files.notes,
        *_compare_sizes(tokenizer, loaded),
        f"labels {', '.join(labels)} ({source})",
        limit,
        *inputs,
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
        glue=about.get("glue", "sst2"),
        columns=tuple(about.get("columns", ())),
        notes=notes,
    )


def _choose_labels(
    directory: str | Path, about: dict[str, Any], count: int, base: dict[str, Any]
) -> tuple[tuple[str, ...], str]:
    """Chooses the names of the classes, and says where they are from.

    Raises:
      ValueError: the file beside the adapter names more or fewer than the head has outputs.
    """
    if about:
        labels = tuple(about["labels"])
        if count not in (0, len(labels)):
            raise ValueError(
                f"{Path(directory) / task_file.NAME} names {len(labels)} labels, and the head of "
                f"the adapter has {count} outputs: they do not belong together."
            )
        return labels, f"those of {task_file.NAME}"
    beside = _read_labels(read_object(Path(directory) / "config.json"))
    if beside and count in (0, len(beside)):
        return beside, "those of the config.json beside the adapter"
    labels = _read_labels(base)
    if labels and count in (0, len(labels)):
        return labels, "those of the base"
    return _number_labels(count or 2), "the base has none for them"  # two, as transformers has


def _number_labels(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{k}" for k in range(count))


def _choose_length(about: dict[str, Any], positions: int | None) -> tuple[int, str]:
    """Chooses the largest number of tokens, and says why it is that."""
    if about:
        longest = min(about["max_length"], positions or about["max_length"])
        return longest, f"at most {longest} tokens, as in training"
    if positions:
        return positions, f"at most {positions} tokens, all that the base has positions for"
    return _BUCKETS[-1], f"at most {_BUCKETS[-1]} tokens"


def _read_labels(config: dict[str, Any]) -> tuple[str, ...]:
    """Reads the names of the classes in a config.json, if it has any."""
    names = config.get("id2label")
    if isinstance(names, dict) and all(isinstance(x, str) for x in names.values()):
        by_number = {str(k): x for k, x in names.items()}
        keys = [str(k) for k in range(len(by_number))]
        if all(k in by_number for k in keys) and len({*by_number.values()}) == len(by_number):
            return tuple(by_number[k] for k in keys)
    return ()


_TYPES = {"task": str, "model": dict, "max_length": int, "buckets": list, "seed": int}
_MODEL_TYPES = {"name": str, "labels": list, "dtype": str}


def _check_metadata(directory: str | Path, about: dict[str, Any]) -> None:
    model = about.get("model")
    model = model if isinstance(model, dict) else {}
    wrong = [name for name, type_ in _TYPES.items() if not isinstance(about.get(name), type_)]
    wrong += [
        f"model.{n}" for n, type_ in _MODEL_TYPES.items() if not isinstance(model.get(n), type_)
    ]
    wrong += [] if _is_classify(about) else ["classify"]
    if wrong or about["task"] != "text-classification":
        raise ValueError(
            f"The adapter in {directory} is not one that experiments.sst2, .glue or .classify "
            f"has saved: its metadata has task {about.get('task')!r}, and lacks "
            f"{', '.join(wrong) or 'nothing'}."
        )


def _is_classify(about: dict[str, Any]) -> bool:
    """Returns whether what is said about a user's own texts, if anything is, is complete."""
    if "classify" not in about:
        return True
    own = about["classify"]
    texts = own.get("text") if isinstance(own, dict) else None
    if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
        return False
    return len(texts) == 1 + (about.get("pairs") is True)


def _say_nothing(line: str) -> None:
    """Tells nobody."""


def predict(
    classifier: Classifier, sentences: list[str], *, say: Callable[[str], None] = _say_nothing
) -> np.ndarray:
    """Computes class probabilities, through the merged weights.

    Args:
      classifier: the base with its adapter.
      sentences: texts, or pairs with a tab between them.
      say: function that is told how many texts were cut to the largest number of tokens.

    Returns:
      ``(len(sentences), num_labels)`` float32: probabilities, or, with a single label, the model's
      number itself.

    Raises:
      ValueError: the tokenizer was not read; the adapter takes pairs, and a sentence does not have
        exactly one tab; or a sentence has a token that is no row of the base's embedding.
    """
    return predict_examples(classifier, _examples(classifier, sentences), say=say)


def predict_examples(
    classifier: Classifier,
    texts: examples.Examples,
    *,
    say: Callable[[str], None] = _say_nothing,
) -> np.ndarray:
    """Computes class probabilities as :func:`predict`, of examples, whose labels are not used."""
    if classifier.tokenizer is None:
        raise ValueError("This classifier has no tokenizer: load it with with_tokenizer=True.")
    scorer = classification.make_scorer(
        classifier.loaded, classifier.labels, classifier.tokenizer, task=_find_task(classifier)
    )
    tokens = tokenization.tokenize(
        scorer.to_prompts(texts),
        classifier.tokenizer,
        max_length=classifier.max_length,
        types=classification.has_token_types(classifier.loaded),
        table=checkpoints.find_table(classifier.loaded),
    )
    count = len(texts.sentences)
    if tokens.cut:
        say(f"{tokens.cut:,} of {count:,} texts cut to {classifier.max_length} tokens")
    params = lora.merge(classifier.loaded.params, classifier.adapter)

    @jax.jit
    def step(params: PyTree, batch: batches.Batch) -> jax.Array:
        scores = scorer.apply(params, batch, None)
        return jax.nn.softmax(scores) if len(classifier.labels) > 1 else scores

    result = np.zeros((count, len(classifier.labels)), np.float32)
    size = min(64, count)
    for batch in batches.eval_batches(tokens, batch_size=size, buckets=classifier.buckets):
        is_real = batch["weights"] > 0
        result[batch["index"][is_real]] = np.asarray(step(params, batch))[is_real]
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
            f"This adapter takes pairs of sentences, separated by one tab; {wrong[0]!r} is none."
        )
    first, second = zip(*(sentence.split("\t") for sentence in sentences), strict=True)
    return examples.Examples(first, labels, second)
