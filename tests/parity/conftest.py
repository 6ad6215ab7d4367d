"""The support table of docs/models.md: made of the outcomes of tests marked ``supports``.

A run of all parity tests fails if the table there is another. To write it anew:

    python -m pytest -m parity tests/parity --write-support-table
"""

from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- support table, from the tests -->\n", "<!-- end of the support table -->\n"
COLUMNS = ("logits", "training", "PEFT round trip", "merged export", "generation")
_OUTCOMES = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--write-support-table", action="store_true", help="write it into the page")


def pytest_configure(config):
    config.stash[_OUTCOMES] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    for mark in item.iter_markers("supports"):
        row, column = mark.args
        if column not in COLUMNS:
            raise ValueError(f"{item.nodeid} is marked with column {column!r}, not of {COLUMNS}.")
        if report.when == "call" or not report.passed:
            item.config.stash[_OUTCOMES].setdefault((row, column), []).append(report.passed)
    return report


def pytest_sessionfinish(session, exitstatus):
    outcomes = session.config.stash[_OUTCOMES]
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    new = table(outcomes)
    if session.config.getoption("--write-support-table", default=False):
        PAGE.write_text(f"{before}{BEGIN}{new}{END}{after}", encoding="utf-8")
    elif rows_of(old) <= {row for row, _ in outcomes} and old != new:
        print(f"\nThe support table of docs/models.md is not what the tests say:\n{new}{__doc__}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def rows_of(markdown):
    """Families that a table names."""
    return {line.split("|")[1].strip() for line in markdown.splitlines()[2:]}


def table(outcomes):
    """A row for each family; a cell says yes if there are tests and all have passed."""
    lines = ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in sorted({row for row, _ in outcomes}, key=str.lower):
        passed = [outcomes.get((row, column)) for column in COLUMNS]
        cells = ["–" if p is None else "yes" if all(p) else "no" for p in passed]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
