"""Sentences as token ids."""

from typing import NamedTuple

import numpy as np
import tokenizers

from lora_jax.data.examples import Examples


class Tokenized(NamedTuple):
    """Token ids of ``n`` examples, ragged: example ``i`` is ``ids[offsets[i]:offsets[i + 1]]``.

    Attributes:
      ids: ``(total,)`` int32, all examples one after the other.
      offsets: ``(n + 1,)`` int64.
      labels: ``(n,)`` int32 or float32, or None where there are none.
      pad_id: what fills a batch to its length; the attention mask hides it.
      types: ``(total,)`` int32, which sentence of a pair each token is of; None for a model that
        is not told.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None
    pad_id: int = 0
    types: np.ndarray | None = None


def tokenize(
    examples: Examples, tokenizer: tokenizers.Tokenizer, *, max_length: int, types: bool = False
) -> Tokenized:
    """Token ids of every example, cut to ``max_length``, special tokens included, not padded.

    Of a pair, the longer sentence is cut first. The tokenizer's own settings for truncation and
    padding are neither used nor changed.

    Args:
      examples: sentences or pairs.
      tokenizer: the model's own.
      max_length: in tokens.
      types: whether the model is told which sentence of a pair each token is of.

    Raises:
      ValueError: ``max_length`` leaves no room for a word, or a sentence has no tokens at all.
    """
    pairs = examples.pairs is not None
    special = tokenizer.num_special_tokens_to_add(is_pair=pairs)
    if max_length <= special + pairs:
        words = "a word of each sentence" if pairs else "a word"
        raise ValueError(
            f"max_length {max_length}, but {special} special tokens and {words} are needed"
        )
    texts = list(examples.sentences)
    if pairs:
        texts = list(zip(texts, examples.pairs, strict=True))
    encoded = _encode(texts, tokenizer, max_length)
    rows = [np.array(row.ids, np.int32) for row in encoded]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    empty = np.flatnonzero(np.diff(offsets) == 0)
    if empty.size:
        row = int(empty[0])
        raise ValueError(f"example {row} has no tokens: {examples.sentences[row]!r}; leave it out")
    ids = np.concatenate([np.zeros(0, np.int32), *rows], dtype=np.int32)
    made = Tokenized(ids, offsets, examples.labels, _pad_id(tokenizer))
    if not (pairs and types):
        return made
    of_rows = [np.array(row.type_ids, np.int32) for row in encoded]
    return made._replace(types=np.concatenate([np.zeros(0, np.int32), *of_rows]))


def _encode(
    texts: list[str] | list[tuple[str, str]], tokenizer: tokenizers.Tokenizer, max_length: int
) -> list[tokenizers.Encoding]:
    own = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    own.no_padding()
    own.enable_truncation(max_length)
    # Without offsets into the text, encoding takes about half the time.
    return own.encode_batch_fast(texts)


def _pad_id(tokenizer: tokenizers.Tokenizer) -> int:
    found = (tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>"))
    return next((token for token in found if token is not None), 0)
