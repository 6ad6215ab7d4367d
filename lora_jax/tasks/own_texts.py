"""One's own texts, from tables: a config's examples, their classes and the part to evaluate on."""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from lora_jax import peft, serialize
from lora_jax.data import labels
from lora_jax.data.examples import Examples, require_labels, subset
from lora_jax.data.examples import take as take_examples
from lora_jax.data.stratification import choose_holdout
from lora_jax.tasks import from_config, glue_config, own_rows
from lora_jax.tasks.own_rows import OwnRows, Part
from lora_jax.tasks.text_task import LabelledTexts, TextTask

NAME = "classify"
_SHARE = "10%"  # of the rows are held out, unless there is a validation split
_TEXTS = {1: ("text",), 2: ("text1", "text2")}  # as a text-to-text model is asked
_WIDE = 10.0  # numbers beyond which a regression is slow to learn, from zero


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a copy of the config, in which nothing is left to the data or the model's family.

    It reads the data: the labels, the part that is held out and a digest of the rows are then in
    the config, so that a run does not go on with other data than it began with.

    Raises:
      FileNotFoundError: there is no such source; or "default" is among targets or trained modules,
        and there is no model.
      ValueError: the data can't be read, with file and line of what is wrong; or they are not those
        that the config holds the digest of; or the model is of no family here.
    """
    config = glue_config.resolve_modules(config.copy_and_resolve_references())
    data = own_rows.read(config)
    classes = own_rows.find_labels(config, data)
    digest = own_rows.make_digest(data)
    if config.data.digest not in ("", digest):
        raise ValueError(
            f"the rows of {config.data.source!r} are not those of data.digest "
            f"{config.data.digest!r}, but have {digest!r}: they have changed since; use a new "
            "workdir, and leave data.digest empty"
        )
    with config.unlocked(), config.ignore_type():  # a share is given as text, too
        config.data.holdout = _resolve_holdout(config.data.holdout, data)
        config.data.digest = digest
        config.model.labels, config.model.num_labels = classes, len(classes)
    return config


def check(config: ConfigDict) -> None:
    """Checks a config that :func:`resolve` has made, before anything is loaded or written.

    Raises:
      ValueError: names fields that are wrong.
    """
    common = config.copy_and_resolve_references()
    with common.unlocked(), common.ignore_type():
        common.data.holdout = 0  # which is checked where the rows are counted
    from_config.check(common, glue_config.LEAST)
    glue_config.check_buckets(config)
    glue_config.check_label_names(config, is_regression=config.data.regression)
    if config.data.regression and config.model.num_labels > 1:
        raise ValueError(
            f"model.labels names {tuple(config.model.labels)}, and with data.regression there is "
            "one number to name."
        )


def load(config: ConfigDict) -> LabelledTexts:
    """Loads the examples of a config that :func:`resolve` has made.

    Raises:
      FileNotFoundError, ValueError: as :func:`resolve`; or the adapter to start from has other
        labels; or the rows can't be divided as the config wants it.
    """
    data = own_rows.read(config)
    training = data.training
    if config.adapter:
        _check_adapter_labels(config.adapter, tuple(config.model.labels))
    examples = own_rows.to_examples(config, training)
    if data.validation:
        others = own_rows.to_examples(config, data.validation)
        notes = [_describe_overlap(training, data.validation)]
    else:
        examples, others, notes = _hold_out(config, training, examples)
    total = len(examples.sentences)
    examples = subset(examples, config.data.train_examples, config.data.seed)
    if len(examples.sentences) < total:
        notes.append(
            f"training on {len(examples.sentences):,} of {total:,} rows (data.train_examples)"
        )
    return LabelledTexts(
        task=_make_task(config, len(training.texts)),
        training=examples,
        evaluations=[others],
        metadata={
            "pairs": len(training.texts) == 2,
            "classify": {
                "text": list(training.texts),
                "label": training.label,
            },
        },
        notes=(*_describe(config, data), *(note for note in notes if note)),
    )


def make_task(labels: Sequence[str], *, texts: int, is_regression: bool) -> TextTask:
    """Describes what is asked of one's own texts.

    Args:
      labels: names of the classes; one name for a regression.
      texts: number of texts of an example.
      is_regression: whether labels are real numbers.
    """
    return TextTask(
        name=NAME,
        labels=tuple(labels),
        texts=_TEXTS[texts],
        is_regression=is_regression,
        score="pearson" if is_regression else "accuracy",
        scores=("pearson", "spearman") if is_regression else ("macro_f1",),
    )


def _make_task(config: ConfigDict, texts: int) -> TextTask:
    return make_task(config.model.labels, texts=texts, is_regression=config.data.regression)


def _resolve_holdout(value: float | str, data: OwnRows) -> int | str:
    """Returns a share as a percentage, or a number of rows; 0 for a validation split."""
    number = own_rows.parse_holdout(value if value != "" else "0" if data.validation else _SHARE)
    return f"{100 * number:g}%" if 0 < number < 1 else int(number)


def _hold_out(
    config: ConfigDict, part: Part, examples: Examples
) -> tuple[Examples, Examples, list[str]]:
    """Divides examples into those to train on and those to evaluate on.

    Returns:
      Both, and notes on how they were divided.

    Raises:
      ValueError: the config holds out nothing, or more than there is.
    """
    holdout, seed = own_rows.parse_holdout(config.data.holdout), config.data.seed
    groups, n = _group(part.rows.texts), len(part.rows.texts)
    total = int(groups.max()) + 1
    count = max(1, round(holdout * total)) if 0 < holdout < 1 else int(holdout)
    if not 0 < count < total:
        raise ValueError(
            f"data.holdout {config.data.holdout} of {total:,} different texts in "
            f"{part.table.path}: hold out at least one and leave some to train on, or give a file "
            "with data.validation"
        )
    classes = None if config.data.regression else examples.labels
    is_out = choose_holdout(groups, classes, count, seed)
    if not is_out.any():
        raise ValueError(
            f"{part.table.path}: every label has one text only, so that none can be both trained "
            "on and evaluated; add rows, or give a file with data.validation"
        )
    by_label = "" if config.data.regression else ", in proportion to the labels"
    notes = [f"held out: {is_out.sum():,} of {n:,} rows{by_label}, by data.seed {seed}"]
    if classes is not None and (unseen := _list_unseen(config, classes[is_out])):
        notes.append(f"labels with no row among those held out: {unseen}")
    held_out, rest = np.flatnonzero(is_out), np.flatnonzero(~is_out)
    return take_examples(examples, rest), take_examples(examples, held_out), notes


def _group(texts: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Numbers rows by their texts: ``(n,)``, the same for equal ones."""
    numbers: dict[tuple[str, ...], int] = {}
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts])


