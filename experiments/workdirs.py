"""What a run leaves in its directory: its config, metrics by line, TensorBoard events, curves."""

import contextlib
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file

import matplotlib.pyplot as plt  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from tensorboardX import summary  # noqa: E402
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402

from experiments import enclosure  # noqa: E402
from lora_jax.files import write_atomically  # noqa: E402

CONFIG, METRICS, CURVES, ADAPTER = "config.json", "metrics.jsonl", "curves.png", "adapter"
CHECKPOINTS, EVENTS = "checkpoints", "tensorboard"
_EVALUATED = "eval_loss"  # in a line of an evaluation, and in no other
SWEEP = "sweep.json"  # in the directory of a sweep, whose runs are in directories below it
# Fields, or sections, of a config that may differ between a run and its continuation.
MAY_CHANGE = ("checkpoint_keep", "guard", "mesh", "pmap")


def check(workdir: Path, config: ConfigDict) -> None:
    """Finds out, without a change to it, whether a run with this config may use the directory.

    Raises:
      ValueError: it holds a run with another config (the message shows the differences), or
        checkpoints of an unknown one, or is a file.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"The workdir {workdir} is a file; give a directory, new or of this run.")
    if (workdir / SWEEP).exists():
        raise ValueError(f"The workdir {workdir} is that of a sweep; use a new workdir for a run.")
    path = workdir / CONFIG
    if not path.exists():
        if (workdir / CHECKPOINTS).exists() or (workdir / ADAPTER).exists():
            raise ValueError(
                f"The workdir {workdir} holds a run, but not its {CONFIG}, so it is not known "
                "whether it is this one; use a new workdir."
            )
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); use a new workdir.") from error
    changes = list(differences(theirs, plain(config)))
    if changes:
        raise ValueError(
            f"The workdir {workdir} holds a run with another config: {'; '.join(changes)}. "
            "Use a new workdir, or the old config to go on with that run."
        )


def claim(workdir: Path, config: ConfigDict) -> None:
    """Takes the directory for this config, or finds that it already has it.

    Only the process that holds its lock may do so.

    Raises:
      ValueError: as :func:`check` and :func:`enclosure.check_links`.
      OSError: it can't be written.
    """
    check(workdir, config)
    enclosure.check_links(workdir)
    for pattern in (f".{CONFIG}.*", f".{METRICS}.*", f".{CURVES}.*", f"{ADAPTER}/.adapter*"):
        for left in workdir.glob(pattern):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
    path = workdir / CONFIG
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(plain(config), indent=2) + "\n").encode())


def plain(config: ConfigDict) -> Any:
    """The config as JSON types; through JSON, so that tuples compare as they are stored."""
    return json.loads(config.to_json_best_effort())


def differences(old: Any, new: Any, field: str = "") -> Iterator[str]:
    """Says which fields of two configs differ that may not, in a sentence each."""
    if field.removeprefix("config.") in MAY_CHANGE:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(old.get(name), new.get(name), f"{field}.{name}".lstrip("."))
    elif old != new and field.removeprefix("config.") not in MAY_CHANGE:
        yield f"{field} is {old!r} there and {new!r} here"


class Log:
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


class NoLog:
    """In place of a :class:`Log` in the processes that do not write."""

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


def plot_curves(workdir: Path, score: str = "accuracy") -> None:
    """Draws loss and score, training and validation, against the epoch."""
    lines = read(workdir / METRICS)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for panel, name in zip(panels, ("loss", score), strict=True):
        for key, label, style in ((name, "training", "-"), (f"eval_{name}", "validation", "o-")):
            points = [(line["epoch"], line[key]) for line in lines if key in line]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label, markersize=5)
        panel.set(xlabel="epoch", ylabel=name, title=name.capitalize())
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    panels[1].legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    plt.close(figure)
    write_atomically(workdir / CURVES, image.getvalue())
