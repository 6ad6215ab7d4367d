"""The training step: a pure function, for every task and kind of adapter.

The base parameters are an argument of the compiled step: neither donated nor closed over, and never
changed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.training import gradients, nan_guard, partitioning
from lora_jax.training.mesh import ONE, Devices
from lora_jax.training.state import TrainState
from lora_jax.training.task import Batch, Task

PyTree = Any


class StepOptions(NamedTuple):
    """What a step is compiled with, besides task and optimiser.

    Attributes:
      accumulate: into so many parts a batch is cut, of which one is in memory at a time.
      guarded: whether a step without a finite loss and gradient changes nothing, and is told of.
      spike: as in :class:`nan_guard.Policy`.
    """

    accumulate: int = 1
    guarded: bool = False
    spike: float = 0.0


PLAIN = StepOptions()


def step_options(config: ConfigDict) -> StepOptions:
    """Those of a config, guarded."""
    return StepOptions(config.accumulate, guarded=True, spike=config.guard.spike)


def train_step(
    task: Task,
    tx: optax.GradientTransformation,
    dropout: Any,
    options: StepOptions = PLAIN,
    *,
    axis: str | None = None,
) -> Callable:
    """``(state, base, batch) -> (state, metrics)``, a pure function.

    The dropout rate, and the numbers in ``tx``, may be JAX scalars: a sweep maps over them. Of a
    guarded step the metrics are a pair, with the guard's verdict. Under a pmap ``axis`` is its
    name; each device then has rows, and dropout, of its own.
    """
    gradient = functools.partial(gradients.whole, axis=axis)
    if options.accumulate > 1:
        parts = options.accumulate
        gradient = functools.partial(gradients.accumulated, parts=parts, axis=axis)

    def step(state: TrainState, base: PyTree, batch: Batch) -> tuple[TrainState, Any]:
        def sums(adapter: PyTree, batch: Batch, key: jax.Array) -> NamedTuple:
            model_key, branch_key = jax.random.split(key)
            apply = lora.lift(task.apply, dropout=dropout, dropout_key=branch_key)
            logits = apply(lora.bind(base, adapter), batch, model_key)
            return task.metrics(logits, batch)

        key = jax.random.fold_in(state.key, state.step)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        grads, found = gradient(sums, state.adapter, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.adapter)
        new = optax.apply_updates(state.adapter, updates), opt_state
        if not options.guarded:
            return TrainState(state.step + 1, *new, state.key, state.health), found
        loss = jnp.where(jnp.isfinite(found[0]), found[0] / found[-1], found[0])
        verdict, health = nan_guard.judge(state.health, loss, grads, spike=options.spike)
        new = nan_guard.kept(verdict, new, (state.adapter, state.opt_state))
        return TrainState(state.step + 1, *new, state.key, health), (found, verdict)

    return step


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    dropout: float,
    options: StepOptions = PLAIN,
    *,
    devices: Devices = ONE,
    like: TrainState | None = None,
) -> Callable:
    """Compiles :func:`train_step`; the state is donated, and on a mesh it lies as ``like`` does."""
    # As an array, so that one minus the rate is rounded as in a sweep, and the masks are the same.
    rate = jnp.asarray(dropout, float) if dropout else 0.0
    axis = partitioning.PMAP if devices.pmap else None
    step = train_step(task, tx, rate, options, axis=axis)
    return partitioning.compile_train_step(devices, step, like)
