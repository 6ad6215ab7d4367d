"""The metrics of a run: JSON lines and TensorBoard events."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Self

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lora_jax.files import write_atomically
from lora_jax.training.workdirs import EVENTS, METRICS

_EVAL_KEY = "eval_loss"  # key of the lines of evaluations, and of no others


class MetricWriter:
    """Metrics of a run: one JSON object a line in ``metrics.jsonl``, and TensorBoard events.

    Lines after ``step`` are dropped, since a resumed run logs them again. So are evaluations after
    ``evaluated``, the step of the last one that the checkpoint knows.

    TensorBoard's usual writer is a thread of its own, in which an error of the disk is lost. Here
    each event is written at once.
    """

    def __init__(self, workdir: Path, step: int, evaluated: int | None = None) -> None:
        self._path = workdir / METRICS
        last = step if evaluated is None else evaluated
        lines = [
            json.dumps(line) + "\n"
            for line in read(self._path)
            if line["step"] <= (last if _EVAL_KEY in line else step)
        ]
        write_atomically(self._path, "".join(lines).encode())
        (workdir / EVENTS).mkdir(exist_ok=True)
        self._events = EventsWriter(str(workdir / EVENTS / "events"))
        # Tells TensorBoard to hide the events of this and later steps in older files.
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # After an error of the disk, closing fails too, and would hide the first error.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._events.close()

    def write(self, step: int, **values: float) -> None:
        """Appends a line.

        Raises:
          OSError: there is no space, for example; checkpoints are intact.
        """
        text = json.dumps({"step": step, **values}, allow_nan=False) + "\n"
        try:
            self._write(step, text, values)
        except OSError as error:
            message = (
                f"Could not write {self._path} ({error.strerror or error}); the checkpoints are "
                "intact: make room, and run the same command again to go on"
            )
            raise OSError(error.errno, message) from error

    def sync(self) -> None:
        """Makes the lines durable, before a checkpoint that relies on them."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def _write(self, step: int, text: str, values: dict[str, float]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)
        for name, value in values.items():
            scalar = summary.scalar(name, value)
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar))
        self._events.flush()


class NullWriter:
    """Stands in for a :class:`MetricWriter` in the processes that do not write."""

    def __init__(self, workdir: Path, step: int, evaluated: int | None = None) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, step: int, **values: float) -> None:
        """Writes nothing."""

    def sync(self) -> None:
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
