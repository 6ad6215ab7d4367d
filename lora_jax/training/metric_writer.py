"""The metrics of a run: JSON lines, TensorBoard events, and trackers."""

import contextlib
import json
import os
from pathlib import Path
from typing import Self

from lora_jax.files import write_atomically
from lora_jax.training import trackers
from lora_jax.training.workdirs import METRICS
from lora_jax.training.writers.run_info import RunInfo
from lora_jax.training.writers.tensorboard import TensorBoardWriter

_EVAL_KEY = "eval_loss"  # key of the lines of evaluations, and of no others


class MetricWriter:
    """Metrics of a run: one JSON object a line in ``metrics.jsonl``, and what settings name.

    Lines after ``step`` are dropped, since a resumed run logs them again. So are evaluations after
    ``evaluated``, the step of the last one that the checkpoint knows.

    Without settings the lines also go to TensorBoard.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        evaluated: int | None = None,
        settings: trackers.Settings | None = None,
    ) -> None:
        self._path = workdir / METRICS
        last = step if evaluated is None else evaluated
        lines = [
            line
            for line in read(self._path)
            if line["step"] <= (last if _EVAL_KEY in line else step)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self._path, text.encode())
        settings = settings or trackers.Settings(info=RunInfo(workdir=workdir, store=workdir))
        self._events = None
        if settings.has_tensorboard:
            self._events = TensorBoardWriter(settings.info, step, settings.score)
        self._trackers = trackers.Trackers(settings, lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._trackers.close(kind is None)
        # After an error of the disk, closing fails too, and would hide the first error.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            if self._events:
                self._events.close(kind is None)

    def write(self, step: int, **values: float) -> None:
        """Appends a line.

        Raises:
          OSError: there is no space, for example; checkpoints are intact.
        """
        line = {"step": step, **values}
        text = json.dumps(line, allow_nan=False) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
            if self._events:
                self._events.write(0, step, values)
        except OSError as error:
            message = (
                f"Could not write {self._path} ({error.strerror or error}); the checkpoints are "
                "intact: make room, and run the same command again to go on"
            )
            raise OSError(error.errno, message) from error
        self._trackers.write(line)

    def sync(self) -> None:
        """Makes the lines durable, before a checkpoint that relies on them."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def mark_failed(self) -> None:
        """Tells trackers that the run has failed, though it ends without an error."""
        self._trackers.mark_failed()


class NullWriter:
    """Stands in for a :class:`MetricWriter` in the processes that do not write."""

    def __init__(
        self,
        workdir: Path,
        step: int,
        evaluated: int | None = None,
        settings: trackers.Settings | None = None,
    ) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, step: int, **values: float) -> None:
        """Writes nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def mark_failed(self) -> None:
        """Does nothing."""


def read_evaluation(path: Path, step: int) -> dict[str, float]:
    """Reads loss and scores of the evaluation after a step; of none, the dictionary is empty."""
    lines = [line for line in read(path) if line["step"] == step and _EVAL_KEY in line]
    values = lines[-1].items() if lines else ()
    return {name.removeprefix("eval_"): x for name, x in values if name.startswith("eval_")}


def read(path: Path) -> list[dict[str, float]]:
    """Reads the lines of a metrics file, up to a last one that was cut short."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines
