"""``kill -9`` at random moments of every part of a run, and of runs that go on after it."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lora_jax.training import checkpointing
from tests.helpers import tiny_encoder, tiny_task
from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow

KILLS = 30
# Each part of a run, with the seconds within which it is killed after the part has begun.
PARTS = {
    "step": 0.02, "save": 0.02, "evaluation": 0.03, "adapter": 0.01, "line": 0.005, "resuming": 0.02,
}  # fmt: skip
EVERY = 4  # steps from checkpoint to checkpoint


@pytest.fixture
def inputs(tmp_path):
    tiny_encoder.checkpoint(tmp_path / "model")
    tiny_encoder.data(tmp_path / "data", n=80)
    return tmp_path


class Runs:
    """Runs of the tiny config, each in a fork of one process that has imported everything."""

    def __init__(self, inputs):
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(inputs / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": str(ROOT),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.forked_runs"], cwd=ROOT, env=os.environ | cache,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        fields = tiny_encoder.overrides(inputs) | {
            "epochs": 4,
            "log_every": 3,
            "checkpoint_every": EVERY,
        }
        flags = [f"--config.{k}={v}" for k, v in fields.items()]
        self._arguments = ["--config=configs/sst2_minilm.py", *flags]
        self.log = inputs / "log"

    def start(self, workdir):
        """Returns the process id."""
        arguments = [str(self.log), *self._arguments, f"--workdir={workdir}"]
        self._process.stdin.write(json.dumps(arguments) + "\n")
        said = self._said()
        self.early = []
        while not said.startswith("pid "):  # the fork may be faster than the one who tells of it
            self.early.append(said)
            said = self._said()
        return int(said.split()[1])

    def parts(self):
        """What the run says, up to and with its status."""
        said = ""
        while not said.startswith("status"):
            said = self.early.pop(0) if self.early else self._said()
            yield said

    def _said(self):
        line = self._process.stdout.readline()
        assert line, "the process that forks has died"
        return line.strip()

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture
def runs(inputs):
    made = Runs(inputs)
    yield made
    made.close()


def killed(runs, workdir, part, count, delay):
    """Kills a run so long after a part has begun for so many times.

    Returns the parts that were under way, None if the run had ended before.
    """
    pid, doing = runs.start(workdir), []
    said = runs.parts()
    for text in said:
        if text.startswith("status"):
            assert text == "status 0", runs.log.read_text()[-3000:]
            return None
        word, name = text.split()
        doing.append(name) if word == "begin" else doing.remove(name)
        count -= text == f"begin {part}"
        if count == 0:
            break
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):  # it may have ended just now
        os.kill(pid, signal.SIGKILL)
    for text in said:  # what it said meanwhile
        if text.startswith("status"):
            break
        word, name = text.split()
        doing.append(name) if word == "begin" else doing.remove(name)
    if text == "status 0":
        return None
    assert text == "status -9", runs.log.read_text()[-3000:]
    if list((workdir / "checkpoints").glob("*tmp*")):
        doing.append("writing a checkpoint")
    return doing


def is_sound(workdir):
    """The checkpoints to be kept can be read, and so can the adapter.

    An older one may be there in part, as it was being deleted.
    """
    if (workdir / "checkpoints").is_dir():
        with checkpointing.manager(workdir / "checkpoints") as checkpoints:
            for step in sorted(checkpoints.all_steps())[-2:]:
                about = json.loads(
                    (workdir / "checkpoints" / str(step) / "about" / "metadata").read_text()
                )
                checkpointing._read(checkpoints, step, about["content"]["layout"])
    path = workdir / "adapter" / "adapter.json"
    if path.exists():
        weights = json.loads(path.read_text())["weights"]
        data = (path.parent / weights["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == weights["sha256"]


def test_killed_at_random(runs, tmp_path):
    """However often and wherever it is killed, the run ends with the bits of one left alone."""
    runs.start(tmp_path / "whole")
    assert list(runs.parts())[-1] == "status 0", runs.log.read_text()[-3000:]
    wanted = tiny_task.outcome(tmp_path / "whole")
    assert [x["step"] for x in wanted.lines if "eval_loss" in x] == [10, 20, 30, 40]
    rng, kills, lives, hit = np.random.default_rng(11), 0, 1, dict.fromkeys(PARTS, 0)
    hit["writing a checkpoint"], turn = 0, 0
    workdir = tmp_path / "run0"
    while kills < KILLS or not all(hit.values()):
        assert turn < 3 * KILLS, hit
        part = list(PARTS)[turn % len(PARTS)]
        count = int(rng.integers(1, 10)) if part in ("step", "line") else 1 + int(turn % 3 == 0)
        doing = killed(runs, workdir, part, count, rng.uniform(0, PARTS[part]))
        turn += 1
        if doing is None:  # it has ended: another one
            assert tiny_task.outcome(workdir) == wanted
            workdir, lives = tmp_path / f"run{lives}", lives + 1
            continue
        kills += 1
        for name in doing:
            hit[name] += 1
        is_sound(workdir)
    while killed(runs, workdir, "none", 1, 0) is not None:
        pass
    assert tiny_task.outcome(workdir) == wanted
    is_sound(workdir)
    print(f"{kills} kills in {lives} runs: {hit}")
