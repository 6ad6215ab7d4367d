"""Where labelled sentences come from: TFDS, the embedded reviews, or files in the GLUE layout.

A source is a string, so that a config can name it:

- ``"tfds:glue/sst2"``, or any ``"tfds:NAME"`` whose features are ``sentence`` and ``label``;
- ``"reviews"``, the small set that comes with the package;
- the path of a directory that holds ``train.tsv``, ``dev.tsv`` and ``test.tsv``.

Other tasks of GLUE have other features and columns: their layouts are in ``glue_tasks``.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import tsv
from experiments.tsv import Layout

SPLITS = ("train", "validation", "test")
_FILES = (("train", "train.tsv"), ("validation", "dev.tsv"), ("test", "test.tsv"))
SENTENCES = Layout(files=_FILES, folder="SST-2")

_REVIEWS = ("reviews", "tfds:lora_reviews")

# Builders that TFDS ships but does not list until their module has been imported.
_BUILDER_MODULES = {"glue": "tensorflow_datasets.text.glue"}

_SOURCES = (
    "a source is 'tfds:NAME' (such as 'tfds:glue/sst2'), 'reviews', "
    f"or a directory with {', '.join(file for _, file in _FILES)}"
)


class Examples(NamedTuple):
    """Sentences, or pairs of them, with their labels.

    Attributes:
      sentences: one string per example.
      labels: ``(n,)`` int32, float32 for a regression, or None for a test split whose labels are
        not published.
      pairs: the second sentence of each example, or None.
      notes: what was left out.
    """

    sentences: tuple[str, ...]
    labels: np.ndarray | None
    pairs: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def load(
    source: str,
    split: str,
    *,
    data_dir: str | None = None,
    num_labels: int = 2,
    layout: Layout = SENTENCES,
) -> Examples:
    """The examples of one split, in the order of the original files.

    Args:
      source: ``"tfds:NAME"``, ``"reviews"``, or a directory in the GLUE layout.
      split: ``"train"``, ``"validation"`` or ``"test"``; or another that the layout has.
      data_dir: where TFDS keeps prepared data; None for its own default.
      num_labels: labels are integers in ``[0, num_labels)``.
      layout: the features or columns.

    Raises:
      FileNotFoundError: no such source, or it is not prepared and cannot be prepared here.
      ValueError: an unknown split, or a row, feature or label that is not as it should be.
    """
    if split not in dict(layout.files):
        raise ValueError(f"split {split!r}, where there are {list(dict(layout.files))}")
    if source in _REVIEWS or source.startswith("tfds:"):
        rows = _tfds_rows(source, split, data_dir=data_dir, text=layout.text)
        return _from_rows(source, rows, num_labels, layout)
    if data_dir is not None:
        raise ValueError(
            f"data_dir={data_dir!r} says where TFDS keeps its data, but the source {source!r} "
            f"is not one of TFDS: leave data_dir out ({_SOURCES})"
        )
    path = _find_tsv(source, split, layout)
    return _examples(tsv.read(path, layout, labelled=split != "test", num_labels=num_labels))


def subset(examples: Examples, count: int | None, seed: int) -> Examples:
    """The first ``count`` examples after a shuffle that depends on ``seed`` alone.

    ``count`` None or 0 gives all examples, in their own order.

    Raises:
      ValueError: ``count`` is negative or more than there are.

    >>> subset(Examples(("a", "b", "c"), np.array([0, 1, 0], np.int32)), 2, seed=1).sentences
    ('a', 'c')
    """
    total = len(examples.sentences)
    if not count:
        return examples
    if not 0 < count <= total:
        raise ValueError(
            f"a subset of {count} examples, where there are {total}: ask for 0..{total}"
        )
    return take(examples, permutation(total, seed, stream=_SUBSET_STREAM)[:count])


# Epochs number the streams from 0, so the last one is free for choosing a subset.
_SUBSET_STREAM = 2**64 - 1


def permutation(n: int, seed: int, *, stream: int) -> np.ndarray:
    """A random order of ``n`` things that depends on ``(n, seed, stream)`` alone.

    It sorts the raw output of Philox, which numpy promises never to change, rather than call
    ``Generator.permutation``, whose algorithm a numpy release may change.

    Args:
      n: how many.
      seed: in ``[0, 2**64)``.
      stream: in ``[0, 2**64)``, such as the number of the epoch.

    Returns:
      ``(n,)`` int64.

    Raises:
      ValueError: ``seed`` or ``stream`` out of range.
    """
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} {value} is not in [0, 2**64)")
    raw = np.random.Philox(key=int(stream) << 64 | int(seed)).random_raw(n)
    return np.argsort(raw, kind="stable").astype(np.int64)


def take(examples: Examples, rows: Sequence[int]) -> Examples:
    """The examples with these numbers."""
    some = lambda texts: tuple(texts[row] for row in rows)
    return Examples(
        some(examples.sentences),
        None if examples.labels is None else examples.labels[rows],
        None if examples.pairs is None else some(examples.pairs),
        examples.notes,
    )


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of several splits, one after the other."""
    texts = lambda field: tuple(text for part in parts for text in getattr(part, field))
    labels = [part.labels for part in parts]
    return Examples(
        texts("sentences"),
        None if any(x is None for x in labels) else np.concatenate(labels),
        None if parts[0].pairs is None else texts("pairs"),
        texts("notes"),
    )


