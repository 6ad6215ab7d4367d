"""Runs of one task, each alone, and together through one compiled step."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sst2_minilm
from experiments import recipes
from lora_jax.sweeps import trials, vmapped_step
from lora_jax.tasks import from_config
from lora_jax.training import metrics
from lora_jax.training.state import initial_state
from lora_jax.training.step import make_train_step
from lora_jax.training.task import Task
from tests.helpers import tiny_encoder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny_encoder.checkpoint(root / "model")
    tiny_encoder.data(root / "data")
    return root


def base_config(root, **changes):
    config = sst2_minilm.get_config().unlock()
    fields = tiny_encoder.overrides(root) | {k.replace("__", "."): v for k, v in changes.items()}
    for field, value in fields.items():
        section, _, name = field.rpartition(".")
        part = config[section] if section else config
        part[name] = eval(value) if isinstance(value, str) and value.startswith("(") else value
    return config.lock()


def add_points(root, values, **changes):
    add_all = lambda add: [add(**v) for v in values]
    return trials.make_trials(base_config(root, **changes), add_all, recipes.GLUE)


def alone(task, config, steps):
    """Losses, each step's, of a run by itself, and its last state."""
    lora_config = from_config.lora_config(config)
    base = task.base if task.redraw_base is None else task.redraw_base(config.seed)
    task = dataclasses.replace(task, base=base)
    state, tx = initial_state(task, config, lora_config)
    step = make_train_step(task, tx, lora_config.dropout)
    losses = []
    for k in range(steps):
        state, (loss, _, count) = step(state, task.base, task.train_batch(k))
        losses.append(float(loss) / float(count))
    return np.array(losses), state


def together(task, configs, steps, program):
    """The same of several, so many at a time, or by a program that was made for such runs."""
    members = [vmapped_step.make_member(task, c, from_config.lora_config(c)) for c in configs]
    shapes = vmapped_step.common_shapes(members)
    if isinstance(program, int):
        program = vmapped_step.make_program(
            task, program, has_dropout=True, options=vmapped_step.make_options(configs[0])
        )
    losses, states, count = [], [], program.count
    for first in range(0, len(members), count):
        chosen = members[first : first + count]
        stacked = vmapped_step.stack([vmapped_step.pad(m, shapes) for m in chosen], count)
        stacked = vmapped_step.place(program, stacked)
        rows = []
        for k in range(steps):
            batch = task.train_batch(k)
            stacked, (sums, _) = vmapped_step.call(program, "train", stacked, task.base, batch)
            loss, _, n = sums
            rows.append(np.asarray(loss, np.float64) / np.asarray(n))
        losses += list(np.array(rows).T[: len(chosen)])
        states += [vmapped_step.unstack(stacked, k) for k in range(len(chosen))]
    return losses, states, members, program


def float64_task():
    """A small network with an adapted embedding, all in float64."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids, key):
            embed = nn.Embed(12, 6, param_dtype=jnp.float64, name="embed")
            x = nn.tanh(nn.Dense(8, param_dtype=jnp.float64, name="hidden")(embed(ids)))
            x = nn.Dropout(0.1)(x.mean(1), deterministic=key is None, rng=key)
            return nn.Dense(2, param_dtype=jnp.float64, name="classifier")(x)

    def batch(step):
        rng = np.random.default_rng(step)
        ids = rng.integers(0, 12, (8, 5)).astype(np.int32)
        labels = (ids.sum(1) % 2).astype(np.int32)
        return {"ids": ids, "labels": labels, "weights": np.ones(8, np.float32)}

    net = Net()
    base = net.init(jax.random.key(1), batch(0)["ids"], None)
    return Task(
        apply=lambda params, b, key: net.apply(params, b["ids"], key),
        metrics=lambda logits, b: metrics.cross_entropy(logits, b["labels"], b["weights"]),
        train_batch=batch,
        eval_batches=lambda: [batch(10_000)],
        steps_per_epoch=50,
        base=base,
        base_id="sha256:none",
        metadata={},
    )
