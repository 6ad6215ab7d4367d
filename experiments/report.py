"""Writes what a sweep has found: a table, pictures, and one page that holds it all.

    python -m experiments.report runs/quickstart_sweep

Takes whatever is finished: all shards of the sweep, or the part of it that has been done so far.
"""

from pathlib import Path

from experiments import cli
from lora_jax.sweeps import report, results


def main(argv: list[str]) -> None:
    """Writes the report into the sweep's directory, and prints the table."""
    if len(argv) != 1:
        raise ValueError("Give the directory of one sweep: python -m experiments.report DIRECTORY")
    workdir = Path(argv[0])
    found = results.load(workdir)
    folder = report.write(workdir, found)
    print(f"{results.as_markdown(found)}\n{report.summary(found)}\nWrote {folder / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
