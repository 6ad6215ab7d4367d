"""Evaluation alone: the logged score again, to the last digit, and no file touched."""

import contextlib
import dataclasses
import hashlib
import io
import json

import pytest
from absl import flags

from experiments import evaluation, finetuning
from lora_jax import serialize
from lora_jax.tasks import adapter_files, classification
from lora_jax.training import metric_writer
from tests.helpers import encoder_runs

config, task = encoder_runs.config, encoder_runs.task


@pytest.fixture(scope="module")
def finished(task, config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    encoder_runs.run(task, config, workdir)
    return workdir


def traces(directory, but=""):
    """Every file with its content, and the time of its last change, directories included."""
    paths = [directory, *directory.rglob("*")]
    return {
        str(path): (
            path.stat().st_mtime_ns,
            path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in paths
        if not (but and but in path.parts)
    }


def scored(config, directory, workdir):
    config = config.copy_and_resolve_references()
    config.adapter = str(directory)
    made, _ = classification.make_task(config)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluation.report(made, config, workdir)
    *human, last = out.getvalue().splitlines()
    return json.loads(last), "\n".join(human)


def best(workdir):
    """The logged line of the best evaluation."""
    step = serialize.read_metadata(workdir / "adapter")["step"]
    lines = metric_writer.read(workdir / "metrics.jsonl")
    return next(x for x in lines if x["step"] == step and "eval_accuracy" in x)


@pytest.mark.slow
def test_the_score_is_the_logged_one(finished, config):
    before = traces(finished)
    found, human = scored(config, finished / "adapter", finished)
    line = best(finished)
    assert (found["accuracy"], found["loss"]) == (line["eval_accuracy"], line["eval_loss"])
    assert found["step"] == line["step"] and found["adapter"] == str(finished / "adapter")
    assert f"accuracy {found['accuracy']:.4f}" in human and "not as the run was" not in human
    assert traces(finished) == before


@pytest.mark.slow
def test_an_adapter_in_the_format_of_peft(finished, config, tmp_path):
    """From a directory of its own, with a workdir that is not there."""
    plain = config.copy_and_resolve_references()
    loaded = classification.load_model(
        plain.model.name, num_labels=2, key=classification.head_key(plain.seed)
    )
    adapter, about = adapter_files.load(finished / "adapter", loaded)
    adapter_files.save_peft(tmp_path / "peft", loaded, adapter, about, base=None)
    before = traces(tmp_path)
    found, human = scored(config, tmp_path / "peft", tmp_path / "none")
    line = best(finished)
    assert (found["accuracy"], found["loss"]) == (line["eval_accuracy"], line["eval_loss"])
    assert "step" not in found and "not as the run was" not in human
    assert traces(tmp_path) == before


def test_another_config_is_said(finished, config):
    other = config.copy_and_resolve_references().unlock()
    other.eval_batch_size, other.lora.rank = 4, 7
    found, human = scored(other, finished / "adapter", finished)
    assert "not as the run was: eval_batch_size is 8 there and 4 here; lora.rank is 2" in human
    assert found["accuracy"] == best(finished)["eval_accuracy"]


@pytest.mark.slow
def test_a_run_under_way(task, config, tmp_path):
    """Between two of its steps; the run goes on as if nothing had been."""
    seen = []

    def batch(step):
        if step == 12:
            before = traces(tmp_path / "run", but="checkpoints")  # the run may be writing one
            seen.append(
                (
                    scored(config, evaluation.find_adapter(tmp_path / "run"), tmp_path / "run")[0],
                    best(tmp_path / "run"),
                )
            )
            assert traces(tmp_path / "run", but="checkpoints") == before
        return task.train_batch(step)

    encoder_runs.run(dataclasses.replace(task, train_batch=batch), config, tmp_path / "run")
    ((found, line),) = seen
    assert found["step"] == 8 and found["loss"] == line["eval_loss"]


def test_there_is_no_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory.*--adapter=DIRECTORY"):
        evaluation.find_adapter(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match="no evaluation has been made there yet"):
        evaluation.find_adapter(tmp_path / "run")


def test_a_head_of_other_labels_is_not_scored(finished, config):
    other = config.copy_and_resolve_references().unlock()
    other.model.labels, other.model.num_labels = ("a", "b", "c"), 3
    with pytest.raises(ValueError, match="fresh head: that of the adapter has 2 labels, so that"):
        scored(other, finished / "adapter", finished)


def test_the_flag_is_there():
    assert flags.FLAGS["eval_only"].default is False and callable(finetuning.is_eval_only)
