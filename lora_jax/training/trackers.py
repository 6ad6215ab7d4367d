"""Trackers: which there are, and how each line of a run reaches each of them once.

``trackers.json``, in the directory of a run, holds the run's id and name in trackers, and how many
lines each has. A run that goes on, after ``kill -9`` too, writes the same lines again after its
checkpoint; what a tracker has is not handed to it again, and what it lacks is.
"""

import dataclasses
import importlib
import importlib.util
import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lora_jax.files import write_atomically
from lora_jax.training import run_names
from lora_jax.training.task import Score
from lora_jax.training.workdirs import METRICS, TRACKERS
from lora_jax.training.writers.run_info import RunInfo, Writer

_LOGGER = logging.getLogger("lora_jax.training")


class Kind(NamedTuple):
    """A tracker: the package that it needs, which is also the extra, and the file of its class."""

    module: str
    file: str
    writer: str


KINDS = {
    "wandb": Kind("wandb", "lora_jax.training.writers.wandb_writer", "WandbWriter"),
    "mlflow": Kind("mlflow", "lora_jax.training.writers.mlflow_writer", "MlflowWriter"),
    "trackio": Kind("trackio", "lora_jax.training.writers.trackio_writer", "TrackioWriter"),
}
TENSORBOARD = "tensorboard"
# JSON lines are always written, since a run goes on by them.
NAMES = ("jsonl", TENSORBOARD, *KINDS)


def list_problems(log: ConfigDict) -> Iterator[str]:
    """Says what is wrong with the section ``log`` of a config."""
    unknown = [str(name) for name in log.to if name not in NAMES]
    if unknown:
        yield f"log.to names {', '.join(unknown)}; there are {', '.join(NAMES)}"
    for name in log.to:
        if name in KINDS and not _is_installed(KINDS[name].module):
            yield (
                f"log.to names {name}, which needs {KINDS[name].module}: "
                f"pip install 'lora_jax[{name}]'"
            )
    if set(log.to) & KINDS.keys() and not log.project:
        yield "log.project is empty: trackers keep runs by project"


