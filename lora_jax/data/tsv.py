r"""Reads files in the GLUE layout, with one example a line and tabs between its fields.

A quote character has no special meaning, and a line ends only at ``\n`` (or ``\r\n``).
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_MAX_LINES = 10  # number of lines that a note lists


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout of a task's examples: its fields in TFDS, and its columns in GLUE's files.

    Attributes:
      text: one or two fields of TFDS with text; the label is in "label".
      columns: columns with the same text.
      label: column with the label.
      words: names of the classes in files, in the order of their numbers; empty if files have the
        numbers.
      header: names of the columns, if the files have no line with them.
      files: file of each split.
      folder: directory that GLUE unpacks the task to.
      scale: the lowest and the highest label, if labels are real numbers.
      gaps: whether the published files have broken rows; they are then left out, and noted.
    """

    text: tuple[str, ...] = ("sentence",)
    columns: tuple[str, ...] = ("sentence",)
    label: str = "label"
    words: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = (("train", "train.tsv"), ("validation", "dev.tsv"))
    folder: str = ""
    scale: tuple[float, float] | None = None
    gaps: bool = False


class Table(NamedTuple):
    """The columns of a file.

    Attributes:
      texts: texts of each column with text.
      labels: ``(n,)`` int32, or float32 for real numbers; None if the file has none.
      note: description of rows that were left out; "" if there are none.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: np.ndarray | None
    note: str = ""


def read(path: str | Path, layout: Layout, *, require_labels: bool, num_labels: int) -> Table:
    """Reads a file.

    Args:
      path: path of the file.
      layout: layout with the columns to read.
      require_labels: whether the column of the label must exist; if it does exist, it is always
        read.
      num_labels: number of classes, which are integers in ``[0, num_labels)``.

    Raises:
      ValueError: a line is wrong; the message names the file and the line.
      FileNotFoundError: there is no such file.
    """
    lines, header = _read_lines(Path(path)), list(layout.header)
    first = 1 if header else 2
    if not header:
        header = lines[0].split("\t")
        columns = [*layout.columns]
        if require_labels:
            columns.append(layout.label)
        _check_header(path, header, columns)
        lines = lines[1:]
        if not lines:
            raise ValueError(f"{path}:1: a header and no examples below it")
    rows: dict[int, dict[str, str]] = {}
    broken = []
    for number, line in enumerate(lines, first):
        try:
            rows[number] = _parse_fields(path, number, line, header=header, columns=layout.columns)
        except ValueError:
            if not layout.gaps:
                raise
            broken.append(number)
    note = _describe_broken(path, broken) if broken else ""
    texts = tuple(tuple(row[column] for row in rows.values()) for column in layout.columns)
    if layout.label not in header:
        return Table(texts, None, note)
    labels = [
        _parse_label(path, number, row[layout.label], layout, num_labels)
        for number, row in rows.items()
    ]
    return Table(texts, np.array(labels, np.float32 if layout.scale else np.int32), note)


def _describe_broken(path: str | Path, lines: Sequence[int]) -> str:
    listing = ", ".join(map(str, lines[:_MAX_LINES]))
    if len(lines) > _MAX_LINES:
        listing += ", ..."
    return f"{path}: {len(lines)} broken rows left out, lines {listing}"


def _read_lines(path: Path) -> list[str]:
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
    # splitlines() would also split at characters that occur within sentences (U+0085, ...).
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _check_header(path: str | Path, header: list[str], wanted: list[str]) -> None:
    if any(header.count(column) != 1 for column in wanted):
        raise ValueError(
            f"{path}:1: the header must have each of {wanted} once, and has {header}; "
            f"write the columns' names in the first line, parted by tabs"
        )


def _parse_fields(
    path: str | Path, number: int, line: str, *, header: list[str], columns: Sequence[str]
) -> dict[str, str]:
    if not line.strip():
        raise ValueError(f"{path}:{number}: empty row; remove the line")
    fields = line.split("\t")
    if len(fields) != len(header):
        raise ValueError(
            f"{path}:{number}: {len(fields)} fields, where the header has {len(header)} {header}"
        )
    row = dict(zip(header, fields, strict=True))
    empty = [column for column in columns if not row[column].strip()]
    if empty:
        raise ValueError(f"{path}:{number}: empty {', '.join(empty)}")
    return row


def _parse_label(
    path: str | Path, number: int, field: str, layout: Layout, num_labels: int
) -> int | float:
    if layout.scale:
        return _parse_number(path, number, field, layout.scale)
    if layout.words:
        if field not in layout.words:
            raise ValueError(f"{path}:{number}: label {field!r} is not one of {layout.words}")
        return layout.words.index(field)
    # int() would also take ' 1', '+1' and '1_0'.
    if not re.fullmatch(r"-?[0-9]+", field, re.ASCII):
        raise ValueError(f"{path}:{number}: label {field!r} is not an integer")
    if not 0 <= int(field) < num_labels:
        raise ValueError(f"{path}:{number}: label {field} is not in [0, {num_labels})")
    return int(field)


def _parse_number(path: str | Path, number: int, field: str, scale: tuple[float, float]) -> float:
    low, high = scale
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?", field, re.ASCII) or not low <= float(field) <= high:
        raise ValueError(f"{path}:{number}: label {field!r} is no number from {low:g} to {high:g}")
    return float(field)


SPLIT_FILES = (("train", "train.tsv"), ("validation", "dev.tsv"), ("test", "test.tsv"))
SENTENCES = Layout(files=SPLIT_FILES, folder="SST-2")
