"""Several texts in one row of a batch, so that little of it is padding.

A text sees itself alone: its tokens have a segment number of their own, and positions from 0.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.data import batches
from lora_jax.data.batches import Batch
from lora_jax.data.order import epoch_order
from lora_jax.data.texts import Texts


class Packed(NamedTuple):
    """Texts, and which of them stand in each row.

    Attributes:
      texts: all of them.
      rows: numbers of the texts of each row.
      length: tokens of a row; shorter ones are padded.
    """

    texts: Texts
    rows: tuple[tuple[int, ...], ...]
    length: int

    @property
    def shared(self) -> bool:
        """Whether texts share a row anywhere."""
        return any(len(row) > 1 for row in self.rows)


def pack(texts: Texts, length: int) -> Packed:
    """Fills rows of ``length`` tokens: the longest texts first, each where it fits best.

    Raises:
      ValueError: a text is longer than that.
    """
    lengths = np.diff(texts.offsets)
    return Packed(texts, tuple(map(tuple, fill(lengths.tolist(), length))), length)


def one_by_one(texts: Texts) -> Packed:
    """Each text in a row of its own, all as long as the longest."""
    count = len(texts.offsets) - 1
    return Packed(texts, tuple((k,) for k in range(count)), int(np.diff(texts.offsets).max()))


def fill(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Distributes things over containers (best fit, in decreasing size).

    Args:
      sizes: of the things.
      room: of each container.

    Returns:
      Numbers of the things in each container.

    Raises:
      ValueError: a thing that fits in none.

    >>> fill([3, 5, 2, 2], 7)
    [[1, 2], [0, 3]]
    """
    if sizes and max(sizes) > room:
        raise ValueError(f"a text of {max(sizes)} tokens does not fit in rows of {room}")
    containers: list[list[int]] = []
    left: list[tuple[int, int]] = []  # room that is left, and the container's number; ascending
    for k in sorted(range(len(sizes)), key=lambda k: (-sizes[k], k)):
        at = bisect.bisect_left(left, (sizes[k], -1))
        if at < len(left):
            free, number = left.pop(at)
        else:
            free, number = room, len(containers)
            containers.append([])
        containers[number].append(k)
        bisect.insort(left, (free - sizes[k], number))
    return containers


def train_batch(
    packed: Packed, step: int, *, seed: int, batch_size: int, rows: np.ndarray | None = None
) -> Batch:
    """The training batch of ``step``, a pure function of its arguments.

    Each epoch has an order of its own, and each row once; a last batch that is not full is filled
    with copies, of weight 0, of its first row. With ``rows`` only these are made, as in
    :func:`batches.train_batch`.

    Returns:
      ``input_ids``, ``attention_mask`` and ``counts``, each ``(batch_size, length)`` int32, and
      ``weights`` ``(batch_size,)`` float32; where texts share rows, ``positions`` and
      ``segment_ids`` as well.
    """
    epoch, place = divmod(step, batches.steps_per_epoch(len(packed.rows), batch_size))
    order = epoch_order(len(packed.rows), seed, epoch)
    return _batch(packed, order[place * batch_size : (place + 1) * batch_size], batch_size, rows)


def eval_batches(
    packed: Packed, *, batch_size: int, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """All rows once; batches as those of :func:`train_batch`."""
    steps = batches.steps_per_epoch(len(packed.rows), batch_size)
    everything = np.arange(len(packed.rows))
    for step in range(steps):
        chosen = everything[step * batch_size : (step + 1) * batch_size]
        yield _batch(packed, chosen, batch_size, rows)


def _batch(packed: Packed, chosen: np.ndarray, batch_size: int, rows: np.ndarray | None) -> Batch:
    rows = np.arange(batch_size) if rows is None else rows
    filled = np.concatenate([chosen, np.repeat(chosen[:1], batch_size - len(chosen))])[rows]
    made = [_row(packed, packed.rows[k]) for k in filled]
    batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
    batch["attention_mask"] = (batch["segment_ids"] > 0).astype(np.int32)
    if not packed.shared:
        del batch["positions"], batch["segment_ids"]
    return batch | {"weights": (rows < len(chosen)).astype(np.float32)}


def _row(packed: Packed, numbers: Sequence[int]) -> Batch:
    texts = packed.texts
    parts = [slice(texts.offsets[k], texts.offsets[k + 1]) for k in numbers]
    sizes = [part.stop - part.start for part in parts]
    padded = lambda pieces, value=0: np.concatenate(
        [*pieces, np.full(packed.length - sum(sizes), value)], dtype=np.int32
    )
    return {
        "input_ids": padded([texts.ids[part] for part in parts], texts.pad_id),
        "counts": padded([texts.counts[part] for part in parts]),
        "positions": padded([np.arange(size) for size in sizes]),
        "segment_ids": padded([np.full(size, k) for k, size in enumerate(sizes, 1)]),
    }
