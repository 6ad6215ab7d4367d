"""Every random order of data: each a pure function of a seed and a stream of its own."""

import functools

import numpy as np

# The streams. Each epoch has two: one with its number for the order of its examples, and BATCHES
# later one for the order of its batches.
BATCHES = 2**63
SUBSET = 2**64 - 1  # which examples are trained on, and which are held out
MEANINGS = 0  # which meaning representations of E2E are held out
LINES = 0  # the lines that a model is pretrained on


def permutation(n: int, seed: int, *, stream: int) -> np.ndarray:
    """A random order of ``n`` things that depends on ``(n, seed, stream)`` alone.

    It sorts the raw output of Philox, which numpy promises never to change, rather than call
    ``Generator.permutation``, whose algorithm a numpy release may change.

    Args:
      n: how many.
      seed: in ``[0, 2**64)``.
      stream: in ``[0, 2**64)``, such as the number of the epoch.

    Returns:
      ``(n,)`` int64.

    Raises:
      ValueError: ``seed`` or ``stream`` out of range.
    """
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} {value} is not in [0, 2**64)")
    raw = np.random.Philox(key=int(stream) << 64 | int(seed)).random_raw(n)
    return np.argsort(raw, kind="stable").astype(np.int64)


@functools.lru_cache(maxsize=1)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of ``n`` examples in an epoch: ``(n,)`` int64, read-only."""
    order = permutation(n, seed, stream=epoch)
    order.flags.writeable = False  # every step of the epoch gets a view of this one array
    return order


@functools.lru_cache(maxsize=1)
def order_by_length(
    offsets: bytes, seed: int, epoch: int, batch_size: int, alike: int
) -> np.ndarray:
    """The order in an epoch of which the examples of a batch have similar lengths.

    Windows of ``alike`` batches are sorted by length and cut into batches, which are then shuffled.

    Args:
      offsets: bytes of ``(n + 1,)`` int64, where each example begins; bytes, since the cache needs
        something with a hash.
      seed: in ``[0, 2**64)``.
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
