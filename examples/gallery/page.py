"""The gallery's page, made of what was measured: ``python -m examples.gallery.page FILES``."""

import argparse
import collections
import datetime
import json
import os
import platform
from pathlib import Path

from examples.gallery.measure import CLOSE_FLOAT32, CLOSE_FLOAT64, RANK, Row

HEADER = """\
# Models of other libraries

This page is made by a program; `examples/gallery/README.md` says how. Each model is one that this
project did not write. It has small random parameters, and nothing in it was changed. `all-linear`
adapts it at the default rank, {rank}.

{count} models of {libraries} libraries. Measured on {date}: {machine}, float32, jax {jax}.

* **lines**: number of lines of user code that make a function and its parameters of the library's
  model.
* **kernels**: number of leaves that are adapted. **uses**: number of places where they stay
  factored, and of those where the full kernel is formed (fallbacks), with the reasons below.
* **step 0**: whether the output of a new adapter has the bits of the base's output, op by op
  (bodies of loops are compiled nevertheless) and jitted; if not, the largest relative difference.
* **lift = merge**: the largest differences of the output and of the adapter's gradient, after
  noise was put into the adapter, of each array relative to its largest entry. Where float32
  leaves more than {close32:.0e}, the same in float64 stands behind; that must be below
  {close64:.0e}.
* **FLOPs**: XLA's count for one gradient, lifted and merged, over that of full fine-tuning. At
  these sizes the rank is not small beside the width, so the ratios are higher than those of real
  models (0.65 to 0.75). XLA counts the body of a loop once.

A blank cell was not measured in the run that made this page: `--depth trace`, which CI makes of a
part of the models, compiles nothing and finds kernels, fallbacks and what is left out.

Each model is also traced with a single row and with arguments that have no values, which must
find the same kernels. Where values are measured it runs with dropout too, which refuses fallbacks,
and its adapter is saved and loaded. What fails is in the last column.
"""

COLUMNS = (
    "library",
    "model",
    "lines",
    "kernels",
    "uses (fallbacks)",
    "step 0",
    "lift = merge",
    "FLOPs",
    "problems",
)


def line(row: Row) -> str:
    """One line of a run's output, and further ones for what deserves attention."""
    cells = dict(zip(COLUMNS, _cells(row), strict=True))
    shown = "; ".join(f"{k} {v}" for k, v in cells.items() if k not in ("library", "model"))
    text = f"{row.library}: {row.name}: {shown}; {row.seconds:.0f} s"
    lists = {
        "formed": row.fallbacks,
        "not adapted": row.left_out,
        "PROBLEM": row.problems,
    }
    return text + "".join(f"\n    {what}: {x}" for what, items in lists.items() for x in items)


def page(rows: list[Row]) -> str:
    """The page in Markdown."""
    header = HEADER.format(
        rank=RANK,
        count=len(rows),
        libraries=len({row.library for row in rows}),
        date=datetime.date.today().isoformat(),
        machine=f"{os.cpu_count()} CPU cores ({platform.machine()})",
        jax=next((row.jax for row in rows), ""),
        close32=CLOSE_FLOAT32,
        close64=CLOSE_FLOAT64,
    )
    table = [COLUMNS, ["---"] * len(COLUMNS), *map(_cells, rows)]
    text = header + "\n" + "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in table)
    total = f"{sum(r.kernels for r in rows)} kernels, {sum(r.factored for r in rows)} uses factored"
    bad = [row for row in rows if row.problems]
    text += f"\n\nTogether: {total}, {sum(len(r.fallbacks) for r in rows)} fallbacks; "
    text += f"{len(bad)} models with problems; {sum(r.seconds for r in rows) / 60:.0f} minutes.\n"
    text += _section("Problems", "What should not be.", rows, "problems")
    text += _section("Fallbacks", "Where a full kernel is formed, and why.", rows, "fallbacks")
    return text + _section(
        "Not adapted", "Leaves of two axes or more that are no tables, and why.", rows, "left_out"
    )


def _cells(row: Row) -> list[str]:
    differences = [row.step0[mode] for mode in ("op by op", "jitted") if mode in row.step0]
    errors = [x for x in (row.output, row.gradient) if x is not None]
    wide = " ({})".format(" / ".join(f"{x:.0e}" for x in row.float64)) if row.float64 else ""
    return [
        row.library,
        row.name,
        row.lines,
        row.kernels,
        f"{row.factored} ({len(row.fallbacks)})",
        ", ".join(f"{x:.0e}" if x else "same" for x in differences),
        " / ".join(f"{x:.0e}" for x in errors) + wide,
        ", ".join(f"{x:.2f}" for x in row.flops),
        len(row.problems) or "",
    ]


def _section(title: str, text: str, rows: list[Row], field: str) -> str:
    """Items by model; the same item is shown once, with its number."""
    lines = []
    for row in rows:
        for item, count in collections.Counter(getattr(row, field)).items():
            times = f" ({count} times)" if count > 1 else ""
            lines.append(f"* {row.library}, {row.name}: {item}{times}")
    if not lines:
        return ""
    return f"\n## {title}\n\n{text}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Writes the page of several runs' rows."""
    parser = argparse.ArgumentParser(prog="python -m examples.gallery.page", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="written by --json")
    parser.add_argument("--write", type=Path, required=True, help="such as docs/gallery.md")
    options = parser.parse_args()
    rows = [Row(**fields) for file in options.files for fields in json.loads(file.read_text())]
    options.write.write_text(
        page(sorted(rows, key=lambda row: row.library.lower())), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
