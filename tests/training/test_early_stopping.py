"""Early stopping: where it stops, that a resumed run stops there too, and what is said of it."""

import dataclasses
import math

import numpy as np
import pytest

import lora_jax as lora
from lora_jax.training import early_stopping, loop, metric_writer
from lora_jax.training.task import Score
from tests.helpers import encoder_runs

config, task = encoder_runs.config, encoder_runs.task


def settings(config, count, delta=0.0):
    return encoder_runs.changed(
        config, early_stopping__patience=count, early_stopping__min_delta=delta
    )


def simulated(values, count, delta, higher):
    """The number of evaluations of a run, from the definition, with all of them at hand."""
    reference, waited = None, 0
    for k, value in enumerate(values, 1):
        better = reference is None or (
            value > reference + delta if higher else value < reference - delta
        )
        reference, waited = (value, 0) if better else (reference, waited + 1)
        if waited == count:
            return k
    return len(values)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("higher", [True, False])
def test_it_stops_after_evaluations_without_an_improvement(config, seed, higher):
    rng = np.random.default_rng(seed)
    values = (rng.integers(0, 64, 30) / 64).tolist()
    count, delta = int(rng.integers(1, 5)), float(rng.integers(0, 8) / 64)
    c = settings(config, count, delta).early_stopping
    progress = loop.Progress()
    k = 0
    for value in values:
        k += 1
        progress = early_stopping.update(progress, Score("x", higher), value, c)
        if progress.ended:
            break
    assert k == simulated(values, count, delta, higher)


def test_small_steps_add_up(config):
    """Each is too small to count, and yet the score is more than min_delta better in the end."""
    c, progress = settings(config, 3, 0.1).early_stopping, loop.Progress()
    for value in (0.5, 0.56, 0.62, 0.68, 0.74):
        progress = early_stopping.update(progress, Score(), value, c)
        assert not progress.ended
    assert progress.reference == 0.74 and progress.waited == 0


SCORES = [0.3, 0.5, 0.4, 0.45, 0.6, 0.59, 0.55, 0.6, 0.9, 0.9]


def scripted(task):
    """The same task, whose score is a function of the step that it is made after."""
    at = [0]

    def batch(step):
        at[0] = step + 1
        return task.train_batch(step)

    return dataclasses.replace(
        task,
        train_batch=batch,
        score=Score("made"),
        scores=lambda _: {"made": SCORES[at[0] // 4 - 1]},
    )


def evaluated(workdir):
    return [x["step"] for x in metric_writer.read(workdir / "metrics.jsonl") if "eval_made" in x]


@pytest.mark.slow
def test_a_resumed_run_stops_where_it_would_have(task, config, tmp_path, capsys):
    """With patience 3 the evaluations at 4, 8, ..., 32 are made, and those at 36 and 40 are not."""
    config = encoder_runs.changed(settings(config, 3), epochs=5, eval_every=4, log_every=4)
    whole = encoder_runs.run(scripted(task), config, tmp_path / "whole")
    # The score of step 20 comes again at 32, with a lower loss: it is kept, and is no improvement.
    assert (whole.best_step, whole.best_score, whole.waited) == (32, 0.6, 3)
    said = capsys.readouterr().out
    why = "made has not been better than 0.6000 in 3 evaluations (early_stopping), at step 32 of 40"
    assert f"Training ended: {why}." in said
    assert evaluated(tmp_path / "whole") == list(range(4, 33, 4))

    class Halt(Exception):
        pass

    def halting(made, at):
        def batch(step):
            if step == at:
                raise Halt
            return made.train_batch(step)

        return dataclasses.replace(made, train_batch=batch)

    with pytest.raises(Halt):  # between evaluations, of which two have been waited for
        encoder_runs.run(halting(scripted(task), 29), config, tmp_path / "resumed")
    found = encoder_runs.run(scripted(task), config, tmp_path / "resumed")
    assert dataclasses.replace(found, seconds=0) == dataclasses.replace(whole, seconds=0)
    assert evaluated(tmp_path / "resumed") == evaluated(tmp_path / "whole")
    one, other = (lora.load(tmp_path / w / "adapter", task.base)[0] for w in ("whole", "resumed"))
    np.testing.assert_array_equal(
        one["params"]["classifier"]["bias"], other["params"]["classifier"]["bias"]
    )
    capsys.readouterr()
    again = encoder_runs.run(scripted(task), config, tmp_path / "resumed")
    assert again == found and f"This run is finished: {why}." in capsys.readouterr().out
    assert evaluated(tmp_path / "resumed") == list(range(4, 33, 4))


def test_without_patience_it_never_stops(config):
    progress = loop.Progress()
    for value in [0.5] * 50:
        assert early_stopping.update(progress, Score(), value, config.early_stopping) is progress
    assert math.isinf(progress.best_loss)
