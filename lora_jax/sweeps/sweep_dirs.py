"""The directory of a sweep: ``sweep.json``, and a directory for each run.

``runs/ID/`` holds ``config.json``, ``metrics.jsonl``, ``adapter/`` (the best so far) and, when all
is done, ``result.json``. That file is written last and in one piece, so that a run is finished if
and only if it exists. Until then ``checkpoints/`` holds the state to go on from.
"""

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lora_jax.files import write_atomically
from lora_jax.sweeps.trials import Trial
from lora_jax.training import workdirs
from lora_jax.training.task import Score

RUNS, RESULT = "runs", "result.json"
FINISHED, DIVERGED, DROPPED = "finished", "diverged", "dropped"


def check(workdir: Path, base: ConfigDict, halving: int) -> None:
    """Checks, without changing the directory, that this sweep may use it.

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
    changes = list(workdirs.differences(_read(path), _describe(base, halving)))
    if changes:
        changes = [change.removeprefix("config.") for change in changes]
        raise ValueError(
            f"The workdir {workdir} holds a sweep of another kind: {'; '.join(changes)}. Runs "
            "may be added to a sweep, but its base config and halving stay: use a new workdir."
        )


def claim(workdir: Path, base: ConfigDict, halving: int) -> None:
    """Takes the directory for this sweep, unless the sweep has it already.

    Raises:
      ValueError: as :func:`check`.
      OSError: it can't be written.
    """
    check(workdir, base, halving)
    path = workdir / workdirs.SWEEP
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(_describe(base, halving), indent=2) + "\n").encode())


def _describe(base: ConfigDict, halving: int) -> dict[str, Any]:
    return {"config": workdirs.to_json_types(base), "halving": halving}


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
