"""Checks, averages, logs and shows training metrics as they come."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Self

import jax
import numpy as np

from lora_jax.training import metric_writer, metrics, nan_guard, progress_bar
from lora_jax.training.task import Batch

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def means(rows: Sequence[Sequence[float]], sums_type: type, *, seconds: float) -> dict[str, float]:
    """Computes the values of a log line from its steps.

    Args:
      rows: for each step its sums, and then the norm of its gradient. Checkpoints of earlier
        versions have no norm. One that is not finite, as that of very large numbers, counts for
        nothing.
      sums_type: type of the sums, a NamedTuple.
      seconds: duration of the steps.

    >>> means([(4.0, 1.0, 2.0, 0.5), (2.0, 2.0, 2.0, 1.5)], metrics.Sums, seconds=0.5)
    {'loss': 1.5, 'accuracy': 0.75, 'grad_norm': 1.0, 'examples_per_second': 8.0}
    """
    count = len(vars(sums_type)["_fields"])
    values = metrics.combine([sums_type(*row[:count]) for row in rows])
    examples = values.pop("examples")
    if norms := [x for row in rows for x in row[count:] if math.isfinite(x)]:
        values["grad_norm"] = math.fsum(norms) / len(norms)
    return values | {"examples_per_second": examples / seconds}


class Meter:
    """Takes the metrics of each step, writes a line every ``log_every`` steps, and shows a bar.

    It reads the metrics of a step when the next step has been dispatched, so that the device need
    not wait for the host. ``steps`` begins with the number of steps that are done, and stops at
    that of the whole run; ``policy`` says what to do about a step without an update,
    ``describe_rates`` gives the learning rates of a step, and ``pending`` is the value that
    :meth:`pending` had when the run was saved that goes on now.
    """

    def __init__(
        self,
        log: metric_writer.MetricWriter | metric_writer.NullWriter,
        *,
        steps: range,
        per_epoch: int,
        log_every: int,
        policy: nan_guard.Policy,
        describe_rates: Callable[[int], dict[str, float]],
        pending: Sequence[Sequence[float]] = (),
    ) -> None:
        self._policy, self._describe_rates = policy, describe_rates
        self._log, self._per_epoch, self._log_every = log, per_epoch, log_every
        self._pending: tuple[int, NamedTuple, nan_guard.Verdict] | None = None
        self._rows: list[Sequence[float]] = list(pending)
        self._sums_type: type = tuple
        self._last = steps.start
        self._clock = time.perf_counter()
        self._shapes: set[Shapes] = set()
        self._bar = progress_bar.ProgressBar(
            steps.stop, initial=steps.start, is_hidden=jax.process_index() > 0
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def compiling(self, batch: Batch) -> AbstractContextManager[None]:
        """Shows that the step in the block is compiled, if it is: for a batch of new shapes."""
        shapes = tuple(sorted((name, np.shape(x)) for name, x in batch.items()))
        if shapes in self._shapes:
            return contextlib.nullcontext()
        self._shapes.add(shapes)
        return self._bar.during("compiling")

    def evaluating(self) -> AbstractContextManager[None]:
        """Shows that the block is an evaluation."""
        return self._bar.during("evaluating", is_work=True)

    def add(self, step: int, sums: NamedTuple, verdict: nan_guard.Verdict) -> None:
        """Takes the sums of a step, of which the first is 1, and the guard's verdict on it.

        Raises:
          FloatingPointError: the step before is one to stop at.
        """
        self._read()
        self._pending = step, sums, verdict

    def flush(self) -> None:
        """Reads the last step's metrics, and writes a line for the steps since the last one.

        Raises:
          FloatingPointError: the last step is one to stop at.
        """
        self._read()
        if self._rows:
            self._write()

    def pending(self) -> list[list[float]]:
        """Returns what :func:`means` takes of each step since the last line, for a checkpoint.

        Raises:
          FloatingPointError: the last step is one to stop at.
        """
        self._read()
        return [list(row) for row in self._rows]

    def show_best(self, name: str, best: float) -> None:
        """Shows the best score beside the bar; starts the time of the next line anew."""
        self._bar.describe(f"best validation {name} {best:.4f}")
        self._clock = time.perf_counter()

    def _read(self) -> None:
        if self._pending is None:
            return
        self._last, *on_device = self._pending
        self._pending = None
        sums, verdict = jax.device_get(on_device)
        self._sums_type = type(sums)
        if problem := nan_guard.check_step(self._policy, self._last, verdict):
            self._log.write(self._last, epoch=self._epoch(), skipped=int(verdict.skips))
            self._bar.write(f"{problem}: its update is left out")
        else:
            self._rows.append([*map(float, sums), float(verdict.grad_norm)])
        self._bar.update()
        if self._last % self._log_every == 0 and self._rows:
            self._write()

    def _epoch(self) -> float:
        return self._last / self._per_epoch

    def _write(self) -> None:
        now = time.perf_counter()
        values = means(self._rows, self._sums_type, seconds=now - self._clock)
        rates = self._describe_rates(self._last)
        self._log.write(self._last, epoch=self._epoch(), **values, **rates)
        speed = values.pop("examples_per_second")
        parts = [f"{name} {value:.3f}" for name, value in values.items()]
        self._bar.show(", ".join([*parts, f"{speed:.0f} examples/s"]))
        self._rows, self._clock = [], now
