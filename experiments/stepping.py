"""Pure step functions: one for training, one for evaluation, for every task and kind of adapter.

The base parameters are an argument of the compiled step: neither donated nor closed over, and never
changed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import lora_jax as lora
from experiments import devices, durations, gradients, guard, metrics, optimisers
from experiments.devices import ONE, Devices
from experiments.tasks import Batch, Task
from lora_jax import adapter as adapters

PyTree = Any


class TrainState(NamedTuple):
    """All that changes during training."""

    step: jax.Array
    adapter: PyTree
    opt_state: PyTree
    key: jax.Array
    health: PyTree = ()


class Options(NamedTuple):
    """What a step is compiled with, besides task and optimiser.

    Attributes:
      accumulate: into so many parts a batch is cut, of which one is in memory at a time.
      guarded: whether a step without a finite loss and gradient changes nothing, and is told of.
      spike: as in :class:`guard.Policy`.
    """

    accumulate: int = 1
    guarded: bool = False
    spike: float = 0.0


PLAIN = Options()


def options(config: ConfigDict) -> Options:
    """Those of a config, guarded."""
    return Options(config.accumulate, guarded=True, spike=config.guard.spike)


def train_step(
    task: Task,
    tx: optax.GradientTransformation,
    dropout: Any,
    options: Options = PLAIN,
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
        verdict, health = guard.judge(state.health, loss, grads, spike=options.spike)
        new = guard.kept(verdict, new, (state.adapter, state.opt_state))
        return TrainState(state.step + 1, *new, state.key, health), (found, verdict)

    return step


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    dropout: float,
    options: Options = PLAIN,
    *,
    on: Devices = ONE,
    like: TrainState | None = None,
) -> Callable:
    """:func:`train_step`, compiled; the state is donated, and on a mesh stays where ``like`` is."""
    # As an array, so that one minus the rate is rounded as in a sweep, and the masks are the same.
    rate = jnp.asarray(dropout, float) if dropout else 0.0
    axis = devices.PMAP if on.pmap else None
    return devices.train_step(on, train_step(task, tx, rate, options, axis=axis), like)


def eval_step(task: Task) -> Callable:
    """``(adapter, base, batch) -> (sums, logits if the task wants them)``, a pure function."""

    def step(adapter: PyTree, base: PyTree, batch: Batch) -> tuple:
        logits = lora.lift(task.apply, dropout=0.0)(lora.bind(base, adapter), batch, None)
        return task.metrics(logits, batch), None if task.scores is None else logits

    return step


def make_eval_step(task: Task, on: Devices = ONE) -> Callable:
    """:func:`eval_step`, compiled."""
    return devices.eval_step(on, eval_step(task))


def evaluate(eval_step: Callable, adapter: PyTree, task: Task) -> dict[str, float]:
    """Loss and scores over all evaluation examples, each counted once."""
    batches = task.eval_batches()
    return gathered(task, [(batch, *eval_step(adapter, task.base, batch)) for batch in batches])


def gathered(task: Task, results: list[tuple[Batch, Any, Any]]) -> dict[str, float]:
    """Loss and scores from each batch of an evaluation with its sums and logits."""
    values = metrics.combine([sums for _, sums, _ in results])
    values.pop("examples")
    if task.scores is not None:
        logits = {
            int(index): row
            for batch, _, rows in results
            for index, row in zip(batch["index"], np.asarray(rows), strict=True)
        }
        values |= task.scores(np.stack([logits[k] for k in range(len(logits))]))
    return values


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
    tx = optimisers.make(config.optimizer, adapter, total, per_epoch=task.steps_per_epoch)
    state = TrainState(
        jnp.int32(0), adapter, tx.init(adapter), jax.random.key_data(run_key), guard.healthy()
    )
    return state._replace(key=jax.random.wrap_key_data(state.key)), tx


def storable(state: TrainState) -> TrainState:
    """The state with its PRNG key as plain integers."""
    return state._replace(key=jax.random.key_data(state.key))


def usable(stored: TrainState) -> TrainState:
    """The inverse of :func:`storable`."""
    return stored._replace(key=jax.random.wrap_key_data(stored.key))
