"""Learning curves, in the colors of what separates the runs."""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from lora_jax.sweeps import figures, results
from lora_jax.sweeps.page import Picture
from lora_jax.sweeps.results import Results, Row

_MAX_COLORS = 10


def draw_curves(sweep: Results) -> Picture | None:
    """Draws training loss and validation score of each run against the epoch.

    None if no run has a line.
    """
    if not any(row.curve for row in sweep.rows):
        return None
    field = find_separating_field(sweep)
    color_of, colors = _choose_colors(sweep, field) if field else (lambda row: "C0", {})
    # One above the other, so that both can be read on a telephone.
    figure, (top, bottom) = figures.make_figure(rows=2, width=5.6, height=2.8)
    key = f"eval_{sweep.score_name}"
    for row in sweep.rows:
        _draw_run(top, row, "loss", color_of(row))
        _draw_run(bottom, row, key, color_of(row))
    top.set(ylabel="training loss", xlim=(0, None), ylim=(0, None))
    bottom.set(xlabel="epoch", ylabel=f"validation {sweep.score_name}", xlim=(0, None))
    figures.keep_in_range(bottom, sweep.score_name)
    for value, color in colors.items():
        bottom.plot([], [], color=color, label=value)
    caption = "One line for each run."
    if colors:
        title = results.format_name(field)
        figure.legend(
            title=title, frameon=False, fontsize=8, title_fontsize=9, loc="outside right upper"
        )
        caption = f"One line for each run, in the color of its {title}."
    return figures.save(figure, "curves", "Learning curves", caption)


def _draw_run(panel: Axes, row: Row, key: str, color: Any) -> None:
    points = [(line["epoch"], line[key]) for line in row.curve if key in line and "epoch" in line]
    if points:
        style = "-" if key == "loss" and len(points) > 3 else "o-"
        panel.plot(
            *zip(*points, strict=True), style, color=color, alpha=0.65, linewidth=1.2, markersize=3
        )


def find_separating_field(sweep: Results) -> str:
    """Finds the varied field whose values leave the least spread of scores within each of them.

    The seed is taken where nothing else varies; "" if nothing does. A field with a value of its own
    for every run separates nothing, unless all fields are such.
    """
    fields = results.without_seed(sweep) or sweep.varied
    few = [field for field in fields if 1 < len(_values(sweep, field)) <= _MAX_COLORS]
    shared = [field for field in few if len(_values(sweep, field)) < len(sweep.rows)]
    candidates = shared or few or fields
    return min(candidates, key=lambda field: _spread_within(sweep, field), default="")


def _values(sweep: Results, field: str) -> list[str]:
    """Returns the values of a field as texts, numbers by size."""
    values = {results.format_value(row.values[field]): row.values[field] for row in sweep.rows}
    is_number = all(map(results.is_number, values.values()))
    return sorted(values, key=lambda text: values[text] if is_number else text)


def _spread_within(sweep: Results, field: str) -> float:
    """Computes the mean variance of the scores of runs that share a value, by number of runs."""
    groups: dict[str, list[float]] = {}
    for row in sweep.rows:
        if row.score is not None:
            groups.setdefault(results.format_value(row.values[field]), []).append(row.score)
    count = sum(map(len, groups.values()))
    return sum(len(x) * statistics.pvariance(x) for x in groups.values()) / max(count, 1)


def _choose_colors(sweep: Results, field: str) -> tuple[Callable[[Row], Any], dict[str, Any]]:
    """Chooses shades for numbers, and colors that differ clearly for anything else."""
    values = _values(sweep, field)
    shades: list[Any]
    if all(results.is_number(row.values[field]) for row in sweep.rows):
        shades = list(colormaps["viridis"](np.linspace(0, 0.9, len(values))))
    else:
        shades = [f"C{k % 10}" for k in range(len(values))]
    by_value = dict(zip(values, shades, strict=True))
    shown = by_value
    if len(values) > _MAX_COLORS:  # some of them stand for the scale
        chosen = np.linspace(0, len(values) - 1, 6).round().astype(int)
        shown = {values[k]: by_value[values[k]] for k in chosen}
    return lambda row: by_value[results.format_value(row.values[field])], shown
