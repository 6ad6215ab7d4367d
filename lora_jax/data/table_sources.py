"""Finds the tables of a source: a file, a folder with a file a split, or a data set's name."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_jax.data import columnar, delimited, json_rows, reviews
from lora_jax.data.tables import FORMATS, Table, suffix

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_SPLITS = {
    "train": TRAIN, "training": TRAIN, "validation": VALIDATION, "valid": VALIDATION,
    "val": VALIDATION, "dev": VALIDATION, "eval": VALIDATION, "test": TEST, "testing": TEST,
}  # fmt: skip
_EXAMPLES = (
    "a source is a file (.csv, .tsv, .jsonl, .json, .parquet), a folder with train.csv or the like "
    "(and validation.csv, if there is one), 'reviews', or 'datasets:NAME' for a data set of "
    "Hugging Face"
)
_REFUSED = {
    ".xlsx": "save the sheet as CSV", ".xls": "save the sheet as CSV",
    ".ods": "save the sheet as CSV", ".zip": "unpack it", ".arrow": "save it as Parquet",
    ".feather": "save it as Parquet", ".txt": "it has no columns; make a CSV or TSV file of it",
    ".bz2": "unpack it", ".xz": "unpack it", ".zst": "unpack it",
    ".pkl": "a pickle can run any code; save it as Parquet or CSV",
}  # fmt: skip


def read_tables(
    source: str, *, delimiter: str = "", columns: Sequence[str] = ()
) -> dict[str, Table]:
    """Reads the tables of a source, by split: "train", and "validation" and "test" if it has them.

    Args:
      source: path of a file, whose rows are of the split "train", or of a folder; or "reviews", or
        "datasets:NAME".
      delimiter: character between the fields of CSV files; "" to find it.
      columns: names of the columns of CSV files without a line of them.

    Raises:
      ValueError: the source can't be read, with file and line of what is wrong; or a library is not
        installed.
      FileNotFoundError: there is no such source.
    """
    if source.startswith(columnar.HUB):
        return _by_split(source, _read_hub(source))
    path = reviews.DIRECTORY if source == "reviews" else Path(source).expanduser()
    if not source or not path.exists():
        raise FileNotFoundError(_explain_missing(source))
    if path.is_dir() and columnar.is_saved(path):
        return _by_split(source, columnar.read_saved(path))
    read = functools.partial(_read_cached, delimiter=delimiter, columns=tuple(columns))
    if not path.is_dir():
        return {TRAIN: read(path)}
    files = _find_files(path)
    return {split: _join([read(file) for file in members]) for split, members in files.items()}


def _join(tables: Sequence[Table]) -> Table:
    """Joins the tables of the shards of a split.

    Raises:
      ValueError: they have different columns.
    """
    first, *others = tables
    if not others:
        return first
    for table in others:
        if table.columns != first.columns:
            raise ValueError(
                f"{first.path} has the columns {list(first.columns)}, and {table.path} "
                f"{list(table.columns)}: the files of a split must have the same"
            )
    rows = [row for table in tables for row in table.rows]
    return dataclasses.replace(
        first,
        path=f"{first.path} and {len(others)} more",
        rows=rows,
        lines=range(1, len(rows) + 1),
        has_lines=False,
        notes=tuple(note for table in tables for note in table.notes),
    )


def _read_cached(path: Path, *, delimiter: str, columns: tuple[str, ...]) -> Table:
    """Reads a file, unless it has been read and is as it was: the runs of a sweep ask for it."""
    status = path.stat()
    return _read_version(path, delimiter, columns, (status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=2)
def _read_hub(source: str) -> dict[str, Table]:
    return columnar.read_hub(source)


@functools.lru_cache(maxsize=4)
def _read_version(
    path: Path, delimiter: str, columns: tuple[str, ...], version: tuple[int, int]
) -> Table:
    return read_file(path, delimiter=delimiter, columns=columns)


def read_file(path: Path, *, delimiter: str = "", columns: Sequence[str] = ()) -> Table:
    """Reads a file in the format of its ending.

    Args:
      path: path of the file.
      delimiter: character between the fields of a CSV file; "" to find it.
      columns: names of the columns of a CSV file without a line of them.

    Raises:
      ValueError: its ending is that of no format here, or it is damaged.
      OSError: it can't be read.
    """
    ending = suffix(path)
    form = FORMATS.get(ending)
    if form is None:
        advice = _REFUSED.get(path.suffix.lower()) or _REFUSED.get(ending, _EXAMPLES)
        raise ValueError(f"{path}: files that end in {ending or 'nothing'!r} aren't read: {advice}")
    if form == "delimited":
        return delimited.read(path, delimiter=delimiter, columns=columns)
    if delimiter or columns:
        raise ValueError(
            f"{path}: data.delimiter and data.columns are for CSV and TSV files; leave them empty"
        )
    readers: dict[str, Callable[[Path], Table]] = {
        "json": json_rows.read,
        "parquet": columnar.read_parquet,
    }
    return readers[form](path)


def _find_files(directory: Path) -> dict[str, list[Path]]:
    """Finds the files of each split, by names such as "dev.tsv" or "train-00000-of-00002.parquet".

    Raises:
      ValueError: there are several files for a split, in several formats.
      FileNotFoundError: there is none for training.
    """
    found: dict[str, list[Path]] = {}
    for folder in (directory, directory / "data"):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            stem = path.name.split(".")[0].lower()
            split = _SPLITS.get(re.sub(r"-\d+-of-\d+$", "", stem))
            if split and suffix(path) in FORMATS and path.is_file():
                found.setdefault(split, []).append(path)
        if TRAIN in found:
            break
    if TRAIN not in found:
        names = sorted(path.name for path in directory.iterdir()) or "nothing"
        raise FileNotFoundError(
            f"source {str(directory)!r}: there is no train.csv, .tsv, .jsonl, .json or .parquet; "
            f"in the folder there is {names}"
        )
    for split, files in found.items():
        is_sharded = all(re.search(r"-\d+-of-\d+\.", file.name) for file in files)
        if len(files) > 1 and not is_sharded:
            names = [file.name for file in files]
            raise ValueError(f"source {str(directory)!r}: {names} could each be the split {split}")
    return found


def _by_split(source: str, tables: dict[str, Table]) -> dict[str, Table]:
    found = {_SPLITS[name]: table for name, table in tables.items() if name in _SPLITS}
    if TRAIN not in found:
        raise ValueError(f"source {source!r} has the splits {list(tables)}, and none is 'train'")
    return found


def _explain_missing(source: str) -> str:
    if not source:
        return f"data.source is empty: {_EXAMPLES}; for example --config.data.source=news.csv"
    if source.startswith("tfds:"):
        return f"source {source!r}: data sets of TFDS are for experiments.glue; here {_EXAMPLES}"
    path = Path(source).expanduser().absolute()
    is_name = not suffix(source) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)
    hint = f"; for a data set of that name write {columnar.HUB}{source}" if is_name else ""
    return f"source {source!r}: {path} does not exist{hint} ({_EXAMPLES})"
