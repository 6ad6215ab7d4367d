"""From sentences to batches: token ids, an order that is a pure function, a few fixed shapes.

Nothing here keeps state. The batch of a step is computed from ``(data, step, seed)``, so a run that
resumes at any step, on any machine, sees the batches it would have seen.
"""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from experiments.sources import SPLITS, Examples, joined, load, permutation, subset, take

__all__ = [
    "SPLITS",
    "Examples",
    "Tokenized",
    "bucket_lengths_used",
    "eval_batches",
    "joined",
    "load",
    "permutation",
    "steps_per_epoch",
    "subset",
    "take",
    "tokenize",
    "train_batch",
]


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


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches that hold each of ``n`` examples once, the last one perhaps not full.

    Raises:
      ValueError: no examples, or a batch size below 1.

    >>> steps_per_epoch(67_349, 32)
    2105
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"{n} examples in batches of {batch_size}: both must be 1 or more")
    return -(-n // batch_size)


def train_batch(
    data: Tokenized,
    step: int,
    *,
    seed: int,
    batch_size: int,
    buckets: Sequence[int],
    alike: int = 0,
    rows: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The training batch of ``step``, a pure function of its arguments.

    Each epoch has an order of its own, and each example once. Its last batch is filled up with
    copies of that batch's first row, of weight 0: a copy is a valid input, where a row that is
    padding alone would attend to nothing and give NaN.

    Args:
      data: labelled examples.
      step: 0, 1, ...; the epoch is ``step // steps_per_epoch(n, batch_size)``.
      seed: in ``[0, 2**64)``.
      batch_size: B, the rows of every batch.
      buckets: ascending lengths, such as ``(32, 64, 128)``. The length L of a batch is the smallest
        that holds its longest row, so there are at most ``len(buckets)`` shapes to compile.
      alike: with more than 1, so many batches at a time are filled by length, and then all batches
        of the epoch are shuffled: rows of like length pad each other less, and the order stays
        random otherwise.
      rows: numbers of the rows to make, of a batch of which other processes make the rest; the
        length is that of the whole batch. None for all.

    Returns:
      ``input_ids`` (B, L) int32; ``attention_mask`` (B, L) int32; ``labels`` (B,) of their dtype;
      ``weights`` (B,) float32, 1 for an example and 0 for a row that fills the batch; and
      ``token_type_ids`` (B, L) int32 where the data have types.

    Raises:
      ValueError: no labels, a negative step, or buckets that do not ascend or do not hold all.
    """
    if data.labels is None:
        raise ValueError("training needs labels, and these examples have none (a test split?)")
    _check_buckets(data, buckets)
    chosen = _train_rows(data, step, seed=seed, batch_size=batch_size, alike=alike)
    return _batch(data, chosen, batch_size, buckets, rows)


def _train_rows(
    data: Tokenized, step: int, *, seed: int, batch_size: int, alike: int
) -> np.ndarray:
    if step < 0:
        raise ValueError(f"step {step} is negative")
    n = len(data.offsets) - 1
    epoch, place = divmod(step, steps_per_epoch(n, batch_size))
    if alike > 1:
        # Bytes, because the cache needs something with a hash.
        order = _order_by_length(data.offsets.tobytes(), seed, epoch, batch_size, alike)
    else:
        order = _epoch_order(n, seed, epoch)
    return order[place * batch_size : (place + 1) * batch_size]


@functools.lru_cache(maxsize=1)
def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    order = permutation(n, seed, stream=epoch)
    order.flags.writeable = False  # every step of the epoch gets a view of this one array
    return order


_SHUFFLE = 2**63  # streams of random numbers beyond those of the epochs


@functools.lru_cache(maxsize=1)
def _order_by_length(
    offsets: bytes, seed: int, epoch: int, batch_size: int, alike: int
) -> np.ndarray:
    lengths = np.diff(np.frombuffer(offsets, np.int64))
    order = _epoch_order(len(lengths), seed, epoch)
    # A last batch that is not full stays the last.
    full = len(order) - len(order) % batch_size
    windows = np.split(order[:full], range(alike * batch_size, full, alike * batch_size))
    by_length = [rows[np.argsort(lengths[rows], kind="stable")] for rows in windows]
    batches = np.concatenate([order[:0], *by_length]).reshape(-1, batch_size)
    shuffled = batches[permutation(len(batches), seed, stream=_SHUFFLE + epoch)].reshape(-1)
    order = np.concatenate([shuffled, order[full:]])
    order.flags.writeable = False
    return order


def eval_batches(
    data: Tokenized,
    *,
    batch_size: int,
    buckets: Sequence[int],
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """All examples once, shortest first, so that few tokens are padding.

    Returns:
      Batches as those of :func:`train_batch`, and ``index`` (B,) int32, the example each row is:
      ``predictions[batch["index"]] = ...`` puts them back in order, as a row that fills the last
      batch is a copy, index included. There are no ``labels`` where the examples have none. With
      ``rows``, as in :func:`train_batch`, the index is still that of all rows.

    Raises:
      ValueError: no examples, or buckets that do not ascend or do not hold every row.
    """
    _check_buckets(data, buckets)
    steps = steps_per_epoch(len(data.offsets) - 1, batch_size)
    order = np.argsort(np.diff(data.offsets), kind="stable")
    batches = (order[step * batch_size : (step + 1) * batch_size] for step in range(steps))
    return (
        _batch(data, chosen, batch_size, buckets, rows)
        | {"index": _fill(chosen, batch_size).astype(np.int32)}
        for chosen in batches
    )


def bucket_lengths_used(
    data: Tokenized,
    steps: int,
    *,
    seed: int,
    batch_size: int,
    buckets: Sequence[int],
    alike: int = 0,
) -> dict[int, int]:
    """How many of the first ``steps`` training batches have each length, ascending by length.

    Every length means one compilation of the train step. Arguments as :func:`train_batch`.

    Raises:
      ValueError: no examples, or buckets that do not ascend or do not hold every row.
    """
    _check_buckets(data, buckets)
    lengths = np.diff(data.offsets)
    rows = functools.partial(_train_rows, data, seed=seed, batch_size=batch_size, alike=alike)
    longest = (int(lengths[rows(step)].max()) for step in range(steps))
    return dict(sorted(Counter(_bucket(length, buckets) for length in longest).items()))


def _check_buckets(data: Tokenized, buckets: Sequence[int]) -> None:
    ascending = all(low < high for low, high in zip(buckets, buckets[1:], strict=False))
    if not buckets or buckets[0] < 1 or not ascending:
        raise ValueError(f"buckets {tuple(buckets)} are not positive lengths that ascend")
    longest = int(np.diff(data.offsets).max(initial=0))
    if longest > buckets[-1]:
        raise ValueError(
            f"buckets {tuple(buckets)} do not hold the longest row, of {longest} tokens: "
            f"tokenize with max_length={buckets[-1]}, or end the buckets with {longest} or more"
        )


def _bucket(length: int, buckets: Sequence[int]) -> int:
    return next(bucket for bucket in buckets if bucket >= length)


def _fill(rows: np.ndarray, batch_size: int) -> np.ndarray:
    return np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))])


def _batch(
    data: Tokenized,
    chosen: np.ndarray,
    batch_size: int,
    buckets: Sequence[int],
    rows: np.ndarray | None,
) -> dict[str, np.ndarray]:
    longest = int((data.offsets[chosen + 1] - data.offsets[chosen]).max())
    columns = np.arange(_bucket(longest, buckets))
    rows = np.arange(batch_size) if rows is None else rows
    filled = _fill(chosen, batch_size)[rows]
    starts, lengths = data.offsets[filled], data.offsets[filled + 1] - data.offsets[filled]
    mask = columns[None, :] < lengths[:, None]
    # Places beyond a row's end are looked up at its start, then overwritten.
    places = starts[:, None] + np.where(mask, columns[None, :], 0)
    batch = {
        "input_ids": np.where(mask, data.ids[places], data.pad_id).astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "weights": (rows < len(chosen)).astype(np.float32),
    }
    if data.types is not None:
        batch["token_type_ids"] = np.where(mask, data.types[places], 0).astype(np.int32)
    return batch if data.labels is None else batch | {"labels": data.labels[filled]}
