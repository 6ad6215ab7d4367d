"""Reads Parquet files, by pyarrow, and data sets of Hugging Face, by their library."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_jax.data.tables import Table

if TYPE_CHECKING:  # optional
    import datasets
    import pyarrow

HUB = "datasets:"  # before the name of a data set of Hugging Face


def read_parquet(path: Path) -> Table:
    """Reads a Parquet file; names of classes come from what Hugging Face's library wrote beside it.

    Raises:
      ValueError: it is no whole Parquet file; or pyarrow is not installed, and the message says
        what to install.
      OSError: the file can't be read.
    """
    _require(f"The Parquet file {path}", "pyarrow")
    import pyarrow
    import pyarrow.parquet

    if path.suffix.lower() == ".gz":
        raise ValueError(f"{path}: a Parquet file is packed inside; unpack it with gunzip")
    path.open("rb").close()  # whose errors name the file
    try:
        # One file, whatever the names of the folders it is in.
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: no whole Parquet file ({error})") from error
    columns = [column.to_pylist() for column in table.columns]
    return Table(
        path=str(path),
        columns=tuple(table.column_names),
        rows=list(zip(*columns, strict=True)),
        lines=range(1, table.num_rows + 1),
        has_lines=False,
        form="Parquet",
        class_names=_read_class_names(table.schema),
    )


def _read_class_names(schema: "pyarrow.Schema") -> dict[str, tuple[str, ...]]:
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    is_class = lambda x: isinstance(x, Mapping) and x.get("_type") == "ClassLabel"
    return {name: tuple(x["names"]) for name, x in features.items() if is_class(x)}


def read_hub(source: str) -> dict[str, Table]:
    """Reads all splits of a data set of Hugging Face.

    Args:
      source: "datasets:NAME" or "datasets:NAME@CONFIG", such as "datasets:ag_news".

    Raises:
      ValueError: it can't be loaded; or their library is not installed, and the message says what
        to install.
    """
    _require(f"The source {source!r}", "datasets")
    import datasets

    name, _, config = source.removeprefix(HUB).partition("@")
    try:
        found = datasets.load_dataset(name, config or None)
    except Exception as error:  # their library's, fsspec's, pyarrow's, the Hub's
        raise ValueError(f"source {source!r} can't be loaded: {error}") from error
    return {split: _to_table(source, split, part) for split, part in found.items()}


def read_saved(directory: Path) -> dict[str, Table]:
    """Reads a folder that ``save_to_disk`` of Hugging Face's library has written.

    Raises:
      ValueError: as :func:`read_hub`.
    """
    _require(f"The folder {directory}, saved by Hugging Face's library,", "datasets")
    import datasets

    try:
        found = datasets.load_from_disk(str(directory))
    except Exception as error:
        raise ValueError(f"{directory} can't be loaded: {error}") from error
    parts = found if isinstance(found, Mapping) else {"train": found}
    return {split: _to_table(str(directory), split, part) for split, part in parts.items()}


def is_saved(directory: Path) -> bool:
    """Returns whether ``save_to_disk`` of Hugging Face's library has written a folder."""
    return any((directory / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _to_table(source: str, split: str, part: "datasets.Dataset") -> Table:
    names = tuple(part.column_names)
    features = {name: getattr(part.features[name], "names", None) for name in names}
    return Table(
        path=f"{source} ({split})",
        columns=names,
        rows=list(zip(*(part[name] for name in names), strict=True)),
        lines=range(1, len(part) + 1),
        has_lines=False,
        form="a data set of Hugging Face",
        class_names={name: tuple(x) for name, x in features.items() if x},
    )


def _require(what: str, module: str) -> None:
    """Checks that a library is installed, which only such data need.

    Raises:
      ValueError: it is not; the message says what to install.
    """
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{what} needs {module}: pip install 'lora_jax[data]'")
