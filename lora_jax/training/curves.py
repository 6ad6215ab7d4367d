"""The curves of a run: loss and score against the epoch."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from lora_jax.files import write_atomically
from lora_jax.training.metric_writer import read
from lora_jax.training.workdirs import CURVES, METRICS


def plot_curves(workdir: Path, score: str = "accuracy") -> None:
    """Draws training and validation curves of the loss and of the score, and writes the image."""
    lines = read(workdir / METRICS)
    figure = Figure(figsize=(9, 3.4), layout="constrained")  # pyplot would choose a window system
    panels = figure.subplots(1, 2)
    for panel, name in zip(panels, ("loss", score), strict=True):
        for key, label, style in ((name, "training", "-"), (f"eval_{name}", "validation", "o-")):
            points = [(line["epoch"], line[key]) for line in lines if key in line]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label, markersize=5)
        panel.set(xlabel="epoch", ylabel=name, title=name.capitalize())
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    panels[1].legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    figure.clear()  # its parts refer to each other, and would wait for the garbage collector
    write_atomically(workdir / CURVES, image.getvalue())
