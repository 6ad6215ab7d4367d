"""Takes texts and labels out of the rows of a table; what is left out is counted."""

from collections.abc import Sequence
from typing import NamedTuple

from lora_jax.data import characters, labels
from lora_jax.data.columns import Columns
from lora_jax.data.tables import Table, Value, count_rows, is_missing, list_places, raise_problems

_UNLABELED = -1  # what Hugging Face's library writes for a label that is not known


class LabelledRows(NamedTuple):
    """Rows that have a text, or two, and a label.

    Attributes:
      texts: texts of each row, a tuple of one or two.
      names: label of each row, as text; empty if there is no column of labels.
      rows: number of each row in its table.
      notes: descriptions of rows that were left out.
    """

    texts: list[tuple[str, ...]]
    names: list[str]
    rows: list[int]
    notes: tuple[str, ...]


def take(table: Table, columns: Columns) -> LabelledRows:
    """Takes the rows of a table that have texts and a label.

    Rows without either are left out, and noted. Blanks around texts and labels are removed.

    Args:
      table: the table.
      columns: its columns with the texts and the label.

    Raises:
      ValueError: texts or labels are of a wrong kind, with file and line of each; or nothing is
        left.
    """
    kept, without_text, without_label, problems = [], [], [], []
    class_names = () if columns.label is None else _class_names(table, columns.label)
    texts: list[tuple[str, ...]] = []
    names: list[str] = []
    for k, row in enumerate(table.rows):
        cells = [row[column] for column in columns.texts]
        label = None if columns.label is None else row[columns.label]
        if any(is_missing(cell) for cell in cells):
            without_text.append(k)
        elif columns.label is not None and _is_unlabeled(label, class_names):
            without_label.append(k)
        else:
            try:
                texts.append(tuple(_to_text(cell) for cell in cells))
                names.append("" if label is None else labels.to_name(label, class_names))
            except ValueError as error:
                problems.append(f"{table.place(k)}: {error}")
            kept.append(k)
    raise_problems(problems)
    what = "a text" if len(columns.texts) == 1 else "both texts"
    left_out = [_describe(table, without_text, what), _describe(table, without_label, "a label")]
    notes = tuple(note for note in left_out if note)
    if not kept:
        wanted = what if columns.label is None else f"{what} and a label"
        raise ValueError(f"{table.path}: no row has {wanted}; {'; '.join(notes)}")
    return LabelledRows(texts, names if columns.label is not None else [], kept, notes)


def _class_names(table: Table, column: int) -> tuple[str, ...]:
    return tuple(table.class_names.get(table.columns[column], ()))


def _is_unlabeled(label: Value, class_names: Sequence[str]) -> bool:
    return is_missing(label) or (bool(class_names) and label == _UNLABELED)


def _to_text(value: Value) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"the text is {str(value)[:40]!r}, a {type(value).__name__}")
    text = str(value).strip()
    characters.check(text)
    return text


def _describe(table: Table, rows: Sequence[int], what: str) -> str:
    if not rows:
        return ""
    return f"left out: {count_rows(len(rows))} without {what} ({list_places(table, rows)})"
