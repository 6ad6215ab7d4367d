"""Sweeps as a user runs them: to the end, killed and resumed, in shards, on several devices."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import common
from tests.helpers import programs, tiny_encoder
from tests.helpers.places import ROOT

pytestmark = pytest.mark.xdist_group("sweep")

GRID = {"lora.rank": (1, 3), "seed": (0, 1)}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny_encoder.checkpoint(root / "model")
    tiny_encoder.data(root / "data", n=80)
    return root


def sweep_file(path, *runs):
    """A config file with a sweep of the given runs."""
    lines = ["from configs import sst2_minilm", "get_config = sst2_minilm.get_config"]
    lines += ["def sweep(add):", *(f"    add(**{run!r})" for run in runs or [{}])]
    path.write_text("\n".join(lines) + "\n")
    return path


def base_flags(inputs, **changes):
    fields = tiny_encoder.overrides(inputs) | {
        "epochs": 2,
        "checkpoint_every": 4,
        "eval_at_start": True,
    }
    del fields["lora.rank"]  # the points of most sweeps have one
    fields |= {k.replace("__", "."): v for k, v in changes.items()}
    return [f"--config.{k}={v}" for k, v in fields.items() if v is not None]


def command(inputs, config, workdir, *arguments, **changes):
    head = [sys.executable, "-m", "experiments.sweep"] if config else []
    flags = [f"--config={config}", f"--workdir={workdir}", *base_flags(inputs, **changes)]
    return [*head, *flags, *arguments]


def run(arguments, **env):
    python, how, module, *others = map(str, arguments)
    if how == "-m":
        return programs.run(module.removeprefix("experiments."), *others, env=env)
    return subprocess.run(
        [python, how, module, *others], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | env,
    )  # fmt: skip


def succeed(arguments, **env):
    done = run(arguments, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def outcome(workdir):
    """All that a sweep has found, by run, but for what the clock says."""
    found = {}
    for path in sorted((workdir / "runs").iterdir()):
        result = json.loads((path / "result.json").read_text())
        result.pop("seconds")
        lines = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("examples_per_second", None)
        weights = [(p.name, p.read_bytes()) for p in path.glob("adapter/*.safetensors")]
        found[path.name] = result, lines, weights
    return found


def by_values(workdir):
    """Directories of the runs by rank and seed."""
    found = {}
    for path in (workdir / "runs").iterdir():
        config = json.loads((path / "config.json").read_text())
        found[config["lora"]["rank"], config["seed"]] = path
    return found


def same(found, wanted):
    """The same runs, with the same values up to rounding: another program computed them."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        (a, lines_a, _), (b, lines_b, _) = found[name], wanted[name]
        assert (a["status"], a["steps"]) == (b["status"], b["steps"])
        assert [x.keys() for x in lines_a] == [x.keys() for x in lines_b]
        for x, y in zip(lines_a, lines_b, strict=True):
            for key in {"loss", "eval_loss"} & x.keys():
                np.testing.assert_allclose(x[key], y[key], rtol=1e-5)


