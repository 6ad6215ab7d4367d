"""Several real processes on 127.0.0.1 are one run: its numbers, its files, its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from tests.helpers import tiny_encoder
from tests.helpers.places import ROOT

SECONDS = 240  # that any of these may take on a busy machine


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny_encoder.checkpoint(root / "model")
    tiny_encoder.data(root / "data")
    return root


def start(inputs, workdir, count, **changes):
    """Starts the processes of a run; a key of `changes` has __ for a dot."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fields = tiny_encoder.overrides(inputs) | {k.replace("__", "."): v for k, v in changes.items()}
    command = [
        sys.executable, "-m", "experiments.sst2", "--config=configs/sst2_minilm.py",
        f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items()),
    ]  # fmt: skip
    number = lambda k: (f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={k}")
    return [
        subprocess.Popen(
            [*command, *(number(k) if count > 1 else ())], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for k in range(count)
    ]  # fmt: skip


def finish(processes):
    """Waits for all of them; returns what each printed."""
    printed = [process.communicate(timeout=SECONDS) for process in processes]
    for process, (_, errors) in zip(processes, printed, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in printed]


def adapter(workdir):
    (path,) = (workdir / "adapter").glob("*.safetensors")
    return safetensors.numpy.load_file(path)


def lines(workdir):
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def numbers(workdir):
    drop = lambda line: {k: x for k, x in line.items() if k != "examples_per_second"}
    return [drop(line) for line in lines(workdir)]


def same(workdir, other):
    """The runs agree as far as float32 sums in another order do."""
    one, two = adapter(workdir), adapter(other)
    assert one.keys() == two.keys()
    for name, x in one.items():
        scale = np.abs(x).max()
        np.testing.assert_allclose(two[name], x, rtol=1e-5, atol=1e-5 * scale, err_msg=name)
    assert len(numbers(workdir)) == len(numbers(other))
    for line, theirs in zip(numbers(workdir), numbers(other), strict=True):
        assert line == pytest.approx(theirs, rel=1e-5)


@pytest.fixture(scope="module")
def single(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("single") / "run"
    finish(start(inputs, workdir, 1))
    return workdir


@pytest.mark.slow
def test_two_processes_are_one_run(inputs, single, tmp_path):
    workdir = tmp_path / "run"
    first, second = finish(start(inputs, workdir, 2, mesh__data=-1))
    assert "mesh: data 2 x fsdp 1 x tensor 1" in first and "trainable params:" in first
    said = [line for line in second.splitlines() if not line.startswith("[Gloo]")]
    assert not said  # the first one speaks for all
    same(single, workdir)
    files = lambda root: sorted(p.name for p in root.iterdir())
    assert files(workdir) == files(single)
    assert len(files(workdir / "tensorboard")) == 1
    # Weights and description; the former have their hash in their name.
    assert len(files(workdir / "adapter")) == len(files(single / "adapter")) == 2


def wait_for(workdir, step, processes):
    limit = time.monotonic() + SECONDS
    while not any(line["step"] >= step for line in lines(workdir)):
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        assert time.monotonic() < limit
        time.sleep(0.1)


@pytest.mark.slow
def test_a_process_dies_and_another_number_goes_on(inputs, single, tmp_path):
    """Four processes split base and batch; one is killed; the rest end; two go on to the end."""
    workdir = tmp_path / "run"
    options = dict(mesh__data=-1, mesh__fsdp=2, checkpoint_every=10, log_every=5)
    processes = start(inputs, workdir, 4, **options)
    wait_for(workdir, 30, processes)
    processes[3].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    for process in processes:
        process.communicate(timeout=SECONDS)
    assert all(process.returncode for process in processes)
    assert time.monotonic() - begin < 120  # a heartbeat is missed after 30 s, at the latest
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())
    assert steps and steps[-1] < 75
    first, _ = finish(start(inputs, workdir, 2, **options | dict(mesh__tensor=1)))
    assert "Going on from the checkpoint of step" in first
    one, two = adapter(single), adapter(workdir)
    for name, x in one.items():
        np.testing.assert_allclose(two[name], x, rtol=1e-5, atol=1e-5 * np.abs(x).max())
    (end,) = finish(start(inputs, workdir, 1, **options | dict(mesh__data=1, mesh__fsdp=1)))
    assert "This run is finished" in end


@pytest.mark.slow
def test_one_is_asked_to_stop_and_all_do(inputs, single, tmp_path):
    """SIGTERM to any of them: they agree on a step, save together, and end well."""
    workdir = tmp_path / "run"
    options = dict(mesh__data=-1, log_every=5)
    processes = start(inputs, workdir, 2, **options)
    wait_for(workdir, 10, processes)
    processes[1].send_signal(signal.SIGTERM)
    first, _ = finish(processes)
    assert "Stopped after step" in first and "To go on:" in first
    first, _ = finish(start(inputs, workdir, 2, **options))
    assert "Going on from the checkpoint of step" in first
    one, two = adapter(single), adapter(workdir)
    for name, x in one.items():
        np.testing.assert_allclose(two[name], x, rtol=1e-5, atol=1e-5 * np.abs(x).max())


@pytest.mark.slow
def test_what_only_one_process_finds_wrong_ends_all(inputs, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "tensorboard").write_text("in the way")  # of the first process alone
    processes = start(inputs, workdir, 2, mesh__data=-1)
    printed = [process.communicate(timeout=SECONDS) for process in processes]
    assert [bool(process.returncode) for process in processes] == [True, True]
    assert printed[0][1].splitlines()[-1].startswith("error: ")


def test_flags_must_be_complete():
    flags = ["--config=configs/sst2_minilm.py", "--workdir=unused", "--processes=2"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.sst2", *flags], cwd=ROOT, capture_output=True, text=True,
        env={k: x for k, x in os.environ.items() if not k.startswith("JAX_")},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: --coordinator, --process must be given, too")
