"""The quickstart, for real: it learns, and its adapter judges sentences that it never saw."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow

NEW = {
    "The movie was absolutely wonderful!": "positive",
    "I loved every minute of this charming little film.": "positive",
    "The food was fresh and the staff were lovely.": "positive",
    "A brilliant album that I keep coming back to.": "positive",
    "The movie was absolutely terrible!": "negative",
    "I hated every minute of this dreary film.": "negative",
    "The food was cold and the staff were rude.": "negative",
    "A boring album that I will never play again.": "negative",
}


def run(*arguments):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # optimised, as a user runs it
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=1200, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart(tmp_path):
    out = run("experiments.sst2", "--config=configs/quickstart.py", f"--workdir={tmp_path}")
    assert float(re.search(r"best validation accuracy ([\d.]+)", out)[1]) >= 0.90
    command = re.search(r"python -m (experiments\.predict --adapter=\S+)", out)[1].split()
    rows = [json.loads(line) for line in run(*command, "--json", *NEW).splitlines()]
    assert {row["sentence"]: row["label"] for row in rows} == NEW
