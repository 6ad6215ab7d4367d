"""Where labelled sentences come from: TFDS, the embedded reviews, or files in the GLUE layout.

A source is a string, so that a config can name it:

- ``"tfds:glue/sst2"``, or any ``"tfds:NAME"`` whose features are ``sentence`` and ``label``;
- ``"reviews"``, the small set that comes with the package;
- the path of a directory that holds ``train.tsv``, ``dev.tsv`` and ``test.tsv``.
"""

import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SPLITS = ("train", "validation", "test")

_FILES = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}

_REVIEWS = ("reviews", "tfds:lora_reviews")

# Builders that TFDS ships but does not list until their module has been imported.
_BUILDER_MODULES = {"glue": "tensorflow_datasets.text.glue"}

_SOURCES = (
    "a source is 'tfds:NAME' (such as 'tfds:glue/sst2'), 'reviews', "
    f"or a directory with {', '.join(_FILES.values())}"
)


class Examples(NamedTuple):
    """Sentences with their labels.

    Attributes:
      sentences: one string per example.
      labels: ``(n,)`` int32, or None for a test split whose labels are not published.
    """

    sentences: tuple[str, ...]
    labels: np.ndarray | None


def load(source: str, split: str, *, data_dir: str | None = None, num_labels: int = 2) -> Examples:
    """The examples of one split, in the order of the original files.

    Args:
      source: ``"tfds:NAME"``, ``"reviews"``, or a directory in the GLUE layout.
      split: ``"train"``, ``"validation"`` or ``"test"``.
      data_dir: where TFDS keeps prepared data; None for its own default.
      num_labels: labels are integers in ``[0, num_labels)``.

    Raises:
      FileNotFoundError: no such source, or it is not prepared and cannot be prepared here.
      ValueError: an unknown split, or a row, feature or label that is not as it should be.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}, where there are {list(SPLITS)}")
    if source in _REVIEWS or source.startswith("tfds:"):
        return _load_tfds(source, split, data_dir=data_dir, num_labels=num_labels)
    if data_dir is not None:
        raise ValueError(
            f"data_dir={data_dir!r} says where TFDS keeps its data, but the source {source!r} "
            f"is not one of TFDS: leave data_dir out ({_SOURCES})"
        )
    return read_tsv(_find_tsv(source, split), labelled=split != "test", num_labels=num_labels)


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
    return _take(examples, permutation(total, seed, stream=_SUBSET_STREAM)[:count])


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


def _take(examples: Examples, rows: Sequence[int]) -> Examples:
    sentences = tuple(examples.sentences[row] for row in rows)
    return Examples(sentences, None if examples.labels is None else examples.labels[rows])


# Files in the GLUE layout.


def read_tsv(path: str | Path, *, labelled: bool, num_labels: int = 2) -> Examples:
    r"""Reads a file of GLUE: a header, then one example per line, fields parted by tabs.

    A quote character is a character like any other, and a line ends at ``\n`` (or ``\r\n``) only.

    Args:
      path: the file, with a column ``sentence``; other columns are not read.
      labelled: a column ``label`` must be there. Where it need not be, it is read if it is.
      num_labels: labels are integers in ``[0, num_labels)``.

    Raises:
      ValueError: names the file and the line that is not as it should be.
      FileNotFoundError: no such file.
    """
    lines = _lines(Path(path))
    header = lines[0].split("\t")
    wanted = ("sentence", "label") if labelled else ("sentence",)
    missing = [column for column in wanted if header.count(column) != 1]
    if missing:
        raise ValueError(
            f"{path}:1: the header must have each of {list(wanted)} once, and has {header}; "
            f"write the columns' names in the first line, parted by tabs"
        )
    if len(lines) == 1:
        raise ValueError(f"{path}:1: a header and no examples below it")
    rows = [_fields(path, number, line, header) for number, line in enumerate(lines[1:], 2)]
    sentences = tuple(row["sentence"] for row in rows)
    if "label" not in header:
        return Examples(sentences, None)
    labels = [_label(path, n, row["label"], num_labels) for n, row in enumerate(rows, 2)]
    return Examples(sentences, np.array(labels, np.int32))


def _lines(path: Path) -> list[str]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8 at byte {error.start} of the file "
            f"(0x{data[error.start]:02x}): convert the file to UTF-8"
        ) from error
    if not text.strip():
        raise ValueError(f"{path}: empty file, where a header and examples were expected")
    # Not splitlines(), which also splits at characters that stand within sentences (U+0085, ...).
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _fields(path: str | Path, number: int, line: str, header: list[str]) -> dict[str, str]:
    if not line.strip():
        raise ValueError(f"{path}:{number}: empty row; remove the line")
    fields = line.split("\t")
    if len(fields) != len(header):
        raise ValueError(
            f"{path}:{number}: {len(fields)} fields, where the header has {len(header)} {header}"
        )
    row = dict(zip(header, fields, strict=True))
    if not row["sentence"].strip():
        raise ValueError(f"{path}:{number}: empty sentence")
    return row


def _label(path: str | Path, number: int, field: str, num_labels: int) -> int:
    # int() would also take ' 1', '+1' and '1_0'.
    if not re.fullmatch(r"-?[0-9]+", field, re.ASCII):
        raise ValueError(f"{path}:{number}: label {field!r} is not an integer")
    if not 0 <= int(field) < num_labels:
        raise ValueError(f"{path}:{number}: label {field} is not in [0, {num_labels})")
    return int(field)


def _find_tsv(source: str, split: str) -> Path:
    directory = Path(source).expanduser()
    if not directory.is_dir():
        state = "is a file" if directory.exists() else "does not exist"
        raise FileNotFoundError(f"source {source!r}: {directory.absolute()} {state}; {_SOURCES}")
    path = directory / _FILES[split]
    if not path.is_file():
        existing = sorted(entry.name for entry in directory.iterdir()) or "nothing"
        raise FileNotFoundError(
            f"source {source!r}: split {split!r} is read from {path}, which does not exist; "
            f"in the directory there is {existing}"
        )
    return path


# TensorFlow Datasets, read without TensorFlow.


def _load_tfds(source: str, split: str, *, data_dir: str | None, num_labels: int) -> Examples:
    builder = _builder(source, data_dir)
    missing = {"sentence", "label"} - set(builder.info.features or ())
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
    return _from_rows(source, rows.__getitems__(list(range(len(rows)))), num_labels)


def _from_rows(source: str, rows: Sequence[dict[str, Any]], num_labels: int) -> Examples:
    if not rows:
        raise ValueError(f"source {source!r} has no examples in this split")
    # TFDS shuffles when it writes; idx gives back the order of the original file.
    if "idx" in rows[0]:
        rows = sorted(rows, key=lambda row: int(row["idx"]))
    sentences = tuple(_text(row["sentence"]) for row in rows)
    return Examples(sentences, _tfds_labels(source, [row["label"] for row in rows], num_labels))


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
