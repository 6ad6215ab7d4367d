"""Training, for every task and every kind of adapter.

A task brings a function of ``(params, batch, key)``, batches by step, and metrics.
"""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import fields, paths
from lora_jax.factors import RANK
from lora_jax.methods.tokens import Tokens
from lora_jax.nodes import is_adapted
from lora_jax.training import (
    about,
    checkpointing,
    distributed,
    durations,
    kept_programs,
    mesh,
    metric_writer,
    partitioning,
    preemption,
    trackers,
    workdirs,
)
from lora_jax.training.evaluation import make_eval_step
from lora_jax.training.loop import Progress, Run, Steps, loop, parse_progress
from lora_jax.training.state import TrainState, initial_state, unwrap_key, wrap_key
from lora_jax.training.step import make_train_step, step_options
from lora_jax.training.task import Task

PyTree = Any
_LOGGER = logging.getLogger("lora_jax.training")


def train(
    task: Task,
    config: ConfigDict,
    lora_config: lora.LoRAConfig,
    workdir: Path,
    *,
    devices: mesh.Devices | None = None,
    say: Callable[[str], None] = _LOGGER.info,
    store: kept_programs.Store | None = None,
) -> Progress:
    """Trains to the end, or goes on from the last checkpoint in ``workdir``.

    Writes ``config.json``, ``adapter/`` (the best so far), ``checkpoints/``, ``metrics.jsonl``,
    TensorBoard events and ``curves.png``.

    Args:
      task: what to train on.
      config: config of the run, with the fields of ``configs/common.py``.
      lora_config: settings of the adapter.
      workdir: directory of the run; it may be new.
      devices: devices of the run, on which the task's base was loaded; by default those that the
        config describes.
      say: takes each line of the report; by default the logger ``lora_jax.training``.
      store: keeps what is compiled for a single device, for the next start; None to keep nothing.

    Returns:
      The progress at the end.

    Raises:
      Stopped: SIGTERM came; the run has stopped at a checkpoint, and goes on if called again.
      FloatingPointError: a loss or gradient is NaN or infinite, or the loss is too large, and the
        config's guard says stop; the best adapter so far and the checkpoints are kept.
      ValueError: the config and the model do not fit; or the workdir is another run's, or in use.
      OSError: the workdir can't be written; earlier checkpoints are intact.
    """
    devices = mesh.find(config) if devices is None else devices
    task = partitioning.place_task(devices, task, config)
    plan = durations.make_plan(config, task.steps_per_epoch)
    state, tx = initial_state(task, config, lora_config, plan=plan, devices=devices)
    workdirs.check(workdir, config)  # before the claim, so that a mistake claims nothing
    with contextlib.ExitStack() as stack:
        _claim(stack, workdir, config)
        stack.enter_context(preemption.handle_sigterm())
        notes = partitioning.notes(devices, task.base)
        say("\n".join([*task.notes, *notes, *report(task.base, state.adapter)]))
        checkpoints = stack.enter_context(
            checkpointing.manager(workdir / workdirs.CHECKPOINTS, keep=config.checkpoint_keep)
        )
        state, progress = _resume(workdir, checkpoints, state, say)
        start = int(state.step)
        distributed.check_same_step(start)
        if start == plan.total == progress.evaluated or progress.ended:
            say(f"This run is finished: {_describe_end(progress, start, plan.total)}.")
            return progress
        if distributed.is_first():
            about.write(workdir, **_describe_run(task, state.adapter))
        state = wrap_key(partitioning.place_state(devices, unwrap_key(state), task.base))
        task = partitioning.copy_base(devices, task)
        options = step_options(config)
        steps = Steps(
            make_train_step(task, tx, lora_config.dropout, options, devices=devices, like=state),
            make_eval_step(task, devices),
        )
        if store is not None and devices.mesh is None:
            steps = Steps(
                kept_programs.Program("train", steps.train, store, donates=True),
                kept_programs.Program("evaluate", steps.evaluate, store),
            )
        make_writer: Callable[..., Any] = metric_writer.NullWriter
        if distributed.is_first():
            make_writer = metric_writer.MetricWriter
        info, outlets = trackers.make_info(config, workdir), trackers.make_outlets(config, say)
        settings = trackers.make_settings(config, info, outlets, task.score, is_announced=True)
        log = make_writer(workdir, start, progress.evaluated, settings)
        run = Run(
            task=task, config=config, lora_config=lora_config, workdir=workdir, plan=plan,
            log=stack.enter_context(log), devices=devices,
        )  # fmt: skip
        try:
            step, progress = loop(run, steps, checkpoints, state, progress)
        except FloatingPointError as error:
            newest = checkpoints.latest_step()
            raise FloatingPointError(_explain_divergence(error, workdir, newest)) from error
        end = _describe_end(progress, step, plan.total)
        if distributed.is_first():
            about.update(workdir, steps=step, seconds=round(progress.seconds, 3), end=end)
        say(f"Training ended: {end}.")
        return progress


