"""Every random order of data: each a pure function of a seed and a stream of its own."""

import functools

import numpy as np

# Epochs number the streams from 0, so the last one is free for choosing a subset.
_SUBSET_STREAM = 2**64 - 1


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
