"""Makes every random order of data, as a pure function of a seed and a stream."""

import functools

import numpy as np

# The streams. Epoch k has the stream k for the order of its examples, and the stream BATCHES + k
# for the order of its batches.
BATCHES = 2**63
SUBSET = 2**64 - 1  # the examples to train on, and those to hold out
HOLDOUT = 2**64 - 2  # the rows of a table to hold out
MEANINGS = 0  # the meaning representations of E2E to hold out
LINES = 0  # the lines to pretrain a model on


def permutation(n: int, seed: int, *, stream: int) -> np.ndarray:
    """Draws a random order of ``n`` items that depends on ``(n, seed, stream)`` alone.

    It sorts the raw output of Philox, which numpy promises never to change. It does not call
    ``Generator.permutation``, whose algorithm may change from one release of numpy to the next.

    Args:
      n: number of items.
      seed: integer in ``[0, 2**64)``.
      stream: integer in ``[0, 2**64)``, such as the number of the epoch.

    Returns:
      ``(n,)`` int64.

    Raises:
      ValueError: ``seed`` or ``stream`` is out of range.
    """
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} {value} is not in [0, 2**64)")
    raw = np.random.Philox(key=int(stream) << 64 | int(seed)).random_raw(n)
    return np.argsort(raw, kind="stable").astype(np.int64)


@functools.lru_cache(maxsize=1)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Draws the order of ``n`` examples in an epoch: ``(n,)`` int64, read-only."""
    order = permutation(n, seed, stream=epoch)
    order.flags.writeable = False  # all steps of the epoch get views of this array
    return order


@functools.lru_cache(maxsize=1)
def order_by_length(
    offsets: bytes, seed: int, epoch: int, batch_size: int, alike: int
) -> np.ndarray:
    """Draws an order for an epoch in which the examples of a batch have similar lengths.

    It sorts windows of ``alike`` batches by length, cuts them into batches, and shuffles these.

    Args:
      offsets: bytes of ``(n + 1,)`` int64, the places where examples begin; they are bytes because
        the cache needs an argument with a hash.
      seed: integer in ``[0, 2**64)``.
      epoch: 0, 1, ...
      batch_size: number of examples of a batch.
      alike: number of batches in a window.

    Returns:
      ``(n,)`` int64, read-only.
    """
    lengths = np.diff(np.frombuffer(offsets, np.int64))
    order = epoch_order(len(lengths), seed, epoch)
    # A last batch that is not full stays the last.
    full = len(order) - len(order) % batch_size
    windows = np.split(order[:full], range(alike * batch_size, full, alike * batch_size))
    by_length = [rows[np.argsort(lengths[rows], kind="stable")] for rows in windows]
    batches = np.concatenate([order[:0], *by_length]).reshape(-1, batch_size)
    shuffled = batches[permutation(len(batches), seed, stream=BATCHES + epoch)].reshape(-1)
    order = np.concatenate([shuffled, order[full:]])
    order.flags.writeable = False
    return order
