"""What lies where on a mesh: base, state and batches; and the steps compiled for it."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lora_jax import paths, sharding
from lora_jax.quantized import is_quantized
from lora_jax.quantized_sharding import spec_of
from lora_jax.training.global_batches import local_rows, put_batch
from lora_jax.training.mesh import Devices, PyTree, require_mesh
from lora_jax.training.state import TrainState
from lora_jax.training.task import Batch, Task

PMAP = "devices"  # the name of a pmap's axis


def place_task(devices: Devices, task: Task, config: ConfigDict) -> Task:
    """Returns the task with its base on the devices.

    A base that was not loaded onto their mesh is put there, split without the table of a family.
    Among several processes, each makes only the rows of its own devices.
    """
    return _place_base(devices, _select_local_rows(devices, task, config))


def _place_base(devices: Devices, task: Task) -> Task:
    if devices.mesh is None or devices.pmap:
        return task
    if all(_is_on(devices.mesh, x) for x in jax.tree.leaves(task.base)):
        return task
    specs = sharding.specs(task.base, (), devices.mesh)
    return dataclasses.replace(task, base=sharding.place(task.base, specs, devices.mesh))


def _is_on(mesh: Mesh, x: jax.Array) -> bool:
    return isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh


def _select_local_rows(devices: Devices, task: Task, config: ConfigDict) -> Task:
    if jax.process_count() == 1:
        return task
    train_rows = local_rows(devices, config.batch_size)
    eval_rows = local_rows(devices, config.eval_batch_size)
    return dataclasses.replace(
        task,
        train_batch=functools.partial(task.train_batch, rows=train_rows),
        eval_batches=functools.partial(task.eval_batches, rows=eval_rows),
    )


def copy_base(devices: Devices, task: Task) -> Task:
    """Returns the task with a copy of its base on each device of a pmap."""
    return dataclasses.replace(task, base=stack(devices, task.base)) if devices.pmap else task


def place_state(devices: Devices, state: TrainState, base: PyTree) -> TrainState:
    """Puts a training state, with integers in place of its key, onto the devices."""
    if devices.mesh is None:
        return state
    if devices.pmap:
        return stack(devices, state)
    return sharding.place(state, state_specs(state, base), devices.mesh)


def place_adapter(devices: Devices, adapter: PyTree, base: PyTree) -> PyTree:
    """Puts an adapter onto the devices."""
    if devices.mesh is None:
        return adapter
    if devices.pmap:
        return stack(devices, adapter)
    specs = sharding.adapter_specs(_specs(base), adapter)
    return sharding.place(adapter, specs, devices.mesh)


def state_specs(state: TrainState, base: PyTree) -> TrainState:
    """Returns the specs of a training state whose adapter is for a base that lies on a mesh."""
    adapter_specs = sharding.adapter_specs(_specs(base), state.adapter)
    return sharding.state_specs(state, state.adapter, adapter_specs)


def _specs(base: PyTree) -> PyTree:
    return jax.tree.map(spec_of, base, is_leaf=is_quantized)


def stack(devices: Devices, tree: PyTree) -> PyTree:
    """Copies each array onto each device of a pmap, along a new first axis."""
    where = NamedSharding(Mesh(np.array(_list(devices)), (PMAP,)), PartitionSpec(PMAP))

    def copy(x: jax.typing.ArrayLike) -> jax.Array:
        pieces = [jax.device_put(np.asarray(x)[None], device) for device in _list(devices)]
        shape = (len(pieces), *np.shape(x))
        return jax.make_array_from_single_device_arrays(shape, where, pieces)

    return jax.tree.map(copy, tree)


def on_host(devices: Devices, tree: PyTree) -> PyTree:
    """Returns the arrays of a tree as numpy's, each whole, in every process.

    On a single device the tree is returned as it is.
    """
    if devices.mesh is None:
        return tree
    if devices.pmap:
        return jax.tree.map(lambda x: np.asarray(x.addressable_data(0))[0], tree)
    return jax.tree.map(_gather, tree)


def _gather(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def compile_train_step(
    devices: Devices, step: Callable, like: TrainState | None = None
) -> Callable:
    """Compiles ``(state, base, batch) -> (state, sums)`` for the devices; the state is donated.

    Args:
      devices: devices of the run.
      step: pure function; for a pmap, one that adds up over the axis :data:`PMAP`.
      like: for a mesh, the state as :func:`place_state` has put it; the new state lies alike.
    """
    if devices.mesh is None:
        return jax.jit(step, donate_argnums=0)
    if devices.pmap:
        run = jax.pmap(step, PMAP, out_axes=(0, None), devices=_list(devices), donate_argnums=0)
        return _with_host_batches(devices, run)
    replicated = NamedSharding(devices.mesh, PartitionSpec())
    out = (jax.tree.map(lambda x: x.sharding, like), replicated)
    return _with_host_batches(devices, jax.jit(step, donate_argnums=0, out_shardings=out))


def _with_host_batches(devices: Devices, run: Any) -> Callable:
    """Returns a compiled step that takes batches of the host, and has the step's ``lower``."""

    def place(batch: Batch) -> PyTree:
        return _split_rows(devices, batch) if devices.pmap else put_batch(devices, batch)

    def mesh_context() -> contextlib.AbstractContextManager:
        # For the models, to which no mesh is handed, and for the constraints that they have.
        return contextlib.nullcontext() if devices.pmap else jax.set_mesh(devices.mesh)

    def step(state: PyTree, base: PyTree, batch: Batch) -> tuple:
        with mesh_context():
            return run(state, base, place(batch))

    def lower(state: PyTree, base: PyTree, batch: Batch) -> jax.stages.Lowered:
        with mesh_context():
            return run.lower(state, base, place(batch))

    setattr(step, "lower", lower)  # noqa: B010
    return step


