"""Training: one way for every task, and for every kind of adapter.

A task brings a function of (params, batch, key), batches by step, and metrics.
"""

import contextlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import lora_jax as lora
from experiments import checkpointing, devices, durations, enclosure, stepping, stopping, workdirs
from experiments.loop import Progress, Run, Steps, loop, stored_progress
from experiments.stepping import TrainState
from experiments.tasks import Task
from lora_jax import adapter as adapters
from lora_jax import lowrank, paths

PyTree = Any


def train(task: Task, config: ConfigDict, lora_config: lora.LoRAConfig, workdir: Path) -> Progress:
    """Trains to the end, or goes on from the last checkpoint in ``workdir``.

    Writes ``config.json``, ``adapter/`` (the best so far), ``checkpoints/``, ``metrics.jsonl``,
    TensorBoard events and ``curves.png``.

    Raises:
      Stopped: SIGTERM came; it has stopped at a checkpoint, and goes on if called again.
      FloatingPointError: a loss or gradient is NaN or infinite, or the loss too large, and the
        config's guard says stop; the best adapter so far and the checkpoints are kept.
      ValueError: the config and the model do not fit; or the workdir is another run's, or in use.
      OSError: the workdir can't be written; what was there is intact.
    """
    on = devices.find(config)
    task = devices.settled(on, devices.local(on, task, config))
    state, tx = stepping.initial_state(task, config, lora_config)
    workdirs.check(workdir, config)  # before the claim: a mistake claims nothing
    with contextlib.ExitStack() as stack:
        _claim(stack, workdir, config)
        stack.enter_context(stopping.on_sigterm())
        lines = [*task.notes, *devices.notes(on, task.base), *report(task.base, state.adapter)]
        print("\n".join(lines), flush=True)
        checkpoints = stack.enter_context(
            checkpointing.manager(workdir / workdirs.CHECKPOINTS, keep=config.checkpoint_keep)
        )
        state, progress = _resumed(workdir, checkpoints, state)
        start, total = int(state.step), durations.plan(config, task.steps_per_epoch).total
        devices.agree(start)
        if start == total == progress.evaluated or progress.ended:
            print(f"This run is finished: {_end(progress, start, total)}.", flush=True)
            return progress
        state = stepping.usable(devices.place(on, stepping.storable(state), task.base))
        task = devices.with_copies(on, task)
        options = stepping.options(config)
        steps = Steps(
            stepping.make_train_step(task, tx, lora_config.dropout, options, on=on, like=state),
            stepping.make_eval_step(task, on),
        )
        log = stack.enter_context(
            (workdirs.Log if devices.first() else workdirs.NoLog)(
                workdir, start, progress.evaluated
            )
        )
        run = Run(task, config, lora_config, workdir, log, on)
        try:
            step, progress = loop(run, steps, checkpoints, state, progress)
        except FloatingPointError as error:
            newest = checkpoints.latest_step()
            raise FloatingPointError(_diverged(error, workdir, newest)) from error
        print(f"Training ended: {_end(progress, step, total)}.", flush=True)
        return progress


def _claim(stack: contextlib.ExitStack, workdir: Path, config: ConfigDict) -> None:
    """Takes the directory; of several processes the first does, and the others wait for it."""
    if devices.first():
        stack.enter_context(enclosure.locked(workdir))
        workdirs.claim(workdir, config)
    devices.barrier("the workdir is claimed")


def _end(progress: Progress, step: int, total: int) -> str:
    """Why a run is over."""
    if progress.ended:
        return f"{progress.ended}, at step {step} of {total}"
    return f"all {total} steps are done"


def report(base: PyTree, adapter: PyTree) -> list[str]:
    """Lines that say what is trained."""
    nodes = adapters.nodes(adapter)
    kernels = {name: node for name, node in nodes.items() if isinstance(node, lowrank.LowRank)}
    lines = []
    if kernels:
        ranks = sorted({node.a.shape[-1] for node in kernels.values()})
        lines.append(
            f"adapted with rank {', '.join(map(str, ranks))}, {len(kernels)} kernels: "
            f"{paths.listing(kernels)}"
        )
    if full := [name for name in nodes if name not in kernels]:
        lines.append(f"trained in full, {len(full)} leaves: {paths.listing(full)}")
    return [*lines, lora.summary(base, adapter)]


def _resumed(workdir: Path, checkpoints: Any, state: TrainState) -> tuple[TrainState, Progress]:
    found = checkpointing.restore(checkpoints, stepping.storable(state))
    if found is None:
        return state, Progress()
    stored, progress = found[0], stored_progress(found[1])
    if progress.best_step >= 0 and not (workdir / workdirs.ADAPTER).is_dir():
        raise FileNotFoundError(
            f"The run in {workdir} has its best adapter from step {progress.best_step}, and its "
            f"folder {workdirs.ADAPTER} is gone: put it back, or use a new workdir."
        )
    print(f"Going on from the checkpoint of step {int(stored.step)}.", flush=True)
    return stepping.usable(stored), progress


def _diverged(error: FloatingPointError, workdir: Path, newest: int | None) -> str:
    said, *more = error.args
    folder = workdir / workdirs.ADAPTER
    kept = f"the best adapter so far is kept in {folder}"
    if not folder.exists():
        kept = "there was no evaluation before, so no adapter is kept"
    checkpoint = "there is no checkpoint yet"
    if newest is not None:
        checkpoint = f"the newest checkpoint, of step {newest}, in {workdir / workdirs.CHECKPOINTS}"
    return (
        f"{said}: training stopped{''.join(more)}; {kept}; {checkpoint}. Lower "
        "optimizer.learning_rate or lora.alpha, or set optimizer.clip_norm, in a new "
        'workdir; or go on in this one without such steps: set guard.action to "skip".'
    )
