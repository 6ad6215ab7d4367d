"""Tokenizes sentences."""

from typing import NamedTuple

import numpy as np
import tokenizers

from lora_jax.data.examples import Examples
from lora_jax.models import token_ids
from lora_jax.models.token_ids import Table


class Tokenized(NamedTuple):
    """Tokens of ``n`` examples: example ``i`` is ``ids[offsets[i]:offsets[i + 1]]``.

    Attributes:
      ids: ``(total,)`` int32, all examples one after the other.
      offsets: ``(n + 1,)`` int64.
      labels: ``(n,)`` int32 or float32; None if there are none.
      pad_id: token of padding, which the attention mask hides.
      types: ``(total,)`` int32, the number of the sentence in a pair that each token is of; None
        for a model without token types.
      cut: number of examples that were longer than the largest number of tokens.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None
    pad_id: int = 0
    types: np.ndarray | None = None
    cut: int = 0


def tokenize(
    examples: Examples,
    tokenizer: tokenizers.Tokenizer,
    *,
    max_length: int,
    types: bool = False,
    table: Table | None = None,
) -> Tokenized:
    """Tokenizes every example with its special tokens, and cuts it to ``max_length``, unpadded.

    In a pair, the longer sentence is cut first. The tokenizer's settings for truncation and padding
    are neither used nor changed.

    Args:
      examples: sentences or pairs.
      tokenizer: the model's tokenizer.
      max_length: largest number of tokens of an example.
      types: whether the model has token types, which tell the sentences of a pair apart.
      table: the model's embedding, of which all tokens must be rows; None for no check.

    Raises:
      ValueError: ``max_length`` leaves no room for a word, a sentence has no tokens at all, or a
        token is no row of the embedding.
    """
    pairs = examples.pairs
    special = tokenizer.num_special_tokens_to_add(is_pair=pairs is not None)
    if max_length <= special + (pairs is not None):
        words = "a word" if pairs is None else "a word of each sentence"
        raise ValueError(
            f"max_length {max_length}, but {special} special tokens and {words} are needed"
        )
    alone = list(examples.sentences)
    texts = alone if pairs is None else list(zip(alone, pairs, strict=True))
    encoded = _encode(texts, tokenizer, max_length)
    rows = [np.array(row.ids, np.int32) for row in encoded]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    empty = np.flatnonzero(np.diff(offsets) == 0)
    if empty.size:
        row = int(empty[0])
        raise ValueError(f"example {row} has no tokens: {examples.sentences[row]!r}; leave it out")
    ids = np.concatenate([np.zeros(0, np.int32), *rows], dtype=np.int32)
    cut = sum(bool(row.overflowing) for row in encoded)
    pad_id = _find_pad_id(tokenizer)
    if table is not None:
        token_ids.check(ids, table, tokenizer)
        pad_id = token_ids.choose_padding(pad_id, table)
    tokenized = Tokenized(ids, offsets, examples.labels, pad_id, cut=cut)
    if not (pairs and types):
        return tokenized
    row_types = [np.array(row.type_ids, np.int32) for row in encoded]
    return tokenized._replace(types=np.concatenate([np.zeros(0, np.int32), *row_types]))


def _encode(
    texts: list[str] | list[tuple[str, str]], tokenizer: tokenizers.Tokenizer, max_length: int
) -> list[tokenizers.Encoding]:
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())  # a copy
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    # Without offsets into the text, encoding takes about half the time.
    return tokenizer.encode_batch_fast(texts)


def _find_pad_id(tokenizer: tokenizers.Tokenizer) -> int:
    ids = (tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>"))
    return next((token_id for token_id in ids if token_id is not None), 0)