@pytest.fixture(scope="session")
def grid(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "grid.py"
    return sweep_file(path, *common.product(GRID))


@pytest.fixture(scope="session")
def finished(inputs, grid, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "sweep"
    return workdir, succeed(command(inputs, grid, workdir, "--parallel=1"))


def test_a_sweep_finishes_and_reports(finished, inputs, grid):
    workdir, out = finished
    assert "group 1: 4 runs, 4 to do" in out and "4 runs finished" in out
    assert "compiled: evaluate 1, train 1" in out
    found = by_values(workdir)
    assert sorted(found) == [(1, 0), (1, 1), (3, 0), (3, 1)]
    for (rank, _), path in found.items():
        about = json.loads((path / "adapter" / "adapter.json").read_text())
        assert about["config"]["rank"] == rank
        result = json.loads((path / "result.json").read_text())
        assert result["status"] == "finished" and result["steps"] == 20
        assert not (path / "checkpoints").exists()
    again = succeed(command(inputs, grid, workdir))
    assert "group 1: 4 runs, 0 to do" in again and "compiled: nothing" in again


@pytest.mark.slow
def test_each_run_is_the_run_alone(finished, inputs, tmp_path):
    """Against experiments.sst2 with the run's own config, and its adapter works alike."""
    path = by_values(finished[0])[3, 1]
    single = tmp_path / "single"
    flags = base_flags(inputs, lora__rank=3, seed=1)
    module = [sys.executable, "-m", "experiments.sst2", "--config=configs/sst2_minilm.py"]
    succeed([*module, f"--workdir={single}", *flags])
    assert (single / "config.json").read_text() == (path / "config.json").read_text()
    of = lambda p: [json.loads(x) for x in (p / "metrics.jsonl").read_text().splitlines()]
    assert [x.keys() for x in of(path)] == [x.keys() for x in of(single)]
    for x, y in zip(of(path), of(single), strict=True):
        for key in x.keys() - {"examples_per_second"}:
            np.testing.assert_allclose(x[key], y[key], rtol=1e-5)
    predict = [sys.executable, "-m", "experiments.predict", "--json", "the film was great"]
    rows = [
        json.loads(succeed([*predict, f"--adapter={p}/adapter"]).splitlines()[0])
        for p in (path, single)
    ]
    assert rows[0]["label"] == rows[1]["label"]
    assert rows[0]["probability"] == pytest.approx(rows[1]["probability"], abs=2e-4)
    abouts = [json.loads((p / "adapter" / "adapter.json").read_text()) for p in (path, single)]
    for about in abouts:
        about.pop("weights")
        about["metadata"].pop("loss")  # equal up to rounding
    assert abouts[0] == abouts[1]


@pytest.mark.slow
def test_together_spread_and_in_shards_is_the_same(finished, inputs, grid, tmp_path):
    """Three at a time; over eight devices; in two shards whose report is that of the whole."""
    wanted = outcome(finished[0])
    out = succeed(command(inputs, grid, tmp_path / "three", "--parallel=3"))
    assert "compiled: evaluate 1, train 1" in out
    same(outcome(tmp_path / "three"), wanted)
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    out = succeed(command(inputs, grid, tmp_path / "eight", "--parallel=4"), XLA_FLAGS=flags)
    assert "device: 8 x" in out and "compiled: evaluate 1, train 1" in out
    same(outcome(tmp_path / "eight"), wanted)
    shards = tmp_path / "shards"
    for shard in ("1/2", "2/2"):
        out = succeed(command(inputs, grid, shards, f"--shard={shard}"))
        assert "2 runs finished" in out
    same(outcome(shards), wanted)
    succeed([sys.executable, "-m", "experiments.report", shards])
    rows = list(csv.DictReader((shards / "report" / "results.csv").read_text().splitlines()))
    assert [(row["lora.rank"], row["seed"]) for row in rows] == [
        ("1", "0"), ("1", "1"), ("3", "0"), ("3", "1"),
    ]  # fmt: skip
    assert succeed(command(inputs, grid, shards)).startswith("group 1: 4 runs, 0 to do")
    page = (shards / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and 'src="http' not in page


@pytest.mark.slow
def test_added_points_alone_are_run(finished, inputs, tmp_path):
    """Another rank, a diverging run and a shorter one: what is finished stays, to the byte."""
    workdir = finished[0]
    before = outcome(workdir)
    times = {p: p.stat().st_mtime_ns for p in workdir.glob("runs/*/*") if p.is_file()}
    wild = {"optimizer.learning_rate": 1e30, "optimizer.warmup": 0.4, "lora.rank": 2}
    more = {"lora.rank": 5}, wild, {"epochs": 1, "lora.rank": 5}
    config = sweep_file(tmp_path / "more.py", *common.product(GRID), *more)
    dry = succeed(command(inputs, config, workdir, "--dry_run"))
    assert "group 1: 6 runs, 2 to do" in dry and "group 2: 1 runs, 1 to do" in dry
    assert dry.count(": to do") == 3 and dry.count(": finished") == 4
    out = succeed(command(inputs, config, workdir))
    assert "1 runs diverged, 6 runs finished" in out
    assert "compiled: evaluate 1, train 1" in out  # the groups differ in their data alone
    after = outcome(workdir)
    assert {k: v for k, v in after.items() if k in before} == before and len(after) == 7
    assert all(p.stat().st_mtime_ns == at for p, at in times.items())
    (diverged,) = (v[0] for v in after.values() if v[0]["status"] == "diverged")
    # The warm-up's first step has a rate of zero, the second a huge one: the third loss shows it.
    assert diverged["steps"] == 3
    report = succeed([sys.executable, "-m", "experiments.report", workdir])
    assert "6 finished, 1 diverged" in report


KILLED_AT_A_WRITE = """
import os, signal, sys
left = int(sys.argv.pop(1))
def counted(write):
    def replacement(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args, **kwargs)
    return replacement
os.replace, os.rename = counted(os.replace), counted(os.rename)
from experiments import cli, sweep
cli.run(sweep.main)
"""


@pytest.mark.slow
def test_killed_at_a_write_and_resumed(finished, inputs, grid, tmp_path):
    """SIGKILL just before a file gets its name: twice, then to the end, with the same result."""
    wanted = {k: v for k, v in outcome(finished[0]).items() if v[0]["id"] in ids(finished[0])}
    workdir = tmp_path / "sweep"
    for writes in (9, 14):
        arguments = command(inputs, grid, workdir, "--parallel=1")[3:]
        done = run([sys.executable, "-c", KILLED_AT_A_WRITE, writes, *arguments])
        assert done.returncode == -signal.SIGKILL, done.stderr
    succeed(command(inputs, grid, workdir, "--parallel=1"))
    assert outcome(workdir) == wanted


@pytest.mark.slow
def test_sigterm_ends_a_sweep_at_checkpoints(finished, inputs, grid, tmp_path):
    wanted = {k: v for k, v in outcome(finished[0]).items() if v[0]["id"] in ids(finished[0])}
    workdir = tmp_path / "sweep"
    arguments = command(inputs, grid, workdir, "--parallel=1")
    process = subprocess.Popen(
        list(map(str, arguments)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 200
    while time.time() < deadline and not list(workdir.glob("runs/*/metrics.jsonl")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "Stopped, as asked" in out and "runs finished" not in out, out
    # A damaged checkpoint costs a run some steps, and nothing else.
    saved = [int(p.name) for p in workdir.glob("runs/*/checkpoints/[0-9]*")]
    (folder,) = workdir.glob("runs/*/checkpoints")
    (folder / str(max(saved) + 1)).mkdir()
    again = out.strip().splitlines()[-1].strip()
    done = subprocess.run(again, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"The checkpoint of step {max(saved) + 1} is damaged" in done.stdout
    assert outcome(workdir) == wanted


def ids(workdir):
    """The ids of the four runs of the grid, whatever was added since."""
    return {path.name for key, path in by_values(workdir).items() if key[0] in (1, 3)}


@pytest.mark.rounding
@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 3])
def test_killed_at_random_and_resumed(inputs, grid, tmp_path, parallel):
    """Ten kills without warning at random points, and the result of a sweep left alone."""
    arguments = [f"--parallel={parallel}"]
    succeed(command(inputs, grid, tmp_path / "alone", *arguments, epochs=10))
    wanted = outcome(tmp_path / "alone")
    workdir, draw, kills = tmp_path / "killed", random.Random(4), 0
    lines = lambda: sum(len(p.read_text().splitlines()) for p in workdir.glob("runs/*/*.jsonl"))
    whole = sum(len(found[1]) for found in wanted.values())
    while kills < 10:
        target = lines() + draw.randint(1, whole // 12)
        process = subprocess.Popen(
            command(inputs, grid, workdir, *arguments, epochs=10), cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.time() + 200
        while process.poll() is None and lines() < target and time.time() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        assert process.poll() is None, "it was done before it could be killed"
        process.kill()
        process.wait()
        kills += 1
    succeed(command(inputs, grid, workdir, *arguments, epochs=10))
    found = outcome(workdir)
    if parallel == 1:
        assert found == wanted
    else:  # runs that a kill has parted share the program with others than before
        same(found, wanted)


@pytest.mark.slow
def test_halving(inputs, tmp_path):
    """Of six runs two go on after a ninth of the steps, and one after a third."""
    config = sweep_file(
        tmp_path / "six.py",
        *common.product({"optimizer.learning_rate": (1e-6, 1e-2, 1e-5), "seed": (0, 1)}),
    )
    rate = {"optimizer__learning_rate": None}  # the points have it
    arguments = command(inputs, config, tmp_path / "sweep", "--halving=3", "--parallel=2", **rate)
    out = succeed(arguments)
    assert "rung 1: 4 runs dropped, 2 go on" in out and "rung 2: 1 runs dropped, 1 go on" in out
    found = [result for result, *_ in outcome(tmp_path / "sweep").values()]
    assert sorted((r["status"], r["steps"]) for r in found) == [
        *[("dropped", 2)] * 4, ("dropped", 7), ("finished", 20),
    ]  # fmt: skip
    assert "0 to do" in succeed(arguments)
    other = run(command(inputs, config, tmp_path / "sweep", **rate))
    assert other.returncode == 2 and "halving is 3 there and 0 here" in other.stderr
    assert "5 dropped" in succeed([sys.executable, "-m", "experiments.report", tmp_path / "sweep"])


def test_an_option_that_the_points_replace(inputs, grid, tmp_path):
    done = run(command(inputs, grid, tmp_path / "sweep", "--config.seed=3", lora__rank=4))
    assert done.returncode == 2 and not (tmp_path / "sweep").exists()
    assert "--config.lora.rank=4, --config.seed=3 would change nothing" in done.stderr
    partly = sweep_file(tmp_path / "partly.py", {"seed": 1}, {"lora.rank": 1})
    said = succeed(command(inputs, partly, tmp_path / "sweep", "--dry_run", lora__rank=4))
    assert "rank 4, seed 1" in said and "rank 1, seed 0" in said


MISTAKES = {
    "parallel": (["--parallel=0"], {}, "--parallel=0: give a number of runs"),
    "shard": (["--shard=3/2"], {}, "give i/n with i from 1 to n"),
    "halving and shards": (["--halving=3", "--shard=1/2"], {}, "can't go with shards"),
    "too few steps": (["--halving=3"], dict(epochs=1, data__train_examples=8), "too few"),
    "only": (["--only=lora.rank=7"], {}, "no run has lora.rank 7; there are 1, 3"),
    "rank": ([], dict(lora__targets="('classifier',)", lora__train="()"), "rank 3 is larger"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(inputs, grid, tmp_path, name):
    arguments, changes, says = MISTAKES[name]
    done = run(command(inputs, grid, tmp_path / "sweep", *arguments, **changes))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert says in errors[0] and "Traceback" not in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_mistakes_that_are_found_without_a_model(inputs, finished, tmp_path):
    plain = run(command(inputs, "configs/quickstart.py", tmp_path / "sweep"))
    assert plain.returncode == 2 and "defines no sweep" in plain.stderr
    report = run([sys.executable, "-m", "experiments.report", tmp_path])
    assert report.returncode == 2 and "of neither a run nor a sweep" in report.stderr
    flags = [f"--workdir={finished[0]}", *base_flags(inputs)]
    single = run(
        [sys.executable, "-m", "experiments.sst2", "--config=configs/sst2_minilm.py", *flags]
    )
    assert single.returncode == 2 and "is that of a sweep" in single.stderr
