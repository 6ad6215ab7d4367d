"""The gallery's pages, made of what was measured: ``python -m examples.gallery.page FILES``.

The first page has the table of all models; each library has a page with a section for each of its
models.
"""

import argparse
import collections
import dataclasses
import inspect
import json
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

from examples.gallery import bridges
from examples.gallery.measure import CLOSE_FLOAT32, CLOSE_FLOAT64, RANK, Row
from lora_jax import paths

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
  leaves more than {close32:.0e}, the same in float64 stands below; that must be less than
  {close64:.0e}.
* **FLOPs**: XLA's count for one gradient, lifted and merged, over that of full fine-tuning. At
  these sizes the rank is not small beside the width, so the ratios are higher than those of real
  models (0.65 to 0.75). XLA counts the body of a loop once.

A blank cell was not measured in the run that made this page: `--depth trace`, which CI makes of a
part of the models, compiles nothing and finds kernels, fallbacks and what is left out.

Each model is also traced with a single row and with arguments that have no values, which must
find the same kernels. Where values are measured it runs with dropout too, which refuses fallbacks,
and its adapter is saved and loaded. Where anything fails, a last column has the number of problems.

The name of a library leads to its page, which says of each model how it is made and called, what is
adapted, and what `explain` tells.
"""

MODELS = Path(__file__).parent / "models"
CODE = "The code of these models"

BRIDGES = """
## How a model becomes a function

`lora_jax` adapts a function of a parameter tree. Each kind of library has its own way to one, which
the pages of the models call by these names (`examples/gallery/bridges.py`):
"""

PAGES = """
```{{toctree}}
:hidden:

{pages}
```
"""

# Of a fallback, as `explain` words it: what is behind it, and what to do.
REASONS = {
    "its own derivative rule": (
        "The kernel goes into a function with a derivative rule of its own (`jax.custom_vjp`,\n"
        "`custom_jvp`), such as a solver that differentiates by an adjoint. The rule was written\n"
        "for arrays. To keep the kernels factored, lift the function that the solver calls, and\n"
        "give the solver the bound parameters as its arguments."
    ),
    "conversion to complex64": (
        "A real kernel is made complex before it is multiplied, as in state-space models. The sum\n"
        "is formed once, before the loop over time, so that this costs little."
    ),
    "used as an activation, or changed entry by entry": (
        "The entries of the kernel are used one by one, for instance for its norm (weight\n"
        "normalization). For this the numbers themselves are needed."
    ),
    "varies over inputs and outputs": (
        "The kernel is multiplied by another array of its size. The product of a sum of low rank\n"
        "and such an array has no low rank."
    ),
}

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
    return text.replace("<br>", " ") + "".join(
        f"\n    {what}: {x}" for what, items in lists.items() for x in items
    )


def page(rows: list[Row]) -> str:
    """The page of all models in Markdown."""
    header = HEADER.format(
        rank=RANK,
        count=len(rows),
        libraries=len({row.library for row in rows}),
        date=" and ".join(sorted({row.date for row in rows})),
        machine=f"{os.cpu_count()} CPU cores ({platform.machine()})",
        jax=next((row.jax for row in rows), ""),
        close32=CLOSE_FLOAT32,
        close64=CLOSE_FLOAT64,
    )
    text = header + "\n" + _table(rows)
    total = f"{sum(r.kernels for r in rows)} kernels, {sum(r.factored for r in rows)} uses factored"
    bad = [row for row in rows if row.problems]
    text += f"\n\nTogether: {total}, {sum(len(r.fallbacks) for r in rows)} fallbacks; "
    text += f"{len(bad)} models with problems; {sum(r.seconds for r in rows) / 60:.0f} minutes.\n"
    text += BRIDGES + "".join(map(_bridge, ("linen", "nnx", "equinox", "haiku", "keras")))
    text += _section("Problems", "What should not be.", rows, "problems")
    text += _section("Fallbacks", "Where a full kernel is formed, and why.", rows, "fallbacks")
    text += _reasons(rows)
    text += _section(
        "Not adapted", "Leaves of two axes or more that are no tables, and why.", rows, "left_out"
    )
    pages = sorted({file_name(row).removesuffix(".md") for row in rows if row.code})
    return text + (
        PAGES.format(pages="\n".join(f"gallery/{name}" for name in pages)) if pages else ""
    )


def _table(rows: list[Row]) -> str:
    """The table of all models, without the last column if there are no problems."""
    count = len(COLUMNS) - (not any(row.problems for row in rows))
    table = [COLUMNS, ["---"] * len(COLUMNS), *map(_cells, rows)]
    return "\n".join("| " + " | ".join(map(str, cells[:count])) + " |" for cells in table)


def _cells(row: Row) -> list[str]:
    differences = [row.step0[mode] for mode in ("op by op", "jitted") if mode in row.step0]
    errors = [x for x in (row.output, row.gradient) if x is not None]
    wide = "<br>({})".format(" / ".join(f"{x:.0e}" for x in row.float64)) if row.float64 else ""
    library = f"[{row.library}](gallery/{file_name(row)})" if row.code else row.library
    return [
        library,
        row.name,
        row.lines,
        row.kernels,
        f"{row.factored} ({len(row.fallbacks)})",
        ", ".join(f"{x:.0e}" if x else "same" for x in differences),
        " / ".join(f"{x:.0e}" for x in errors) + wide,
        ", ".join(f"{x:.2f}" for x in row.flops),
        len(row.problems) or "",
    ]


def file_name(row: Row) -> str:
    """Name of the page of the row's library.

    >>> file_name(Row(library="dm-haiku 0.0.17", name="hk.LSTM and hk.GRU"))
    'dm-haiku.md'
    """
    return f"{row.library.split()[0].lower()}.md"


def library_page(rows: list[Row]) -> str:
    """The page of one library in Markdown: how each model is called, and what is adapted."""
    head = f"# {rows[0].library}\n\n"
    head += "Models of [the gallery](../gallery.md); this page is made by the same program.\n"
    sections = "".join(f"\n## {row.name}\n\n{describe(row)}\n" for row in rows)
    return head + sections + _sources(rows[0].library.split()[0])


def _sources(library: str) -> str:
    """The files of a library's models, in full; "" if there are none."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(MODELS.glob("*.py"))}
    found = {path: text for path, text in texts.items() if f'Library("{library}")' in text}
    head = f"\n## {CODE}\n" if found else ""
    return head + "".join(
        f"\n`examples/gallery/models/{path.name}`:\n\n```python\n{text.strip()}\n```\n"
        for path, text in found.items()
    )


