"""The progress bar of a whole sweep, with the best run so far."""

import math
import sys
from collections.abc import Sequence
from typing import Self

from tqdm import tqdm

from lora_jax.sweeps import trials
from lora_jax.sweeps.trials import Trial
from lora_jax.training.task import Score

_PARTS = 10_000  # units of a run, since whole numbers add up
_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class ProgressBar:
    """Shows which fraction of all runs together is done."""

    def __init__(self, runs: Sequence[Trial], varied: Sequence[str]) -> None:
        self._done = {trial.id: 0 for trial in runs}
        self._varied = varied
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

    def set_progress(self, trial: Trial, fraction: float) -> None:
        """Shows that this fraction of a run, from 0 to 1, is done."""
        parts = round(fraction * _PARTS)
        self._bar.update(parts - self._done[trial.id])
        self._done[trial.id] = parts

    def set_best(self, trial: Trial, score: Score, value: float | None) -> None:
        """Takes the best value that a run has reached; None if there is none yet."""
        if value is not None and score.merit(value) > self._best:
            self._best = score.merit(value)
            run = trials.describe(trial, self._varied)
            self._bar.set_description(f"best {score.name} {value:.4f} ({run})", refresh=False)
