"""The programs on 8 virtual devices, as a user starts them: the numbers of one device."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import e2e_files, tiny_encoder, tiny_llama
from tests.helpers.places import ROOT

MIXED = {"mesh.data": -1, "mesh.fsdp": 2, "mesh.tensor": 2}
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("mesh programs")]


def run(module, workdir, fields, *, devices=1):
    flags = os.environ.get("XLA_FLAGS", "")
    extra = f"{flags} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", f"--workdir={workdir}",
         *(f"--config.{name}={value}" if name else f"--config={value}" for name, value in sorted(fields.items()))],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"XLA_FLAGS": extra},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def same_numbers(one, other):
    read = lambda root: [json.loads(x) for x in (root / "metrics.jsonl").read_text().splitlines()]
    assert len(read(one)) == len(read(other)) > 3
    for line, theirs in zip(read(one), read(other), strict=True):
        for values in (line, theirs):
            values.pop("examples_per_second", None)
        assert theirs == pytest.approx(line, rel=2e-5)  # of float32 sums in another order


def test_conversations(tmp_path):
    tiny_llama.checkpoint(tmp_path / "model")
    tiny_llama.data(tmp_path / "data.jsonl")
    fields = {
        "": "configs/instruct_llama.py", "model.name": tmp_path / "model", "model.dtype": "float32",
        "data.train": tmp_path / "data.jsonl", "data.holdout": 6, "data.max_length": 48,
        "batch_size": 8, "eval_batch_size": 8, "epochs": 6, "optimizer.learning_rate": 1e-3,
    }  # fmt: skip
    run("instruct", tmp_path / "one", fields)
    said = run("instruct", tmp_path / "mixed", fields | MIXED, devices=8)
    assert "mesh: data 2 x fsdp 2 x tensor 2; of the base's" in said
    same_numbers(tmp_path / "one", tmp_path / "mixed")


def test_meanings_to_texts(tmp_path):
    """From a base that is trained from nothing on a mesh, to the scores of what is written."""
    source = tmp_path / "source"
    source.mkdir()
    for part in ("train", "test"):
        (source / f"{part}.txt").write_text("\n".join(e2e_files.lines(part)) + "\n")
    base = e2e_files.BASE | {
        "": "configs/e2e_tiny_base.py", "data.source": source, "batch_size": 8, "eval_batch_size": 8,
        "optimizer.learning_rate": 1e-3, "mesh.fsdp": 8,
    }  # fmt: skip
    run("pretrain", tmp_path / "base", base, devices=8)
    fields = e2e_files.ADAPTED | {
        "": "configs/e2e_tiny.py", "data.source": source, "batch_size": 8, "eval_batch_size": 8,
        "model.name": tmp_path / "base" / "model", "epochs": 10, "optimizer.learning_rate": 1e-3,
        "log_every": 2,
    }  # fmt: skip
    run("e2e_nlg", tmp_path / "one", fields)
    run("e2e_nlg", tmp_path / "mixed", fields | MIXED, devices=8)
    same_numbers(tmp_path / "one", tmp_path / "mixed")
    scores = [json.loads((tmp_path / w / "scores.json").read_text()) for w in ("one", "mixed")]
    assert scores[1]["adapted"] == pytest.approx(scores[0]["adapted"], rel=1e-3)


@pytest.mark.parametrize("kind", ["pmap", "mixed"])
def test_sentences_on_and_on(tmp_path, kind):
    """What stops on 8 devices goes on there, and on one it is found finished."""
    tiny_encoder.checkpoint(tmp_path / "model")
    tiny_encoder.data(tmp_path / "data", n=40)
    fields = {"": "configs/sst2_minilm.py"} | tiny_encoder.overrides(tmp_path)
    mesh = {"pmap": True} if kind == "pmap" else MIXED
    said = run("sst2", tmp_path / "run", fields | mesh, devices=8)
    assert "mesh: " in said and "best validation accuracy" in said
    assert "This run is finished" in run("sst2", tmp_path / "run", fields)
    text = run_predict(tmp_path / "run" / "adapter")
    assert "positive" in text or "negative" in text


def run_predict(adapter):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.predict", f"--adapter={adapter}", "the film was good"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