def describe(row: Row) -> str:
    """The section of a model: how it is made and called, what is adapted, what `explain` says."""
    parts = [
        *filter(None, [row.about]),
        f"```python\n{row.code}\n```",
        f"Called with {', '.join(f'`{x}`' for x in row.inputs)}. At rank {RANK}: `{row.summary}`.",
        "What `explain` says:",
        f"```text\n{row.explanation}\n```",
        *_explain_fallbacks(row.fallbacks),
    ]
    if row.tables:
        parts.append("Tables and scales, which stay as they are: " + _names(row.tables) + ".")
    if row.left_out:
        items = "\n".join(f"* {item}" for item in dict.fromkeys(row.left_out))
        parts.append(f"Not adapted, though they have two axes or more:\n\n{items}")
    if not row.fallbacks:
        parts.append("Every use stays factored: no full kernel is formed.")
    return "\n\n".join(parts)


def _names(items: list[str]) -> str:
    """The leaves' names, each once, where layers that are alike share one."""
    names = (paths.fold_layers(re.sub(r" \(.*", "", item)) for item in items)
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def _explain_fallbacks(fallbacks: Iterable[str]) -> list[str]:
    return [text for part, text in REASONS.items() if any(part in x for x in fallbacks)]


def _reasons(rows: list[Row]) -> str:
    texts = _explain_fallbacks([x for row in rows for x in row.fallbacks])
    return "".join(f"\n{text}\n" for text in texts)


def _bridge(name: str) -> str:
    """A function of ``bridges``, as it stands there."""
    function = getattr(bridges, name)
    code = inspect.getsource(function).strip()
    return f"\n```python\n{code}\n```\n"


def merge(rows: Iterable[Row]) -> list[Row]:
    """Makes one row of those of the same model, sorted by library.

    What a trace finds is that of the last row. Values that the last one lacks, since nothing was
    compiled for it, are those of the row before, with its problems and its date.
    """
    merged: dict[tuple[str, str], Row] = {}
    for row in rows:
        old = merged.get((row.library, row.name))
        if old is not None and row.output is None:
            measured = ("step0", "output", "gradient", "float64", "flops", "date", "seconds")
            problems = list(dict.fromkeys([*old.problems, *row.problems]))
            values = {name: getattr(old, name) for name in measured}
            row = dataclasses.replace(row, problems=problems, **values)
        merged[row.library, row.name] = row
    return sorted(merged.values(), key=lambda row: row.library.lower())


def write(file: Path, rows: list[Row]) -> None:
    """Writes the page of all models, and those of the libraries into a folder beside it."""
    file.write_text(page(rows), encoding="utf-8")
    libraries: dict[str, list[Row]] = {}
    for row in rows:
        if row.code:
            libraries.setdefault(file_name(row), []).append(row)
    folder = file.with_suffix("")
    folder.mkdir(exist_ok=True)
    for name, models in sorted(libraries.items()):
        (folder / name).write_text(library_page(models), encoding="utf-8")


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
    """Writes the pages of several runs' rows; of the same model, a later file's row counts."""
    parser = argparse.ArgumentParser(prog="python -m examples.gallery.page", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="written by --json")
    parser.add_argument("--write", type=Path, required=True, help="such as docs/gallery.md")
    options = parser.parse_args()
    rows = [Row(**fields) for file in options.files for fields in json.loads(file.read_text())]
    write(options.write, merge(rows))


if __name__ == "__main__":
    main()
