"""The loop when something goes wrong on the way: numbers that are no numbers, disks that say no."""

import ast
import dataclasses
import gc
import itertools
import json
import resource
import signal

import jax
import numpy as np
import pytest
import tiny

import lora_jax as lora
from configs import sst2_minilm
from lora_jax.tasks import classification, from_config
from lora_jax.training import checkpointing, metric_writer, train


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny.checkpoint(root / "model")
    tiny.data(root / "data", n=64)
    config = sst2_minilm.get_config().unlock()
    for field, value in tiny.overrides(root).items():
        tupled = isinstance(value, str) and value.startswith("(")
        config.update_from_flattened_dict({field: ast.literal_eval(value) if tupled else value})
    return config.lock()


@pytest.fixture(scope="module")
def task(config):
    return classification.make_task(config)[0]


pytestmark = pytest.mark.usefixtures("quiet")

PER_EPOCH = 8  # 64 examples, 8 a batch


def run(task, config, workdir):
    return train.train(task, config, from_config.lora_config(config), workdir, say=print)


def poisoned(task, step):
    """The same task, but for one batch whose loss is infinite."""
    batch = lambda number: spoilt(task.train_batch(number), number == step)
    return dataclasses.replace(task, train_batch=batch)


def spoilt(batch, really=True):
    """Examples that weigh infinitely much: a loss of infinity, of which the mean is NaN."""
    weights = np.where(batch["weights"] > 0, np.float32(np.inf), 0) if really else batch["weights"]
    return batch | {"weights": weights}


def finite(tree):
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("step", [10, PER_EPOCH * 2 - 1])
def test_infinity_in_training_stops_and_keeps_the_best_adapter(task, config, tmp_path, step):
    """Also in the last step of an epoch, when an evaluation is due."""
    with pytest.raises(
        FloatingPointError, match=rf"inf at step {step + 1}: .* is kept in"
    ) as error:
        run(poisoned(task, step), config, tmp_path)
    assert str(tmp_path / "adapter") in str(error.value)
    kept, _ = lora.load(tmp_path / "adapter", task.base, base=task.base_id)
    assert finite(kept)
    lines = metric_writer.read(tmp_path / "metrics.jsonl")
    assert [x["step"] for x in lines if "eval_accuracy" in x] == [PER_EPOCH]
    with checkpointing.manager(tmp_path / "checkpoints") as checkpoints:
        assert list(checkpoints.all_steps()) == [PER_EPOCH]


def test_infinity_before_any_evaluation_keeps_nothing(task, config, tmp_path):
    with pytest.raises(FloatingPointError, match=r"inf at step 4: .* no adapter is kept"):
        run(poisoned(task, 3), config, tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_nan_in_evaluation_stops_and_keeps_the_best_adapter(task, config, tmp_path):
    good, calls = list(task.eval_batches()), itertools.count()
    faulty = dataclasses.replace(
        task, eval_batches=lambda: [spoilt(batch) for batch in good] if next(calls) == 1 else good
    )
    with pytest.raises(FloatingPointError, match=r"validation loss is nan at step 16: .* kept in"):
        run(faulty, config, tmp_path)
    kept, _ = lora.load(tmp_path / "adapter", task.base, base=task.base_id)
    assert finite(kept)
    assert json.loads((tmp_path / "adapter" / "adapter.json").read_text())["metadata"]["step"] == 8


# The event file can be neither flushed nor closed then, which its destructor tells.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_disk_full_loses_nothing(task, config, tmp_path):
    """The run stops with one clear error, and goes on to the same bits when there is room."""
    run(task, config, tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def batch(number):
        if number == PER_EPOCH:  # after the first checkpoint, no file can grow beyond this
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return task.train_batch(number)

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error, rather than the end
    try:
        with pytest.raises(OSError) as error:
            run(dataclasses.replace(task, train_batch=batch), config, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "File too large" in str(error.value) or "intact" in str(error.value)
    run(task, config, tmp_path / "run")
    one, two = (lora.load(tmp_path / w / "adapter", task.base)[0] for w in ("whole", "run"))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    del error
    gc.collect()
