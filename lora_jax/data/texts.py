"""Makes batches of texts: rows of tokens, some of which are to be learned."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.data import batches, tokenization
from lora_jax.data.batches import Batch


class Texts(NamedTuple):
    """Tokens of ``n`` texts, one after the other: text ``i`` is ``ids[offsets[i]:offsets[i + 1]]``.

    Attributes:
      ids: ``(total,)`` int32.
      offsets: ``(n + 1,)`` int64.
      counts: ``(total,)`` int32, 1 for each token that is to be learned, from those before it.
      pad_id: token of padding, which the attention mask hides.
    """

    ids: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray
    pad_id: int = 0


def make_texts(rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_id: int = 0) -> Texts:
    """Makes texts from pairs of a prompt and the tokens to learn after it.

    Raises:
      ValueError: a text has nothing to learn, or no prompt.

    >>> texts = make_texts([([7, 8], [9]), ([5], [6, 6])])
    >>> texts.ids.tolist(), texts.counts.tolist()
    ([7, 8, 9, 5, 6, 6], [0, 0, 1, 0, 1, 1])
    """
    for k, (prompt, target) in enumerate(rows):
        if not len(prompt) or not len(target):
            raise ValueError(
                f"text {k} has {len(prompt)} tokens that are given and {len(target)} to learn; "
                "both must be there"
            )
    ids = [np.array([*prompt, *target], np.int32) for prompt, target in rows]
    counts = [np.repeat([0, 1], [len(prompt), len(target)]) for prompt, target in rows]
    join = lambda parts: np.concatenate([np.zeros(0, np.int32), *parts], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return Texts(join(ids), offsets, join(counts), pad_id)


def train_batch(texts: Texts, step: int, **options: Any) -> Batch:
    """Makes the training batch of ``step``; the options are those of :func:`batches.train_batch`.

    Returns:
      ``input_ids``, ``attention_mask``, ``counts``, each ``(B, L)`` int32, and ``weights`` ``(B,)``
      float32, 1 for a text and 0 for a row that fills the batch.
    """
    return _rename(batches.train_batch(_to_tokenized(texts), step, **options))


def eval_batches(texts: Texts, **options: Any) -> Iterator[Batch]:
    """Yields all texts once, as :func:`batches.eval_batches`; batches as :func:`train_batch`."""
    return map(_rename, batches.eval_batches(_to_tokenized(texts), **options))


def _to_tokenized(texts: Texts) -> tokenization.Tokenized:
    # Types of tokens are the numbers of sentences there; here they carry the counts.
    unused = np.zeros(len(texts.offsets) - 1, np.int32)
    return tokenization.Tokenized(
        texts.ids, texts.offsets, unused, texts.pad_id, types=texts.counts
    )


def _rename(batch: Batch) -> Batch:
    """Gives the arrays of a batch the names that texts have."""
    names = {"token_type_ids": "counts"}
    return {names.get(name, name): x for name, x in batch.items() if name != "labels"}
