"""What a run logs and keeps: learning rate, gradient norm, the base before training, the best adapter."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from configs import common
from experiments import finetuning
from lora_jax import serialize
from lora_jax.data import examples, tokenization
from lora_jax.data.examples import Examples
from lora_jax.tasks import classification
from lora_jax.training import (
    checkpointing,
    curves,
    durations,
    gradients,
    loop,
    metric_logger,
    metric_writer,
    metrics,
    optimizer,
)
from lora_jax.training.state import initial_state
from lora_jax.training.task import Score
from tests.helpers import encoder_runs, tiny_task

config, task = encoder_runs.config, encoder_runs.task


@pytest.mark.parametrize("decay", optimizer.DECAYS)
@pytest.mark.parametrize("warmup", [0.0, "7 steps", 0.3])
def test_the_rate_of_a_step_is_that_of_its_update(decay, warmup):
    c = common.base_config().optimizer
    c.decay, c.warmup, c.learning_rate = decay, warmup, 3e-3
    rate = optimizer.make_rate(c, 40, per_epoch=20)
    schedule = optimizer.schedule(optimizer.settings(c, 40, per_epoch=20), decay)
    steps = range(1, 41)
    want = [float(schedule(step - 1)) for step in steps]  # optax counts from 0
    np.testing.assert_allclose([rate(step) for step in steps], want, rtol=1e-5, atol=1e-10)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    changes = {"log_every": 1, "optimizer__clip_norm": 0.01, "optimizer__warmup": 0.25}
    tiny_task.run(workdir, eval_at_start=True, **changes)
    return workdir, tiny_task.config(eval_at_start=True, **changes)


def test_the_first_line_has_the_norm_before_clipping(logged):
    """Against the derivative in float64: at the start b = 0, so that of a is 0, too."""
    workdir, c = logged
    made = tiny_task.task()
    state, _ = initial_state(made, c, tiny_task.LORA)
    batch = made.train_batch(0)
    x, kernel = np.float64(batch["x"]), np.float64(made.base["dense"]["kernel"])
    logits = x @ kernel
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p[np.arange(6), batch["labels"]] -= 1
    a = np.float64(state.adapter["dense"]["kernel"].a)
    want = np.linalg.norm(tiny_task.LORA.kernel_scale("dense") * (x @ a).T @ p / 6)
    first = next(line for line in metric_writer.read(workdir / "metrics.jsonl") if line["step"])
    assert want > 10 * 0.01  # it is clipped
    np.testing.assert_allclose(first["grad_norm"], want, rtol=1e-5)


def test_each_line_has_the_rate_of_its_step(logged):
    workdir, c = logged
    lines = [x for x in metric_writer.read(workdir / "metrics.jsonl") if "loss" in x]
    peak, rise, total = c.optimizer.learning_rate, 6, 24
    want = [peak * min(k / rise, (total - k) / (total - rise)) for k in range(total)]
    np.testing.assert_allclose([x["learning_rate"] for x in lines], want, rtol=1e-12)


def test_the_norm_is_that_of_what_is_trained():
    adapter = lora.init(
        jax.random.key(0), lambda p, x: x @ p["k"], {"k": jnp.ones((3, 2))},
        lora.LoRAConfig(rank=1, targets=("k",)), jnp.ones((1, 3)),
    )  # fmt: skip
    grads = jax.tree.map(lambda x: 2.0 * jnp.ones_like(x), adapter)
    count = sum(x.size for x in jax.tree.leaves(adapter) if x.ndim)
    np.testing.assert_allclose(gradients.global_norm(grads), 2 * np.sqrt(count), rtol=1e-6)


def test_means_of_a_line():
    rows = [(4.0, 1.0, 2.0, 3.0), (2.0, 1.0, 2.0, np.inf), (2.0, 2.0, 2.0, 5.0)]
    found = metric_logger.means(rows, metrics.Sums, seconds=2)
    assert found == {
        "loss": 8 / 6, "accuracy": 4 / 6, "grad_norm": 4.0, "examples_per_second": 3.0
    }  # fmt: skip
    older = metric_logger.means([row[:3] for row in rows], metrics.Sums, seconds=2)
    assert older == {k: v for k, v in found.items() if k != "grad_norm"}


def test_a_run_that_an_earlier_version_began_goes_on(tmp_path, monkeypatch):
    """Its checkpoint has sums without norms, of the steps since the last line."""
    made = tiny_task.task()

    def batch(step):
        if step == 5:
            raise InterruptedError
        return made.train_batch(step)

    save = checkpointing.save

    def save_as_before(checkpoints, step, state, progress):
        old = progress | {"pending": [row[:-1] for row in progress["pending"]]}
        save(checkpoints, step, state, old)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(checkpointing, "save", save_as_before)
        tiny_task.run(tmp_path / "old", dataclasses.replace(made, train_batch=batch))
    tiny_task.run(tmp_path / "old")
    tiny_task.run(tmp_path / "new")
    old, new = tiny_task.lines(tmp_path / "old"), tiny_task.lines(tmp_path / "new")
    at = next(k for k, line in enumerate(new) if line["step"] == 6)
    assert old[at].pop("grad_norm") != new[at].pop("grad_norm") and old == new


def record(workdir, values, score):
    """The progress after evaluations of (score, loss); the adapter's only number is its step."""
    made = dataclasses.replace(tiny_task.task(), score=score)
    workdir.mkdir()
    with metric_writer.MetricWriter(workdir, 0) as log:
        run = loop.Run(
            task=made, config=tiny_task.config(), lora_config=tiny_task.LORA, workdir=workdir,
            log=log, plan=durations.Plan(9, 1, 0),
        )  # fmt: skip
        progress = loop.Progress()
        adapter = jax.tree.map(np.asarray, tiny_task.state().adapter)
        for step, (value, loss) in enumerate(values, 1):
            found = loop.Evaluation(step, {"loss": loss, score.name: value})
            progress = loop.record(run, adapter, found, progress)
    return progress, serialize.read_metadata(workdir / "adapter")["step"]


