"""What a run leaves in its directory: its config, metrics by line, TensorBoard events, curves."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file

import matplotlib.pyplot as plt  # noqa: E402
import tensorboardX  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from lora_jax.files import write_atomically  # noqa: E402

CONFIG, METRICS, CURVES = "config.json", "metrics.jsonl", "curves.png"


def claim(workdir: Path, config: ConfigDict) -> None:
    """Takes the directory for this config, or finds that it already has it.

    Raises:
      ValueError: it holds a run with another config; the message shows the differences.
      OSError: it can't be written.
    """
    # Through JSON, so that tuples compare as they are stored.
    mine = json.loads(config.to_json_best_effort())
    path = workdir / CONFIG
    if path.exists():
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); use a new workdir.") from error
        changes = list(_differences(theirs, mine))
        if changes:
            raise ValueError(
                f"The workdir {workdir} holds a run with another config: {'; '.join(changes)}. "
                "Use a new workdir, or the old config to go on with that run."
            )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(mine, indent=2) + "\n").encode())


def _differences(old: Any, new: Any, field: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{field}.{name}".lstrip("."))
    elif old != new:
        yield f"{field} is {old!r} there and {new!r} here"


class Log:
    """Metrics of a run: one JSON object a line in ``metrics.jsonl``, and TensorBoard events."""

    def __init__(self, workdir: Path) -> None:
        self._path = workdir / METRICS
        self._events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()

    def rewind(self, step: int) -> None:
        """Drops the lines after ``step``, which a resumed run will write again."""
        kept = [json.dumps(line) + "\n" for line in read(self._path) if line["step"] <= step]
        write_atomically(self._path, "".join(kept).encode())

    def write(self, step: int, **values: float) -> None:
        """Appends a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file; a last line cut short by an interruption is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def plot_curves(workdir: Path) -> None:
    """Draws loss and accuracy, training and validation, against the epoch."""
    lines = read(workdir / METRICS)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for panel, name in zip(panels, ("loss", "accuracy"), strict=True):
        for key, label, style in ((name, "training", "-"), (f"eval_{name}", "validation", "o-")):
            points = [(line["epoch"], line[key]) for line in lines if key in line]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label, markersize=5)
        panel.set(xlabel="epoch", ylabel=name, title=name.capitalize())
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    panels[1].legend(frameon=False)
    figure.savefig(workdir / CURVES, dpi=150)
    plt.close(figure)
