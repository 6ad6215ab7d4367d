"""Writes reports: of a sweep, of a run, or of any runs side by side.

    python -m experiments.report runs/quickstart_sweep
    python -m experiments.report runs/quickstart
    python -m experiments.report runs/one runs/another runs/quickstart_sweep

The page of a sweep, and that of each of its runs, has what is finished: the runs of all shards, or
those that have been done so far. Several directories make one page, in the folder ``report`` of the
directory that they share, or in that of ``--out``; a sweep among them stands for its runs, and runs
of different tasks or scores have a section each.
"""

import os
from pathlib import Path

from absl import flags

from experiments import cli, environment, lazy

with lazy.imports():
    from lora_jax.sweeps import report, results, runs
    from lora_jax.training import workdirs

_OUT = flags.DEFINE_string("out", None, "Directory for the page of several directories.")


def main(argv: list[str]) -> None:
    """Writes the report, and prints the table of a sweep."""
    if not argv:
        raise ValueError(
            "Give the directory of a sweep or a run, or several: "
            "python -m experiments.report DIRECTORY ..."
        )
    environment.place_fonts()
    directories = [Path(text) for text in argv]
    if len(directories) > 1:
        _compare(directories)
    elif _OUT.value:
        raise ValueError("--out is for several directories: the page of one is in its own.")
    elif (directories[0] / workdirs.SWEEP).exists():
        _report_sweep(directories[0])
    else:
        runs.find(directories[0])
        print(f"Wrote {report.write_run(directories[0])}")


def _report_sweep(workdir: Path) -> None:
    sweep = results.load(workdir)
    folder = report.write(workdir, sweep)
    print(f"{results.to_markdown(sweep)}\n{report.summarize(sweep)}\nWrote {folder / report.PAGE}")


def _compare(directories: list[Path]) -> None:
    groups = runs.compare([run for directory in directories for run in runs.find(directory)])
    shared = os.path.commonpath([path.resolve() for path in directories])
    folder = Path(_OUT.value) if _OUT.value else Path(shared) / report.FOLDER
    written = report.write_comparison(folder, groups)
    print(f"Wrote {written}")


if __name__ == "__main__":
    cli.run(main)
