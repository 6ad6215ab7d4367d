"""The training state of a run."""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax.methods.initial_values import FROM_ACTIVATIONS, FROM_GRADIENTS, FROM_RESIDUALS
from lora_jax.training import durations, nan_guard, optimizer
from lora_jax.training.global_batches import put_batch
from lora_jax.training.gradients import deal
from lora_jax.training.mesh import ONE, Devices, base_mesh
from lora_jax.training.task import Batch, Task

PyTree = Any


class TrainState(NamedTuple):
    """All that changes during training.

    Attributes:
      step: number of steps that are done.
      adapter: the adapter, of which some leaves are trained.
      opt_state: state of the optimizer.
      key: PRNG key of all dropout of the run.
      health: memory of the NaN guard, a :class:`nan_guard.Health`.
    """

    step: jax.Array
    adapter: PyTree
    opt_state: PyTree
    key: jax.Array
    health: PyTree = ()


def initial_state(
    task: Task,
    config: ConfigDict,
    lora_config: lora.LoRAConfig,
    *,
    plan: durations.Plan | None = None,
    devices: Devices = ONE,
) -> tuple[TrainState, optax.GradientTransformation]:
    """Makes the state at step 0, and the optimizer.

    Args:
      task: what is trained on.
      config: config of the run.
      lora_config: settings of the adapter.
      plan: length of the run; by default the one that the config describes.
      devices: devices of the run, over which the rows of batches are split if first values of the
        adapter need some.

    Raises:
      ValueError: the config and the model do not fit.
    """
    plan = plan or durations.make_plan(config, task.steps_per_epoch)
    key = jax.random.key(config.seed)
    init_key, run_key = jax.random.split(key)
    if task.adapter is None:
        adapter = _make_adapter(init_key, task, lora_config, config, devices)
    else:  # a copy, since the step donates its state
        adapter = jax.tree.map(lambda x: jnp.array(x, copy=True), task.adapter)
    # So runs with other alphas and rates have states of one structure, that of checkpoints; the
    # steps get the rate as an argument.
    adapter = adapters.as_data(adapter)
    # Leaves of a bfloat16 base may be trained in full, and small updates would round to nothing.
    widen = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    adapter = jax.tree.map(widen, adapter)
    tx = optimizer.make(config.optimizer, adapter, plan.total, per_epoch=task.steps_per_epoch)
    state = TrainState(
        jnp.int32(0),
        adapter,
        tx.init(adapter),
        jax.random.key_data(run_key),
        nan_guard.initial_health(),
    )
    return state._replace(key=jax.random.wrap_key_data(state.key)), tx


_FROM_DATA = {
    FROM_GRADIENTS: lora.init_from_gradients,
    FROM_ACTIVATIONS: lora.init_from_activations,
}


def _make_adapter(
    key: jax.Array, task: Task, lora_config: lora.LoRAConfig, config: ConfigDict, devices: Devices
) -> PyTree:
    make = _FROM_DATA.get(lora_config.init)
    if lora_config.init == FROM_RESIDUALS:
        return _make_from_residuals(key, task, lora_config)
    if make is None:
        return lora.init(key, task.apply, task.base, lora_config, task.train_batch(0), None)

    mesh = base_mesh(devices)

    def compute_loss(params: PyTree, batch: Batch) -> jax.Array:
        with _trace_for(mesh):
            sums = task.metrics(task.apply(params, batch, None), batch)
        return sums[0] / jnp.maximum(sums[-1], 1)  # a part of a batch may be padding alone

    batches: list[PyTree] = [
        part
        for k in range(config.init_batches)
        for part in _split(task.train_batch(k), config.accumulate)
    ]
    if mesh is not None:
        batches = [put_batch(devices, jax.tree.map(np.asarray, batch)) for batch in batches]
    return make(key, compute_loss, task.base, lora_config, *batches)


def _trace_for(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which models have their constraints for a mesh, as in a step."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _make_from_residuals(key: jax.Array, task: Task, lora_config: lora.LoRAConfig) -> PyTree:
    if task.load_original is None:
        raise ValueError(
            f"lora.init={FROM_RESIDUALS!r} makes up for what model.quantize takes away, and here "
            "nothing was quantized."
        )
    original, batch = task.load_original(), task.train_batch(0)
    return lora.init_from_residuals(key, task.apply, task.base, lora_config, original, batch, None)


def _split(batch: Batch, parts: int) -> list[Batch]:
    """Splits a batch into micro-batches, as training does, of which one fits the memory.

    Of a batch on a mesh these are the rows of this process: as many from each device as from all.
    """
    dealt = jax.tree.map(lambda x: deal(jnp.asarray(x), parts), batch)
    return [jax.tree.map(lambda x, k=k: x[k], dealt) for k in range(parts)]


def unwrap_key(state: TrainState) -> TrainState:
    """Returns the state with its PRNG key as plain integers."""
    return state._replace(key=jax.random.key_data(state.key))


def wrap_key(stored: TrainState) -> TrainState:
    """Inverts :func:`unwrap_key`."""
    return stored._replace(key=jax.random.wrap_key_data(stored.key))
