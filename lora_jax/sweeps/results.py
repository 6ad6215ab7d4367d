"""The results of a sweep as rows and as means over seeds."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.sweeps import sweep_dirs, trials
from lora_jax.training import metric_writer, workdirs
from lora_jax.training.task import Score

SEED, RANK, ALPHA = "seed", "lora.rank", "lora.alpha"


class Row(NamedTuple):
    """One run.

    Attributes:
      directory: of the run.
      values: of the fields that the sweep varies, and of rank and alpha.
      result: the content of its ``result.json``.
      curve: the lines of its ``metrics.jsonl``.
    """

    directory: Path
    values: dict[str, Any]
    result: dict[str, Any]
    curve: list[dict[str, float]]

    @property
    def score(self) -> float | None:
        """The best validation score of a run that went to its end."""
        done = self.result["status"] == sweep_dirs.FINISHED
        return sweep_dirs.best(self.result)[1] if done else None


class Results(NamedTuple):
    """A sweep as far as it has come.

    Attributes:
      rows: one for each run with a result.
      swept: the fields that differ between them.
      unfinished: how many runs have begun and have no result.
    """

    rows: list[Row]
    swept: list[str]
    unfinished: int

    @property
    def score(self) -> Score:
        """What selects among runs: accuracy, or another score."""
        return sweep_dirs.best(self.rows[0].result)[0]

    @property
    def score_name(self) -> str:
        """The score's name."""
        return self.score.name


class Cell(NamedTuple):
    """The runs that differ in their seed alone."""

    values: dict[str, Any]
    rows: list[Row]

    @property
    def scores(self) -> list[float]:
        """Of the finished runs."""
        return [row.score for row in self.rows if row.score is not None]

    @property
    def mean(self) -> float | None:
        """Of the scores; None if there are none."""
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def spread(self) -> float | None:
        """Their sample standard deviation; None for fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def load(workdir: Path) -> Results:
    """Reads what a sweep, or several shards of one, has left in a directory.

    Raises:
      ValueError: no sweep, no finished run, or a damaged file.
    """
    found = sweep_dirs.finished_runs(workdir)
    if not found:
        raise ValueError(f"No run of the sweep in {workdir} is finished yet.")
    swept = trials.swept([config for *_, config in found])
    fields = list(dict.fromkeys([*swept, RANK, ALPHA]))
    rows = []
    for directory, result, config in found:
        values = {field: _plain(trials.value_of(config, field)) for field in fields}
        rows.append(
            Row(directory, values, result, metric_writer.read(directory / workdirs.METRICS))
        )
    rows.sort(key=lambda row: [_order(row.values[field]) for field in fields])
    begun = sum(1 for path in (workdir / sweep_dirs.RUNS).iterdir() if path.is_dir())
    return Results(rows, swept, begun - len(rows))


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else value


def _order(value: Any) -> tuple:
    """Numbers by size, everything else by its text."""
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def without_seed(results: Results) -> list[str]:
    """The fields that are varied, but for the seed."""
    return [field for field in results.swept if field != SEED]


def cells(results: Results, fields: Sequence[str] | None = None) -> list[Cell]:
    """The runs by their values of ``fields``: by default, of all but the seed."""
    fields = without_seed(results) if fields is None else fields
    found: dict[str, Cell] = {}
    for row in results.rows:
        values = {field: row.values[field] for field in fields}
        found.setdefault(str(values), Cell(values, [])).rows.append(row)
    return list(found.values())


def as_csv(results: Results) -> str:
    """One line for each run."""
    of_result = (
        "status", "steps", "best_step", f"best_{results.score_name}", "best_loss",
        "trainable_parameters", "seconds",
    )  # fmt: skip
    fields = list(results.rows[0].values)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", *fields, *of_result])
    for row in results.rows:
        values = [row.values[field] for field in fields]
        writer.writerow([row.result["id"], *values, *(row.result[name] for name in of_result)])
    return text.getvalue()


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table of means, the best first."""
    fields = without_seed(results)
    header = [name(f) for f in fields]
    header += ["runs", f"validation {results.score_name}", "trainable parameters", "seconds a run"]
    return header, [
        _line(cell, fields) for cell in sorted(cells(results), key=merit(results))[::-1]
    ]


def merit(results: Results) -> Callable[[Cell], float]:
    """What cells are compared by: the largest is the best; those without a score come last."""
    return lambda cell: -math.inf if cell.mean is None else results.score.merit(cell.mean)


def _line(cell: Cell, fields: Sequence[str]) -> list[str]:
    counts = dict.fromkeys((sweep_dirs.FINISHED, sweep_dirs.DIVERGED, sweep_dirs.DROPPED), 0)
    for row in cell.rows:
        counts[row.result["status"]] += 1
    extra = [f"{n} {status}" for status, n in counts.items() if n and status != sweep_dirs.FINISHED]
    runs = ", ".join([str(counts[sweep_dirs.FINISHED]), *extra])
    sizes = sorted({row.result["trainable_parameters"] for row in cell.rows})
    seconds = statistics.fmean(row.result["seconds"] for row in cell.rows)
    values = [number(cell.values[field]) for field in fields]
    return [*values, runs, score(cell), ", ".join(f"{n:,d}" for n in sizes), f"{seconds:.1f}"]


def score(cell: Cell) -> str:
    """Mean and spread in words."""
    if cell.mean is None:
        return "none"
    return f"{cell.mean:.4f}" + ("" if cell.spread is None else f" ± {cell.spread:.4f}")


def name(field: str) -> str:
    """A field's name for people."""
    return field.split(".")[-1].replace("_", " ")


def number(value: Any) -> str:
    """A value for people."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_markdown(results: Results) -> str:
    """The table of means."""
    header, lines = table(results)
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
