"""The benchmark against PEFT runs, and its rows say what it promises; no timing decides a test."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.places import ROOT

pytestmark = pytest.mark.parity
pytest.importorskip("peft")


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory from /proc")
def test_rows():
    options = ["--cases=tiny:2x8,tiny:3x4", "--steps=3", "--warmup=1", "--dropout=0.1"]
    options += ["--dtypes=float32,bfloat16"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.vs_peft", *options, "--threads=1"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    cases = [(row["size"], row["length"], row["dtype"]) for row in rows]
    assert cases == [(n, k, x) for n, k in ((2, 8), (3, 4)) for x in ("float32", "bfloat16")]
    assert all(row["processor"] for row in rows)
    for row in rows:
        assert row["threads"] == 1 and row["dropout"] == 0.1
        for side in ("ours", "eager"):
            assert "error" not in row[side], row[side]
            assert 0 < row[side]["step_s"]["min"] <= row[side]["step_s"]["median"]
            assert row[side]["first_step_s"] > 0 and row[side]["peak_mb"] > 0
        for of in ("median", "min"):
            ratio = row["eager"]["step_s"][of] / row["ours"]["step_s"][of]
            assert row["ratio"][f"eager step_s {of}"] == pytest.approx(ratio, abs=1e-3)
        # The same problem on both sides: two classes at random, and nothing learned yet.
        assert row["ours"]["loss"] == pytest.approx(row["eager"]["loss"], abs=0.1)
        assert row["ours"]["trained"] == row["eager"]["trained"]
