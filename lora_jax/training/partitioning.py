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
from lora_jax.training.mesh import Devices, PyTree
from lora_jax.training.task import Batch, Task


def settled(on: Devices, task: Task) -> Task:
    """The task with its base on the mesh, if it was not loaded onto it: by no table, then."""
    is_there = lambda x: isinstance(x.sharding, NamedSharding) and x.sharding.mesh == on.mesh
    if on.mesh is None or on.pmap or all(map(is_there, jax.tree.leaves(task.base))):
        return task
    specs = sharding.specs(task.base, (), on.mesh)
    return dataclasses.replace(task, base=sharding.place(task.base, specs, on.mesh))


def with_copies(on: Devices, task: Task) -> Task:
    """The task with a copy of its base on each device, for a pmap."""
    return dataclasses.replace(task, base=stacked(on, task.base)) if on.pmap else task


def _specs(base: PyTree) -> PyTree:
    return jax.tree.map(spec_of, base, is_leaf=is_quantized)


def place(on: Devices, state: Any, base: PyTree) -> Any:
    """Puts a training state, with numbers in place of its key, onto the devices."""
    if on.mesh is None:
        return state
    if on.pmap:
        return stacked(on, state)
    return sharding.place(state, state_specs(state, base), on.mesh)


def place_adapter(on: Devices, adapter: PyTree, base: PyTree) -> PyTree:
    """The same for an adapter alone."""
    if on.mesh is None:
        return adapter
    if on.pmap:
        return stacked(on, adapter)
    return sharding.place(adapter, sharding.adapter_specs(_specs(base), adapter), on.mesh)


def state_specs(state: Any, base: PyTree) -> Any:
    """The specs of a training state whose adapter is for a base that lies on a mesh."""
    split = sharding.adapter_specs(_specs(base), state.adapter)
    return sharding.state_specs(state, state.adapter, split)


def stacked(on: Devices, tree: PyTree) -> PyTree:
    """A copy of each array for each device of a pmap, along a new first axis."""
    devices = list(on.mesh.devices.flat)
    where = NamedSharding(Mesh(np.array(devices), (PMAP,)), PartitionSpec(PMAP))

    def copies(x: Any) -> jax.Array:
        pieces = [jax.device_put(np.asarray(x)[None], device) for device in devices]
        shape = (len(devices), *np.shape(x))
        return jax.make_array_from_single_device_arrays(shape, where, pieces)

    return jax.tree.map(copies, tree)


PMAP = "devices"  # the name of a pmap's axis


def on_host(on: Devices, tree: PyTree) -> PyTree:
    """The arrays of a tree as numpy's, each whole, in every process; untouched on one device."""
    if on.mesh is None:
        return tree
    if on.pmap:
        return jax.tree.map(lambda x: np.asarray(x.addressable_data(0))[0], tree)
    whole = functools.partial(multihost_utils.process_allgather, tiled=True)
    return jax.tree.map(lambda x: np.asarray(x) if x.is_fully_addressable else whole(x), tree)


def rows(on: Devices, batch_size: int) -> np.ndarray:
    """Which rows of a batch the devices of this process hold, ascending."""
    split = NamedSharding(on.mesh, sharding.BATCH)
    found = split.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in found]))


def local(on: Devices, task: Task, config: ConfigDict) -> Task:
    """The task, of whose batches each process builds the rows of its own devices alone."""
    if jax.process_count() == 1:
        return task
    mine = functools.partial(rows, on)
    return dataclasses.replace(
        task,
        train_batch=functools.partial(task.train_batch, rows=mine(config.batch_size)),
        eval_batches=functools.partial(task.eval_batches, rows=mine(config.eval_batch_size)),
    )