@pytest.mark.parametrize("score, values, best", [
    (Score(), [(0.5, 0.7), (0.5, 0.6), (0.5, 0.6), (0.5, 0.65)], 2),
    (Score(), [(0.5, 0.7), (0.6, 0.9), (0.5, 0.1), (0.6, 0.8)], 4),
    (Score("error", higher_is_better=False), [(0.3, 0.7), (0.3, 0.6), (0.4, 0.1)], 2),
    (Score("loss", higher_is_better=False), [(0.7, 0.7), (0.6, 0.6), (0.6, 0.6)], 2),
])  # fmt: skip
def test_of_equal_scores_the_lower_loss_is_kept(tmp_path, score, values, best):
    progress, saved = record(tmp_path / "run", values, score)
    assert (progress.best_step, saved) == (best, best)
    assert (progress.best_score, progress.best_loss) == values[best - 1]


def test_before_and_after(logged, capsys):
    workdir, _ = logged
    before, *others = [x for x in metric_writer.read(workdir / "metrics.jsonl") if "eval_loss" in x]
    best = max(others, key=lambda x: (x["eval_accuracy"], -x["eval_loss"]))
    progress = loop.Progress(
        best_step=best["step"], best_score=best["eval_accuracy"], best_loss=best["eval_loss"]
    )
    assert before["step"] == 0
    assert finetuning.describe_change(workdir, progress, "accuracy") == (
        f"validation, before training → best: accuracy {before['eval_accuracy']:.4f} → "
        f"{best['eval_accuracy']:.4f}, loss {before['eval_loss']:.4f} → {best['eval_loss']:.4f}\n"
    )
    same = dataclasses.replace(progress, best_step=0)
    assert "no later evaluation was better" in finetuning.describe_change(workdir, same, "loss")
    assert finetuning.describe_change(workdir / "none", progress, "accuracy") == ""


@pytest.mark.parametrize("line, score, panels", [
    ({"eval_loss": 1.0, "eval_accuracy": 0.5}, "accuracy", ["loss", "accuracy"]),
    ({"eval_loss": 1.0, "eval_accuracy": 0.5}, "loss", ["loss", "accuracy"]),
    ({"eval_loss": 1.0, "eval_pearson": 0.5}, "pearson", ["loss", "pearson"]),
    ({"eval_loss": 1.0}, "loss", ["loss"]),
])  # fmt: skip
def test_panels_of_the_curves(tmp_path, line, score, panels):
    line = {"step": 1, "epoch": 0.5} | line
    assert curves.choose_panels([line], score) == panels
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    curves.plot_curves(tmp_path, score)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_left_out_and_what_is_cut_is_told(config):
    """64 training sentences of four words, which are six tokens with the special ones."""
    few = encoder_runs.changed(
        config, data__train_examples=40, data__max_length=5, data__buckets=(5,)
    )
    notes = classification.make_task(few)[0].notes
    assert "training on 40 of 64 sentences (data.train_examples)" in notes
    assert (
        "60 sentences cut to 5 tokens (data.max_length): 40 of training, 20 of evaluation" in notes
    )
    both = encoder_runs.changed(config, data__train_examples=40, data__holdout=8)
    notes = classification.make_task(both)[0].notes
    assert notes.count("training on 40 of 56 sentences (data.train_examples)") == 1
    whole = classification.make_task(config)[0].notes
    assert not [note for note in whole if "cut to" in note or " of 64 " in note]


def test_pairs_that_are_cut():
    tokenizer = tokenization.tokenizers.Tokenizer(
        tokenization.tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    )
    tokenizer.pre_tokenizer = tokenization.tokenizers.pre_tokenizers.Whitespace()
    texts = Examples(("a a a", "a", "a a"), None, ("b", "b", "b b b b"))
    found = tokenization.tokenize(texts, tokenizer, max_length=4)
    assert np.diff(found.offsets).tolist() == [4, 2, 4] and found.cut == 1
    assert examples.subset(texts, 2, seed=0).notes == ()
