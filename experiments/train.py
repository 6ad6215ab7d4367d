"""The training loop: one for every task, and for every kind of adapter.

A task brings a function of (params, batch, key), batches by step, and metrics.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import lora_jax as lora
from experiments import checkpointing, durations, guard, patience, stepping, workdirs
from experiments.meter import Meter
from experiments.stepping import TrainState
from experiments.tasks import Score, Task
from lora_jax import adapter as adapters
from lora_jax import lowrank, paths

PyTree = Any


class Progress(NamedTuple):
    """The best evaluation so far (step -1 for none), and the seconds that the run has taken.

    ``reference``, ``waited`` and ``ended`` are early stopping's: the score to be better than, the
    evaluations since it was found, and why the run is over, if it is.
    """

    best_step: int = -1
    best_score: float = -math.inf
    best_loss: float = math.inf
    seconds: float = 0.0
    reference: float | None = None
    waited: int = 0
    ended: str = ""


def train(task: Task, config: ConfigDict, lora_config: lora.LoRAConfig, workdir: Path) -> Progress:
    """Trains to the end, or goes on from the last checkpoint in ``workdir``.

    Writes ``config.json``, ``adapter/`` (the best so far), ``checkpoints/``, ``metrics.jsonl``,
    TensorBoard events and ``curves.png``.

    Raises:
      FloatingPointError: a loss or gradient is NaN or infinite, or the loss too large, and the
        config's guard says stop; the best adapter so far and the checkpoints are kept.
      ValueError: the config and the model do not fit; or the workdir is another run's.
      OSError: the workdir can't be written; what was there is intact.
    """
    state, tx = stepping.initial_state(task, config, lora_config)
    workdirs.claim(workdir, config)  # not before all has been checked: a mistake claims nothing
    print("\n".join([*task.notes, *report(task.base, state.adapter)]), flush=True)
    total = durations.plan(config, task.steps_per_epoch).total
    with checkpointing.manager(workdir / workdirs.CHECKPOINTS) as checkpoints:
        state, progress = _resumed(workdir, checkpoints, state)
        start = int(state.step)
        if start == total or progress.ended:
            print(f"This run is finished: {_end(progress, start, total)}.", flush=True)
            return progress
        options = stepping.options(config)
        steps = _Steps(
            stepping.make_train_step(task, tx, lora_config.dropout, options),
            stepping.make_eval_step(task),
        )
        with workdirs.Log(workdir, start) as log:
            run = Run(task, config, lora_config, workdir, log)
            try:
                state, progress = _loop(run, steps, checkpoints, state, progress)
            except FloatingPointError as error:
                newest = checkpoints.latest_step()
                raise FloatingPointError(_diverged(error, workdir, newest)) from error
            print(f"Training ended: {_end(progress, int(state.step), total)}.", flush=True)
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
    stored, progress = found[0], Progress(**found[1])
    if progress.best_step >= 0 and not (workdir / workdirs.ADAPTER).is_dir():
        raise FileNotFoundError(
            f"The run in {workdir} has its best adapter from step {progress.best_step}, and its "
            f"folder {workdirs.ADAPTER} is gone: put it back, or use a new workdir."
        )
    print(f"Going on from the checkpoint of step {int(stored.step)}.", flush=True)
    return stepping.usable(stored), progress


def _loop(
    run: Run, steps: _Steps, checkpoints: Any, state: TrainState, progress: Progress
) -> tuple[TrainState, Progress]:
    """Runs the steps that are left, with evaluations and checkpoints between them."""
    start, per_epoch = int(state.step), run.task.steps_per_epoch
    plan, policy = durations.plan(run.config, per_epoch), guard.policy(run.config, state.adapter)
    begun = time.perf_counter() - progress.seconds
    with Meter(
        run.log, start=start, total=plan.total, per_epoch=per_epoch,
        log_every=run.config.log_every, policy=policy,
    ) as meter:  # fmt: skip
        for done in range(start + 1, plan.total + 1):
            batch = run.task.train_batch(done - 1)
            state, told = steps.train(state, run.task.base, batch)
            meter.add(done, *told)
            if not durations.saves(plan, done):
                continue
            # A line at each checkpoint, so that a run that goes on from there logs the same.
            meter.flush()
            if durations.evaluates(plan, done):
                found = Evaluation(done, stepping.evaluate(steps.evaluate, state.adapter, run.task))
                progress = recorded(run, state.adapter, found, progress)
                value = found.values[run.task.score.name]
                progress = patience.noted(
                    progress, run.task.score, value, run.config.early_stopping
                )
                workdirs.plot_curves(run.workdir, run.task.score.name)
                meter.evaluated(run.task.score.name, progress.best_score)
            progress = progress._replace(seconds=time.perf_counter() - begun)
            checkpointing.save(checkpoints, done, stepping.storable(state), progress._asdict())
            if progress.ended:
                break
    return state, progress


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
    if progress.best_step >= 0 and not _is_better(run.task.score, score, progress.best_score):
        return progress
    metadata = {**run.task.metadata, "step": step, **values}
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
