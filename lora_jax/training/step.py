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
    """Settings that a step is compiled with, besides task and optimizer.

    Attributes:
      accumulate: number of micro-batches that a batch is split into; one is in memory at a time.
      has_guard: whether a step without a finite loss and gradient changes nothing; the metrics then
        have the guard's verdict.
      spike: as in :class:`nan_guard.Policy`.
      has_norm: whether the metrics of a step without a guard have the norm of the gradient, before
        it is clipped; with one, its verdict has it.
      orthogonality: weight of the penalty of nodes that have one.
    """

    accumulate: int = 1
    has_guard: bool = False
    spike: float = 0.0
    has_norm: bool = False
    orthogonality: float = 0.0


PLAIN = StepOptions()


def step_options(config: ConfigDict) -> StepOptions:
    """Returns the options of a config, with the guard."""
    return StepOptions(
        config.accumulate,
        has_guard=True,
        spike=config.guard.spike,
        orthogonality=config.optimizer.orthogonality,
    )


def train_step(
    task: Task,
    tx: optax.GradientTransformation,
    dropout: float | jax.Array,
    options: StepOptions = PLAIN,
    *,
    axis: str | None = None,
) -> Callable:
    """Returns the step, a pure function ``(state, base, batch) -> (state, metrics)``.

    The metrics are the task's sums; with a guard they are a pair of these and the guard's verdict,
    and with ``has_norm`` a pair of these and the norm of the gradient.

    Args:
      task: gives ``apply`` and ``metrics``.
      tx: optimizer; its numbers may be JAX scalars, over which a sweep maps.
      dropout: rate of the low-rank branches; it may be a JAX scalar, too.
      options: options of the step.
      axis: name of the axis of a pmap; each device then has its own rows, and its own dropout.
    """
    compute_gradient = functools.partial(gradients.compute, axis=axis)
    if options.accumulate > 1:
        parts = options.accumulate
        compute_gradient = functools.partial(gradients.accumulate, parts=parts, axis=axis)

    def step(state: TrainState, base: PyTree, batch: Batch) -> tuple[TrainState, Any]:
        def compute_sums(adapter: PyTree, batch: Any, key: jax.Array) -> NamedTuple:
            model_key, branch_key = jax.random.split(key)
            apply = lora.lift(task.apply, dropout=dropout, dropout_key=branch_key)
            outputs = apply(lora.bind(base, adapter), batch, model_key)
            return task.metrics(outputs, batch)

        key = jax.random.fold_in(state.key, state.step)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        grads, sums = compute_gradient(compute_sums, state.adapter, batch, key)
        grads = gradients.add_penalty(grads, state.adapter, options.orthogonality)
        updates, opt_state = tx.update(grads, state.opt_state, state.adapter)
        new = optax.apply_updates(state.adapter, updates), opt_state
        if not options.has_guard:
            metrics = (sums, gradients.global_norm(grads)) if options.has_norm else sums
            return TrainState(state.step + 1, *new, state.key, state.health), metrics
        loss = jnp.where(jnp.isfinite(sums[0]), sums[0] / sums[-1], sums[0])
        verdict, health = nan_guard.judge(state.health, loss, grads, spike=options.spike)
        adapter, opt_state = nan_guard.choose(verdict, new, (state.adapter, state.opt_state))
        return TrainState(state.step + 1, adapter, opt_state, state.key, health), (sums, verdict)

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
