"""Runs of any kind as rows of a report: single ones, and those of sweeps."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lora_jax.sweeps import results, sweep_dirs
from lora_jax.sweeps.results import Results, Row
from lora_jax.training import about, config_fields, metric_writer, workdirs
from lora_jax.training.task import Score

_EVAL = "eval_"
# Fields that change nothing of what is learned.
_SILENT = ("log_every", "checkpoint_every", "eval_batch_size", *workdirs.MAY_CHANGE)
RUNNING = "running"  # status of a single run that has not ended


def is_run(directory: Path) -> bool:
    """Returns whether a directory is that of a run, by itself or in a sweep."""
    return (directory / workdirs.CONFIG).is_file()


def find(directory: Path) -> list[Path]:
    """Returns the directories of a run or of a sweep's runs.

    Raises:
      ValueError: it is neither, or no run of the sweep has begun.
    """
    if is_run(directory):
        return [directory]
    if not (directory / workdirs.SWEEP).exists():
        raise ValueError(
            f"{directory} is the directory of neither a run nor a sweep: it has no "
            f"{workdirs.CONFIG} and no {workdirs.SWEEP}. Give a --workdir of a program."
        )
    found = [path for path in sorted((directory / sweep_dirs.RUNS).glob("*")) if is_run(path)]
    if not found:
        raise ValueError(f"No run of the sweep in {directory} has begun.")
    return found


def compare(directories: Sequence[Path]) -> list[Results]:
    """Reads runs that are to be compared, those of one task and score together.

    A field that the config of one run lacks, since an earlier version wrote it or another program,
    counts as the default that stood for it then, or as "absent".

    Raises:
      ValueError: a directory is no run's, or no run has had an evaluation.
    """
    groups: dict[tuple[str, ...], list[Path]] = {}
    for directory in dict.fromkeys(path.resolve() for path in directories):
        config = read_config(directory)
        result = read_result(directory)
        key = (_task_name(config), result["score"])
        groups.setdefault(key, []).append(directory)
    return [_make_results(group) for group in groups.values()]


def _task_name(config: ConfigDict) -> str:
    return str(config.get("task", config.get("data", {}).get("source", "")))


def _make_results(directories: Sequence[Path]) -> Results:
    flat = {path: _flatten(read_config(path)) for path in directories}
    names = list(dict.fromkeys(name for values in flat.values() for name in values))
    for values in flat.values():
        for name in names:
            values.setdefault(name, workdirs.ADDED.get(name, "absent"))
    varied = [name for name in names if len({str(values[name]) for values in flat.values()}) > 1]
    order = (results.RANK, results.ALPHA)
    varied.sort(key=lambda name: (name == results.SEED, name not in order, name))
    fields = list(dict.fromkeys([*varied, *order]))
    rows = [
        Row(
            path,
            {field: values.get(field, "absent") for field in fields},
            read_result(path),
            metric_writer.read(path / workdirs.METRICS),
        )
        for path, values in flat.items()
    ]
    return Results(rows, varied, 0)


def _flatten(config: ConfigDict) -> dict[str, Any]:
    values = {}
    for name in config_fields.field_names(config):
        if name.partition(".")[0] not in _SILENT:
            section, last = config_fields.get_section(config, name)
            value = section[last]
            values[name] = value.to_dict() if isinstance(value, ConfigDict) else value
    return values


def read_config(directory: Path) -> ConfigDict:
    """Reads the config of a run.

    Raises:
      ValueError: it is damaged.
    """
    path = directory / workdirs.CONFIG
    try:
        return ConfigDict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}).") from error


def read_result(directory: Path) -> dict[str, Any]:
    """Reads the result of a run: that of its file, or for a single run, of its metrics so far.

    Raises:
      ValueError: the file is damaged.
    """
    path = directory / sweep_dirs.RESULT
    if path.is_file():
        try:
            return {"score": "accuracy", **json.loads(path.read_text(encoding="utf-8"))}
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}).") from error
    return _compute_result(directory)


def _compute_result(directory: Path) -> dict[str, Any]:
    facts, lines = about.read(directory), metric_writer.read(directory / workdirs.METRICS)
    evaluations = [line for line in lines if f"{_EVAL}loss" in line]
    name = facts.get("score") or _guess_score(evaluations)
    score = Score(name, facts.get("higher_is_better", name != "loss"))
    key = f"{_EVAL}{name}"
    merit = lambda line: (score.merit(line.get(key, -math.inf)), -line[f"{_EVAL}loss"])
    best = max((line for line in evaluations if key in line), key=merit, default={})
    return {
        "id": directory.name,
        "status": sweep_dirs.FINISHED if "end" in facts else RUNNING,
        "steps": facts.get("steps", lines[-1]["step"] if lines else 0),
        "best_step": best.get("step"),
        "score": name,
        "higher_is_better": score.higher_is_better,
        f"best_{name}": best.get(key),
        "best_loss": best.get(f"{_EVAL}loss"),
        "trainable_parameters": facts.get("trainable_parameters", 0),
        "seconds": facts.get("seconds", 0.0),
    }


def _guess_score(evaluations: Sequence[dict[str, float]]) -> str:
    """Guesses the score of a run of earlier versions, which do not say it."""
    names = [key.removeprefix(_EVAL) for line in evaluations for key in line if key[:5] == _EVAL]
    others = [name for name in names if name != "loss"]
    return "accuracy" if "accuracy" in others else next(iter(others), "loss")
