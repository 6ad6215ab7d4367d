"""Reads rows that are JSON objects: one a line, or all in one array."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.data.tables import Table, Value, raise_problems, read_text


def read(path: Path) -> Table:
    """Reads a file with an object a line, or an array of objects.

    A row that lacks a key that others have gets None there; blank lines are no rows.

    Args:
      path: path of the file.

    Raises:
      ValueError: rows are no objects, or have a key twice; the message has file and line of each.
      OSError: the file can't be read.
    """
    text = read_text(path)
    is_array = text.lstrip().startswith("[")
    rows, numbers = _parse_array(path, text) if is_array else _parse_lines(path, text)
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    if not rows:
        raise ValueError(f"{path}: no rows")
    if len(rows) == 1 and all(isinstance(x, list | dict) for x in rows[0].values()):
        raise ValueError(
            f"{path}: one object of {list(columns)}, each with many values, where rows are "
            "expected: write an object a line (pandas: orient='records', lines=True)"
        )
    return Table(
        path=str(path),
        columns=columns,
        rows=[tuple(row.get(name) for name in columns) for row in rows],
        lines=numbers,
        has_lines=not is_array,
        form="a JSON array" if is_array else "JSON lines",
    )


def _parse_lines(path: Path, text: str) -> tuple[list[dict[str, Value]], list[int]]:
    rows, lines, problems = [], [], []
    # Not splitlines(), which also splits at characters that stand within texts (U+0085, ...).
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row, problem = _parse(line)
        if problem and number == 1 and line.strip() == "{":
            raise ValueError(
                f"{path}:1: an object over several lines, where each line must hold one row, or "
                "the file an array of rows"
            )
        if problem:
            problems.append(f"{path}:{number}: {problem}")
        rows.append(row)
        lines.append(number)
    raise_problems(problems)
    return rows, lines


def _parse(text: str) -> tuple[dict[str, Value], str]:
    """Returns the row of a text, and the problem with it, "" for none."""
    try:
        row = json.loads(text, object_pairs_hook=_make_object)
    except (ValueError, RecursionError) as error:
        return {}, f"no JSON object ({error})"
    if not isinstance(row, dict):
        return {}, f"a JSON {type(row).__name__}, where an object with named fields is expected"
    return row, ""


def _parse_array(path: Path, text: str) -> tuple[list[dict[str, Value]], Sequence[int]]:
    try:
        rows = json.loads(text, object_pairs_hook=_make_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: no JSON array ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON array ({error})") from error
    raise_problems(
        f"{path}, row {k}: a JSON {type(row).__name__}, where an object with named fields is "
        "expected"
        for k, row in enumerate(rows, 1)
        if not isinstance(row, dict)
    )
    return rows, range(1, len(rows) + 1)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"the key {twice[0]!r} occurs twice")
    return row