def put_batch(on: Devices, batch: Batch) -> PyTree:
    """Puts the rows that this process has of a batch onto its devices."""
    split = NamedSharding(on.mesh, sharding.BATCH)
    parts = on.mesh.shape[sharding.DATA] * on.mesh.shape[sharding.FSDP]
    mine = rows(on, parts)

    def put(x: np.ndarray) -> jax.Array:
        size = len(x) // len(mine)  # rows of each part
        own = lambda index: np.searchsorted(mine, (index[0].start or 0) // size) * size
        return jax.make_array_from_callback(
            (size * parts, *x.shape[1:]), split, lambda index: x[own(index) : own(index) + size]
        )

    # Which example each row is, nobody asks on the devices; and it is said of all rows.
    return {name: put(x) for name, x in batch.items() if name != "index"}


def train_step(on: Devices, step: Callable, like: Any = None) -> Callable:
    """Compiles ``(state, base, batch) -> (state, sums)`` for the devices; the state is donated.

    Args:
      on: the devices.
      step: a pure function; for a pmap, one that adds up over the axis :data:`PMAP`.
      like: for a mesh, the state as :func:`place` has put it: it stays where it is.
    """
    if on.mesh is None:
        return jax.jit(step, donate_argnums=0)
    if on.pmap:
        run = jax.pmap(step, PMAP, out_axes=(0, None), devices=_list(on), donate_argnums=0)
        return _fed(on, run, functools.partial(_parted, on))
    whole = NamedSharding(on.mesh, PartitionSpec())
    out = (jax.tree.map(lambda x: x.sharding, like), whole)
    run = jax.jit(step, donate_argnums=0, out_shardings=out)
    return _fed(on, run, functools.partial(put_batch, on))


def _fed(on: Devices, run: Callable, put: Callable) -> Callable:
    """The compiled function, to which batches of the host can be given."""
    # For the models, which are told of no mesh, and for the constraints that they have.
    around = lambda: contextlib.nullcontext() if on.pmap else jax.set_mesh(on.mesh)

    def fed(state: PyTree, base: PyTree, batch: Batch) -> tuple:
        with around():
            return run(state, base, put(batch))

    def lower(state: PyTree, base: PyTree, batch: Batch) -> Any:
        with around():
            return run.lower(state, base, put(batch))

    fed.lower = lower
    return fed


def eval_step(on: Devices, step: Callable) -> Callable:
    """Compiles ``(adapter, base, batch) -> (sums, logits or None)``; every process gets all."""
    if on.mesh is None:
        return jax.jit(step)
    if not on.pmap:
        run = jax.jit(step, out_shardings=NamedSharding(on.mesh, PartitionSpec()))
        return _fed(on, run, functools.partial(put_batch, on))

    def summed(adapter: PyTree, base: PyTree, batch: PyTree) -> tuple:
        sums, logits = step(adapter, base, batch)
        return jax.lax.psum(sums, PMAP), logits

    run = jax.pmap(summed, PMAP, out_axes=(None, 0), devices=_list(on))

    def call(adapter: PyTree, base: PyTree, batch: Batch) -> tuple:
        sums, logits = run(adapter, base, _parted(on, batch))
        return sums, None if logits is None else np.concatenate(np.asarray(logits))

    return call


def _list(on: Devices) -> list[jax.Device]:
    return list(on.mesh.devices.flat)


def _parted(on: Devices, batch: Batch) -> Batch:
    """The rows of each device along a new first axis."""
    count = on.mesh.size
    return {name: x.reshape(count, len(x) // count, *x.shape[1:]) for name, x in batch.items()}


def notes(on: Devices, base: PyTree) -> list[str]:
    """Lines for the report at the start."""
    if on.mesh is None:
        return []
    said = " x ".join(f"{name} {size}" for name, size in on.mesh.shape.items())
    total = sum(x.nbytes for x in jax.tree.leaves(base))
    if on.pmap:
        return [f"mesh: pmap over {on.mesh.size} devices, the base ({_size(total)}) on each"]
    specs = _specs(base)
    each = sharding.bytes_per_device(base, specs, on.mesh)
    line = f"mesh: {said}; of the base's {_size(total)} each device holds {_size(each)}"
    whole = sharding.replicated(base, specs) if math.prod(on.mesh.devices.shape[1:]) > 1 else []
    return [line, *([f"not split: {paths.listing(whole)}"] if whole else [])]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
