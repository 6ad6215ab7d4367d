"""Measures the models of all libraries that are installed.

Ends with status 1 if a model has a problem: a table taken for a kernel, a small kernel refused,
lifted values that are not the merged ones, or anything that raises.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import re
import sys
import warnings
from pathlib import Path

from examples.gallery import page, registry
from examples.gallery.measure import measure


def main(argv: list[str] | None = None) -> int:
    """Runs the gallery from the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.gallery", description=__doc__)
    parser.add_argument("--only", default="", help="regular expression, searched in the titles")
    parser.add_argument("--environment", choices=registry.ENVIRONMENTS, help="this one's libraries")
    parser.add_argument("--depth", choices=("trace", "values", "all"), default="all")
    parser.add_argument("--list", action="store_true", help="lists the titles and measures nothing")
    parser.add_argument("--json", type=Path, help="file for the rows as JSON")
    parser.add_argument(
        "--write",
        type=Path,
        help="file for the page (docs/gallery.md); those of libraries go beside it",
    )
    options = parser.parse_args(argv)
    # Warnings of libraries that are no longer maintained.
    warnings.simplefilter("ignore")
    chosen = [
        entry
        for entry in registry.entries(options.environment)
        if re.search(options.only, entry.title)
    ]
    if options.list:
        print("\n".join(entry.title for entry in chosen))
        return 0
    rows = []
    for entry in chosen:
        version = importlib.metadata.version(entry.library)
        rows.append(measure(entry, version, depth=options.depth))
        print(page.line(rows[-1]), flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=1))
    if options.write:
        page.write(options.write, rows)
    bad = [row for row in rows if row.problems]
    print(f"{len(rows)} models, {len(bad)} with problems")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
