"""The directory of a sweep: ``sweep.json``, and a directory for each run.

``runs/ID/`` holds ``config.json``, ``metrics.jsonl``, ``adapter/`` (the best so far) and, when all
is done, ``result.json``. That file is written last and in one piece, so that a run is finished if
and only if it exists. Until then ``checkpoints/`` holds the state to go on from.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lora_jax.files import write_atomically
from lora_jax.sweeps.trials import Trial
from lora_jax.training import workdirs
from lora_jax.training.task import Score

RUNS, RESULT = "runs", "result.json"
_AXES = "sweep"  # key of a grid in sweep.json
FINISHED, DIVERGED, DROPPED = "finished", "diverged", "dropped"


def check(
    workdir: Path, base: ConfigDict, halving: int, axes: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Checks, without changing the directory, that this sweep may use it.

    Args:
      workdir: directory of the sweep.
      base: base config of the sweep.
      halving: as in :class:`lora_jax.sweeps.scheduler.Sweep`.
      axes: fields and their values, of a grid; the directory's may have fewer values.

    Raises:
      ValueError: it holds another sweep (the message shows the differences) or a single run, or is
        a file.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"The workdir {workdir} is a file; give a directory.")
    single = (workdirs.CONFIG, workdirs.CHECKPOINTS, workdirs.ADAPTER)
    if any((workdir / name).exists() for name in single):
        raise ValueError(f"The workdir {workdir} holds a single run; use a new one for a sweep.")
    workdirs.check_links(workdir)
    path = workdir / workdirs.SWEEP
    if not path.exists():
        return
    stored = _read(path)
    grid = _describe(base, halving, axes)
    if _is_part(stored.get(_AXES), grid.get(_AXES)):
        stored = {**stored, _AXES: grid[_AXES]}
    changes = list(workdirs.differences(stored, grid))
    if changes:
        changes = [change.removeprefix("config.") for change in changes]
        raise ValueError(
            f"The workdir {workdir} holds a sweep of another kind: {'; '.join(changes)}. Runs "
            "may be added to a sweep, but its base config and halving stay: use a new workdir."
        )


def _is_part(axes: Any, others: Any) -> bool:
    """Returns whether a grid has the same fields as another, and no value that this one lacks."""
    if not (isinstance(axes, dict) and isinstance(others, dict) and axes.keys() == others.keys()):
        return False
    return all(x in others[field] for field, values in axes.items() for x in values)


def claim(
    workdir: Path, base: ConfigDict, halving: int, axes: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Takes the directory for this sweep, unless the sweep has it already.

    Args:
      workdir: directory of the sweep.
      base: base config of the sweep.
      halving: as in :func:`check`.
      axes: as in :func:`check`; values that are new are noted in the directory.

    Raises:
      ValueError: as :func:`check`.
      OSError: it can't be written.
    """
    check(workdir, base, halving, axes)
    path, content = workdir / workdirs.SWEEP, _describe(base, halving, axes)
    if not path.exists() or (axes and _read(path) != content):
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def _describe(
    base: ConfigDict, halving: int, axes: Mapping[str, Sequence[Any]] | None
) -> dict[str, Any]:
    grid = {_AXES: json.loads(json.dumps(dict(axes)))} if axes else {}  # tuples are lists there
    return {"config": workdirs.to_json_types(base), "halving": halving, **grid}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it, or use a new workdir."
        ) from error


def lock(workdir: Path, shard: str) -> AbstractContextManager[None]:
    """Locks a shard of the sweep against other processes; see :func:`workdirs.lock`."""
    hint = "wait for it, or share the runs of the sweep with --shard=1/2 and --shard=2/2"
    return workdirs.lock(workdir, f".lock-{shard.replace('/', '-of-')}", hint)


def run_dir(workdir: Path, trial: Trial) -> Path:
    """Returns the directory of a run."""
    return workdir / RUNS / trial.id


def read_result(workdir: Path, trial: Trial) -> dict[str, Any] | None:
    """Reads the result of a run; None if the run is not finished."""
    path = run_dir(workdir, trial) / RESULT
    return _read(path) if path.exists() else None


def best_score(result: dict[str, Any]) -> tuple[Score, float | None]:
    """Returns the score that selects among runs, and the best value that a run has reached."""
    score = Score(result.get("score", "accuracy"), result.get("higher_is_better", True))
    return score, result[f"best_{score.name}"]


def rank(result: dict[str, Any]) -> tuple[float, float]:
    """Returns what results are compared by, the largest the best: the score, then the loss."""
    score, value = best_score(result)
    if value is None:
        raise ValueError("A run without an evaluation has no rank.")
    return score.merit(value), -result["best_loss"]


def finish(workdir: Path, trial: Trial, values: dict[str, Any]) -> None:
    """Writes the result of a run, and removes the checkpoints that it no longer needs."""
    directory = run_dir(workdir, trial)
    about = {"id": trial.id, **values}
    text = json.dumps(about, indent=2, allow_nan=False) + "\n"
    write_atomically(directory / RESULT, text.encode())
    shutil.rmtree(directory / workdirs.CHECKPOINTS, ignore_errors=True)


def finished_runs(workdir: Path) -> list[tuple[Path, dict[str, Any], ConfigDict]]:
    """Returns directory, result and config of every run that has a result, ordered by id.

    Raises:
      ValueError: the directory is not that of a sweep, or a file in it is damaged.
    """
    if not (workdir / workdirs.SWEEP).exists():
        raise ValueError(
            f"{workdir} is not the directory of a sweep: it has no {workdirs.SWEEP}. Give the "
            "--workdir of experiments.sweep."
        )
    return [
        (path.parent, _read(path), ConfigDict(_read(path.parent / workdirs.CONFIG)))
        for path in sorted((workdir / RUNS).glob(f"*/{RESULT}"))
    ]
