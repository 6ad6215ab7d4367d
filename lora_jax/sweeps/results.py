"""The results of a sweep, as rows and as means over seeds."""

import csv
import functools
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.sweeps import sweep_dirs, trials
from lora_jax.training import metric_writer, workdirs
from lora_jax.training.task import Score

SEED, RANK, ALPHA = "seed", "lora.rank", "lora.alpha"


class Row(NamedTuple):
    """One run.

    Attributes:
      directory: directory of the run.
      values: values of the fields that the sweep varies, and of rank and alpha.
      result: content of the run's ``result.json``.
      curve: lines of the run's ``metrics.jsonl``.
    """

    directory: Path
    values: dict[str, Any]
    result: dict[str, Any]
    curve: list[dict[str, float]]

    @property
    def score(self) -> float | None:
        """The best validation score of a finished run; None for another."""
        is_finished = self.result["status"] == sweep_dirs.FINISHED
        return sweep_dirs.best_score(self.result)[1] if is_finished else None


class Results(NamedTuple):
    """The results of a sweep so far.

    Attributes:
      rows: one row for each run with a result.
      varied: names of the fields that differ between them.
      unfinished: number of runs that have begun and have no result.
    """

    rows: list[Row]
    varied: list[str]
    unfinished: int

    @property
    def score(self) -> Score:
        """The score that selects among runs: accuracy, or another."""
        return sweep_dirs.best_score(self.rows[0].result)[0]

    @property
    def score_name(self) -> str:
        """The name of the score that selects among runs."""
        return self.score.name


class Cell(NamedTuple):
    """Runs that differ in their seed alone.

    Attributes:
      values: values of the fields that they share.
      rows: the runs.
    """

    values: dict[str, Any]
    rows: list[Row]

    @property
    def scores(self) -> list[float]:
        """The scores of the finished runs."""
        return [row.score for row in self.rows if row.score is not None]

    @property
    def mean(self) -> float | None:
        """The mean of the scores; None if there are none."""
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def spread(self) -> float | None:
        """The sample standard deviation of the scores; None for fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def load(workdir: Path) -> Results:
    """Reads the results of a sweep, or of several shards of one, in a directory.

    Raises:
      ValueError: there is no sweep, or no finished run, or a file is damaged.
    """
    runs = sweep_dirs.finished_runs(workdir)
    if not runs:
        raise ValueError(f"No run of the sweep in {workdir} is finished yet.")
    varied = trials.varied_fields([config for *_, config in runs])
    fields = list(dict.fromkeys([*varied, RANK, ALPHA]))
    rows = []
    for directory, result, config in runs:
        values = {field: _to_dict(trials.get_value(config, field)) for field in fields}
        rows.append(
            Row(directory, values, result, metric_writer.read(directory / workdirs.METRICS))
        )
    rows.sort(key=lambda row: [_sort_key(row.values[field]) for field in fields])
    started = sum(1 for path in (workdir / sweep_dirs.RUNS).iterdir() if path.is_dir())
    return Results(rows, varied, started - len(rows))


def _to_dict(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else value


def _sort_key(value: Any) -> tuple[int, float, str]:
    """Returns what values are sorted by: numbers by size, everything else by its text."""
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def is_number(value: Any) -> bool:
    """Returns whether a value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def without_seed(results: Results) -> list[str]:
    """Returns the fields that the sweep varies, but for the seed."""
    return [field for field in results.varied if field != SEED]


def cells(results: Results, fields: Sequence[str] | None = None) -> list[Cell]:
    """Groups the runs by their values of some fields, by default of all that vary but the seed."""
    fields = without_seed(results) if fields is None else fields
    by_values: dict[str, Cell] = {}
    for row in results.rows:
        values = {field: row.values[field] for field in fields}
        by_values.setdefault(str(values), Cell(values, [])).rows.append(row)
    return list(by_values.values())


def to_csv(results: Results) -> str:
    """Writes a table with a line for each run."""
    result_keys = (
        "status", "steps", "best_step", f"best_{results.score_name}", "best_loss",
        "trainable_parameters", "seconds",
    )  # fmt: skip
    fields = list(results.rows[0].values)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", *fields, *result_keys])
    for row in results.rows:
        values = [row.values[field] for field in fields]
        writer.writerow([row.result["id"], *values, *(row.result[name] for name in result_keys)])
    return text.getvalue()


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Returns header and lines of the table of means, the best first."""
    fields = without_seed(results)
    header = [format_name(f) for f in fields]
    header += ["runs", f"validation {results.score_name}", "trainable parameters", "seconds a run"]
    ranked = sorted(cells(results), key=functools.partial(merit, results))[::-1]
    return header, [_line(cell, fields) for cell in ranked]


def merit(results: Results, cell: Cell) -> float:
    """Returns what cells are compared by: the largest is the best; one without a score is last."""
    return -math.inf if cell.mean is None else results.score.merit(cell.mean)


def _line(cell: Cell, fields: Sequence[str]) -> list[str]:
    statuses = [row.result["status"] for row in cell.rows]
    counts = {sweep_dirs.FINISHED: 0} | {x: statuses.count(x) for x in sorted(set(statuses))}
    extra = [f"{n} {status}" for status, n in counts.items() if n and status != sweep_dirs.FINISHED]
    runs = ", ".join([str(counts[sweep_dirs.FINISHED]), *extra])
    sizes = sorted({row.result["trainable_parameters"] for row in cell.rows})
    seconds = statistics.fmean(row.result["seconds"] for row in cell.rows)
    values = [format_value(cell.values[field]) for field in fields]
    return [
        *values,
        runs,
        format_score(cell),
        ", ".join(f"{n:,d}" for n in sizes),
        f"{seconds:.1f}",
    ]


def format_score(cell: Cell) -> str:
    """Formats mean and spread."""
    if cell.mean is None:
        return "none"
    if cell.spread is None:
        return f"{cell.mean:.4f}"
    return f"{cell.mean:.4f} ± {cell.spread:.4f}"


def format_name(field: str) -> str:
    """Formats the name of a field for people."""
    return field.split(".")[-1].replace("_", " ")


def format_value(value: Any) -> str:
    """Formats the value of a field for people."""
    if isinstance(value, tuple | list):
        return ", ".join(map(format_value, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def to_markdown(results: Results) -> str:
    """Writes the table of means."""
    header, lines = table(results)
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