# Files in the GLUE layout.


def read_tsv(path: str | Path, *, labelled: bool, num_labels: int = 2) -> Examples:
    """Reads a file with the columns ``sentence`` and ``label``; see :func:`tsv.read`."""
    return _examples(tsv.read(path, SENTENCES, labelled=labelled, num_labels=num_labels))


def _examples(table: tsv.Table) -> Examples:
    pairs = table.texts[1] if len(table.texts) > 1 else None
    return Examples(table.texts[0], table.labels, pairs, (table.note,) if table.note else ())


def _find_tsv(source: str, split: str, layout: Layout) -> Path:
    directory = Path(source).expanduser()
    if not directory.is_dir():
        state = "is a file" if directory.exists() else "does not exist"
        raise FileNotFoundError(f"source {source!r}: {directory.absolute()} {state}; {_SOURCES}")
    name = dict(layout.files)[split]
    # The directory of the task, or the one that has those of all tasks.
    path = directory / layout.folder / name
    path = path if path.is_file() else directory / name
    if not path.is_file():
        existing = sorted(entry.name for entry in directory.iterdir()) or "nothing"
        raise FileNotFoundError(
            f"source {source!r}: split {split!r} is read from {path}, which does not exist; "
            f"in the directory there is {existing}"
        )
    return path


# TensorFlow Datasets, read without TensorFlow.


def _tfds_rows(
    source: str, split: str, *, data_dir: str | None, text: Sequence[str]
) -> Sequence[dict[str, Any]]:
    builder = _builder(source, data_dir)
    missing = {*text, "label"} - set(builder.info.features or ())
    if missing:
        raise ValueError(
            f"source {source!r} has the features {sorted(builder.info.features or ())}, "
            f"without {sorted(missing)}"
        )
    if not builder.is_prepared():
        builder = _prepare(builder, source, data_dir)
    if split not in builder.info.splits:
        raise ValueError(
            f"source {source!r} has the splits {sorted(builder.info.splits)}, not {split!r}"
        )
    try:
        rows = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise ValueError(
            f"source {source!r}: the data in {builder.data_path} are not array_record files, "
            f"which alone are read without TensorFlow; give another data_dir, to prepare them anew"
        ) from error
    # One read of all: by single examples, each would unpack the block of records it stands in.
    return rows.__getitems__(list(range(len(rows))))


def _from_rows(
    source: str, rows: Sequence[dict[str, Any]], num_labels: int, layout: Layout
) -> Examples:
    if not rows:
        raise ValueError(f"source {source!r} has no examples in this split")
    # TFDS shuffles when it writes; idx gives back the order of the original file.
    if "idx" in rows[0]:
        rows = sorted(rows, key=lambda row: int(row["idx"]))
    texts = [tuple(_text(row[field]) for row in rows) for field in layout.text]
    values = [row["label"] for row in rows]
    read = _tfds_numbers if layout.scale else _tfds_labels
    return Examples(texts[0], read(source, values, layout.scale or num_labels), *texts[1:])


def _text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _tfds_labels(source: str, values: Sequence[Any], num_labels: int) -> np.ndarray | None:
    labels = np.asarray(values)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"source {source!r} has labels of dtype {labels.dtype}, not integers")
    # TFDS writes -1 where the label is not published.
    if np.all(labels == -1):
        return None
    outside = sorted({int(label) for label in labels if not 0 <= label < num_labels})
    if outside:
        raise ValueError(f"source {source!r} has labels {outside}, not in [0, {num_labels})")
    return labels.astype(np.int32)


def _tfds_numbers(
    source: str, values: Sequence[Any], scale: tuple[float, float]
) -> np.ndarray | None:
    labels = np.asarray(values, np.float32)
    # TFDS writes -1 where the label is not published.
    if np.all(labels == -1):
        return None
    low, high = scale
    outside = labels[~((labels >= low) & (labels <= high))]
    if outside.size:
        raise ValueError(f"source {source!r} has labels {outside[:5]}, not in [{low:g}, {high:g}]")
    return labels


def _prepare(builder: Any, source: str, data_dir: str | None) -> Any:
    """Downloads and writes the data of ``builder``; returns a builder that reads them."""
    if source not in _REVIEWS and importlib.util.find_spec("tensorflow") is None:
        raise FileNotFoundError(
            f"source {source!r} is not prepared: looked in {builder.data_path}. To prepare it, "
            f"TFDS needs TensorFlow once: pip install 'lora_jax[tfds-prepare]' and run this "
            f"again. If it is prepared elsewhere, give its data_dir; {_SOURCES}"
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        # Another process may have prepared the same data meanwhile: the rename then fails.
        if not builder.is_prepared():
            error.add_note(f"source {source!r} could not be prepared here; {_SOURCES}")
            raise
    return _builder(source, data_dir)


def _builder(source: str, data_dir: str | None) -> Any:
    if source in _REVIEWS:
        return importlib.import_module("experiments.reviews").builder(data_dir=data_dir)
    import tensorflow_datasets as tfds  # slow to import, and of use only here

    name = source.removeprefix("tfds:")
    module = _BUILDER_MODULES.get(name.partition("/")[0])
    if module:
        importlib.import_module(module)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"source {source!r}: TFDS knows no dataset {name!r}, and none is prepared in "
            f"{data_dir or 'its default data_dir'}; {_SOURCES}"
        ) from error
