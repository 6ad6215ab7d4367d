"""The rows of one's own texts that a config asks for, with the names of their classes."""

import hashlib
import json
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lora_jax.data import holdout, labelled_rows, labels, table_sources
from lora_jax.data.columns import find_columns
from lora_jax.data.examples import Examples
from lora_jax.data.labelled_rows import LabelledRows
from lora_jax.data.tables import Table


class Part(NamedTuple):
    """The rows of one split, with the columns that they are from.

    Attributes:
      table: table of the rows.
      rows: the rows.
      texts: names of the columns of the texts.
      label: name of the column of the label.
    """

    table: Table
    rows: LabelledRows
    texts: tuple[str, ...]
    label: str


class OwnRows(NamedTuple):
    """The rows of a run.

    Attributes:
      training: rows to train on, before any are held out.
      validation: rows to evaluate on; None to hold some out.
      notes: what of the source is not used.
    """

    training: Part
    validation: Part | None
    notes: tuple[str, ...]

    @property
    def parts(self) -> list[Part]:
        """The parts that there are."""
        return [part for part in (self.training, self.validation) if part is not None]


def read(config: ConfigDict) -> OwnRows:
    """Reads the rows to train on, and those of a validation split, if there is one.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: it can't be read, with file and line of what is wrong; or the config says twice
        what to evaluate on.
    """
    c = config.data
    names = [name.strip() for name in c.columns.split(",")] if c.columns else []
    options: dict[str, Any] = {"delimiter": c.delimiter, "columns": names}
    wants_holdout = c.holdout != "" and parse_holdout(c.holdout) > 0
    if c.validation and wants_holdout:
        raise ValueError(
            f"data.validation {c.validation!r} and data.holdout {c.holdout!r}: the rows to "
            "evaluate on are either those of a file or a part of the others; set one of them"
        )
    tables = table_sources.read_tables(c.source, **options)
    training = _take(config, tables.pop(table_sources.TRAIN))
    if c.validation:
        # A folder there may have one split alone, which is called as it likes.
        found = table_sources.read_tables(c.validation, **options)
        table: Table | None = found.get(table_sources.VALIDATION, found[table_sources.TRAIN])
    else:
        table = None if wants_holdout else tables.pop(table_sources.VALIDATION, None)
    validation = None if table is None else _take(config, table, like=training)
    unused = f"not used: the split {' and '.join(tables)} of {c.source}" if tables else ""
    return OwnRows(training, validation, (unused,) if unused else ())


def _take(config: ConfigDict, table: Table, like: Part | None = None) -> Part:
    c = config.data
    text: Any = c.text
    label = c.label
    # A file to evaluate on may have other names, if they are usual ones.
    if like is not None and {*like.texts, like.label} <= set(table.columns):
        text, label = like.texts, like.label
    found = find_columns(table, text=text, label=label, is_regression=c.regression)
    if like is not None and len(found.texts) != len(like.texts):
        raise ValueError(
            f"{table.path}: the texts are in {[table.columns[k] for k in found.texts]}, and those "
            f"to train on in {list(like.texts)}: both must be pairs, or neither"
        )
    rows = labelled_rows.take(table, found)
    columns = table.columns
    label_name = "" if found.label is None else columns[found.label]
    return Part(table, rows, tuple(columns[k] for k in found.texts), label_name)


def find_labels(config: ConfigDict, data: OwnRows) -> tuple[str, ...]:
    """Finds the names of the classes, or, of a regression, of the number.

    Raises:
      ValueError: labels are no classes, or no numbers.
    """
    training, validation = data.training, data.validation
    given = tuple(str(name) for name in config.model.labels)
    if given or config.data.regression:
        return given or (training.label,)
    classes = tuple(training.table.class_names.get(training.label, ()))
    try:
        classes = classes or labels.find_classes(training.rows.names, training.label)
    except ValueError as error:
        raise ValueError(f"{training.table.path}: {error}") from error
    if validation is not None:
        table, rows, names = validation.table, validation.rows.rows, validation.rows.names
        # Numbers there are of no class that only was found.
        labels.encode_classes(table, rows, names, classes, may_be_numbers=False)
    return classes


def to_examples(config: ConfigDict, part: Part) -> Examples:
    """Makes examples of rows, whose classes the config names.

    Raises:
      ValueError: labels are of no class, or no numbers; with file and line of each.
    """
    columns = list(zip(*part.rows.texts, strict=True))
    table, rows, names = part.table, part.rows.rows, part.rows.names
    if config.data.regression:
        values = labels.parse_numbers(table, rows, names)
    else:
        values = labels.encode_classes(table, rows, names, config.model.labels, may_be_numbers=True)
    return Examples(columns[0], values, columns[1] if len(columns) == 2 else None)


def parse_holdout(value: float | str) -> float:
    """Returns a share below 1, or a number of rows.

    Raises:
      ValueError: the value is neither.

    >>> parse_holdout("20%"), parse_holdout(0.2), parse_holdout("500")
    (0.2, 0.2, 500.0)
    """
    try:
        return float(holdout.parse(value)[0])
    except ValueError as error:
        raise ValueError(f"data.holdout {error}") from error


def make_digest(data: OwnRows) -> str:
    """Makes a content hash of the rows that are used."""
    rows = [[part.rows.texts, part.rows.names] for part in data.parts]
    return f"sha256:{hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}"
