"""Several runs through one compiled step: what differs between them is data.

Runs of different ranks get one shape by zeros. Columns of ``a`` and rows of ``b`` that are zero
have gradients of zero (that of ``a`` is a product with ``b``, and the other way round), hence
moments and weight decay of zero, and stay zero. They add nothing to a norm. The padded run is the
run.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import fields, paths
from lora_jax.factors import RANK
from lora_jax.nodes import is_adapted
from lora_jax.training import durations, optimizer
from lora_jax.training.evaluation import eval_step
from lora_jax.training.state import TrainState, initial_state, storable, usable
from lora_jax.training.step import StepOptions, train_step
from lora_jax.training.task import Batch, Task

PyTree = Any
_AXIS = "runs"


class Member(NamedTuple):
    """One run as the compiled steps see it; with a leading axis, several.

    Attributes:
      state: its training state, storable.
      alive: whether its loss has been finite so far; otherwise its state no longer changes.
      settings: of its optimiser.
      dropout: rate of the low-rank branches.
      own: leaves of the base, by name, that this run has for itself: drawn by its seed, and neither
        trained nor shared.
    """

    state: TrainState
    alive: Any
    settings: optimizer.Settings
    dropout: Any
    own: dict[str, Any]


class Options(NamedTuple):
    """What steps are compiled with, the same for all of their runs.

    Attributes:
      decay: of the learning rate; see :func:`optimizer.schedule`.
      accumulate: as in :class:`step.StepOptions`.
    """

    decay: str
    accumulate: int


def options(config: ConfigDict) -> Options:
    """Those of a config."""
    return Options(config.optimizer.decay, config.accumulate)


def member(
    task: Task,
    config: ConfigDict,
    lora_config: lora.LoRAConfig,
    *,
    plan: durations.Plan | None = None,
) -> Member:
    """Makes a run at step 0, in numpy arrays of its true rank.

    Args:
      task: what the run is trained on.
      config: config of the run.
      lora_config: settings of the adapter.
      plan: length of the run; by default the one that the config describes.

    Raises:
      ValueError: the config and the model do not fit.
    """
    plan = plan or durations.plan(config, task.steps_per_epoch)
    base = task.base if task.base_of is None else task.base_of(config.seed)
    state, _ = initial_state(dataclasses.replace(task, base=base), config, lora_config, plan=plan)
    own = _own_leaves(task.base, base, state.adapter)
    found = Member(
        storable(state),
        np.array(True),
        optimizer.settings(config.optimizer, plan.total, per_epoch=task.steps_per_epoch),
        float(lora_config.dropout),
        own,
    )
    # Python numbers get JAX's default dtypes, as they do in a single run.
    return jax.tree.map(lambda x: np.asarray(x, jax.dtypes.result_type(x)), found)


def _own_leaves(shared: PyTree, base: PyTree, adapter: PyTree) -> dict[str, Any]:
    trained = {n for n, x in adapters.nodes(adapter).items() if not is_adapted(x)}
    leaves = paths.named_leaves(shared)
    return {
        name: x
        for name, x in paths.named_leaves(base).items()
        if x is not leaves[name] and name not in trained
    }


def kernels(run: Member) -> list[str]:
    """The names of the kernels that are adapted."""
    nodes = adapters.nodes(run.state.adapter)
    return [name for name, x in nodes.items() if is_adapted(x)]


def common_shapes(members: Sequence[Member]) -> PyTree:
    """The smallest shapes that hold every run: those of the largest rank of each kernel.

    Raises:
      ValueError: the runs' adapters differ along another axis, which zeros can't fill up.
    """
    each = [_sizes_beside_the_rank(m.state.adapter) for m in members]
    if uneven := [name for name in each[0] if any(x.get(name) != each[0][name] for x in each)]:
        raise ValueError(
            f"Runs of one program may differ in their ranks, and these differ in other sizes of "
            f"{paths.listing(uneven)}: {[x.get(uneven[0]) for x in each]}. Sweep them apart."
        )
    largest = lambda *xs: tuple(map(max, zip(*(x.shape for x in xs), strict=True)))
    return jax.tree.map(largest, *members)


def _sizes_beside_the_rank(adapter: PyTree) -> dict[str, dict[str, int]]:
    entries = adapters.nodes(adapter).items()
    sizes = {name: fields.sizes(node) for name, node in entries if is_adapted(node)}
    return {name: {k: n for k, n in own.items() if k != RANK} for name, own in sizes.items()}


def pad(tree: PyTree, shapes: PyTree) -> PyTree:
    """Fills each array up with zeros.

    >>> pad({"a": np.ones((1, 2))}, {"a": (2, 2)})["a"].tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """

    def padded(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        full = np.zeros(shape, x.dtype)
        full[tuple(map(slice, x.shape))] = x
        return full

    return jax.tree.map(padded, tree, shapes)


def cut(tree: PyTree, like: PyTree) -> PyTree:
    """The inverse of :func:`pad`: the part of each array that ``like`` has."""
    return jax.tree.map(lambda x, y: x[tuple(map(slice, y.shape))], tree, like)


def stack(members: Sequence[Member], count: int) -> Member:
    """Puts runs of equal shapes side by side, and dead copies of the first up to ``count``."""
    filler = [members[0]._replace(alive=np.array(False))] * (count - len(members))
    return jax.tree.map(lambda *xs: np.stack(xs), *members, *filler)


def unstack(tree: PyTree, index: int) -> PyTree:
    """Run number ``index`` of the stack, in numpy arrays."""
    # Indexed by numpy: JAX would compile each index of each shape.
    return jax.tree.map(lambda x: np.asarray(x)[index], tree)


def member_step(task: Task, *, dropout: bool, options: Options) -> Callable:
    """``(member, base, batch) -> (member, sums)``: the step of a single run, with its data.

    Args:
      task: its ``apply`` and ``metrics`` are used.
      dropout: whether the low-rank branches have any; a rate of zero is exact, and costs the draw.
      options: of the runs.
    """

    def step(run: Member, base: PyTree, batch: Batch) -> tuple[Member, Any]:
        tx = optimizer.adamw(run.settings, run.state.adapter, options.decay)
        # What diverges is left alone here, run by run: no guard of a single run's kind.
        step = StepOptions(accumulate=options.accumulate)
        single = train_step(task, tx, run.dropout if dropout else 0.0, step)
        state, sums = single(usable(run.state), _with_own(base, run.own), batch)
        alive = run.alive & jnp.isfinite(sums[0])
        kept = lambda new, old: jnp.where(alive, new, old)
        state = jax.tree.map(kept, storable(state), run.state)
        return run._replace(state=state, alive=alive), sums

    return step


def member_eval_step(task: Task) -> Callable:
    """``(member, base, batch) -> sums``."""
    single = eval_step(task)
    return lambda run, base, batch: single(run.state.adapter, _with_own(base, run.own), batch)


def _with_own(base: PyTree, own: dict[str, Any]) -> PyTree:
    leaves = paths.named_leaves(base)
    return jax.tree.structure(base).unflatten([own.get(n, x) for n, x in leaves.items()])


class Program(NamedTuple):
    """The steps of ``count`` runs at a time, each compiled once for each length of batch.

    Attributes:
      steps: functions for one run, by name.
      count: runs at a time.
      mesh: the devices that the runs are spread over, the same number on each.
      compiled: by name and shapes of the batch, with the seconds that it took.
    """

    steps: dict[str, Callable]
    count: int
    mesh: Mesh
    compiled: dict[tuple, Any]


def place(on: Program, members: Member) -> Member:
    """Puts a stack of runs on the devices."""
    return jax.device_put(members, NamedSharding(on.mesh, PartitionSpec(_AXIS)))


def replicate(on: Program, tree: PyTree) -> PyTree:
    """Puts arrays that all runs share on every device."""
    return jax.device_put(tree, NamedSharding(on.mesh, PartitionSpec()))


def program(task: Task, count: int, *, dropout: bool, options: Options) -> Program:
    """A program for ``count`` runs at a time, over as many devices as divide them evenly."""
    # Nothing of the data is held on to.
    task = dataclasses.replace(task, base=None, train_batch=None, eval_batches=None, base_of=None)
    devices = jax.devices()
    used = max(d for d in range(1, len(devices) + 1) if count % d == 0)
    mesh = Mesh(np.array(devices[:used]), (_AXIS,))
    steps = {
        "train": member_step(task, dropout=dropout, options=options),
        "evaluate": member_eval_step(task),
    }
    return Program(steps, count, mesh, {})


def call(on: Program, name: str, members: Member, base: PyTree, batch: Batch) -> Any:
    """Runs a step of a program, after compiling it if these shapes are new.

    ``train`` uses up ``members``.
    """
    return compiled(on, name, members, base, batch)(members, base, batch)


def compiled(on: Program, name: str, members: Member, base: PyTree, batch: Batch) -> Any:
    """The compiled step for these shapes."""
    key = (name, *sorted((k, np.shape(x), str(x.dtype)) for k, x in batch.items()))
    if key not in on.compiled:
        fn = jax.jit(_batched(on, name), donate_argnums=0 if name == "train" else ())
        begin = time.perf_counter()
        step = fn.lower(members, base, batch).compile()
        on.compiled[key] = step, time.perf_counter() - begin
    return on.compiled[key][0]


def compile_seconds(on: Program) -> float:
    """What compiling the steps of a program has taken so far."""
    return sum(seconds for _, seconds in on.compiled.values())


def _batched(on: Program, name: str) -> Callable:
    """The step over the leading axis of the runs; base and batch are shared.

    ``vmap`` leaves unbatched what depends on no run: everything before the first adapter is
    computed once. A single run goes without it, since that is the faster program.
    """
    devices, single = on.mesh.devices.size, on.steps[name]

    def alone(members: Member, base: PyTree, batch: Batch) -> Any:
        first = jax.tree.map(lambda x: x[0], members)
        return jax.tree.map(lambda x: x[None], single(first, base, batch))

    many = jax.vmap(single, in_axes=(0, None, None))
    local = alone if on.count == devices else many

    def step(members: Member, base: PyTree, batch: Batch) -> Any:
        if devices == 1:
            return local(members, base, batch)
        runs, shared = PartitionSpec(_AXIS), PartitionSpec()
        specs = {"in_specs": (runs, shared, shared), "out_specs": runs}
        # By hand rather than by the compiler's choice: no run ever waits for another device. JAX's
        # check of what varies puts marks on the kernels, which `lift` would have to see through.
        spread = jax.shard_map(local, mesh=on.mesh, check_vma=False, **specs)
        return spread(members, base, batch)

    step.__name__ = f"sweep_{name}_step"
    return step
