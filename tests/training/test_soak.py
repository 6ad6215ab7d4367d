"""A long run: memory, compilations and the time of a step stay where they are."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow

STEPS, PER_EPOCH = 24_000, 400
WARM = 6_000  # steps until buffers, caches and arenas have their size
GROWTH = 6e6  # bytes of resident memory from there to the end: a third of a kilobyte a step

SOAK = f"""
import dataclasses, gc, json, os, resource, sys, threading, time
from pathlib import Path
import jax
from tests.helpers import tiny_task
from absl import logging
logging.set_verbosity(logging.FATAL)
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
)
task, samples = tiny_task.task({PER_EPOCH}), []

def batch(number):
    if number % 500 == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        samples.append({{
            "step": number, "rss": pages * resource.getpagesize(), "seconds": time.perf_counter(),
            "compiled": len(compiled), "threads": threading.active_count(),
            "files": len(os.listdir("/proc/self/fd")),
        }})
    return task.train_batch(number)

progress = tiny_task.run(
    Path(sys.argv[1]), dataclasses.replace(task, train_batch=batch),
    epochs={STEPS // PER_EPOCH}, log_every=50, checkpoint_every=250,
)
batch({STEPS})
print(json.dumps(samples))
"""


def test_a_long_run_takes_no_more_memory_than_a_short_one(tmp_path):
    """24,000 steps with 60 evaluations, 144 checkpoints, 480 lines and 60 pages of curves."""
    path = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", SOAK, str(tmp_path)], capture_output=True, text=True, timeout=280,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    samples = json.loads(done.stdout.splitlines()[-1])[1:]  # the first batch is made twice
    late = [s for s in samples if s["step"] >= WARM]
    steps, rss = (np.array([s[k] for s in late], float) for k in ("step", "rss"))
    slope = np.polyfit(steps, rss, 1)[0]  # bytes a step
    seconds = np.array([s["seconds"] for s in samples])
    rates = np.diff(seconds) / np.diff([s["step"] for s in samples])
    figures = {
        "rss at the end in MB": round(rss[-1] / 1e6, 1), "bytes a step": round(slope, 1),
        "compiled": late[-1]["compiled"], "threads": late[-1]["threads"],
        "files": late[-1]["files"],
        "ms a step, first and last quarter": [
            round(1e3 * float(np.median(part)), 3) for part in (rates[:12], rates[-12:])
        ],
    }  # fmt: skip
    print(json.dumps(figures))
    assert slope * (STEPS - WARM) < GROWTH, figures
    assert {s["compiled"] for s in late} == {late[0]["compiled"]}, figures
    # A save under way has threads of its own; those that never end would be in every sample.
    assert min(s["threads"] for s in late[-8:]) <= late[0]["threads"] + 2, figures
    assert max(s["files"] for s in late) <= late[0]["files"] + 8, figures
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum("eval_loss" in x for x in lines) == STEPS // PER_EPOCH
    assert sum("eval_loss" not in x for x in lines) == STEPS // 50
