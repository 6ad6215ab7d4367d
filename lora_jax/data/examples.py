"""Labelled sentences in memory, and parts of them."""

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
      sentences: one string per example.
      labels: ``(n,)`` int32, float32 for a regression, or None for a test split whose labels are
        not published.
      pairs: the second sentence of each example, or None.
      notes: what was left out.
    """

    sentences: tuple[str, ...]
    labels: np.ndarray | None
    pairs: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def subset(examples: Examples, count: int | None, seed: int) -> Examples:
    """The first ``count`` examples after a shuffle that depends on ``seed`` alone.

    ``count`` None or 0 gives all examples, in their own order.

    Raises:
      ValueError: ``count`` is negative or more than there are.

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


def take(examples: Examples, rows: Sequence[int]) -> Examples:
    """The examples with these numbers."""
    some = lambda texts: tuple(texts[row] for row in rows)
    return Examples(
        some(examples.sentences),
        None if examples.labels is None else examples.labels[rows],
        None if examples.pairs is None else some(examples.pairs),
        examples.notes,
    )


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of several splits, one after the other."""
    texts = lambda field: tuple(text for part in parts for text in getattr(part, field))
    labels = [part.labels for part in parts]
    return Examples(
        texts("sentences"),
        None if any(x is None for x in labels) else np.concatenate(labels),
        None if parts[0].pairs is None else texts("pairs"),
        texts("notes"),
    )


def read_tsv(path: str | Path, *, labelled: bool, num_labels: int = 2) -> Examples:
    """Reads a file with the columns ``sentence`` and ``label``; see :func:`tsv.read`."""
    return from_table(tsv.read(path, SENTENCES, labelled=labelled, num_labels=num_labels))


def from_table(table: tsv.Table) -> Examples:
    """The rows of a file as examples."""
    pairs = table.texts[1] if len(table.texts) > 1 else None
    return Examples(table.texts[0], table.labels, pairs, (table.note,) if table.note else ())