def _is_installed(module: str) -> bool:
    # A folder of that name in the current directory, as W&B makes one, is no package.
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlets:
    """The trackers of one or several runs of this process.

    Attributes:
      names: names of the trackers.
      say: takes a line about one that has failed, and where the metrics go.
      failed: names of those that have failed, which are not tried again.
    """

    names: Sequence[str] = ()
    say: Callable[[str], None] = _LOGGER.warning
    failed: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the metrics of a run go beside ``metrics.jsonl``.

    Attributes:
      info: the run.
      has_tensorboard: whether TensorBoard's events are written.
      outlets: trackers.
      score: name of the metric that selects the best adapter, as it is logged.
      is_announced: whether the run opens its trackers at its start, and says where they are.
    """

    info: RunInfo
    has_tensorboard: bool = True
    outlets: Outlets = dataclasses.field(default_factory=Outlets)
    score: str = ""
    is_announced: bool = False


def make_outlets(config: ConfigDict, say: Callable[[str], None]) -> Outlets:
    """Returns the trackers that a config names."""
    return Outlets(names=[name for name in KINDS if name in config.log.to], say=say)


def make_settings(
    config: ConfigDict, info: RunInfo, outlets: Outlets, score: Score, *, is_announced: bool = False
) -> Settings:
    """Returns where the metrics of a run go; arguments as in :class:`Settings`."""
    return Settings(
        info=info,
        has_tensorboard=TENSORBOARD in config.log.to,
        outlets=outlets,
        score=f"eval_{score.name}",
        is_announced=is_announced,
    )


def make_info(
    config: ConfigDict, workdir: Path, *, name: str = "", group: str = "", store: Path | None = None
) -> RunInfo:
    """Says of a run what trackers learn of it.

    Args:
      config: config of the run.
      workdir: directory of the run.
      name: name among the runs of a sweep; "" for a run by itself.
      group: name that the runs of the sweep share.
      store: directory of what trackers keep on this machine; by default the workdir.
    """
    log = config.log
    if name and log.name:
        name = f"{log.name}-{name}"
    chosen = Path(log.dir).absolute() if log.dir else None
    return RunInfo(
        workdir=workdir,
        store=chosen or (store or workdir).absolute(),
        is_store_chosen=chosen is not None,
        name=name or log.name or run_names.name_run(config),
        project=log.project,
        group=log.group or group,
        hyperparameters=run_names.flatten(config),
    )


class Trackers:
    """The trackers of a run, each opened when there is a first line for it.

    Args:
      settings: of the run.
      lines: lines that ``metrics.jsonl`` has.
    """

    def __init__(self, settings: Settings, lines: Sequence[Mapping[str, float]]) -> None:
        self._outlets, self._settings = settings.outlets, settings
        self._lines, self._is_failed = list(lines), False
        self._open: dict[str, Writer] = {}
        if self._outlets.names:
            self._path = settings.info.workdir / TRACKERS
            self._state = _read_state(self._path, settings.info)
            self._catch_up(is_opening=settings.is_announced)

    def write(self, line: Mapping[str, float]) -> None:
        """Hands a line to each tracker that does not have it."""
        if self._outlets.names:
            self._lines.append(line)
            self._catch_up()

    def mark_failed(self) -> None:
        """Says that the run has failed, such as by diverging, though it ends without an error."""
        self._is_failed = True

    def close(self, is_success: bool) -> None:
        """Closes the trackers; they learn whether the run has ended well."""
        for name, writer in self._open.items():
            try:
                writer.close(is_success and not self._is_failed)
            except Exception as error:
                self._fail(name, error)
        self._open = {}

    def _catch_up(self, *, is_opening: bool = False) -> None:
        """Hands each tracker the lines that it does not have."""
        for name in self._outlets.names:
            is_behind = is_opening or self._position(name) < len(self._lines)
            if is_behind and name not in self._outlets.failed:
                try:
                    self._hand_over(name, self._writer(name))
                except Exception as error:  # of a network, a server, a disk: of any type
                    self._fail(name, error)

    def _position(self, name: str) -> int:
        return self._state["lines"].get(name, 0)

    def _hand_over(self, name: str, writer: Writer) -> None:
        for number in range(self._position(name), len(self._lines)):
            values = dict(self._lines[number])
            writer.write(number + 1, int(values.pop("step")), values)
            self._state["lines"][name] = number + 1
            self._save()

    def _writer(self, name: str) -> Writer:
        if name not in self._open:
            self._save()  # before a run of this id is made
            kind, info = KINDS[name], self._settings.info
            writer_class = getattr(importlib.import_module(kind.file), kind.writer)
            about = dataclasses.replace(info, id=self._state["id"], name=self._state["name"])
            about.store.mkdir(parents=True, exist_ok=True)
            writer: Writer = writer_class(about)
            self._open[name], count = writer, writer.count_lines()
            if count is not None:
                self._state["lines"][name] = count
            if self._settings.is_announced:
                self._outlets.say(f"metrics to {name}: {writer.place}")
        return self._open[name]

    def _save(self) -> None:
        write_atomically(self._path, (json.dumps(self._state, indent=2) + "\n").encode())

    def _fail(self, name: str, error: Exception) -> None:
        self._outlets.failed.add(name)
        reason = " ".join(str(error).split())[:300] or "no reason was given"
        self._outlets.say(
            f"{name} does not take the metrics ({type(error).__name__}: {reason}). The run goes on "
            f"without it, and {METRICS} has every line; a run that is started again hands on what "
            "is missing."
        )


def _read_state(path: Path, info: RunInfo) -> dict[str, Any]:
    """Reads what trackers have of a run; a damaged file counts as none."""
    new = {"id": uuid.uuid4().hex[:16], "name": info.name, "lines": {}}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        is_sound = isinstance(state["lines"], dict) and all(
            isinstance(state[key], str) for key in ("id", "name")
        )
    except (OSError, ValueError, KeyError, TypeError):
        return new
    return state if is_sound else new
