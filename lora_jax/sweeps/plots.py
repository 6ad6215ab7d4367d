"""The figures of a sweep's report."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_jax import analysis
from lora_jax.files import read_safetensors
from lora_jax.sweeps import figures, results, sweep_dirs
from lora_jax.sweeps.curve_plots import draw_curves
from lora_jax.sweeps.page import Picture
from lora_jax.sweeps.results import ALPHA, RANK, SEED, Cell, Results, Row
from lora_jax.training import workdirs

_MAX_LINES = 8


def draw_all(sweep: Results) -> list[Picture]:
    """Draws every figure for which the sweep has the data."""
    pictures = [
        draw_scores(sweep),
        draw_heat_map(sweep),
        draw_curves(sweep),
        draw_similarity(sweep),
    ]
    return [picture for picture in pictures if picture is not None]


def draw_comparison(runs: Results) -> list[Picture]:
    """Draws what runs that no sweep has chosen have in common: scores and curves."""
    return [picture for picture in (draw_bars(runs), draw_curves(runs)) if picture is not None]


def draw_bars(runs: Results) -> Picture | None:
    """Draws the best score of each run as a bar, the best on top."""
    best = [(row, sweep_dirs.best_score(row.result)[1]) for row in runs.rows]
    scored = [(row, value) for row, value in best if value is not None]
    if not scored:
        return None
    scored.sort(key=lambda entry: runs.score.merit(entry[1]))
    figure, (panel,) = figures.make_figure(width=5.2, height=0.9 + 0.32 * len(scored))
    bars = panel.barh([row.directory.name for row, _ in scored], [value for _, value in scored])
    panel.bar_label(bars, fmt="%.4f", padding=3, fontsize=8)
    panel.set(xlabel=f"best validation {runs.score_name}")
    low, high = figures.score_range(runs.score_name)
    panel.set_xlim(max(low, panel.get_xlim()[0]), min(high, panel.get_xlim()[1] * 1.12))
    return figures.save(
        figure, "bars", f"Best validation {runs.score_name}", "One bar for each run."
    )


def _numeric_fields(sweep: Results) -> list[str]:
    """Returns the fields that vary and have numbers as values, without the seed.

    Rank and alpha come first, then those with the most values.
    """
    fields = [
        field
        for field in results.without_seed(sweep)
        if all(results.is_number(row.values[field]) for row in sweep.rows)
    ]
    count = lambda field: len({row.values[field] for row in sweep.rows})
    return sorted(fields, key=lambda field: (field != RANK, field != ALPHA, -count(field)))


def _set_ticks(panel: Axes, values: Sequence[float]) -> None:
    """Puts a tick at each value; the axis is logarithmic if they are positive and far apart."""
    if min(values) > 0 and max(values) >= 4 * min(values):
        panel.set_xscale("log", base=2)
    panel.set_xticks(values, [results.format_value(v) for v in values], minor=False)
    panel.set_xticks([], minor=True)


# Score against rank, or against the field that varies instead.


def draw_scores(sweep: Results) -> Picture | None:
    """Draws the score against the rank, with the spread over seeds."""
    fields = _numeric_fields(sweep)
    if not fields:
        return None
    x = fields[0]
    lines = _lines(sweep, x)
    figure, (panel,) = figures.make_figure(width=5.6, height=4.2)
    _set_ticks(panel, sorted({row.values[x] for row in sweep.rows}))
    for k, (label, cells) in enumerate(lines):
        # Shifted a little, so that no bar hides another.
        places = k - (len(lines) - 1) / 2
        by_x = {_shift(panel, cell.values[x], places): cell for cell in cells}
        _draw_line(panel, by_x, score=sweep.score_name, label=label, color=f"C{k}")
    figures.keep_in_range(panel, sweep.score_name)
    panel.set(xlabel=results.format_name(x), ylabel=f"validation {sweep.score_name}")
    if len(lines) > 1:
        figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=_columns(lines))
    return figures.save(
        figure,
        "against",
        f"{sweep.score_name.capitalize()} against {results.format_name(x)}",
        "Means over seeds. Bars are standard deviations, cut at the score's ends; dots are runs.",
    )


def _columns(lines: Sequence[tuple[str, list[Cell]]]) -> int:
    """Returns the number of columns of a legend, which is below the panel."""
    return 3 if max(len(label) for label, _ in lines) < 20 else 1


def _shift(panel: Axes, x: float, places: float) -> float:
    if panel.get_xscale() == "log":
        return x * 1.05**places
    low, high = min(panel.get_xticks()), max(panel.get_xticks())
    return x + 0.01 * (high - low) * places


def _draw_line(panel: Axes, by_x: dict[float, Cell], *, score: str, label: str, color: str) -> None:
    scored = {x: by_x[x] for x in sorted(by_x) if by_x[x].mean is not None}
    means = [cell.mean for cell in scored.values() if cell.mean is not None]
    bars = figures.clip_bars(means, [cell.spread or 0.0 for cell in scored.values()], score)
    panel.errorbar(
        list(scored), means, bars,
        fmt="o-", label=label, color=color, capsize=2, elinewidth=1, markersize=5,
    )  # fmt: skip
    for x, cell in scored.items():
        n = len(cell.scores)
        panel.plot([x] * n, cell.scores, ".", color=color, alpha=0.35, markersize=5)


def _lines(sweep: Results, x: str) -> list[tuple[str, list[Cell]]]:
    """Returns what to draw lines for: values of the other fields, or rules that alpha follows."""
    others = [field for field in results.without_seed(sweep) if field != x]
    cells = results.cells(sweep)
    if others == [ALPHA] and x == RANK and (rules := _rules(cells)):
        return rules
    by_rest: dict[str, list[Cell]] = {}
    for cell in cells:
        rest = (f"{results.format_name(f)} {results.format_value(cell.values[f])}" for f in others)
        by_rest.setdefault(", ".join(rest), []).append(cell)
    # If there are too many, those that reach the best scores.
    best = lambda rest: max(results.merit(sweep, cell) for cell in by_rest[rest])
    chosen = set(sorted(by_rest, key=best, reverse=True)[:_MAX_LINES])
    return [(rest, cells) for rest, cells in by_rest.items() if rest in chosen]


def _rules(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """Returns the alphas that grow with the rank and those that stay, if all ranks have them.

    There are none if all ranks have the same alphas, since each alpha then has its own line.
    """
    ranks = {c.values[RANK] for c in cells}
    alphas = {r: {c.values[ALPHA] for c in cells if c.values[RANK] == r} for r in ranks}
    if len({frozenset(values) for values in alphas.values()}) == 1:
        return []
    kinds: dict[str, list[Cell]] = {}
    for cell in cells:
        rank, alpha = cell.values[RANK], cell.values[ALPHA]
        factor = alpha / rank
        rule = "alpha = rank" if factor == 1 else f"alpha = {results.format_value(factor)} × rank"
        kinds.setdefault(rule, []).append(cell)
        kinds.setdefault(f"alpha = {results.format_value(alpha)}", []).append(cell)
    return [(rule, group) for rule, group in kinds.items() if len(group) == len(ranks)]


# The heat map.


def draw_heat_map(sweep: Results) -> Picture | None:
    """Draws the mean score for each rank and alpha, or for two other fields that vary."""
    fields = _numeric_fields(sweep)[:2]
    if len(fields) < 2:
        return None
    y, x = fields
    rows, columns = ([*sorted({r.values[f] for r in sweep.rows})] for f in (y, x))
    means = np.full((len(rows), len(columns)), np.nan)
    # The best cell of each place comes last, and stays.
    for cell in sorted(results.cells(sweep), key=functools.partial(results.merit, sweep)):
        if cell.mean is not None:
            means[rows.index(cell.values[y]), columns.index(cell.values[x])] = cell.mean
    figure, (panel,) = figures.make_figure(
        width=max(3.6, 0.75 * len(columns) + 1.8), height=max(2.6, 0.5 * len(rows) + 1.2)
    )
    _draw_map(figure, panel, means, f"validation {sweep.score_name}")
    panel.set_xticks(range(len(columns)), [results.format_value(v) for v in columns])
    panel.set_yticks(range(len(rows)), [results.format_value(v) for v in rows])
    panel.set(xlabel=results.format_name(x), ylabel=results.format_name(y))
    caption = "Means over seeds."
    if len(results.without_seed(sweep)) > 2:
        caption = "Means over seeds, at the best of what else is varied."
    title = f"{results.format_name(y).capitalize()} and {results.format_name(x)}"
    return figures.save(figure, "heat_map", title, caption + " Blank: not run, or not finished.")


def _draw_map(figure: Figure, panel: Axes, values: np.ndarray, label: str) -> None:
    panel.grid(False)
    panel.spines[:].set_visible(False)
    image = panel.imshow(values, aspect="auto", origin="lower", cmap="viridis")
    figure.colorbar(image, ax=panel, label=label)
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if value < middle else "black"
            panel.text(column, row, f"{value:.3f}", ha="center", va="center", color=color, size=8)


# Subspaces.


def draw_similarity(sweep: Results) -> Picture | None:
    """Draws the subspace similarity of the learned A, between ranks and between seeds."""
    rows = _find_comparable(sweep)
    pairs = [pair for pair in (_two_ranks(rows), _two_seeds(sweep, rows)) if pair]
    if not pairs:
        return None
    kernel = _middle_kernel(pairs[0][1][0])
    maps = [(text, _similarity(*rows, kernel)) for text, rows in pairs]
    highest = max(values.max() for _, values in maps)  # after a few steps they are far below 1
    figure, panels = figures.make_figure(len(maps), width=4.4, height=3.6)
    image, (_, values) = None, maps[-1]
    for panel, (text, values) in zip(panels, maps, strict=True):
        panel.grid(False)
        image = panel.imshow(
            values, origin="lower", cmap="viridis", vmin=0, vmax=highest, aspect="auto",
            extent=(0.5, values.shape[1] + 0.5, 0.5, values.shape[0] + 0.5),
        )  # fmt: skip
        panel.set(title=text[0], ylabel=text[1], xlabel=text[2])
        panel.title.set_fontsize(10)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    if image is not None:  # there is a map
        figure.colorbar(image, ax=panels, label="subspace similarity φ(i, j)")
    last = _factor(pairs[-1][1][0], kernel)
    inputs = last.size // last.shape[-1]
    chance = analysis.random_similarity(inputs, min(values.shape))
    caption = (
        f"Hu et al. 2021, section 7.2, equation 4, for A of {kernel}: the share of the i leading "
        f"directions that lies in the space of the j leading ones. Two random subspaces of "
        f"{min(values.shape)} dimensions have {chance:.3f}."
    )
    return figures.save(figure, "similarity", "Subspaces of the learned A", caption)


def _scored_rows(sweep: Results) -> list[Row]:
    return [row for row in sweep.rows if row.score is not None]


def _find_comparable(sweep: Results) -> list[Row]:
    """Finds the runs whose subspaces can be compared: most of those that have factors A.

    Runs of other methods, or of other targets, may have none, or those of other kernels.
    """
    by_nodes: dict[str, list[Row]] = {}
    for row in _scored_rows(sweep):
        nodes = _read_about(row).get("nodes", {})
        if nodes and any(name.endswith("/a") for name in _tensors(row)):
            by_nodes.setdefault(json.dumps(nodes, sort_keys=True), []).append(row)
    return max(by_nodes.values(), key=len, default=[])


def _two_ranks(rows: Sequence[Row]) -> tuple[tuple[str, str, str], tuple[Row, Row]] | None:
    """Returns two runs, with the smallest rank above 1, if there is one, and with the largest."""
    ranks = sorted({row.values[RANK] for row in rows})
    if len(ranks) < 2:
        return None
    low = next((r for r in ranks if 1 < r < ranks[-1]), ranks[0])
    small, large = (next(row for row in rows if row.values[RANK] == r) for r in (low, ranks[-1]))
    return (
        (f"rank {low} and rank {ranks[-1]}", f"i, of rank {low}", f"j, of rank {ranks[-1]}"),
        (small, large),
    )


def _two_seeds(
    sweep: Results, rows: Sequence[Row]
) -> tuple[tuple[str, str, str], tuple[Row, Row]] | None:
    """Returns two of the runs, of the largest rank, that differ in their seed alone."""
    if SEED not in sweep.varied:
        return None
    groups = [[row for row in cell.rows if row in rows] for cell in results.cells(sweep)]
    many = [group for group in groups if len(group) > 1]
    if not many:
        return None
    first, second = max(many, key=lambda group: group[0].values[RANK])[:2]
    rank, seeds = first.values[RANK], (first.values[SEED], second.values[SEED])
    return (
        (f"rank {rank}, two seeds", f"i, seed {seeds[0]}", f"j, seed {seeds[1]}"),
        (first, second),
    )


def _similarity(one: Row, other: Row, kernel: str) -> np.ndarray:
    return np.asarray(analysis.subspace_similarity(_factor(one, kernel), _factor(other, kernel)))


def _tensors(row: Row) -> dict[str, np.ndarray]:
    file = row.directory / workdirs.ADAPTER / _read_about(row)["weights"]["file"]
    return read_safetensors(file.read_bytes())


def _read_about(row: Row) -> dict[str, Any]:
    file = row.directory / workdirs.ADAPTER / "adapter.json"
    return json.loads(file.read_text(encoding="utf-8"))


def _factor(row: Row, kernel: str) -> np.ndarray:
    return _tensors(row)[f"{kernel}/a"]


def _middle_kernel(row: Row) -> str:
    """Returns the name of the kernel in the middle of the network, as in the paper."""
    names = [name.removesuffix("/a") for name in _tensors(row) if name.endswith("/a")]
    return sorted(names)[len(names) // 2]
