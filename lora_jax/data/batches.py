"""Makes batches of tokenized examples, in an order that is a pure function, of a few fixed shapes.

Nothing here keeps state. The batch of a step is computed from ``(data, step, seed)``, so that a run
that resumes at any step, on any machine, sees the same batches as one that was never interrupted.
"""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from lora_jax.data.order import epoch_order, order_by_length
from lora_jax.data.tokenization import Tokenized

Batch = dict[str, np.ndarray]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Counts the batches that hold each of ``n`` examples once; the last one may not be full.

    Raises:
      ValueError: there are no examples, or the batch size is below 1.

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
) -> Batch:
    """Makes the training batch of ``step``, a pure function of the arguments.

    Every epoch has a different order, in which each example occurs once. Its last batch is filled
    up with copies of that batch's first row, of weight 0: a copy is a valid input, whereas a row of
    nothing but padding would attend to nothing and give NaN.

    Args:
      data: examples with labels.
      step: 0, 1, ...; the epoch is ``step // steps_per_epoch(n, batch_size)``.
      seed: integer in ``[0, 2**64)``.
      batch_size: number of rows of every batch, B.
      buckets: ascending lengths, such as ``(32, 64, 128)``. The length L of a batch is the smallest
        that holds its longest row, so that there are at most ``len(buckets)`` shapes to compile.
      alike: number of batches that are filled by length at a time, before all batches of the epoch
        are shuffled: rows of similar length need less padding, and the order stays random
        otherwise. 0 or 1 for none.
      rows: numbers of the rows to make, where other processes make the rest of the batch; the
        length is that of the whole batch. None for all.

    Returns:
      ``input_ids`` (B, L) int32; ``attention_mask`` (B, L) int32; ``labels`` (B,) of their dtype;
      ``weights`` (B,) float32, 1 for an example and 0 for a row that fills the batch; and
      ``token_type_ids`` (B, L) int32 if the data have types.

    Raises:
      ValueError: there are no labels, the step is negative, or the buckets do not ascend or do not
        hold every row.
    """
    if data.labels is None:
        raise ValueError("training needs labels, and these examples have none (a test split?)")
    _check_buckets(data, buckets)
    chosen = _choose_examples(data, step, seed=seed, batch_size=batch_size, alike=alike)
    return _make_batch(data, chosen, batch_size, buckets, rows)


def _choose_examples(
    data: Tokenized, step: int, *, seed: int, batch_size: int, alike: int
) -> np.ndarray:
    if step < 0:
        raise ValueError(f"step {step} is negative")
    n = len(data.offsets) - 1
    epoch, place = divmod(step, steps_per_epoch(n, batch_size))
    if alike > 1:
        # Bytes, because the cache needs an argument with a hash.
        order = order_by_length(data.offsets.tobytes(), seed, epoch, batch_size, alike)
    else:
        order = epoch_order(n, seed, epoch)
    return order[place * batch_size : (place + 1) * batch_size]


def eval_batches(
    data: Tokenized,
    *,
    batch_size: int,
    buckets: Sequence[int],
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yields all examples once, the shortest first, so that few tokens are padding.

    The arguments are those of :func:`train_batch`.

    Returns:
      Batches as those of :func:`train_batch`, with ``index`` (B,) int32, the number of the example
      in each row: ``predictions[batch["index"]] = ...`` restores the order, since a row that fills
      the last batch is a copy with the same index. There are no ``labels`` if the examples have
      none. With ``rows``, the index is still that of all rows of the batch.

    Raises:
      ValueError: there are no examples, or the buckets do not ascend or do not hold every row.
    """
    _check_buckets(data, buckets)
    steps = steps_per_epoch(len(data.offsets) - 1, batch_size)
    order = np.argsort(np.diff(data.offsets), kind="stable")
    batches = (order[step * batch_size : (step + 1) * batch_size] for step in range(steps))
    return (
        _make_batch(data, chosen, batch_size, buckets, rows)
        | {"index": _fill(chosen, batch_size).astype(np.int32)}
        for chosen in batches
    )


def count_bucket_lengths(
    data: Tokenized,
    steps: int,
    *,
    seed: int,
    batch_size: int,
    buckets: Sequence[int],
    alike: int = 0,
) -> dict[int, int]:
    """Counts the first ``steps`` training batches of each length, ascending by length.

    The train step is compiled once for every length. The arguments are those of
    :func:`train_batch`.

    Raises:
      ValueError: there are no examples, or the buckets do not ascend or do not hold every row.
    """
    _check_buckets(data, buckets)
    lengths = np.diff(data.offsets)
    rows = functools.partial(_choose_examples, data, seed=seed, batch_size=batch_size, alike=alike)
    longest = (int(lengths[rows(step)].max()) for step in range(steps))
    return dict(sorted(Counter(_find_bucket(length, buckets) for length in longest).items()))


def _check_buckets(data: Tokenized, buckets: Sequence[int]) -> None:
    is_ascending = all(low < high for low, high in zip(buckets, buckets[1:], strict=False))
    if not buckets or buckets[0] < 1 or not is_ascending:
        raise ValueError(f"buckets {tuple(buckets)} are not positive lengths that ascend")
    longest = int(np.diff(data.offsets).max(initial=0))
    if longest > buckets[-1]:
        raise ValueError(
            f"buckets {tuple(buckets)} do not hold the longest row, of {longest} tokens: "
            f"tokenize with max_length={buckets[-1]}, or end the buckets with {longest} or more"
        )


def _find_bucket(length: int, buckets: Sequence[int]) -> int:
    return next(bucket for bucket in buckets if bucket >= length)


def _fill(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Appends copies of the first row until there are ``batch_size``."""
    return np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))])


def _make_batch(
    data: Tokenized,
    chosen: np.ndarray,
    batch_size: int,
    buckets: Sequence[int],
    rows: np.ndarray | None,
) -> Batch:
    longest = int((data.offsets[chosen + 1] - data.offsets[chosen]).max())
    columns = np.arange(_find_bucket(longest, buckets))
    rows = np.arange(batch_size) if rows is None else rows
    examples = _fill(chosen, batch_size)[rows]
    starts = data.offsets[examples]
    lengths = data.offsets[examples + 1] - starts
    mask = columns[None, :] < lengths[:, None]
    # Places after a row's end read the token at its start, which is then overwritten.
    places = starts[:, None] + np.where(mask, columns[None, :], 0)
    batch = {
        "input_ids": np.where(mask, data.ids[places], data.pad_id).astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "weights": (rows < len(chosen)).astype(np.float32),
    }
    if data.types is not None:
        batch["token_type_ids"] = np.where(mask, data.types[places], 0).astype(np.int32)
    return batch if data.labels is None else batch | {"labels": data.labels[examples]}
