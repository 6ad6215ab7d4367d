"""What a machine does to a run: locks, disks, links, clocks."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_jax.sweeps import sweep_dirs
from lora_jax.training import metric_writer, workdirs
from tests.helpers import slow, tiny_task
from tests.helpers.places import ROOT

pytestmark = pytest.mark.usefixtures("quiet")


def child(code, *arguments):
    path = str(ROOT)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def at(step, act):
    """The task, with something that happens while the batch of a step is made."""
    task = tiny_task.task()

    def batch(number):
        if number == step:
            act()
        return task.train_batch(number)

    return dataclasses.replace(task, train_batch=batch)


# Two runs on one directory.

HOLDS = """
import sys, time
from pathlib import Path
from lora_jax.training import workdirs
with workdirs.lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(1000)
"""


def test_a_second_run_on_the_same_directory_is_refused(left_alone, tmp_path):
    """While the first lives; however it dies, its lock goes with it."""
    holder = child(HOLDS, tmp_path)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"Another process is at work in {tmp_path}"):
            tiny_task.run(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    tiny_task.run(tmp_path)
    assert tiny_task.outcome(tmp_path) == left_alone


def test_the_first_run_goes_on_when_a_second_is_refused(left_alone, tmp_path):
    def second():
        with pytest.raises(ValueError, match="Another process"):
            tiny_task.run(tmp_path)

    tiny_task.run(tmp_path, at(11, second))
    assert tiny_task.outcome(tmp_path) == left_alone


def test_a_lock_is_no_way_out(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="can't be written"), workdirs.lock(tmp_path / "run"):
        pass
    assert (tmp_path / "target").read_text() == "mine"


# Links.

NAMES = ["config.json", "metrics.jsonl", "curves.png", "adapter", "checkpoints", "tensorboard"]
NAMES += ["checkpoints/10", "adapter/adapter.json"]


@pytest.mark.parametrize("name", NAMES)
def test_links_that_lead_out_of_the_workdir_are_refused(tmp_path, name):
    """Of a run that is under way, with something at the other end, or nothing yet."""
    outside, workdir = tmp_path / "outside", tmp_path / "run"
    workdir.mkdir()
    outside.mkdir()
    workdirs.claim(workdir, tiny_task.config())
    target, link = outside / Path(name).name, workdir / name
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        shutil.move(link, target)
    link.symlink_to(target)
    before = {p: p.read_bytes() for p in outside.iterdir()}
    with pytest.raises(ValueError, match="holds links that lead out of it") as error:
        tiny_task.run(workdir)
    assert f"{name} -> {target}" in str(error.value)
    assert {p: p.read_bytes() for p in outside.iterdir()} == before


def test_links_within_and_to_the_workdir_are_followed(left_alone, tmp_path):
    (tmp_path / "real" / "best").mkdir(parents=True)
    (tmp_path / "real" / "adapter").symlink_to("best")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "config.json").write_text(
        json.dumps(workdirs.to_json_types(tiny_task.config()), indent=2)
    )
    tiny_task.run(tmp_path / "link")
    assert tiny_task.outcome(tmp_path / "real") == left_alone
    assert (tmp_path / "real" / "best" / "adapter.json").exists()


def test_links_out_of_a_sweep_are_refused(tmp_path):
    (tmp_path / "sweep" / "runs").mkdir(parents=True)
    (tmp_path / "sweep" / "runs" / "abc").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="runs/abc -> "):
        sweep_dirs.claim(tmp_path / "sweep", tiny_task.config(), 0)


# Disks.


@pytest.fixture
def disk(tmp_path):
    """A small file system in memory."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)]
    done = None
    if shutil.which("mount"):
        done = subprocess.run(mount, capture_output=True, text=True)
    if done is None or done.returncode:
        pytest.skip(f"no file system can be mounted here: {done and done.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def fill(disk, left=0):
    """Leaves so many bytes free."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    if left:
        os.truncate(disk / "filler", (disk / "filler").stat().st_size - left)


# What can't be flushed any more can't be closed either, as the destructor of the event file tells.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("step, left", slow.after(2, [(8, 0), (9, 8192), (12, 0), (12, 16384)]))
def test_a_disk_that_is_full(left_alone, disk, step, left):
    """One clear error, what was saved before is intact, and with room the run goes on.

    At step 8 a checkpoint is being written when the disk becomes full.
    """
    run = disk / "run"
    names = lambda: [p.name for p in (run / "checkpoints").iterdir()]
    busy = lambda: len(names()) > 2 or any("tmp" in name for name in names())

    def full():
        while step != 8 and busy():
            time.sleep(0.001)
        fill(disk, left)

    with pytest.raises(OSError) as error:
        tiny_task.run(run, at(step, full))
    text = str(error.value)
    assert "Could not write" in text and "intact" in text
    last = max(map(int, names()))
    assert last == {8: 5, 9: 8, 12: 10}[step] or (step, last) == (8, 8)
    assert not busy()
    (disk / "filler").unlink()
    tiny_task.run(run)
    assert tiny_task.outcome(run) == left_alone


def test_a_disk_that_is_read_only(left_alone, disk):
    run = disk / "run"
    with pytest.raises(RuntimeError):
        tiny_task.run(run, at(12, lambda: (_ for _ in ()).throw(RuntimeError)))
    remount = lambda how: subprocess.run(
        ["mount", "-o", f"remount,{how}", str(disk)], check=True, capture_output=True
    )
    remount("ro")
    try:
        with pytest.raises(OSError, match=f"workdir {run} can't be written: Read-only"):
            tiny_task.run(run)
    finally:
        remount("rw")
    tiny_task.run(run)
    assert tiny_task.outcome(run) == left_alone


# Clocks.

JUMPING = """
import random, sys, time
draw, true, true_ns = random.Random(5), time.time, time.time_ns
time.time = lambda: true() + draw.choice([0, 7200, -7200, 86400 * 400, -86400 * 400])
time.time_ns = lambda: true_ns() + draw.choice([0, 7200, -7200]) * 10**9
from pathlib import Path
from tests.helpers import tiny_task
begun = time.perf_counter()
try:
    tiny_task.run(Path(sys.argv[1]), tiny_task.task(), epochs=3)
finally:
    print(time.perf_counter() - begun)
"""


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(left_alone, tmp_path):
    """By hours and years at every look: results are the same, and durations are durations."""
    with pytest.raises(RuntimeError):
        tiny_task.run(tmp_path, at(12, lambda: (_ for _ in ()).throw(RuntimeError)))
    process = child(JUMPING, tmp_path)
    try:
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Going on from the checkpoint of step 10." in out
    assert tiny_task.outcome(tmp_path) == left_alone
    progress = tiny_task.run(tmp_path)  # finished
    assert 0 < progress.seconds < float(out.splitlines()[-1]) + 100
    for line in metric_writer.read(tmp_path / "metrics.jsonl"):
        assert 0 < line.get("examples_per_second", 1.0) < math.inf


def test_what_a_killed_writer_has_left_is_removed(left_alone, tmp_path):
    tiny_task.run(tmp_path)
    left = [".metrics.jsonl.x1", ".config.json.x2", ".curves.png.x3", "adapter/.adapter.json.x4"]
    left += ["adapter/.adapter-0123.safetensors.x5"]
    for name in [*left, "notes.txt", "adapter/notes.txt"]:
        (tmp_path / name).write_text("half")
    tiny_task.run(tmp_path)
    assert tiny_task.outcome(tmp_path) == left_alone
    assert not any((tmp_path / name).exists() for name in left)
    assert (tmp_path / "notes.txt").exists() and (tmp_path / "adapter" / "notes.txt").exists()