def _list_unseen(config: ConfigDict, held_out: np.ndarray) -> str:
    unseen = [n for k, n in enumerate(config.model.labels) if k not in set(held_out.tolist())]
    listing = ", ".join(unseen[:8])
    return f"{listing}, ... ({len(unseen)})" if len(unseen) > 8 else listing


def _describe(config: ConfigDict, data: OwnRows) -> list[str]:
    """Says which columns are used, which labels there are, and which rows are left out."""
    training = data.training
    used = {*training.texts, training.label}
    unused = [name for name in training.table.columns if name not in used]
    texts = " and ".join(repr(name) for name in training.texts)
    lines = [
        f"columns: texts in {texts}, labels in {training.label!r} ({training.table.form})"
        + (f"; not used: {', '.join(map(repr, unused))}" if unused else ""),
        *data.notes,
    ]
    for part in data.parts:
        lines += [*part.table.notes, *part.rows.notes, *_describe_repeats(part)]
    numbers = require_labels(own_rows.to_examples(config, training))
    if not config.data.regression:
        return [*lines, *labels.describe_classes(config.model.labels, numbers)]
    low, high, mean = (float(f(numbers)) for f in (np.min, np.max, np.mean))
    lines.append(f"labels: numbers from {low:g} to {high:g}, {mean:g} on average")
    if max(abs(low), abs(high)) > _WIDE:
        lines.append(
            f"labels beyond ±{_WIDE:g} are slow to learn: divide them, so that they are near 1"
        )
    return lines


def _describe_repeats(part: Part) -> list[str]:
    """Says which rows repeat the text of another, and how many of them with another label."""
    first: dict[tuple[str, ...], str] = {}
    repeats = conflicts = 0
    for text, name in zip(part.rows.texts, part.rows.names, strict=True):
        repeats += text in first
        conflicts += first.setdefault(text, name) != name
    if not repeats:
        return []
    also = f", {conflicts:,} of them with another label" if conflicts else ""
    return [f"repeated: {repeats:,} rows of {part.table.path} have the text of another{also}"]


def _describe_overlap(training: Part, validation: Part) -> str:
    known = set(training.rows.texts)
    both = sum(text in known for text in validation.rows.texts)
    if not both:
        return ""
    return (
        f"repeated: {both:,} of the {len(validation.rows.texts):,} texts to evaluate on are among "
        "those to train on, so that the scores are too good"
    )


def _check_adapter_labels(directory: str, names: tuple[str, ...]) -> None:
    """Checks that the adapter to start from means the same by its outputs.

    Raises:
      ValueError: it has as many labels, and they are others, or in another order.
    """
    if peft.is_peft(directory):
        return  # it has no names
    model = serialize.read_metadata(directory).get("model")
    stored = model.get("labels") if isinstance(model, dict) else None
    if isinstance(stored, list) and len(stored) == len(names) and tuple(stored) != names:
        raise ValueError(
            f"The adapter in {directory} has the labels {tuple(stored)}, and the data have "
            f"{names}: set model.labels to the first, in that order, if they are the same; "
            "otherwise start from another adapter."
        )


def find_example(examples: Examples) -> str:
    """Finds an example to try next: a short one, the two texts of a pair separated by a tab.

    >>> find_example(Examples(("A long story, " * 20, "Fine."), None))
    'Fine.'
    """
    pairs = examples.pairs or [None] * len(examples.sentences)
    both = zip(examples.sentences, pairs, strict=True)
    texts = ["\t".join(" ".join(x.split()) for x in row if x is not None) for row in both]
    # What begins with a dash would be an option.
    plain = [x for x in texts if x.isprintable() or (examples.pairs and "\t" in x)] or texts
    fit = [x for x in plain if len(x) <= 100 and not x.startswith("-")]
    return fit[0] if fit else min(plain, key=len)