def _describe_run(task: Task, adapter: PyTree) -> dict[str, Any]:
    """Returns what a report says of a run beside its config and its metrics."""
    sizes = jax.tree.map(lambda x, is_trained: x.size * is_trained, adapter, lora.mask(adapter))
    return {
        "score": task.score.name,
        "higher_is_better": task.score.higher_is_better,
        "trainable_parameters": int(sum(jax.tree.leaves(sizes))),
        "base": task.base_id,
        "notes": list(task.notes),
    }


def _claim(stack: contextlib.ExitStack, workdir: Path, config: ConfigDict) -> None:
    """Takes the directory for the run; of several processes the first does, and the others wait."""
    if distributed.is_first():
        stack.enter_context(workdirs.lock(workdir))
        workdirs.claim(workdir, config)
    distributed.barrier("the workdir is claimed")


def _describe_end(progress: Progress, step: int, total: int) -> str:
    """Says why a run is over."""
    if progress.ended:
        return f"{progress.ended}, at step {step} of {total}"
    return f"all {total} steps are done"


def report(base: PyTree, adapter: PyTree) -> list[str]:
    """Returns lines that say what is trained."""
    nodes = adapters.nodes(adapter)
    adapted = {name: node for name, node in nodes.items() if is_adapted(node)}
    tokens = {name: node for name, node in adapted.items() if isinstance(node, Tokens)}
    biases = [name for name, node in adapted.items() if not node.is_kernel]
    kernels = {n: node for n, node in adapted.items() if n not in (*tokens, *biases)}
    lines = []
    if kernels:
        ranks = sorted({fields.sizes(node).get(RANK, 0) for node in kernels.values()})
        lines.append(
            f"adapted with rank {', '.join(map(str, ranks))}, {len(kernels)} kernels: "
            f"{paths.listing(kernels)}"
        )
    if biases:
        lines.append(f"adapted biases, {len(biases)}: {paths.listing(biases)}")
    for name, node in tokens.items():
        lines.append(f"trained tokens, {len(node.ids)} of {name}")
    if full := [name for name in nodes if name not in adapted]:
        lines.append(f"trained in full, {len(full)} leaves: {paths.listing(full)}")
    return [*lines, lora.summary(base, adapter)]


def _resume(
    workdir: Path,
    checkpoints: ocp.CheckpointManager,
    state: TrainState,
    say: Callable[[str], None],
) -> tuple[TrainState, Progress]:
    checkpoint = checkpointing.restore(checkpoints, unwrap_key(state), say)
    if checkpoint is None:
        return state, Progress()
    stored, progress = checkpoint[0], parse_progress(checkpoint[1])
    if progress.best_step >= 0 and not (workdir / workdirs.ADAPTER).is_dir():
        raise FileNotFoundError(
            f"The run in {workdir} has its best adapter from step {progress.best_step}, and its "
            f"folder {workdirs.ADAPTER} is gone: put it back, or use a new workdir."
        )
    say(f"Going on from the checkpoint of step {int(stored.step)}.")
    return wrap_key(stored), progress


def _explain_divergence(error: FloatingPointError, workdir: Path, newest: int | None) -> str:
    problem, *details = error.args
    folder = workdir / workdirs.ADAPTER
    adapter = f"the best adapter so far is kept in {folder}"
    if not folder.exists():
        adapter = "there was no evaluation before, so no adapter is kept"
    checkpoint = "there is no checkpoint yet"
    if newest is not None:
        checkpoint = f"the newest checkpoint, of step {newest}, in {workdir / workdirs.CHECKPOINTS}"
    return (
        f"{problem}: training stopped{''.join(details)}; {adapter}; {checkpoint}. Lower "
        "optimizer.learning_rate or lora.alpha, or set optimizer.clip_norm, in a new "
        'workdir; or go on in this one without such steps: set guard.action to "skip".'
    )
