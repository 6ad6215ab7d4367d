"""The state of a run: all that changes while it trains."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax.training import durations, nan_guard, optimizer
from lora_jax.training.task import Task

PyTree = Any


class TrainState(NamedTuple):
    """All that changes during training."""

    step: jax.Array
    adapter: PyTree
    opt_state: PyTree
    key: jax.Array
    health: PyTree = ()


def initial_state(task: Task, config: ConfigDict, lora_config: lora.LoRAConfig) -> tuple:
    """The state at step 0, and the optimiser."""
    key = jax.random.key(config.seed)
    init_key, run_key = jax.random.split(key)
    if task.adapter is None:
        adapter = lora.init(init_key, task.apply, task.base, lora_config, task.train_batch(0), None)
    else:  # a copy, since the step donates its state
        adapter = jax.tree.map(lambda x: jnp.array(x, copy=True), task.adapter)
    # So runs with other alphas and rates have states of one structure, that of checkpoints; the
    # steps get the rate as an argument.
    adapter = adapters.as_data(adapter)
    # Leaves of a bfloat16 base that are trained in full: small updates would round to nothing.
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    adapter = jax.tree.map(wide, adapter)
    total = durations.plan(config, task.steps_per_epoch).total
    tx = optimizer.make(config.optimizer, adapter, total, per_epoch=task.steps_per_epoch)
    state = TrainState(
        jnp.int32(0), adapter, tx.init(adapter), jax.random.key_data(run_key), nan_guard.healthy()
    )
    return state._replace(key=jax.random.wrap_key_data(state.key)), tx


def storable(state: TrainState) -> TrainState:
    """The state with its PRNG key as plain integers."""
    return state._replace(key=jax.random.key_data(state.key))


def usable(stored: TrainState) -> TrainState:
    """The inverse of :func:`storable`."""
    return stored._replace(key=jax.random.wrap_key_data(stored.key))
