"""Several runs through one compiled step: the differences between them are data.

Runs of different ranks are padded with zeros to one shape. Columns of ``a`` and rows of ``b`` that
are zero have gradients of zero (that of ``a`` is a product with ``b``, and the other way round),
hence moments and weight decay of zero, and stay zero. They add nothing to a norm. So a padded run
computes what the run alone would.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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
from lora_jax.quantized import is_quantized
from lora_jax.training import durations, optimizer
from lora_jax.training.evaluation import eval_step
from lora_jax.training.state import TrainState, initial_state, unwrap_key, wrap_key
from lora_jax.training.step import StepOptions, train_step
from lora_jax.training.task import Batch, Task

PyTree = Any
Array = jax.Array | np.ndarray
_AXIS = "runs"


class Member(NamedTuple):
    """One run as the compiled steps see it; with a leading axis, several.

    Attributes:
      state: training state of the run, with plain integers in place of its key.
      is_alive: whether the loss has been finite so far; otherwise the state no longer changes.
      settings: settings of the optimizer.
      dropout: rate of the low-rank branches.
      own_leaves: leaves of the base, by name, that the run does not share: they are drawn by its
        seed, and not trained.
    """

    state: TrainState
    is_alive: Array
    settings: optimizer.Settings
    dropout: Array
    own_leaves: dict[str, Array]


class Options(NamedTuple):
    """Settings that steps are compiled with, the same for all of their runs.

    Attributes:
      decay: decay of the learning rate, as in :func:`optimizer.schedule`.
      accumulate: as in :class:`lora_jax.training.step.StepOptions`.
      varied_rates: names of the multipliers of the learning rate that are not 1 in all runs; the
        step does not multiply by the others.
      orthogonality: as in :class:`lora_jax.training.step.StepOptions`.
    """

    decay: str
    accumulate: int
    varied_rates: tuple[str, ...] = ()
    orthogonality: float = 0.0


def make_options(config: ConfigDict, *others: ConfigDict) -> Options:
    """Returns the options of runs, by the config of one of them and of those that may differ."""
    each = [optimizer.read_multipliers(c.optimizer) for c in (config, *others)]
    varied = tuple(name for name in optimizer.MULTIPLIERS if any(x[name] != 1.0 for x in each))
    rule = config.optimizer
    return Options(rule.decay, config.accumulate, varied, rule.orthogonality)


def make_member(
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
    plan = plan or durations.make_plan(config, task.steps_per_epoch)
    base = task.base if task.redraw_base is None else task.redraw_base(config.seed)
    state, _ = initial_state(dataclasses.replace(task, base=base), config, lora_config, plan=plan)
    member = Member(
        unwrap_key(state),
        np.array(True),
        optimizer.settings(config.optimizer, plan.total, per_epoch=task.steps_per_epoch),
        np.asarray(lora_config.dropout),
        _select_own_leaves(task.base, base, state.adapter),
    )
    # Python numbers get JAX's default dtypes, as they do in a single run.
    return jax.tree.map(lambda x: np.asarray(x, jax.dtypes.result_type(x)), member)


def _select_own_leaves(shared: PyTree, base: PyTree, adapter: PyTree) -> dict[str, Any]:
    trained = {n for n, x in adapters.nodes(adapter).items() if not is_adapted(x)}
    leaves = paths.named_leaves(shared)
    return {
        name: x
        for name, x in paths.named_leaves(base).items()
        if x is not leaves[name] and name not in trained
    }


def adapted_kernels(member: Member) -> list[str]:
    """Returns the names of the kernels that are adapted."""
    nodes = adapters.nodes(member.state.adapter)
    return [name for name, x in nodes.items() if is_adapted(x)]


def common_shapes(members: Sequence[Member]) -> PyTree:
    """Returns the smallest shapes that hold every run, with the largest rank of each kernel.

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
    """Pads each array with zeros to a shape.

    >>> pad({"a": np.ones((1, 2))}, {"a": (2, 2)})["a"].tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """

    def pad_array(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        full = np.zeros(shape, x.dtype)
        full[tuple(map(slice, x.shape))] = x
        return full

    return jax.tree.map(pad_array, tree, shapes)


def cut(tree: PyTree, like: PyTree) -> PyTree:
    """Inverts :func:`pad`: returns the part of each array that ``like`` has."""
    return jax.tree.map(lambda x, y: x[tuple(map(slice, y.shape))], tree, like)


def stack(members: Sequence[Member], count: int) -> Member:
    """Stacks runs of equal shapes, and copies of the first that are not alive up to ``count``."""
    filler = [members[0]._replace(is_alive=np.array(False))] * (count - len(members))
    return jax.tree.map(lambda *xs: np.stack(xs), *members, *filler)


def unstack(tree: PyTree, index: int) -> PyTree:
    """Returns run number ``index`` of the stack, in numpy arrays."""
    # Indexed by numpy: JAX would compile each index of each shape.
    return jax.tree.map(lambda x: np.asarray(x)[index], tree)


def member_step(task: Task, *, has_dropout: bool, options: Options) -> Callable:
    """Returns the step of a single run, ``(member, base, batch) -> (member, (sums, norm))``.

    The norm is that of the gradient, before it is clipped.

    Args:
      task: gives ``apply`` and ``metrics``.
      has_dropout: whether the low-rank branches have any; a rate of zero is exact, but has the
        cost of the draw.
      options: options of the runs.
    """

    def step(member: Member, base: PyTree, batch: Batch) -> tuple[Member, tuple]:
        same: dict[str, Any] = {
            n: x for n, x in optimizer.MULTIPLIERS.items() if n not in options.varied_rates
        }
        settings = dataclasses.replace(member.settings, **same)
        tx = optimizer.adamw(settings, member.state.adapter, options.decay)
        # A run that diverges is stopped below, without the guard of a single run.
        step_options = StepOptions(
            accumulate=options.accumulate, has_norm=True, orthogonality=options.orthogonality
        )
        rate = jnp.asarray(member.dropout) if has_dropout else 0.0
        single = train_step(task, tx, rate, step_options)
        own_base = _put_own(base, member.own_leaves)
        state, (sums, norm) = single(wrap_key(member.state), own_base, batch)
        is_alive = member.is_alive & jnp.isfinite(sums[0])
        choose = lambda new, old: jnp.where(is_alive, new, old)
        state = jax.tree.map(choose, unwrap_key(state), member.state)
        return member._replace(state=state, is_alive=is_alive), (sums, norm)

    return step


def member_eval_step(task: Task) -> Callable:
    """Returns the evaluation of a single run, ``(member, base, batch) -> (sums, logits)``."""
    single = eval_step(task)

    def step(member: Member, base: PyTree, batch: Batch) -> tuple:
        return single(member.state.adapter, _put_own(base, member.own_leaves), batch)

    return step


def _put_own(base: PyTree, own_leaves: dict[str, Array]) -> PyTree:
    leaves = paths.named_leaves(base)
    treedef = jax.tree.structure(base, is_leaf=is_quantized)
    return jax.tree.unflatten(treedef, [own_leaves.get(n, x) for n, x in leaves.items()])


class Program(NamedTuple):
    """The steps of ``count`` runs at a time, each compiled once for each length of batch.

    Attributes:
      steps: functions for one run, by name.
      count: number of runs at a time.
      mesh: devices that the runs are spread over, the same number on each.
      compiled: compiled steps by name and shapes of the batch, with the seconds of compilation.
      compiling: makes the context that a compilation goes on within.
    """

    steps: dict[str, Callable]
    count: int  # type: ignore[assignment]  # it hides tuple.count
    mesh: Mesh
    compiled: dict[tuple, tuple[jax.stages.Compiled, float]]
    compiling: Callable[[], AbstractContextManager] = contextlib.nullcontext


def place(program: Program, members: Member) -> Member:
    """Puts a stack of runs on the devices."""
    return jax.device_put(members, NamedSharding(program.mesh, PartitionSpec(_AXIS)))


def replicate(program: Program, tree: PyTree) -> PyTree:
    """Puts arrays that all runs share on every device."""
    return jax.device_put(tree, NamedSharding(program.mesh, PartitionSpec()))


def make_program(task: Task, count: int, *, has_dropout: bool, options: Options) -> Program:
    """Makes a program for ``count`` runs at a time, over as many devices as divide them evenly."""
    # The program must keep no reference to the data.
    without_data: dict[str, Any] = dict.fromkeys(
        ("base", "train_batch", "eval_batches", "redraw_base")
    )
    task = dataclasses.replace(task, **without_data)
    devices = jax.devices()
    device_count = max(d for d in range(1, len(devices) + 1) if count % d == 0)
    mesh = Mesh(np.array(devices[:device_count]), (_AXIS,))
    steps = {
        "train": member_step(task, has_dropout=has_dropout, options=options),
        "evaluate": member_eval_step(task),
    }
    return Program(steps, count, mesh, {})


def call(program: Program, name: str, members: Member, base: PyTree, batch: Batch) -> tuple:
    """Runs a step of a program, after compiling it if these shapes are new.

    The step ``train`` donates ``members``.
    """
    return compile_step(program, name, members, base, batch)(members, base, batch)


def compile_step(
    program: Program, name: str, members: Member, base: PyTree, batch: Batch
) -> jax.stages.Compiled:
    """Returns the compiled step for these shapes, which it compiles if they are new."""
    key = (name, *sorted((k, np.shape(x), str(x.dtype)) for k, x in batch.items()))
    if key not in program.compiled:
        fn = jax.jit(_batch_over_runs(program, name), donate_argnums=0 if name == "train" else ())
        begin = time.perf_counter()
        with program.compiling():
            step = fn.lower(members, base, batch).compile()
        program.compiled[key] = step, time.perf_counter() - begin
    return program.compiled[key][0]


def compile_seconds(program: Program) -> float:
    """Returns the seconds that compiling the steps of a program has taken so far."""
    return sum(seconds for _, seconds in program.compiled.values())


def _batch_over_runs(program: Program, name: str) -> Callable:
    """Returns the step over the leading axis of the runs; base and batch are shared.

    ``vmap`` leaves unbatched what depends on no run, so that everything before the first adapter is
    computed once. A single run goes without ``vmap``, since that is the faster program.
    """
    devices, single = program.mesh.devices.size, program.steps[name]

    def alone(members: Member, base: PyTree, batch: Batch) -> tuple:
        first = jax.tree.map(lambda x: x[0], members)
        return jax.tree.map(lambda x: x[None], single(first, base, batch))

    many = jax.vmap(single, in_axes=(0, None, None))
    local = alone if program.count == devices else many

    def step(members: Member, base: PyTree, batch: Batch) -> tuple:
        if devices == 1:
            return local(members, base, batch)
        runs, shared = PartitionSpec(_AXIS), PartitionSpec()
        specs: dict[str, Any] = {"in_specs": (runs, shared, shared), "out_specs": runs}
        # By hand rather than by the compiler, so that no run ever waits for another device. JAX's
        # check of varying axes would put equations on the kernels that `lift` had to see through.
        spread = jax.shard_map(local, mesh=program.mesh, check_vma=False, **specs)
        return spread(members, base, batch)

    step.__name__ = f"sweep_{name}_step"
    return step
