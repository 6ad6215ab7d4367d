"""Packs several texts into one row of a batch, so that little of it is padding.

A text sees only itself: its tokens have their own segment number, and positions from 0.
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
    """Texts, and their distribution over rows.

    Attributes:
      texts: all texts.
      rows: numbers of the texts in each row.
      length: number of tokens of a row; shorter ones are padded.
    """

    texts: Texts
    rows: tuple[tuple[int, ...], ...]
    length: int

    @property
    def has_shared_rows(self) -> bool:
        """Whether a row holds more than one text."""
        return any(len(row) > 1 for row in self.rows)


def pack(texts: Texts, length: int) -> Packed:
    """Fills rows of ``length`` tokens, with the longest texts first, each where it fits best.

    Raises:
      ValueError: a text is longer than a row.
    """
    lengths = np.diff(texts.offsets)
    return Packed(texts, tuple(map(tuple, fill(lengths.tolist(), length))), length)


def pack_singly(texts: Texts) -> Packed:
    """Puts each text into a separate row; all rows are as long as the longest text."""
    count = len(texts.offsets) - 1
    return Packed(texts, tuple((k,) for k in range(count)), int(np.diff(texts.offsets).max()))


def fill(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Distributes items over containers (best fit, in decreasing size).

    Args:
      sizes: sizes of the items.
      room: size of each container.

    Returns:
      Numbers of the items in each container.

    Raises:
      ValueError: an item is larger than a container.

    >>> fill([3, 5, 2, 2], 7)
    [[1, 2], [0, 3]]
    """
    if sizes and max(sizes) > room:
        raise ValueError(f"a text of {max(sizes)} tokens does not fit in rows of {room}")
    containers: list[list[int]] = []
    free: list[tuple[int, int]] = []  # free room and number of each container, ascending
    for k in sorted(range(len(sizes)), key=lambda k: (-sizes[k], k)):
        place = bisect.bisect_left(free, (sizes[k], -1))
        if place < len(free):
            free_room, number = free.pop(place)
        else:
            free_room, number = room, len(containers)
            containers.append([])
        containers[number].append(k)
        bisect.insort(free, (free_room - sizes[k], number))
    return containers


def train_batch(
    packed: Packed, step: int, *, seed: int, batch_size: int, rows: np.ndarray | None = None
) -> Batch:
    """Makes the training batch of ``step``, a pure function of the arguments.

    Every epoch has a different order, in which each row occurs once; a last batch that is not full
    is filled with copies of its first row, of weight 0. With ``rows`` only these are made, as in
    :func:`batches.train_batch`.

    Returns:
      ``input_ids``, ``attention_mask`` and ``counts``, each ``(batch_size, length)`` int32, and
      ``weights`` ``(batch_size,)`` float32; if texts share rows, also ``positions`` and
      ``segment_ids``, int32 of the first shape.
    """
    epoch, place = divmod(step, batches.steps_per_epoch(len(packed.rows), batch_size))
    order = epoch_order(len(packed.rows), seed, epoch)
    return _make_batch(
        packed, order[place * batch_size : (place + 1) * batch_size], batch_size, rows
    )


def eval_batches(
    packed: Packed, *, batch_size: int, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """Yields all rows once, in batches as those of :func:`train_batch`."""
    steps = batches.steps_per_epoch(len(packed.rows), batch_size)
    order = np.arange(len(packed.rows))
    for step in range(steps):
        chosen = order[step * batch_size : (step + 1) * batch_size]
        yield _make_batch(packed, chosen, batch_size, rows)


def _make_batch(
    packed: Packed, chosen: np.ndarray, batch_size: int, rows: np.ndarray | None
) -> Batch:
    rows = np.arange(batch_size) if rows is None else rows
    numbers = np.concatenate([chosen, np.repeat(chosen[:1], batch_size - len(chosen))])[rows]
    row_arrays = [_make_row(packed, packed.rows[k]) for k in numbers]
    batch = {name: np.stack([row[name] for row in row_arrays]) for name in row_arrays[0]}
    batch["attention_mask"] = (batch["segment_ids"] > 0).astype(np.int32)
    if not packed.has_shared_rows:
        del batch["positions"], batch["segment_ids"]
    return batch | {"weights": (rows < len(chosen)).astype(np.float32)}


def _make_row(packed: Packed, numbers: Sequence[int]) -> Batch:
    """Makes a row of the texts with these numbers, each array int32 ``(length,)``."""
    texts = packed.texts
    parts = [slice(texts.offsets[k], texts.offsets[k + 1]) for k in numbers]
    sizes = [part.stop - part.start for part in parts]

    def join(pieces: Sequence[np.ndarray], pad: int = 0) -> np.ndarray:
        padding = np.full(packed.length - sum(sizes), pad)
        return np.concatenate([*pieces, padding], dtype=np.int32)

    return {
        "input_ids": join([texts.ids[part] for part in parts], texts.pad_id),
        "counts": join([texts.counts[part] for part in parts]),
        "positions": join([np.arange(size) for size in sizes]),
        "segment_ids": join([np.full(size, k) for k, size in enumerate(sizes, 1)]),
    }
