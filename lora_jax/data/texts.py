"""Texts as batches: rows of tokens of which some are to be learned."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.data import batches, tokenization
from lora_jax.data.batches import Batch


class Texts(NamedTuple):
    """Tokens of ``n`` texts, ragged: text ``i`` is ``ids[offsets[i]:offsets[i + 1]]``.

    Attributes:
      ids: ``(total,)`` int32.
      offsets: ``(n + 1,)`` int64.
      counts: ``(total,)`` int32, 1 for each token that is to be learned, from those before it.
      pad_id: what fills a batch to its length; the attention mask hides it.
    """

    ids: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray
    pad_id: int = 0


def texts(rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_id: int = 0) -> Texts:
    """Texts from pairs of tokens: those that are given, then those that are to be learned.

    Raises:
      ValueError: a text has nothing to learn, or nothing to learn it from.

    >>> made = texts([([7, 8], [9]), ([5], [6, 6])])
    >>> made.ids.tolist(), made.counts.tolist()
    ([7, 8, 9, 5, 6, 6], [0, 0, 1, 0, 1, 1])
    """
    for k, (given, learned) in enumerate(rows):
        if not len(given) or not len(learned):
            raise ValueError(
                f"text {k} has {len(given)} tokens that are given and {len(learned)} to learn; "
                "both must be there"
            )
    whole = [np.array([*given, *learned], np.int32) for given, learned in rows]
    counts = [np.repeat([0, 1], [len(given), len(learned)]) for given, learned in rows]
    join = lambda parts: np.concatenate([np.zeros(0, np.int32), *parts], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, whole)], dtype=np.int64)
    return Texts(join(whole), offsets, join(counts), pad_id)


def train_batch(texts: Texts, step: int, **options: Any) -> Batch:
    """The training batch of ``step``, a pure function; options as :func:`batches.train_batch`.

    Returns:
      ``input_ids``, ``attention_mask``, ``counts``, each ``(B, L)`` int32, and ``weights`` ``(B,)``
      float32, 1 for a text and 0 for a row that fills the batch.
    """
    return _batch(batches.train_batch(_tokenized(texts), step, **options))


def eval_batches(texts: Texts, **options: Any) -> Iterator[Batch]:
    """All texts once, by :func:`batches.eval_batches`; batches as those of :func:`train_batch`."""
    return map(_batch, batches.eval_batches(_tokenized(texts), **options))


def _tokenized(texts: Texts) -> tokenization.Tokenized:
    # There, what is said of each token is which sentence of a pair it is of; here, if it counts.
    unused = np.zeros(len(texts.offsets) - 1, np.int32)
    return tokenization.Tokenized(
        texts.ids, texts.offsets, unused, texts.pad_id, types=texts.counts
    )


def _batch(batch: Batch) -> Batch:
    names = {"token_type_ids": "counts"}
    return {names.get(name, name): x for name, x in batch.items() if name != "labels"}
