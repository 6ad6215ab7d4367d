"""Reads CSV and TSV files: any usual delimiter, quoted fields, line breaks within fields."""

import contextlib
import csv
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_jax.data.tables import Table, count_rows, raise_problems, read_text, suffix

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_MAX_LISTED = 5  # number of lines that a note lists
_SAMPLE = 100  # number of records by which a delimiter is chosen
_FIELD_LIMIT = 2**31 - 1  # of the csv module, whose default is below the length of some documents


class _Record(NamedTuple):
    """The fields of a record, and the line at which it begins."""

    line: int
    fields: list[str]


class _RecordError(ValueError):
    """A record can't be read; the arguments are the line at which it begins, and the reason."""


def read(path: Path, *, delimiter: str = "", columns: Sequence[str] = ()) -> Table:
    """Reads a file whose first line names the columns, unless they are given.

    Rows whose fields are all empty are left out, and noted.

    Args:
      path: path of the file.
      delimiter: character between fields; "" to find it.
      columns: names of the columns of a file without a line of them.

    Raises:
      ValueError: the file is damaged, or rows have another number of fields than there are columns;
        the message has file and line of each.
      OSError: the file can't be read.
    """
    text, first = read_text(path), 1
    if mark := re.match(r"sep=(.)\r?\n", text, re.IGNORECASE):  # which Excel reads and writes
        delimiter, text, first = delimiter or mark[1], text[mark.end() :], 2
    delimiter = "\t" if delimiter == "\\t" else delimiter
    delimiter = delimiter or find_delimiter(text, prefer_tab=suffix(path) in (".tsv", ".tab"))
    records, is_quoted = _parse(path, text, delimiter, first)
    names = [name.strip() for name in columns]
    if not names:
        names, records = [name.strip() for name in records[0].fields], records[1:]
    else:
        _check_no_header(path, names, records[0])
    if not records:
        raise ValueError(f"{path}:{first}: a line of column names and no rows below it")
    rows = [record for record in records if any(field.strip() for field in record.fields)]
    _check_widths(path, names, rows, delimiter)
    notes = []
    if blank := len(records) - len(rows):
        notes.append(f"left out: {count_rows(blank)} of {path} with nothing in it")
    # A quote that is not closed where it should be makes one row of many.
    if long := [str(row.line) for row in rows if any("\n" in field for field in row.fields)]:
        listing = ", ".join([*long[:_MAX_LISTED], *(["..."] if len(long) > _MAX_LISTED else [])])
        notes.append(f"fields with line breaks: in {count_rows(len(long))} ({path}:{listing})")
    if not is_quoted and any(field.startswith('"') for row in rows for field in row.fields):
        notes.append(f"{path}: quotes are part of the texts, since they do not come in pairs")
    return Table(
        path=str(path),
        columns=tuple(names),
        rows=[tuple(row.fields[: len(names)]) for row in rows],
        lines=[row.line for row in rows],
        form=f"fields separated by {DELIMITERS.get(delimiter, repr(delimiter))}",
        notes=tuple(notes),
    )


def find_delimiter(text: str, *, prefer_tab: bool = False) -> str:
    r"""Finds the character between the fields of a text: that by which most records fit the first.

    >>> find_delimiter("text;label\nGood, cheap;1\nBad, dear;0\n")
    ';'
    >>> find_delimiter("text\nno column but this one\n")
    ','
    """
    best, most = "\t" if prefer_tab else ",", (0.0, 0)
    for delimiter in ["\t", ",", ";", "|"] if prefer_tab else [",", ";", "\t", "|"]:
        widths = _sample_widths(text, delimiter)
        if not widths or widths[0] < 2:
            continue
        share = sum(width == widths[0] for width in widths) / len(widths)
        if (share, widths[0]) > most:
            best, most = delimiter, (share, widths[0])
    return best


def _sample_widths(text: str, delimiter: str) -> list[int]:
    """Counts the fields of the first records; one that can't be read has none, and is the last."""
    widths: list[int] = []
    try:
        for record in itertools.islice(_records(text, delimiter), _SAMPLE):
            widths.append(len(record.fields))
    except _RecordError:
        widths.append(0)
    return widths


def _parse(path: Path, text: str, delimiter: str, first: int) -> tuple[list[_Record], bool]:
    """Parses a text with quoted fields; or, between tabs, with quotes that mean nothing.

    Returns:
      The records, and whether fields may be quoted.
    """
    try:
        records = list(_records(text, delimiter, first=first))
    except _RecordError as error:
        if delimiter == "\t":
            return list(_records(text, delimiter, first=first, is_quoted=False)), False
        line, reason = error.args
        raise ValueError(
            f"{path}:{line}: the row that begins here can't be read ({reason}): a field with "
            "quotes in it must stand in quotes, and each of those inside be doubled, as in "
            '"He said ""no""."'
        ) from error
    if delimiter == "\t" and _is_ragged(records):
        plain = list(_records(text, delimiter, first=first, is_quoted=False))
        if not _is_ragged(plain):
            return plain, False
    return records, True


def _is_ragged(records: Sequence[_Record]) -> bool:
    return len({len(record.fields) for record in records}) > 1


def _records(
    text: str, delimiter: str, *, first: int = 1, is_quoted: bool = True
) -> Iterator[_Record]:
    """Yields the records that are no empty lines."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE,
        skipinitialspace=True,
        strict=is_quoted,
    )
    line = first
    with _large_fields():
        try:
            for fields in reader:
                if fields:
                    yield _Record(line, fields)
                line = first + reader.line_num
        except csv.Error as error:
            raise _RecordError(line, str(error)) from error


@contextlib.contextmanager
def _large_fields() -> Iterator[None]:
    before = csv.field_size_limit(_FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_no_header(path: Path, columns: Sequence[str], first: _Record) -> None:
    fields = [field.strip().casefold() for field in first.fields]
    if fields == [name.casefold() for name in columns]:
        raise ValueError(
            f"{path}:{first.line}: the first line names the columns, so that data.columns, which "
            "is for files without such a line, must be empty"
        )


def _check_widths(
    path: Path, names: Sequence[str], rows: Sequence[_Record], delimiter: str
) -> None:
    problems = []
    for line, fields in rows:
        # Programs for tables write delimiters after the last column.
        if len(fields) < len(names) or any(field.strip() for field in fields[len(names) :]):
            problems.append(
                f"{path}:{line}: {len(fields)} fields, where there are {len(names)} columns "
                f"{list(names)}; a field with {DELIMITERS.get(delimiter, repr(delimiter))} or line "
                "breaks in it must stand in double quotes"
            )
    raise_problems(problems)
