"""The loop of a run: its steps, and what happens between them."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.training import (
    checkpointing,
    curves,
    distributed,
    durations,
    early_stopping,
    mesh,
    metric_writer,
    nan_guard,
    optimizer,
    partitioning,
    preemption,
    workdirs,
)
from lora_jax.training.compile_ahead import compile_ahead
from lora_jax.training.evaluation import evaluate
from lora_jax.training.metric_logger import Meter
from lora_jax.training.state import TrainState, unwrap_key
from lora_jax.training.task import Task

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, apart from its state.

    Attributes:
      best_step: step of the best evaluation so far; -1 for none.
      best_score: score of the best evaluation.
      best_loss: loss of the best evaluation.
      seconds: duration of the run so far.
      evaluated: step of the last evaluation, 0 for one before the first step; -1 for none.
      pending: of each step since the last line of the log its sums, and the norm of its gradient.
      reference: score that early stopping waits to see improved; None before the first.
      waited: number of evaluations since that score was reached.
      ended: reason why the run is over before its last step; "" if it is not.
    """

    best_step: int = -1
    best_score: float = -math.inf
    best_loss: float = math.inf
    seconds: float = 0.0
    evaluated: int = -1
    pending: Sequence[Sequence[float]] = ()
    reference: float | None = None
    waited: int = 0
    ended: str = ""


def parse_progress(stored: dict[str, Any]) -> Progress:
    """Reads the progress that a checkpoint holds.

    Raises:
      ValueError: it has fields that this version does not know.
    """
    if unknown := sorted(stored.keys() - {field.name for field in dataclasses.fields(Progress)}):
        raise ValueError(
            f"The checkpoint holds {', '.join(unknown)}, which this version does not know: go on "
            "with the version that wrote it, or use a new workdir."
        )
    return Progress(**stored)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run, its devices, and its directory.

    Attributes:
      task: what the run is trained on.
      config: config of the run.
      lora_config: settings of the adapter.
      workdir: directory of the run.
      log: writer of the metrics.
      plan: length and intervals of the run.
      devices: devices of the run.
    """

    task: Task
    config: ConfigDict
    lora_config: lora.LoRAConfig
    workdir: Path
    log: metric_writer.MetricWriter | metric_writer.NullWriter
    plan: durations.Plan
    devices: mesh.Devices = mesh.ONE


class Evaluation(NamedTuple):
    """Loss and scores on the evaluation examples, after ``step`` steps."""

    step: int
    values: dict[str, float]


class Steps(NamedTuple):
    """The compiled functions of a run, of ``step.py`` and ``evaluation.py``."""

    train: Callable
    evaluate: Callable


def loop(
    run: Run,
    steps: Steps,
    checkpoints: ocp.CheckpointManager,
    state: TrainState,
    progress: Progress,
) -> tuple[int, Progress]:
    """Runs the steps that are left, with evaluations and checkpoints between them.

    Returns:
      The last step, and the progress.

    Raises:
      Stopped, FloatingPointError, OSError: as :func:`lora_jax.training.train.train`.
    """
    start, plan = int(partitioning.on_host(run.devices, state.step)), run.plan
    start_time = time.perf_counter() - progress.seconds
    with _meter(run, state.adapter, start, progress) as meter:
        # That of the start, or one that an earlier stop has left out at the step of its checkpoint.
        stop = preemption.is_requested(start)
        is_due = durations.is_evaluation_due(plan, start) and start > progress.evaluated
        if is_due and not stop:
            with _compile_ahead(run, steps, state, start, meter):
                progress, stop = _evaluate(run, steps, state.adapter, start, progress, meter)
        if progress.ended:
            return start, progress
        if stop and (is_due or start < plan.total):
            _stop(run, checkpoints, start)
        for step in range(start + 1, plan.total + 1):
            batch = run.task.train_batch(step - 1)
            with meter.compiling(batch):
                state, metrics = steps.train(state, run.task.base, batch)
            meter.add(step, *metrics)
            stop = preemption.is_requested(step)
            is_due = durations.is_evaluation_due(plan, step)
            if is_due:
                meter.flush()
            if is_due and not stop:
                progress, stop = _evaluate(run, steps, state.adapter, step, progress, meter)
            if stop or durations.is_checkpoint_due(plan, step):
                seconds = time.perf_counter() - start_time
                progress = dataclasses.replace(progress, seconds=seconds, pending=meter.pending())
                _save(run, checkpoints, state, progress)
            if progress.ended:
                return step, progress
            if stop and (is_due or step < plan.total):
                _stop(run, checkpoints, step)
    return plan.total, progress


@contextlib.contextmanager
def _compile_ahead(
    run: Run, steps: Steps, state: TrainState, step: int, meter: Meter
) -> Iterator[None]:
    """Compiles the step for its first batch beside a block, on a single device."""
    if run.devices.mesh is not None or step >= run.plan.total:
        yield
        return
    batch = run.task.train_batch(step)
    with meter.compiling(batch), compile_ahead(steps.train, state, run.task.base, batch):
        yield


def _meter(run: Run, adapter: PyTree, start: int, progress: Progress) -> Meter:
    return Meter(
        run.log, steps=range(start, run.plan.total), per_epoch=run.task.steps_per_epoch,
        log_every=run.config.log_every, policy=nan_guard.make_policy(run.config, adapter),
        describe_rates=make_rates(run), pending=progress.pending,
    )  # fmt: skip


def make_rates(run: Run) -> Callable[[int], dict[str, float]]:
    """Returns the function from a step of a run to its learning rates, by name."""
    config, per_epoch = run.config.optimizer, run.task.steps_per_epoch
    rate = optimizer.make_rate(config, run.plan.total, per_epoch=per_epoch)
    return lambda step: optimizer.describe_rates(config, rate(step))


def _evaluate(
    run: Run, steps: Steps, adapter: PyTree, step: int, progress: Progress, meter: Meter
) -> tuple[Progress, bool]:
    """Makes the evaluation of a step; also says whether it was left, since the run is to stop."""
    batches = lambda: preemption.until_requested(run.task.eval_batches())
    task = dataclasses.replace(run.task, eval_batches=batches)
    try:
        with meter.evaluating():
            values = evaluate(steps.evaluate, adapter, task)
    except preemption.Interrupted:
        return progress, True
    return _report(run, adapter, Evaluation(step, values), progress, meter), False


def _report(
    run: Run, adapter: PyTree, evaluation: Evaluation, progress: Progress, meter: Meter
) -> Progress:
    """Writes an evaluation into the run's files, its curves and its bar."""
    score = run.task.score
    progress = record(run, partitioning.on_host(run.devices, adapter), evaluation, progress)
    value = evaluation.values[score.name]
    progress = early_stopping.update(progress, score, value, run.config.early_stopping)
    if distributed.is_first() and evaluation.step:  # there is no curve before the first step
        curves.plot_curves(run.workdir, score.name)
    meter.show_best(score.name, progress.best_score)
    return progress


