"""The loop when something goes wrong on the way: numbers that are no numbers, disks that say no."""

import dataclasses
import gc
import itertools
import json
import resource
import signal

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.training import checkpointing, metric_writer
from tests.helpers import encoder_runs

config, task = encoder_runs.config, encoder_runs.task


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("step", [10, encoder_runs.PER_EPOCH * 2 - 1])
def test_infinity_in_training_stops_and_keeps_the_best_adapter(task, config, tmp_path, step):
    """Also in the last step of an epoch, when an evaluation is due."""
    with pytest.raises(
        FloatingPointError, match=rf"inf at step {step + 1}: .* is kept in"
    ) as error:
        encoder_runs.run(encoder_runs.poisoned(task, step), config, tmp_path)
    assert str(tmp_path / "adapter") in str(error.value)
    kept, _ = lora.load(tmp_path / "adapter", task.base, base=task.base_id)
    assert encoder_runs.finite(kept)
    lines = metric_writer.read(tmp_path / "metrics.jsonl")
    assert [x["step"] for x in lines if "eval_accuracy" in x] == [encoder_runs.PER_EPOCH]
    with checkpointing.manager(tmp_path / "checkpoints") as checkpoints:
        assert list(checkpoints.all_steps()) == [encoder_runs.PER_EPOCH]


def test_infinity_before_any_evaluation_keeps_nothing(task, config, tmp_path):
    with pytest.raises(FloatingPointError, match=r"inf at step 4: .* no adapter is kept"):
        encoder_runs.run(encoder_runs.poisoned(task, 3), config, tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_nan_in_evaluation_stops_and_keeps_the_best_adapter(task, config, tmp_path):
    good, calls = list(task.eval_batches()), itertools.count()
    faulty = dataclasses.replace(
        task,
        eval_batches=lambda: (
            [encoder_runs.spoilt(batch) for batch in good] if next(calls) == 1 else good
        ),
    )
    with pytest.raises(FloatingPointError, match=r"validation loss is nan at step 16: .* kept in"):
        encoder_runs.run(faulty, config, tmp_path)
    kept, _ = lora.load(tmp_path / "adapter", task.base, base=task.base_id)
    assert encoder_runs.finite(kept)
    assert json.loads((tmp_path / "adapter" / "adapter.json").read_text())["metadata"]["step"] == 8


# The event file can be neither flushed nor closed then, which its destructor tells.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_disk_full_loses_nothing(task, config, tmp_path):
    """The run stops with one clear error, and goes on to the same bits when there is room."""
    encoder_runs.run(task, config, tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def batch(number):
        if (
            number == encoder_runs.PER_EPOCH
        ):  # after the first checkpoint, no file can grow beyond this
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return task.train_batch(number)

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error, rather than the end
    try:
        with pytest.raises(OSError) as error:
            encoder_runs.run(dataclasses.replace(task, train_batch=batch), config, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "File too large" in str(error.value) or "intact" in str(error.value)
    encoder_runs.run(task, config, tmp_path / "run")
    one, two = (lora.load(tmp_path / w / "adapter", task.base)[0] for w in ("whole", "run"))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    del error
    gc.collect()
