"""Reports: a page for a sweep, for each of its runs, and for any runs side by side."""

import json
import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lora_jax.files import write_atomically
from lora_jax.sweeps import curve_plots, page, plots, results, runs, sweep_dirs
from lora_jax.sweeps.page import Link, Picture
from lora_jax.sweeps.results import Results, Row
from lora_jax.training import about, metric_writer, run_names, workdirs

FOLDER, PAGE = "report", "report.html"


def write(workdir: Path, sweep: Results) -> Path:
    """Writes tables, figures and pages of a sweep and its runs; returns the sweep's folder."""
    for row in sweep.rows:
        write_run(row.directory)
    pictures = plots.draw_all(sweep)
    return _write_folder(
        workdir / FOLDER, sweep, pictures, make_page(workdir, sweep, pictures, workdir / FOLDER)
    )


def _write_folder(folder: Path, sweep: Results, pictures: Sequence[Picture], text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes | str] = {f"{picture.name}.png": picture.png for picture in pictures}
    files |= {"results.csv": results.to_csv(sweep), "table.md": results.to_markdown(sweep)}
    files |= {PAGE: text}  # the last, since it stands for the whole
    for name, content in files.items():
        write_atomically(folder / name, content.encode() if isinstance(content, str) else content)
    return folder


def write_run(directory: Path) -> Path:
    """Writes the page of a run into its directory; returns the page's path."""
    (single,) = runs.compare([directory])
    (row,) = single.rows
    config = runs.read_config(row.directory)
    parts = [
        page.paragraph(_describe_result(row)),
        page.facts(_describe_setting(config, about.read(directory))),
        *map(page.figure, filter(None, [curve_plots.draw_curves(single)])),
        page.heading("Evaluations"),
        _evaluations(row),
        *_notes(about.read(directory)),
        page.details("The whole config", json.dumps(config.to_dict(), indent=2, default=list)),
    ]
    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    text = page.make_page(name_run(directory, config), parts)
    write_atomically(folder / PAGE, text.encode())
    return folder / PAGE