def _save(
    run: Run, checkpoints: ocp.CheckpointManager, state: TrainState, progress: Progress
) -> None:
    run.log.sync()
    stored = partitioning.on_host(run.devices, unwrap_key(state))
    checkpointing.save(checkpoints, int(stored.step), stored, dataclasses.asdict(progress))


def _stop(run: Run, checkpoints: ocp.CheckpointManager, step: int) -> NoReturn:
    checkpointing.wait(checkpoints)  # a run without its checkpoint has not ended well
    raise preemption.Stopped(
        f"Stopped after step {step}, as asked, with a checkpoint in {run.workdir}. To go on:\n"
        f"  {preemption.command_line()}"
    )


def record(run: Run, adapter: PyTree, evaluation: Evaluation, progress: Progress) -> Progress:
    """Logs an evaluation, and keeps the adapter if it is the best so far.

    Of two adapters with the same score, the one with the lower loss is the better one.

    Raises:
      FloatingPointError: the loss is NaN or infinite.
    """
    step, values = evaluation
    loss, score = values["loss"], values[run.task.score.name]
    if not math.isfinite(loss):
        raise FloatingPointError(f"The validation loss is {loss} at step {step}")
    epoch = step / run.task.steps_per_epoch
    run.log.write(step, epoch=epoch, **{f"eval_{name}": x for name, x in values.items()})
    progress = dataclasses.replace(progress, evaluated=step)
    merit = run.task.score.merit
    best = merit(progress.best_score), -progress.best_loss
    if progress.best_step >= 0 and not (merit(score), -loss) > best:
        return progress
    metadata = {**run.task.metadata, "step": step, **values}
    if distributed.is_first():
        lora.save(
            run.workdir / workdirs.ADAPTER, adapter, run.lora_config,
            base=run.task.base_id, metadata=metadata,
        )  # fmt: skip
    return dataclasses.replace(progress, best_step=step, best_score=score, best_loss=loss)
