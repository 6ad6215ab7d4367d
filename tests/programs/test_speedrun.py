"""The speedrun: what it waits for, and one real run of it on a tiny encoder."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import speedrun
from tests.helpers import tiny_encoder
from tests.helpers.places import ROOT
from tests.helpers.tools import needs_git

LINES = [
    {"step": 0, "eval_loss": 0.7, "eval_accuracy": 0.5},
    {"step": 5, "loss": 0.6, "accuracy": 0.99},  # of training examples: not what counts
    {"step": 10, "eval_loss": 0.5, "eval_accuracy": 0.86},
    {"step": 20, "eval_loss": 0.4, "eval_accuracy": 0.9},
]
WRITE = """
import json, sys, time
path, lines, status, seconds = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
with open(path, "w") as file:
    for line in lines:
        print(json.dumps(line), file=file, flush=True)
time.sleep(float(seconds))
sys.exit(status)
"""


def start(path, lines, status=0, seconds=0):
    """A process that writes metrics, as a run does."""
    arguments = [str(path), json.dumps(lines), str(status), str(seconds)]
    return subprocess.Popen([sys.executable, "-S", "-c", WRITE, *arguments])


@pytest.mark.parametrize(
    ("target", "step"), [(0.86, 10), (0.3, 0), (0.9, 20), (0.91, None), (0.99, None)]
)
def test_it_waits_for_the_first_evaluation_with_the_accuracy(tmp_path, target, step):
    with start(tmp_path / "metrics.jsonl", LINES) as process:
        line = speedrun.wait_for(process, tmp_path / "metrics.jsonl", target)
    assert (line and line["step"]) == step


def test_it_does_not_wait_for_the_end(tmp_path):
    process = start(tmp_path / "metrics.jsonl", LINES, seconds=60)
    try:
        assert speedrun.wait_for(process, tmp_path / "metrics.jsonl", 0.86)["step"] == 10
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_the_number_is_the_median_of_runs_that_all_reached_it():
    runs = [{"seconds": x} for x in (90.0, 70.0, 80.5)]
    assert speedrun.summarize(runs) == {"seconds": 80.5, "runs": runs}
    assert speedrun.summarize([*runs, {"seconds": None}])["seconds"] is None


@needs_git
def test_commit_and_changed_files(tmp_path):
    git = lambda *command: subprocess.run(["git", *command], cwd=tmp_path, check=True, text=True, capture_output=True).stdout.strip()  # fmt: skip
    assert speedrun.find_commit(tmp_path) == ""
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    commit = speedrun.find_commit(tmp_path)
    assert git("rev-parse", "HEAD").startswith(commit) and len(commit) >= 7
    (tmp_path / "file").write_text("two")
    assert speedrun.find_commit(tmp_path) == f"{commit}+"


def test_mistakes(capsys):
    with pytest.raises(SystemExit):
        speedrun.main(["--source=sst2", "--steps=3"])
    assert "--steps=3: only --config.FIELD=VALUE may follow" in capsys.readouterr().err
    most = len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match=f"--cores=0: this process can be given 1 to {most} cores"):
        speedrun.limit_cores(0)


@pytest.mark.slow
def test_a_real_run(tmp_path):
    tiny_encoder.checkpoint(tmp_path / "model")
    tiny_encoder.data(tmp_path / "data")
    fields = tiny_encoder.overrides(tmp_path) | {
        "steps": 4,
        "eval_every": 2,
        "data.train_examples": 0,
    }
    fields = [f"--config.{k}={v}" for k, v in fields.items() if k != "data.source"]
    command = [sys.executable, "-m", "benchmarks.speedrun", f"--source={tmp_path / 'data'}"]
    options = ["--seeds=3,4", "--cores=1", "--target=0.01"]
    done = subprocess.run([*command, *options, *fields], cwd=ROOT, capture_output=True, text=True)
    row = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [run["seed"] for run in row["runs"]] == [3, 4]
    assert all(run["step"] == 2 and run["seconds"] > 0 for run in row["runs"])
    assert row["model"] == str(tmp_path / "model") and row["cores"] == 1
    done = subprocess.run([*command, "--seeds=3", "--cores=1", "--target=2", *fields], cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    row = json.loads(done.stdout)
    assert done.returncode == 1 and row["seconds"] is None and row["runs"][0]["best"] <= 1
    done = subprocess.run([*command, "--seeds=3", "--cores=1", "--config.no.field=1"], cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and "no.field" in done.stderr
