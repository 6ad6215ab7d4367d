"""Labelled sentences in memory, and selections of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_jax.data import tsv
from lora_jax.data.order import SUBSET, permutation
from lora_jax.data.tsv import SENTENCES


class Examples(NamedTuple):
    """Sentences, or pairs of them, with their labels.

    Attributes:
      sentences: one string for each example.
      labels: ``(n,)`` int32, or float32 for a regression; None for a test split whose labels are
        not published.
      pairs: the second sentence of each example, or None.
      notes: descriptions of rows that were left out.
    """

    sentences: tuple[str, ...]
    labels: np.ndarray | None
    pairs: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def subset(examples: Examples, count: int | None, seed: int) -> Examples:
    """Takes the first ``count`` examples after a shuffle that depends on ``seed`` alone.

    It takes all examples, in their original order, if ``count`` is None or 0.

    Raises:
      ValueError: ``count`` is negative, or larger than the number of examples.

    >>> subset(Examples(("a", "b", "c"), np.array([0, 1, 0], np.int32)), 2, seed=1).sentences
    ('a', 'c')
    """
    total = len(examples.sentences)
    if not count:
        return examples
    if not 0 < count <= total:
        raise ValueError(
            f"a subset of {count} examples, where there are {total}: ask for 0..{total}"
        )
    return take(examples, permutation(total, seed, stream=SUBSET)[:count])


def require_labels(examples: Examples) -> np.ndarray:
    """Returns the labels of examples that must have them.

    Raises:
      ValueError: they have none, as those of a test split.
    """
    if examples.labels is None:
        raise ValueError("The examples have no labels: they are of a test split, say.")
    return examples.labels


def take(examples: Examples, rows: Sequence[int] | np.ndarray) -> Examples:
    """Takes the examples with these numbers."""
    choose = lambda texts: tuple(texts[row] for row in rows)
    return Examples(
        choose(examples.sentences),
        None if examples.labels is None else examples.labels[rows],
        None if examples.pairs is None else choose(examples.pairs),
        examples.notes,
    )


def concatenate(parts: Sequence[Examples]) -> Examples:
    """Concatenates the examples of several splits."""
    join = lambda field: tuple(text for part in parts for text in getattr(part, field))
    labels = [part.labels for part in parts]
    known = [x for x in labels if x is not None]
    return Examples(
        join("sentences"),
        None if len(known) < len(labels) else np.concatenate(known),
        None if parts[0].pairs is None else join("pairs"),
        join("notes"),
    )


def read_tsv(path: str | Path, *, require_labels: bool, num_labels: int = 2) -> Examples:
    """Reads a file with the columns ``sentence`` and ``label``; see :func:`tsv.read`."""
    return from_table(
        tsv.read(path, SENTENCES, require_labels=require_labels, num_labels=num_labels)
    )


def from_table(table: tsv.Table) -> Examples:
    """Makes examples of the rows of a file."""
    sentences, *others = table.texts
    notes = (table.note,) if table.note else ()
    return Examples(sentences, table.labels, others[0] if others else None, notes)
