r"""Files in the GLUE layout: one example a line, fields parted by tabs.

A quote character is a character like any other, and a line ends at ``\n`` (or ``\r\n``) only.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MOST = 10  # lines that a note names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a task's examples stand: its fields in TFDS, and its columns in GLUE's files.

    Attributes:
      text: one or two fields of TFDS with text; the label is in "label".
      columns: the columns with the same text.
      label: the column with the label.
      words: what the files call the classes, in the order of their numbers; empty where they have
        the numbers themselves.
      header: the names of the columns, where the files have no line that says them.
      files: the file of each split.
      folder: the directory that GLUE unpacks the task to.
      scale: where labels are real numbers, the lowest and the highest.
      gaps: whether the published files have broken rows, which are then left out, and said.
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
    """The columns of a file: text by column, labels ``(n,)`` or None, and what was left out."""

    texts: tuple[tuple[str, ...], ...]
    labels: np.ndarray | None
    note: str = ""


def read(path: str | Path, layout: Layout, *, labelled: bool, num_labels: int) -> Table:
    """Reads a file.

    Args:
      path: the file.
      layout: its columns; others are not read.
      labelled: the label's column must be there. Where it need not be, it is read if it is.
      num_labels: classes are integers in ``[0, num_labels)``.

    Raises:
      ValueError: names the file and the line that is not as it should be.
      FileNotFoundError: no such file.
    """
    lines, header = _lines(Path(path)), list(layout.header)
    first = 1 if header else 2
    if not header:
        header = lines[0].split("\t")
        _check_header(path, header, [*layout.columns, *([layout.label] if labelled else [])])
        lines = lines[1:]
        if not lines:
            raise ValueError(f"{path}:1: a header and no examples below it")
    rows, gaps = {}, []
    for number, line in enumerate(lines, first):
        try:
            rows[number] = _fields(path, number, line, header=header, columns=layout.columns)
        except ValueError:
            if not layout.gaps:
                raise
            gaps.append(number)
    shown = ", ".join(map(str, gaps[:_MOST])) + (", ..." if len(gaps) > _MOST else "")
    note = f"{path}: {len(gaps)} broken rows left out, lines {shown}" if gaps else ""
    texts = tuple(tuple(row[column] for row in rows.values()) for column in layout.columns)
    if layout.label not in header:
        return Table(texts, None, note)
    one = lambda number, row: _label(path, number, row[layout.label], layout, num_labels)
    labels = [one(number, row) for number, row in rows.items()]
    return Table(texts, np.array(labels, np.float32 if layout.scale else np.int32), note)


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


def _check_header(path: str | Path, header: list[str], wanted: list[str]) -> None:
    if any(header.count(column) != 1 for column in wanted):
        raise ValueError(
            f"{path}:1: the header must have each of {wanted} once, and has {header}; "
            f"write the columns' names in the first line, parted by tabs"
        )


def _fields(
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


def _label(path: str | Path, number: int, field: str, layout: Layout, num_labels: int) -> Any:
    if layout.scale:
        return _number(path, number, field, layout.scale)
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


def _number(path: str | Path, number: int, field: str, scale: tuple[float, float]) -> float:
    low, high = scale
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?", field, re.ASCII) or not low <= float(field) <= high:
        raise ValueError(f"{path}:{number}: label {field!r} is no number from {low:g} to {high:g}")
    return float(field)


SPLIT_FILES = (("train", "train.tsv"), ("validation", "dev.tsv"), ("test", "test.tsv"))
SENTENCES = Layout(files=SPLIT_FILES, folder="SST-2")
