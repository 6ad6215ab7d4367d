"""The progress bar of a whole sweep, with the best run so far."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Self

from lora_jax.sweeps import trials
from lora_jax.sweeps.trials import Trial
from lora_jax.training import progress_bar
from lora_jax.training.task import Score

_PARTS = 10_000  # units of a run, since whole numbers add up


class ProgressBar:
    """Shows which fraction of all runs together is done."""

    def __init__(self, runs: Sequence[Trial], varied: Sequence[str]) -> None:
        self._done: dict[str, int] = {}
        self._varied = varied
        self._best = -math.inf
        self._bar = progress_bar.ProgressBar(len(runs) * _PARTS, has_counts=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def set_progress(self, trial: Trial, fraction: float, *, is_work: bool = True) -> None:
        """Shows that this fraction of a run, from 0 to 1, is done.

        Args:
          trial: the run.
          fraction: how much of it is done.
          is_work: whether this took time; a run that goes on has a part that took none here.
        """
        parts = round(fraction * _PARTS)
        count = self._bar.update if is_work and trial.id in self._done else self._bar.skip
        count(parts - self._done.get(trial.id, 0))
        self._done[trial.id] = parts

    def compiling(self) -> AbstractContextManager[None]:
        """Shows that steps are compiled in the block."""
        return self._bar.during("compiling")

    def set_best(self, trial: Trial, score: Score, value: float | None) -> None:
        """Takes the best value that a run has reached; None if there is none yet."""
        if value is not None and score.merit(value) > self._best:
            self._best = score.merit(value)
            run = trials.describe(trial, self._varied)
            self._bar.describe(f"best {score.name} {value:.4f} ({run})")
