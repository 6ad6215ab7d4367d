"""Writes the report of a sweep: a table, figures, and one page that holds it all.

    python -m experiments.report runs/quickstart_sweep

It has the runs that are finished: those of all shards, or those that have been done so far.
"""

from pathlib import Path

from experiments import cli, environment, lazy

with lazy.imports():
    from lora_jax.sweeps import report, results


def main(argv: list[str]) -> None:
    """Writes the report into the sweep's directory, and prints the table."""
    if len(argv) != 1:
        raise ValueError("Give the directory of one sweep: python -m experiments.report DIRECTORY")
    environment.place_fonts()
    workdir = Path(argv[0])
    sweep = results.load(workdir)
    folder = report.write(workdir, sweep)
    print(
        f"{results.to_markdown(sweep)}\n{report.summarize(sweep)}\nWrote {folder / 'report.html'}"
    )


if __name__ == "__main__":
    cli.run(main)
