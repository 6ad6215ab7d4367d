"""Checks that tokens are rows of a model's embedding.

JAX reads a row beyond an array as NaN, and everything after it becomes NaN, so that the mistake
has to be found before a model is applied.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

_FEW = 0.9  # part of the rows below which a tokenizer's tokens are few; tables are padded a little


class Table(NamedTuple):
    """The embedding of a model's tokens.

    Attributes:
      name: name of the model.
      rows: number of tokens that it has.
    """

    name: str
    rows: int


def check(
    ids: np.ndarray | Sequence[int], table: Table, tokenizer: tokenizers.Tokenizer | None = None
) -> None:
    """Checks tokens before a model is applied to them.

    Args:
      ids: integers of any shape.
      table: the embedding.
      tokenizer: tokenizer that has made them, if it is known, for the message.

    Raises:
      ValueError: a token is no row of the embedding.

    >>> check([3, 22], Table("tiny", 22))
    Traceback (most recent call last):
    ValueError: The token 22 is beyond the embedding of tiny, which has 22 rows, 0 to 21. Use the \
tokenizer that belongs to the model, or give the model the missing rows and train them: \
transformers' model.resize_token_embeddings(23).
    """
    ids = np.asarray(ids)
    wrong = ids[(ids >= table.rows) | (ids < 0)]
    if not wrong.size:
        return
    number = int(wrong.flat[0])
    rows = f"the embedding of {table.name}, which has {table.rows} rows, 0 to {table.rows - 1}"
    size = int(wrong.max()) + 1
    if tokenizer is None:
        said = f"The token {number} is beyond {rows}"
    else:
        size = max(size, tokenizer.get_vocab_size())
        said = (
            f"The token {tokenizer.id_to_token(number)!r} has the id {number}, beyond {rows}; the "
            f"tokenizer has {tokenizer.get_vocab_size()} tokens"
        )
    raise ValueError(
        f"{said}. Use the tokenizer that belongs to the model, or give the model the missing rows "
        f"and train them: transformers' model.resize_token_embeddings({size})."
    )


def choose_padding(pad_id: int, table: Table) -> int:
    """Returns a token of padding that the embedding has: the mask hides it, whichever it is.

    >>> choose_padding(22, Table("tiny", 22)), choose_padding(1, Table("tiny", 22))
    (0, 1)
    """
    return pad_id if pad_id < table.rows else 0


def describe(tokenizer: tokenizers.Tokenizer, table: Table) -> tuple[str, ...]:
    """Says in a line for the report if tokenizer and embedding are of very different sizes."""
    size = tokenizer.get_vocab_size()
    if _FEW * table.rows <= size <= table.rows:
        return ()
    more = "" if size < table.rows else "; texts with a token beyond it are refused"
    rows = f"the embedding of {table.name} has {table.rows:,} rows"
    return (f"tokenizer: {size:,} tokens, and {rows}{more}",)