def compile_eval_step(devices: Devices, step: Callable) -> Callable:
    """Compiles ``(adapter, base, batch) -> (sums, logits or None)``; every process gets all."""
    if devices.mesh is None:
        return jax.jit(step)
    if not devices.pmap:
        run = jax.jit(step, out_shardings=NamedSharding(devices.mesh, PartitionSpec()))
        return _with_host_batches(devices, run)

    def sum_over_devices(adapter: PyTree, base: PyTree, batch: PyTree) -> tuple:
        sums, logits = step(adapter, base, batch)
        return jax.lax.psum(sums, PMAP), logits

    run = jax.pmap(sum_over_devices, PMAP, out_axes=(None, 0), devices=_list(devices))

    def call(adapter: PyTree, base: PyTree, batch: Batch) -> tuple:
        sums, logits = run(adapter, base, _split_rows(devices, batch))
        return sums, None if logits is None else np.concatenate(np.asarray(logits))

    return call


def _list(devices: Devices) -> list[Any]:
    return list(require_mesh(devices).devices.flat)


def _split_rows(devices: Devices, batch: Batch) -> Batch:
    """Puts the rows of each device along a new first axis."""
    count = require_mesh(devices).size
    return {name: x.reshape(count, len(x) // count, *x.shape[1:]) for name, x in batch.items()}


def notes(devices: Devices, base: PyTree) -> list[str]:
    """Returns lines for the report at the start of a run."""
    mesh = devices.mesh
    if mesh is None:
        return []
    total = sum(x.nbytes for x in jax.tree.leaves(base))
    if devices.pmap:
        return [f"mesh: pmap over {mesh.size} devices, the base ({_format_bytes(total)}) on each"]
    specs = _specs(base)
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    each = sharding.bytes_per_device(base, specs, mesh)
    lines = [
        f"mesh: {shape}; of the base's {_format_bytes(total)} each device holds "
        f"{_format_bytes(each)}"
    ]
    if math.prod(mesh.devices.shape[1:]) > 1 and (whole := sharding.replicated(base, specs)):
        lines.append(f"not split: {paths.listing(whole)}")
    return lines


def _format_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
