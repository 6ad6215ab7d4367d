"""Training runs of a tiny encoder, in process: a config, its task, and ways to spoil a batch."""

import ast
import copy
import dataclasses

import jax
import numpy as np
import pytest

from configs import sst2_minilm
from lora_jax.tasks import classification, from_config
from lora_jax.training import train
from tests.helpers import tiny_encoder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny_encoder.checkpoint(root / "model")
    tiny_encoder.data(root / "data", n=64)
    config = sst2_minilm.get_config().unlock()
    for field, value in tiny_encoder.overrides(root).items():
        tupled = isinstance(value, str) and value.startswith("(")
        config.update_from_flattened_dict({field: ast.literal_eval(value) if tupled else value})
    return config.lock()


@pytest.fixture(scope="module")
def task(config):
    return classification.make_task(config)[0]


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


def changed(config, **fields):
    config = copy.deepcopy(config).unlock()
    for field, value in fields.items():
        section, _, name = field.rpartition("__")
        (config[section] if section else config)[name] = value
    return config.lock()
