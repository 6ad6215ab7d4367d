"""The training loop: one for every task, and for every kind of adapter.

A task brings a function of (params, batch, key), batches by step, and metrics.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ml_collections import ConfigDict

import lora_jax as lora
from experiments import (
    checkpointing,
    devices,
    durations,
    enclosure,
    guard,
    patience,
    stepping,
    stopping,
    workdirs,
)
from experiments.meter import Meter
from experiments.stepping import TrainState
from experiments.tasks import Score, Task
from lora_jax import adapter as adapters
from lora_jax import lowrank, paths

PyTree = Any


class Progress(NamedTuple):
    """How far a run is, apart from its state.

    Attributes:
      best_step: of the best evaluation so far; -1 for none.
      best_score: its score.
      best_loss: its loss.
      seconds: that the run has taken.
      evaluated: the step of the last evaluation; 0 for none.
      pending: sums of the steps since the last line of the log.
      reference: of early stopping, the score to be better than.
      waited: evaluations since it was found.
      ended: why the run is over before its last step, if it is.
    """

    best_step: int = -1
    best_score: float = -math.inf
    best_loss: float = math.inf
    seconds: float = 0.0
    evaluated: int = 0
    pending: Sequence[Sequence[float]] = ()
    reference: float | None = None
    waited: int = 0
    ended: str = ""


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
    total = durations.plan(config, task.steps_per_epoch).total
    with contextlib.ExitStack() as stack:
        if devices.first():  # for all processes of the run
            stack.enter_context(enclosure.locked(workdir))
            workdirs.claim(workdir, config)
        devices.barrier("the workdir is claimed")
        stack.enter_context(stopping.on_sigterm())
        lines = [*task.notes, *devices.notes(on, task.base), *report(task.base, state.adapter)]
        print("\n".join(lines), flush=True)
        folder = workdir / workdirs.CHECKPOINTS
        checkpoints = stack.enter_context(
            checkpointing.manager(folder, keep=config.checkpoint_keep)
        )
        state, progress = _resumed(workdir, checkpoints, state)
        start = int(state.step)
        devices.agree(start)
        if progress.ended or start == total == progress.evaluated:
            print(f"This run is finished: {_end(progress, start, total)}.", flush=True)
            return progress
        state = stepping.usable(devices.place(on, stepping.storable(state), task.base))
        task = devices.with_copies(on, task)
        options = stepping.options(config)
        steps = _Steps(
            stepping.make_train_step(task, tx, lora_config.dropout, options, on=on, like=state),
            stepping.make_eval_step(task, on),
        )
        kind = workdirs.Log if devices.first() else workdirs.NoLog
        log = stack.enter_context(kind(workdir, start, progress.evaluated))
        run = Run(task, config, lora_config, workdir, log, on)
        try:
            step, progress = _loop(run, steps, checkpoints, state, progress)
        except FloatingPointError as error:
            newest = checkpoints.latest_step()
            raise FloatingPointError(_diverged(error, workdir, newest)) from error
        print(f"Training ended: {_end(progress, step, total)}.", flush=True)
        return progress


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


class Run(NamedTuple):
    """What one run is, and where it writes."""

    task: Task
    config: ConfigDict
    lora_config: lora.LoRAConfig
    workdir: Path
    log: workdirs.Log
    on: devices.Devices = devices.ONE


class Evaluation(NamedTuple):
    """Loss and scores on the evaluation examples after ``step`` steps."""

    step: int
    values: dict[str, float]


class _Steps(NamedTuple):
    train: Callable
    evaluate: Callable


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


def stored_progress(stored: dict) -> Progress:
    """The progress that a checkpoint notes.

    Raises:
      ValueError: it has more to say than this version knows.
    """
    if unknown := sorted(stored.keys() - set(Progress._fields)):
        raise ValueError(
            f"The checkpoint notes {', '.join(unknown)}, which this version does not know: go on "
            "with the version that wrote it, or use a new workdir."
        )
    return Progress(**stored)


def _loop(
    run: Run, steps: _Steps, checkpoints: Any, state: TrainState, progress: Progress
) -> tuple[int, Progress]:
    """Runs the steps that are left, with evaluations and checkpoints between them.

    It starts with the evaluation that is still to be made after the step before, if there is one.
    Returns the last step.
    """
    start = int(devices.on_host(run.on, state.step))
    per_epoch = run.task.steps_per_epoch
    plan, policy = durations.plan(run.config, per_epoch), guard.policy(run.config, state.adapter)
    begun = time.perf_counter() - progress.seconds
    with Meter(
        run.log, start=start, total=plan.total, per_epoch=per_epoch,
        log_every=run.config.log_every, policy=policy, pending=progress.pending,
    ) as meter:  # fmt: skip
        for done in range(start, plan.total + 1):
            if done > start:
                batch = run.task.train_batch(done - 1)
                state, told = steps.train(state, run.task.base, batch)
                meter.add(done, *told)
            stop = stopping.requested(done)
            due = durations.evaluates(plan, done) and done > progress.evaluated
            if due and done > start:
                meter.flush()
            if due and not stop:
                found = _evaluated(run, steps, state.adapter, done)
                stop = found is None
                progress = progress if stop else _noted(run, state.adapter, found, progress, meter)
            if done > start and (due or stop or durations.saves(plan, done)):
                seconds = time.perf_counter() - begun
                progress = progress._replace(seconds=seconds, pending=meter.pending())
                _save(run, checkpoints, state, progress)
            if progress.ended:
                break
            if stop and (due or done < plan.total):
                _stop(run, checkpoints, done)
    return done, progress


def _evaluated(run: Run, steps: _Steps, adapter: PyTree, step: int) -> Evaluation | None:
    """An evaluation, or None if it was left since the run is to stop."""
    batches = lambda: stopping.unless_requested(run.task.eval_batches())
    task = run.task._replace(eval_batches=batches)
    try:
        return Evaluation(step, stepping.evaluate(steps.evaluate, adapter, task))
    except stopping.Interrupted:
        return None


def _noted(
    run: Run, adapter: PyTree, found: Evaluation, progress: Progress, meter: Meter
) -> Progress:
    """Puts an evaluation where it is looked for: files, curves, bar."""
    progress = recorded(run, devices.on_host(run.on, adapter), found, progress)
    score = run.task.score
    progress = patience.noted(progress, score, found.values[score.name], run.config.early_stopping)
    if devices.first():
        workdirs.plot_curves(run.workdir, run.task.score.name)
    meter.evaluated(run.task.score.name, progress.best_score)
    return progress


def _save(run: Run, checkpoints: Any, state: TrainState, progress: Progress) -> None:
    run.log.sync()
    stored = devices.on_host(run.on, stepping.storable(state))
    checkpointing.save(checkpoints, int(stored.step), stored, progress._asdict())


def _stop(run: Run, checkpoints: Any, step: int) -> NoReturn:
    checkpointing.wait(checkpoints)  # what is not on disk is no reason to end well
    raise stopping.Stopped(
        f"Stopped after step {step}, as asked, with a checkpoint in {run.workdir}. To go on:\n"
        f"  {stopping.command()}"
    )


def recorded(run: Run, adapter: PyTree, found: Evaluation, progress: Progress) -> Progress:
    """Logs an evaluation, and keeps the adapter if it is the best so far.

    Raises:
      FloatingPointError: the loss is NaN or infinite.
    """
    step, values = found
    loss, score = values["loss"], values[run.task.score.name]
    if not math.isfinite(loss):
        raise FloatingPointError(f"The validation loss is {loss} at step {step}")
    epoch = step / run.task.steps_per_epoch
    run.log.write(step, epoch=epoch, **{f"eval_{name}": x for name, x in values.items()})
    progress = progress._replace(evaluated=step)
    if progress.best_step >= 0 and not _is_better(run.task.score, score, progress.best_score):
        return progress
    metadata = {**run.task.metadata, "step": step, **values}
    if devices.first():
        lora.save(
            run.workdir / workdirs.ADAPTER, adapter, run.lora_config,
            base=run.task.base_id, metadata=metadata,
        )  # fmt: skip
    return progress._replace(best_step=step, best_score=score, best_loss=loss)


def _is_better(score: Score, value: float, than: float) -> bool:
    return value > than if score.higher_is_better else value < than


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
