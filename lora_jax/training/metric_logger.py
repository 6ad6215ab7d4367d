"""Training metrics as they come: checked, averaged, logged and shown."""

import sys
import time
from collections.abc import Sequence
from typing import NamedTuple, Self

import jax
from tqdm import tqdm

from lora_jax.training import metric_writer, metrics, nan_guard


def means(sums: Sequence[NamedTuple], seconds: float) -> dict[str, float]:
    """A log line's values from the sums of its steps.

    >>> means([metrics.Sums(4.0, 1.0, 2.0), metrics.Sums(2.0, 2.0, 2.0)], seconds=0.5)
    {'loss': 1.5, 'accuracy': 0.75, 'examples_per_second': 8.0}
    """
    values = metrics.combine(sums)
    count = values.pop("examples")
    return values | {"examples_per_second": count / seconds}


class Meter:
    """Takes the metrics of each step, writes a line every ``log_every``, and shows a bar.

    Metrics are looked at when the next step has been dispatched, so that the device need not wait
    for the host. ``policy`` says what is done about a step that the guard left out, ``pending`` is
    what :meth:`pending` gave when the run that goes on was saved.
    """

    def __init__(
        self,
        log: metric_writer.MetricWriter,
        *,
        start: int,
        total: int,
        per_epoch: int,
        log_every: int,
        policy: nan_guard.Policy,
        pending: Sequence[Sequence[float]] = (),
    ) -> None:
        self._policy = policy
        self._log, self._per_epoch, self._log_every = log, per_epoch, log_every
        self._pending: tuple[int, NamedTuple, nan_guard.Verdict] | None = None
        self._sums: list[Sequence[float]] = list(pending)
        self._kind: type = tuple
        self._last = start
        self._clock = time.perf_counter()
        # In a file, which keeps every update, a line now and then is enough.
        seconds = 1 if sys.stderr.isatty() else 10
        self._bar = tqdm(
            total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=seconds,
            disable=jax.process_index() > 0,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, done: int, sums: NamedTuple, verdict: nan_guard.Verdict) -> None:
        """Takes the sums of step ``done`` (1 is the first), and what the guard found of it.

        Raises:
          FloatingPointError: the step before is one to stop at.
        """
        self._look()
        self._pending = done, sums, verdict

    def flush(self) -> None:
        """Looks at the last step, and writes what has come since the last line, if anything.

        Raises:
          FloatingPointError: the last step is one to stop at.
        """
        self._look()
        if self._sums:
            self._write()

    def pending(self) -> list[list[float]]:
        """The sums of each step since the last line, for a checkpoint: its line is yet to come.

        Raises:
          FloatingPointError: the last step is one to stop at.
        """
        self._look()
        return list(self._sums)

    def evaluated(self, name: str, best: float) -> None:
        """Shows the best score beside the bar; the evaluation's time is no training time."""
        self._bar.set_description(f"best validation {name} {best:.4f}", refresh=False)
        self._clock = time.perf_counter()

    def _look(self) -> None:
        if self._pending is None:
            return
        self._last, *found = self._pending
        self._pending = None
        sums, verdict = jax.device_get(found)
        self._kind = type(sums)
        if complaint := nan_guard.complaint(self._policy, self._last, verdict):
            self._log.write(self._last, epoch=self._epoch(), skipped=int(verdict.skips))
            self._bar.write(f"{complaint}: its update is left out", file=sys.stderr)
        else:
            self._sums.append([float(x) for x in sums])
        self._bar.update(1)
        if self._last % self._log_every == 0 and self._sums:
            self._write()

    def _epoch(self) -> float:
        return self._last / self._per_epoch

    def _write(self) -> None:
        now = time.perf_counter()
        # What comes from a checkpoint is plain lists.
        values = means([self._kind(*x) for x in self._sums], now - self._clock)
        self._log.write(self._last, epoch=self._epoch(), **values)
        speed = values.pop("examples_per_second")
        shown = [f"{name} {value:.3f}" for name, value in values.items()]
        self._bar.set_postfix_str(", ".join([*shown, f"{speed:.0f} examples/s"]), refresh=False)
        self._sums, self._clock = [], now
