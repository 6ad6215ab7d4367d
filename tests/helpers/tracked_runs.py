"""The tiny task in a process of its own, whose metrics go to trackers, and which may be killed.

    python -m tests.helpers.tracked_runs WORKDIR wandb,mlflow 14

kills itself without warning before the given step's batch; without a step it goes on to the end.
"""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers.places import ROOT


def start(workdir, names, kill_at="", **env):
    """What a run prints, and its status."""
    return subprocess.run(
        [sys.executable, "-m", "tests.helpers.tracked_runs", str(workdir), names, str(kill_at)],
        cwd=ROOT, text=True, capture_output=True, timeout=300, env=os.environ | env,
    )  # fmt: skip


def main(workdir, names, kill_at=""):
    from tests.helpers import tiny_task

    made = tiny_task.task()

    def batch(step):
        if kill_at and step == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return made.train_batch(step)

    some_task = dataclasses.replace(made, train_batch=batch)
    tiny_task.run(Path(workdir), some_task, log__to=tuple(names.split(",")))


if __name__ == "__main__":
    main(*sys.argv[1:])
