"""Labels as they stand in tables: names of classes, or real numbers."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from lora_jax.data.tables import Table, Value, raise_problems

_WHOLE = re.compile(r"[+-]?[0-9]+(\.0*)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_CODE = re.compile(r"[+-]?0[0-9]+", re.ASCII)  # the zero in front is part of the name
# Words that some programs write where there is no value, and others for a class.
_ODD = ("nan", "null", "none", "n/a", "na", "undefined", "?")
_LARGEST = float(np.finfo(np.float32).max)
_MAX_NAMES = 8  # number of names that a message lists


def to_name(value: Value, class_names: Sequence[str] = ()) -> str:
    """Converts a cell with a label to text.

    Args:
      value: content of the cell.
      class_names: names of the classes, if cells hold their numbers.

    Raises:
      ValueError: it is a list or an object, or the number of no class.

    >>> to_name(" spam "), to_name(3), to_name(True), to_name(1, ("ham", "spam"))
    ('spam', '3', 'true', 'spam')
    """
    if isinstance(value, list | dict):
        raise ValueError(
            f"the label {str(value)[:40]} is a {type(value).__name__}, and a row has one label: a "
            "word or a number"
        )
    if isinstance(value, bool):
        return str(value).lower()
    if class_names and isinstance(value, int):
        if not 0 <= value < len(class_names):
            raise ValueError(f"the label {value} is not in [0, {len(class_names)})")
        return class_names[value]
    return str(value).strip()


def find_classes(names: Sequence[str], column: str) -> tuple[str, ...]:
    """Finds the classes of a column: sorted by number if all are whole numbers, else as words.

    Numbers with zeros in front are codes, and as such words.

    Args:
      names: label of each row.
      column: name of the column, for messages.

    Raises:
      ValueError: there is one class only, or real numbers, or about as many classes as rows.

    >>> find_classes(["10", "9", "10", "9.0"], "label")
    ('9', '10')
    >>> find_classes(["spam", "ham", "ham", "spam"], "label")
    ('ham', 'spam')
    >>> find_classes(["01", "1", "01", "1"], "code")
    ('01', '1')
    """
    found = set(names)
    has_codes = any(_CODE.fullmatch(name) for name in found)
    if not has_codes and all(_NUMBER.fullmatch(name) for name in found):
        real = sorted(name for name in found if not _WHOLE.fullmatch(name))
        if real:
            raise ValueError(
                f"the labels in {column!r} are real numbers ({_list(real)}): set "
                "--config.data.regression=True to learn the number; to learn them as classes, "
                "write words"
            )
        found = {_to_whole(name) for name in found}
        classes = tuple(sorted(found, key=int))
    else:
        classes = tuple(sorted(found))
    if len(classes) < 2:
        raise ValueError(
            f"all {len(names)} rows have the label {', '.join(map(repr, classes))} in {column!r}: "
            "a classifier needs rows of at least two classes"
        )
    if 2 * len(classes) > len(names) and len(classes) > 2:
        raise ValueError(
            f"{column!r} has {len(classes)} different labels in {len(names)} rows "
            f"({_list(classes)}), fewer than two rows for each: it seems to hold no classes; name "
            "another column with --config.data.label (or set --config.data.regression=True, if "
            "it holds numbers to learn)"
        )
    return classes


def encode_classes(
    table: Table,
    rows: Sequence[int],
    names: Sequence[str],
    classes: Sequence[str],
    *,
    may_be_numbers: bool,
) -> np.ndarray:
    """Converts labels to numbers of classes, ``(n,)`` int32.

    Args:
      table: the table, for messages.
      rows: numbers of its rows.
      names: label of each of them.
      classes: names of the classes.
      may_be_numbers: whether all labels may be the numbers of the classes, from 0, where the names
        of the classes are words.

    Raises:
      ValueError: labels are no class; the message has file and line of each.
    """
    numbers = _find_numbers(set(names), classes)
    has_words = not any(_WHOLE.fullmatch(name) for name in classes)
    if may_be_numbers and has_words and all(_WHOLE.fullmatch(name) for name in names):
        by_index = {str(k): k for k in range(len(classes))}
        numbers = {n: by_index[_to_whole(n)] for n in names if _to_whole(n) in by_index}
    raise_problems(
        f"{table.place(row)}: the label {name!r} is none of the {len(classes)} classes "
        f"{_list(classes)}"
        for row, name in zip(rows, names, strict=True)
        if name not in numbers
    )
    return np.array([numbers[name] for name in names], np.int32)


def _find_numbers(names: set[str], classes: Sequence[str]) -> Mapping[str, int]:
    numbers = {name: k for k, name in enumerate(classes)}
    whole = {n: _to_whole(n) for n in names - numbers.keys() if _WHOLE.fullmatch(n)}
    return numbers | {name: numbers[x] for name, x in whole.items() if x in numbers}


def _to_whole(name: str) -> str:
    return str(int(name.partition(".")[0]))


def parse_numbers(table: Table, rows: Sequence[int], names: Sequence[str]) -> np.ndarray:
    """Converts labels to real numbers, ``(n,)`` float32.

    Raises:
      ValueError: labels are no finite numbers; the message has file and line of each.
    """
    values = [float(name) if _NUMBER.fullmatch(name) else math.nan for name in names]
    raise_problems(
        f"{table.place(row)}: the label {name!r} is no number (a decimal point is a dot)"
        for row, name, value in zip(rows, names, values, strict=True)
        if not abs(value) <= _LARGEST
    )
    return np.array(values, np.float32)


def describe_classes(classes: Sequence[str], labels: np.ndarray) -> list[str]:
    """Says how many rows each class has, and which names may be slips.

    Args:
      classes: names of the classes.
      labels: ``(n,)``, number of the class of each row.
    """
    counts = np.bincount(labels, minlength=len(classes))
    order = np.argsort(-counts, kind="stable")
    parts = [f"{classes[k]} {counts[k]:,}" for k in order[:_MAX_NAMES]]
    more = f", and {len(classes) - _MAX_NAMES} more" if len(classes) > _MAX_NAMES else ""
    lines = [f"labels: {len(classes)} classes, by rows: {', '.join(parts)}{more}"]
    rare = [name for name, count in zip(classes, counts, strict=True) if count == 1]
    if rare:
        lines.append(f"labels of one row each, of which little can be learned: {_list(rare)}")
    folded = Counter(name.casefold() for name in classes)
    alike = [name for name in classes if folded[name.casefold()] > 1]
    if alike:
        lines.append(f"labels that differ in case alone are classes of their own: {_list(alike)}")
    odd = [name for name in classes if name.casefold() in _ODD]
    if odd:
        lines.append(f"labels that may stand for no value are classes here: {_list(odd)}")
    return lines


def _list(names: Sequence[str]) -> str:
    shown = [repr(name) for name in names[:_MAX_NAMES]]
    return ", ".join([*shown, "..."] if len(names) > _MAX_NAMES else shown)
