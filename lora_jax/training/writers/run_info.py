"""What a tracker learns of a run, and the interface that every tracker has."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

Hyperparameter = bool | int | float | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunInfo:
    """A run as trackers know it.

    Attributes:
      workdir: directory of the run.
      store: directory of what trackers keep on this machine.
      is_store_chosen: whether the config names that directory; otherwise a variable of the
        environment that a tracker has for it goes before.
      id: text that no other run has, the same each time that the run goes on.
      name: name for people.
      project: name of the project, or of MLflow's experiment.
      group: name that the runs of a sweep share; "" for none.
      hyperparameters: the config, by dotted names of fields.
    """

    workdir: Path
    store: Path
    is_store_chosen: bool = False
    id: str = ""
    name: str = ""
    project: str = ""
    group: str = ""
    hyperparameters: Mapping[str, Hyperparameter] = dataclasses.field(default_factory=dict)


class Writer(Protocol):
    """A run that is open in a tracker; what it raises is reported, and does not end the run.

    Attributes:
      place: where the metrics go, for people.
    """

    place: str

    def count_lines(self) -> int | None:
        """Returns the number of lines that the tracker has for certain; None if it can't say."""

    def write(self, number: int, step: int, values: Mapping[str, float]) -> None:
        """Logs a line; its number in ``metrics.jsonl`` is 1 for the first, and never comes back."""

    def close(self, is_success: bool) -> None:
        """Says that the run has ended, or is interrupted, and waits until all is written."""


def choose_store(info: RunInfo, variable: str, default: str) -> str:
    """Returns the address of a tracker's store: of the config, the environment, or the run.

    Args:
      info: the run.
      variable: variable of the environment that the tracker has for it.
      default: address in the directory ``info.store``.
    """
    if info.is_store_chosen:
        return default
    return os.environ.get(variable) or default
