"""Loads labelled sentences from TFDS, the embedded reviews, or files in the GLUE layout.

A source is a string, so that a config can name it:

- ``"tfds:glue/sst2"``, or any ``"tfds:NAME"`` whose features are ``sentence`` and ``label``;
- ``"reviews"``, the small set that comes with the package;
- the path of a directory that holds ``train.tsv``, ``dev.tsv`` and ``test.tsv``.

Other tasks of GLUE have other features and columns; their layouts are in ``lora_jax.tasks.glue``.
"""

from pathlib import Path

from lora_jax.data import tsv
from lora_jax.data.examples import Examples, from_table
from lora_jax.data.tfds import REVIEWS, SOURCES, from_rows, read
from lora_jax.data.tsv import SENTENCES, Layout

SPLITS = ("train", "validation", "test")


def load(
    source: str,
    split: str,
    *,
    data_dir: str | None = None,
    num_labels: int = 2,
    layout: Layout = SENTENCES,
) -> Examples:
    """Loads the examples of one split, in the order of the original files.

    Args:
      source: ``"tfds:NAME"``, ``"reviews"``, or a directory in the GLUE layout.
      split: ``"train"``, ``"validation"`` or ``"test"``; or another that the layout has.
      data_dir: directory of data that TFDS has prepared; None for its default.
      num_labels: number of classes; labels are integers in ``[0, num_labels)``.
      layout: features in TFDS, or columns in files.

    Raises:
      FileNotFoundError: there is no such source, or it is not prepared and can't be prepared here.
      ValueError: the split is unknown, or a row, feature or label is wrong.
    """
    if split not in dict(layout.files):
        raise ValueError(f"split {split!r}, where there are {list(dict(layout.files))}")
    if source in REVIEWS or source.startswith("tfds:"):
        rows = read(source, split, data_dir=data_dir, text=layout.text)
        return from_rows(source, rows, num_labels, layout)
    if data_dir is not None:
        raise ValueError(
            f"data_dir={data_dir!r} says where TFDS keeps its data, but the source {source!r} "
            f"is not one of TFDS: leave data_dir out ({SOURCES})"
        )
    path = _find_tsv(source, split, layout)
    return from_table(tsv.read(path, layout, require_labels=split != "test", num_labels=num_labels))


def _find_tsv(source: str, split: str, layout: Layout) -> Path:
    directory = Path(source).expanduser()
    if not directory.is_dir():
        state = "is a file" if directory.exists() else "does not exist"
        raise FileNotFoundError(f"source {source!r}: {directory.absolute()} {state}; {SOURCES}")
    name = dict(layout.files)[split]
    # The source is the directory of the task, or that of all tasks.
    path = directory / layout.folder / name
    path = path if path.is_file() else directory / name
    if not path.is_file():
        existing = sorted(entry.name for entry in directory.iterdir()) or "nothing"
        raise FileNotFoundError(
            f"source {source!r}: split {split!r} is read from {path}, which does not exist; "
            f"in the directory there is {existing}"
        )
    return path
