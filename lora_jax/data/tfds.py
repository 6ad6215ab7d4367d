"""Reads TensorFlow Datasets without TensorFlow."""

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_jax.data.examples import Examples
from lora_jax.data.tsv import SPLIT_FILES, Layout

if TYPE_CHECKING:  # slow to import
    from tensorflow_datasets.core import DatasetBuilder

REVIEWS = ("reviews", "tfds:lora_reviews")

# Builders of TFDS that it does not list until their module has been imported.
_BUILDER_MODULES = {"glue": "tensorflow_datasets.text.glue"}

SOURCES = (
    "a source is 'tfds:NAME' (such as 'tfds:glue/sst2'), 'reviews', "
    f"or a directory with {', '.join(file for _, file in SPLIT_FILES)}"
)


def read(
    source: str, split: str, *, data_dir: str | None, text: Sequence[str]
) -> Sequence[dict[str, Any]]:
    """Reads the rows of a split in TFDS's order, and prepares the data set if it is not yet.

    Args:
      source: ``"tfds:NAME"`` or ``"reviews"``.
      split: name of the split, such as ``"train"``.
      data_dir: directory of data that TFDS has prepared; None for its default.
      text: features that must exist besides the label.

    Raises:
      FileNotFoundError: there is no such data set, or it can't be prepared here.
      ValueError: the data set lacks the split or a feature, or is stored in another form.
    """
    builder = _make_builder(source, data_dir)
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
    # All rows are read at once, as each read unpacks whole blocks of records.
    return rows.__getitems__(list(range(len(rows))))


def from_rows(
    source: str, rows: Sequence[dict[str, Any]], num_labels: int, layout: Layout
) -> Examples:
    """Makes examples of the rows of a split, in the order of the original file.

    Raises:
      ValueError: there are no rows, or a label is wrong.
    """
    if not rows:
        raise ValueError(f"source {source!r} has no examples in this split")
    # TFDS shuffles rows when it writes them; idx is their order in the original file.
    if "idx" in rows[0]:
        rows = sorted(rows, key=lambda row: int(row["idx"]))
    texts = [tuple(_decode(row[field]) for row in rows) for field in layout.text]
    values = [row["label"] for row in rows]
    if layout.scale:
        labels = _check_numbers(source, values, layout.scale)
    else:
        labels = _check_labels(source, values, num_labels)
    return Examples(texts[0], labels, *texts[1:])


def _decode(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _check_labels(source: str, values: Sequence[Any], num_labels: int) -> np.ndarray | None:
    labels = np.asarray(values)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"source {source!r} has labels of dtype {labels.dtype}, not integers")
    # TFDS writes -1 for labels that are not published.
    if np.all(labels == -1):
        return None
    outside = sorted({int(label) for label in labels if not 0 <= label < num_labels})
    if outside:
        raise ValueError(f"source {source!r} has labels {outside}, not in [0, {num_labels})")
    return labels.astype(np.int32)


def _check_numbers(
    source: str, values: Sequence[Any], scale: tuple[float, float]
) -> np.ndarray | None:
    labels = np.asarray(values, np.float32)
    # TFDS writes -1 for labels that are not published.
    if np.all(labels == -1):
        return None
    low, high = scale
    outside = labels[~((labels >= low) & (labels <= high))]
    if outside.size:
        raise ValueError(f"source {source!r} has labels {outside[:5]}, not in [{low:g}, {high:g}]")
    return labels


def _prepare(builder: "DatasetBuilder", source: str, data_dir: str | None) -> "DatasetBuilder":
    """Downloads and writes the data of ``builder``, and returns a builder that reads them."""
    if source not in REVIEWS and importlib.util.find_spec("tensorflow") is None:
        raise FileNotFoundError(
            f"source {source!r} is not prepared: looked in {builder.data_path}. To prepare it, "
            f"TFDS needs TensorFlow once: pip install 'lora_jax[tfds-prepare]' and run this "
            f"again. If it is prepared elsewhere, give its data_dir; {SOURCES}"
        )
    try:
        with _hide_output() if source in REVIEWS else contextlib.nullcontext():
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        # The rename fails if another process has prepared the same data meanwhile.
        if not builder.is_prepared():
            error.add_note(f"source {source!r} could not be prepared here; {SOURCES}")
            raise
    return _make_builder(source, data_dir)


@contextlib.contextmanager
def _hide_output() -> Iterator[None]:
    """Hides what TFDS prints, and its progress bars, which are many lines for a second's work."""
    import tensorflow_datasets as tfds

    bar = tfds.core.utils.tqdm(disable=True)
    has_bars = not isinstance(bar, tfds.core.utils.tqdm_utils.EmptyTqdm)
    tfds.display_progress_bar(enable=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(enable=has_bars)


def _make_builder(source: str, data_dir: str | None) -> "DatasetBuilder":
    if source in REVIEWS:
        return importlib.import_module("lora_jax.data.reviews").builder(data_dir=data_dir)
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
            f"{data_dir or 'its default data_dir'}; {SOURCES}"
        ) from error
