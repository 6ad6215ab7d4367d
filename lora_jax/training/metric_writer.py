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

_EVALUATED = "eval_loss"  # in a line of an evaluation, and in no other


class MetricWriter:
    """Metrics of a run: one JSON object a line in ``metrics.jsonl``, and TensorBoard events.

    What was logged after ``step`` is dropped, as a resumed run will log it again; and so is the
    evaluation at ``step`` if it is not the one at ``evaluated``, the last that counts.

    TensorBoard's usual writer is a thread of its own, in which an error of the disk is lost; here
    each event is written at once.
    """

    def __init__(self, workdir: Path, step: int, evaluated: int | None = None) -> None:
        self._path = workdir / METRICS
        last = step if evaluated is None else evaluated
        kept = [
            json.dumps(line) + "\n"
            for line in read(self._path)
            if line["step"] <= (last if _EVALUATED in line else step)
        ]
        write_atomically(self._path, "".join(kept).encode())
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
          OSError: no space, ...; checkpoints are intact.
        """
        text = json.dumps({"step": step, **values}, allow_nan=False) + "\n"
        try:
            self._write(step, text, values)
        except OSError as error:
            said = f"Could not write {self._path} ({error.strerror or error}); the checkpoints are"
            todo = "intact: make room, and run the same command again to go on"
            raise OSError(error.errno, f"{said} {todo}") from error

    def sync(self) -> None:
        """Makes the lines durable, before a checkpoint that counts on them."""
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
    """In place of a :class:`MetricWriter` in the processes that do not write."""

    def __init__(self, workdir: Path, step: int, evaluated: int | None = None) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, step: int, **values: float) -> None:
        """Writes nothing."""

    def sync(self) -> None:
        """Has nothing to make durable."""


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file, up to one that is none: a last one that was cut short."""
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
