"""What the figures of reports share."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_jax.sweeps.page import Picture

# Least and largest values that scores can have.
_RANGES = {
    "loss": (0.0, np.inf),
    **dict.fromkeys(("matthews", "pearson", "spearman"), (-1.0, 1.0)),
    **dict.fromkeys(("accuracy", "f1", "macro_f1"), (0.0, 1.0)),
}


def score_range(name: str) -> tuple[float, float]:
    """Returns the least and the largest value that a score can have.

    >>> score_range("accuracy"), score_range("pearson"), score_range("bleu")
    ((0.0, 1.0), (-1.0, 1.0), (-inf, inf))
    """
    return _RANGES.get(name, (-np.inf, np.inf))


def make_figure(
    columns: int = 1, rows: int = 1, *, width: float = 4.2, height: float = 3.4
) -> tuple[Figure, list[Axes]]:
    """Makes a figure with panels of a width and a height, in inches."""
    # Not by pyplot, which would choose a window system for the whole process.
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(panels)


def save(figure: Figure, name: str, title: str, caption: str) -> Picture:
    """Draws a figure into a PNG."""
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    figure.clear()  # its parts refer to each other, and would wait for the garbage collector
    return Picture(name, title, caption, image.getvalue())


def keep_in_range(panel: Axes, score: str) -> None:
    """Ends the axis of a score where the score does, with room for a marker's half."""
    (low, high), (bottom, top) = score_range(score), panel.get_ylim()
    room = 0.02 * (top - bottom)
    panel.set_ylim(max(bottom, low - room), min(top, high + room))


def clip_bars(
    means: Sequence[float], spreads: Sequence[float], score: str
) -> tuple[list[float], list[float]]:
    """Returns the lengths of bars below and above means, within the score's range.

    >>> [[round(x, 3) for x in side] for side in clip_bars([0.98], [0.05], "accuracy")]
    [[0.05], [0.02]]
    """
    low, high = score_range(score)
    pairs = list(zip(means, spreads, strict=True))
    return (
        [max(0.0, min(spread, mean - low)) for mean, spread in pairs],
        [max(0.0, min(spread, high - mean)) for mean, spread in pairs],
    )
