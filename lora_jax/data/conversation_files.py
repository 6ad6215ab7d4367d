"""Reads rows from the files that people have: JSON, CSV, Parquet, and data sets of Hugging Face.

What kind a file is, its first bytes and its name say: ``.csv`` and ``.tsv`` are tables with a line
of names, Parquet begins with ``PAR1``, and all else is JSON: an object a line, or one array.
"""

import csv
import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from lora_jax.data import strict_json

PREFIX = "datasets:"  # before the name of a data set of Hugging Face
_TABLES = (".csv", ".tsv")
_PARQUET = b"PAR1"
# First bytes of files of other kinds, with what to do.
_OTHERS = {
    b"\x1f\x8b": ("a gzip archive", "unpack it"),
    b"PK\x03\x04": ("a ZIP archive", "unpack it"),
    b"BZh": ("a bzip2 archive", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("a Zstandard archive", "unpack it"),
    b"\xfd7zXZ": ("an xz archive", "unpack it"),
    b"ARROW1": ("an Arrow file", "convert it to Parquet"),
    b"\xff\xfe": ("a text in UTF-16", "convert it to UTF-8"),
    b"\xfe\xff": ("a text in UTF-16", "convert it to UTF-8"),
}
_SPACE = " \t\r\n"


class Row(NamedTuple):
    """A row of a file.

    Attributes:
      value: what the row holds; a dict, if it is as it should be.
      place: "file:line", for errors.
      problem: what is wrong with its form; "" for nothing.
    """

    value: object
    place: str
    problem: str = ""


def read(source: str | Path) -> list[Row]:
    """Reads the rows of a file, of a folder, or of a data set.

    Args:
      source: path of a file; or of a folder that the library ``datasets`` reads; or
        "datasets:NAME", "datasets:NAME:SPLIT" or "datasets:NAME@CONFIG:SPLIT" for a data set of the
        Hub or of its cache.

    Raises:
      OSError: the file can't be read.
      ValueError: it is of another kind, or empty, or takes a library that is not installed.
    """
    path = Path(source).expanduser()
    if str(source).startswith(PREFIX):
        return _read_dataset(str(source).removeprefix(PREFIX), str(source))
    if path.is_dir():
        return _read_dataset(str(path), str(source))
    if not path.exists() and not path.suffix and str(source).count("/") <= 1:
        raise FileNotFoundError(
            f"There is no file {source}; if it is a data set of the Hub, write {PREFIX}{source}."
        )
    data = path.read_bytes()
    if data.startswith(_PARQUET):
        return _read_parquet(path)
    for begin, (kind, advice) in _OTHERS.items():
        if data.startswith(begin):
            raise ValueError(f"{path} is {kind}, which is not read; {advice}.")
    text = _decode(path, data)
    read_rows = _read_table if path.suffix.lower() in _TABLES else _read_json
    rows = list(read_rows(path, text))
    if not rows:
        raise ValueError(f"{path}: no row, where conversations were expected.")
    return rows


def _decode(path: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8 at byte {error.start} of the file; convert it to UTF-8."
        ) from error
    if not text.strip():
        raise ValueError(f"{path}: empty file, where conversations were expected, one a line.")
    return text


def _read_json(path: Path, text: str) -> Iterator[Row]:
    if text.lstrip(_SPACE).startswith("["):
        yield from _read_array(path, text)
        return
    rows = list(_read_lines(path, text))
    if rows[0].problem and (whole := _read_whole(path, text, rows[0].place)):
        rows = [whole]
    yield from rows


def _read_lines(path: Path, text: str) -> Iterator[Row]:
    """Yields the values of lines that are not blank."""
    # splitlines() would also split at characters that occur within texts (U+2028, ...).
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(_SPACE):
            continue
        place = f"{path}:{number}"
        try:
            yield Row(strict_json.loads(line), place)
        except ValueError as error:
            yield Row(None, place, f"no JSON object ({error})")


def _read_whole(path: Path, text: str, place: str) -> Row | None:
    """Reads a file that is one object over several lines; None if it is not."""
    try:
        return Row(strict_json.loads(text), place)
    except ValueError:
        return None


def _read_array(path: Path, text: str) -> Iterator[Row]:
    """Yields the values of an array, each with the line on which it begins."""
    place = _skip_space(text, text.index("[") + 1)
    line, counted, is_open = 1, 0, text[place : place + 1] != "]"
    while True:
        line, counted = line + text.count("\n", counted, place), place
        if not is_open:
            break
        try:
            value, place = strict_json.read_value(text, place)
        except ValueError as error:
            yield Row(None, f"{path}:{line}", f"no JSON in the array that the file is ({error})")
            return
        yield Row(value, f"{path}:{line}")
        place = _skip_space(text, place)
        is_open = text[place : place + 1] == ","
        place = _skip_space(text, place + 1) if is_open else place
    if text[place:].strip(_SPACE) != "]":
        rest = text[place : place + 40].strip()
        problem = f"the array that the file is goes on with {rest!r}, and no comma or end of it"
        yield Row(None, f"{path}:{line}", problem)


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in _SPACE:
        place += 1
    return place


def _read_table(path: Path, text: str) -> Iterator[Row]:
    """Yields the lines of a table as objects, in which empty cells are missing."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _find_delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names, line = None, 1
    try:
        for cells in reader:
            place, line = f"{path}:{line}", reader.line_num + 1
            if not any(cells):
                continue
            if names is None:
                names = _check_names(place, cells)
            elif len(cells) != len(names):
                yield Row(None, place, f"{len(cells)} cells, where the header has {len(names)}")
            else:
                cells_by_name = zip(names, cells, strict=True)
                yield Row({name: cell for name, cell in cells_by_name if cell}, place)
    except csv.Error as error:
        yield Row(None, f"{path}:{line}", f"no table ({error})")


def _find_delimiter(text: str) -> str:
    """Finds what parts the names in the first line, for spreadsheets write semicolons, too."""
    header = text.lstrip().split("\n", 1)[0]
    return max(",;\t", key=header.count)


def _check_names(place: str, names: list[str]) -> list[str]:
    twice = [name for name in names if names.count(name) > 1]
    if twice or not all(names):
        raise ValueError(f"{place}: each column must have a name of its own; there are {names}")
    return names


def _read_parquet(path: Path) -> list[Row]:
    parquet = _import("pyarrow.parquet", f"{path} is a Parquet file", "pyarrow")
    try:
        values = parquet.ParquetFile(path).read().to_pylist()
    except Exception as error:  # its own errors are of several kinds
        raise ValueError(f"{path} can't be read as Parquet: {error}") from error
    if not values:
        raise ValueError(f"{path}: no row, where conversations were expected.")
    return [Row(_drop_none(x), f"{path}: row {k}") for k, x in enumerate(values, 1)]


def _read_dataset(name: str, source: str) -> list[Row]:
    library = _import("datasets", f"{source} is read with the library datasets", "datasets")
    name, config, split = _split_name(name)
    try:
        if _is_saved(Path(name)):
            found = library.load_from_disk(name)
        else:
            found = library.load_dataset(name, config)
        if hasattr(found, "keys"):  # several splits
            if split not in found:
                raise ValueError(f"there is no split {split!r}; there are {', '.join(found)}")
            found = found[split]
        values = found.to_list()
    except Exception as error:  # its own errors are of several kinds
        raise ValueError(f"{source} can't be read with datasets: {error}") from error
    if not values:
        raise ValueError(f"{source}: no row, where conversations were expected.")
    return [Row(_drop_none(x), f"{source}: row {k}") for k, x in enumerate(values, 1)]


def _split_name(name: str) -> tuple[str, str | None, str]:
    """Returns name, config and split of a data set.

    >>> _split_name("someone/talks@english:validation"), _split_name("someone/talks")
    (('someone/talks', 'english', 'validation'), ('someone/talks', None, 'train'))
    """
    if Path(name).is_dir():
        return name, None, "train"
    name, _, split = name.partition(":")
    name, _, config = name.partition("@")
    return name, config or None, split or "train"


def _is_saved(path: Path) -> bool:
    return any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))


def _import(name: str, purpose: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{purpose}, which needs the package {package}: pip install 'lora_jax[data]'."
        ) from error


def _drop_none(value: Any) -> Any:
    """Leaves out what is None in objects: columns of Arrow have each key of any row."""
    if isinstance(value, dict):
        return {name: _drop_none(x) for name, x in value.items() if x is not None}
    return [_drop_none(x) for x in value] if isinstance(value, list) else value