def name_run(directory: Path, config: ConfigDict) -> str:
    """Returns the name that trackers have of a run, or else that of its directory."""
    try:
        return str(json.loads((directory / workdirs.TRACKERS).read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    in_sweep = (directory / sweep_dirs.RESULT).exists()
    return run_names.name_run(config) if in_sweep else directory.resolve().name


def write_comparison(folder: Path, groups: Sequence[Results]) -> Path:
    """Writes the page of runs side by side: a section for each task and score.

    Returns:
      The path of the page.
    """
    parts = []
    if len(groups) > 1:
        parts.append(
            page.paragraph(
                f"They are of {len(groups)} tasks or scores, which can't be compared with each "
                "other: each has a section of its own.",
                is_note=True,
            )
        )
    for group in groups:
        first = runs.read_config(group.rows[0].directory)
        title = f"{describe_task(first)}: validation {group.score_name}"
        parts += [page.heading(title), page.paragraph(_name_best(group))]
        parts += [_runs_table(group, folder), *map(page.figure, plots.draw_comparison(group))]
        for row in group.rows:
            write_run(row.directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PAGE, page.make_page("Comparison of runs", parts).encode())
    return folder / PAGE


def _name_best(group: Results) -> str:
    best = min(group.rows, key=_order)
    if best.score is None:
        return "None of these runs has ended with a score."
    score = f"best validation {group.score_name} {best.score:.4f}"
    return f"{len(group.rows)} runs; {score}: {best.directory.name}."


def summarize(sweep: Results) -> str:
    """Says how many runs there are, and which is the best of them."""
    statuses = [row.result["status"] for row in sweep.rows]
    known = (sweep_dirs.FINISHED, sweep_dirs.DIVERGED, sweep_dirs.DROPPED, runs.RUNNING)
    parts = [f"{statuses.count(status)} {status}" for status in known if status in statuses]
    if sweep.unfinished:
        parts.append(f"{sweep.unfinished} not finished yet")
    hours = sum(row.result["seconds"] for row in sweep.rows) / 3600
    text = f"{len(sweep.rows) + sweep.unfinished} runs: {', '.join(parts)}; {hours:.2f} hours."
    scored = [row for row in sweep.rows if row.score is not None]
    if scored:
        best = max(scored, key=lambda row: sweep_dirs.rank(row.result))
        values = ", ".join(
            f"{results.format_name(f)} {results.format_value(best.values[f])}" for f in sweep.varied
        )
        text += f" Best validation {sweep.score_name} {best.score:.4f}: {values or 'the only run'}."
    return text


def make_page(workdir: Path, sweep: Results, pictures: Sequence[Picture], folder: Path) -> str:
    """Writes an HTML page that needs no other file; its links lead to the pages of the runs."""
    stored = json.loads((workdir / workdirs.SWEEP).read_text(encoding="utf-8"))
    base, facts = ConfigDict(stored["config"]), about.read(workdir)
    parts = [
        page.paragraph(summarize(sweep)),
        page.facts(_describe_setting(base, facts, varied=sweep.varied)),
        page.heading("Results"),
        _table(sweep),
        page.paragraph(
            "Mean ± sample standard deviation over seeds of each run's best validation "
            f"{sweep.score_name}.",
            is_note=True,
        ),
        *map(page.figure, pictures),
        page.heading("Runs"),
        _runs_table(sweep, folder),
        *_notes(facts),
        page.details("The base config", json.dumps(base.to_dict(), indent=2, default=list)),
    ]
    return page.make_page(workdir.resolve().name, parts)


def _table(sweep: Results) -> str:
    return page.table(*results.table(sweep))


def _runs_table(sweep: Results, folder: Path) -> str:
    """Writes a table of the single runs, the best first, with links to their pages."""
    fields = sweep.varied
    header = ["run", *map(results.format_name, fields), "status", f"best {sweep.score_name}"]
    header += ["loss", "at step", "steps", "seconds"]
    rows = sorted(sweep.rows, key=_order)
    return page.table(header, [_run_line(row, fields, folder) for row in rows])


def _order(row: Row) -> tuple[float, float]:
    score, loss = sweep_dirs.rank(row.result) if row.score is not None else (-1e300, 0.0)
    return -score, -loss


def _run_line(row: Row, fields: Sequence[str], folder: Path) -> list[str | Link]:
    target = os.path.relpath(row.directory / FOLDER / PAGE, folder)
    result, values = row.result, [results.format_value(row.values[field]) for field in fields]
    _, best = sweep_dirs.best_score(result)
    return [
        Link(row.directory.name, urllib.parse.quote(target)),
        *values,
        result["status"],
        _format(best),
        _format(result["best_loss"]),
        str(result["best_step"] if result["best_step"] is not None else "none"),
        str(result["steps"]),
        f"{result['seconds']:.1f}",
    ]


def _format(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _evaluations(row: Row) -> str:
    lines = [line for line in row.curve if "eval_loss" in line]
    names = list(dict.fromkeys(key for line in lines for key in line if key.startswith("eval_")))
    header = ["step", "epoch", *(results.format_name(name.removeprefix("eval_")) for name in names)]
    rows = [
        [str(line["step"]), f"{line['epoch']:g}", *(_format(line.get(name)) for name in names)]
        for line in lines
    ]
    return page.table(header, rows) if rows else page.paragraph("None yet.")


def _describe_result(row: Row) -> str:
    result, (score, best) = row.result, sweep_dirs.best_score(row.result)
    text = f"{result['status'].capitalize()} after {result['steps']} steps"
    if result["seconds"]:
        text += f" and {result['seconds'] / 60:.1f} minutes"
    if best is None:
        return f"{text}; no evaluation yet."
    before = metric_writer.read_evaluation(row.directory / workdirs.METRICS, 0).get(score.name)
    change = "" if before is None else f" ({before:.4f} before training)"
    return (
        f"{text}. Best validation {score.name} {best:.4f}{change}, at step {result['best_step']}."
    )


def describe_task(config: ConfigDict) -> str:
    """Describes what a run is trained on: the task, if it has a name, and the source."""
    data = config.get("data", {})
    task, source = config.get("task", ""), data.get("source", "") or data.get("train", "")
    return ", ".join(str(x) for x in (task, source) if x) or "data of its own"


def _describe_setting(
    config: ConfigDict, facts: dict[str, Any], varied: Sequence[str] = ()
) -> dict[str, str]:
    """Says of a run or a sweep what it was made with; what a sweep varies is told as varied."""
    show = lambda field, value: "varied" if field in varied else results.format_value(value)
    model, lora, rule = (config.get(x, {}) for x in ("model", "lora", "optimizer"))
    adapter = ", ".join(
        f"{name.replace('_', ' ')} {show(f'lora.{name}', lora[name])}"
        for name in ("method", "rank", "alpha", "dropout", "targets")
        if name in lora
    )
    training = ", ".join(
        f"{name} {show(field, value)}"
        for field, name, value in (
            ("optimizer.learning_rate", "learning rate", rule.get("learning_rate")),
            ("batch_size", "batch", config.get("batch_size")),
            ("epochs", "epochs", config.get("epochs")),
            ("seed", "seed", config.get("seed")),
        )
        if value is not None
    )
    count = facts.get("trainable_parameters", 0)
    versions = ", ".join(f"{name} {x}" for name, x in facts.get("versions", {}).items())
    return {
        "Model": show("model.name", model.get("name", "")),
        "Data": describe_task(config),
        "Adapter": adapter,
        "Training": training,
        "Trainable parameters": f"{count:,d}" if count else "",
        "Begun": facts.get("started", "").replace("T", " "),
        "Hardware": facts.get("hardware", ""),
        "Versions": versions,
    }


def _notes(facts: dict[str, Any]) -> list[str]:
    return (
        [page.details("Notes of the run", "\n".join(facts["notes"]))] if facts.get("notes") else []
    )
