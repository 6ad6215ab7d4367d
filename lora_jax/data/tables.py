"""Tables of rows from files: CSV, TSV, JSON lines, JSON arrays and Parquet, told by their endings.

>>> sorted(FORMATS)
['.csv', '.json', '.jsonl', '.ndjson', '.parquet', '.tab', '.tsv']
"""

import dataclasses
import gzip
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Value = str | int | float | bool | None | list | dict

FORMATS = {
    ".csv": "delimited", ".tsv": "delimited", ".tab": "delimited", ".jsonl": "json",
    ".ndjson": "json", ".json": "json", ".parquet": "parquet",
}  # fmt: skip
_GZIP = ".gz"
_MAX_LISTED = 10  # number of places that one message lists


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of a file, each with a value for every column.

    Attributes:
      path: name of the file.
      columns: names of the columns, as they stand in the file; a name may occur twice.
      rows: values of each row, in the order of the columns; None where a row has none.
      lines: number of the line at which each row begins, or of the row where there are no lines.
      has_lines: whether the numbers are those of lines.
      form: the format, for a report, such as "CSV with ';'".
      class_names: names of the classes of a column whose values are their numbers, where the file
        has them.
      notes: what the reader decided or left out.
    """

    path: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Value, ...]]
    lines: Sequence[int]
    has_lines: bool = True
    form: str = ""
    class_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def place(self, row: int) -> str:
        """Returns where a row stands, such as "news.csv:3"."""
        mark = ":" if self.has_lines else ", row "
        return f"{self.path}{mark}{self.lines[row]}"


def suffix(path: str | Path) -> str:
    """Returns the ending of a file's name that tells its format, without that of gzip.

    >>> suffix("News.CSV.gz")
    '.csv'
    """
    name = Path(path).name.lower()
    return Path(name.removesuffix(_GZIP)).suffix


def is_missing(value: Value) -> bool:
    """Returns whether a cell has nothing in it: no value, blanks alone, or NaN."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def count_rows(count: int) -> str:
    """Writes a number of rows.

    >>> count_rows(1), count_rows(1200)
    ('1 row', '1,200 rows')
    """
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def list_places(table: Table, rows: Sequence[int]) -> str:
    """Lists where rows stand, the first few of them.

    >>> table = Table(path="a.csv", columns=(), rows=(), lines=range(2, 30))
    >>> list_places(table, [0, 5]), list_places(table, range(11))[-15:]
    ('a.csv:2, 7', ' 9, 10, 11, ...')
    """
    numbers = [str(table.lines[row]) for row in rows[:_MAX_LISTED]]
    more = ["..."] if len(rows) > _MAX_LISTED else []
    mark = ":" if table.has_lines else f", row{'s' * (len(rows) > 1)} "
    return f"{table.path}{mark}{', '.join([*numbers, *more])}"


def raise_problems(problems: Iterable[str]) -> None:
    """Raises what is wrong with rows, if anything is, the first problems in one message.

    Raises:
      ValueError: there are problems.
    """
    problems = list(problems)
    if len(problems) > _MAX_LISTED:
        problems = [*problems[:_MAX_LISTED], f"and {len(problems) - _MAX_LISTED} more"]
    if problems:
        raise ValueError("\n".join(problems))


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8, or in UTF-16 with its mark, packed by gzip or not.

    Raises:
      ValueError: it is in another encoding, or empty; the message names file and line.
      OSError: it can't be read.
    """
    data = path.read_bytes()
    if path.suffix.lower() == _GZIP:
        data = _unpack(path, data)
    is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8 at byte {error.start} of the file "
            f"(0x{data[error.start]:02x}): convert it, for example by "
            "iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}:{line}: a zero byte: this is no text file in UTF-8")
    if not text.strip():
        raise ValueError(f"{path}: empty file, where rows were expected")
    return text


def _unpack(path: Path, data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from error
