"""The curves of a run: loss and score against the epoch."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_jax.files import write_atomically
from lora_jax.training.metric_writer import read
from lora_jax.training.workdirs import CURVES, METRICS

_ACCURACY = "accuracy"


def plot_curves(workdir: Path, score: str = "accuracy") -> None:
    """Draws training and validation curves of the loss and of the score, and writes the image.

    Where the score is the loss itself, the accuracy has the second panel, if there is one.
    """
    from matplotlib.figure import Figure  # takes 0.2 s, for which the first step need not wait

    lines = read(workdir / METRICS)
    names = choose_panels(lines, score)
    # pyplot would choose a window system
    figure = Figure(figsize=(4.5 * len(names), 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for key, label, style in ((name, "training", "-"), (f"eval_{name}", "validation", "o-")):
            points = [(line["epoch"], line[key]) for line in lines if key in line]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label, markersize=5)
        panel.set(xlabel="epoch", ylabel=name, title=name.capitalize())
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    panels[-1].legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    figure.clear()  # its parts refer to each other, and would wait for the garbage collector
    write_atomically(workdir / CURVES, image.getvalue())


def choose_panels(lines: Sequence[Mapping[str, float]], score: str) -> list[str]:
    """Returns the names of the metrics that get a panel: the loss, and one more if there is one.

    >>> choose_panels([{"eval_loss": 0.5, "eval_accuracy": 0.8}], "loss")
    ['loss', 'accuracy']
    """
    second = _ACCURACY if score == "loss" else score
    has_second = any(second in line or f"eval_{second}" in line for line in lines)
    return ["loss", second] if has_second else ["loss"]
