"""The progress bar of a whole sweep, with the best run so far."""

import math
import sys
from collections.abc import Sequence
from typing import Self

from tqdm import tqdm

from lora_jax.sweeps import trials
from lora_jax.sweeps.trials import Point
from lora_jax.training.task import Score

_PARTS = 10_000  # of a run: whole numbers add up
_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class Bar:
    """Shows how much of all runs together is done."""

    def __init__(self, runs: Sequence[Point], swept: Sequence[str]) -> None:
        self._at = {point.id: 0 for point in runs}
        self._swept = swept
        self._best = -math.inf
        # In a file, which keeps every update, a line now and then is enough.
        seconds = 1 if sys.stderr.isatty() else 10
        self._bar = tqdm(
            total=len(runs) * _PARTS, bar_format=_FORMAT, dynamic_ncols=True, mininterval=seconds
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def at(self, point: Point, fraction: float) -> None:
        """A run has come so far, from 0 to 1."""
        parts = round(fraction * _PARTS)
        self._bar.update(parts - self._at[point.id])
        self._at[point.id] = parts

    def found(self, point: Point, score: Score, value: float | None) -> None:
        """Takes the best value that a run has reached, None if there is none yet."""
        if value is not None and score.merit(value) > self._best:
            self._best = score.merit(value)
            run = trials.label(point, self._swept)
            self._bar.set_description(f"best {score.name} {value:.4f} ({run})", refresh=False)
