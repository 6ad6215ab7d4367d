"""The training loop: one for every task, and for every kind of adapter.

A task brings a function of (params, batch, key), batches by step, and metrics.
"""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import lora_jax as lora
from experiments import checkpointing, devices, stepping, workdirs
from experiments.meter import Meter
from experiments.stepping import TrainState
from experiments.tasks import Score, Task
from lora_jax import adapter as adapters
from lora_jax import lowrank, paths

PyTree = Any


class Progress(NamedTuple):
    """The best evaluation so far (step -1 for none), and the seconds that the run has taken."""

    best_step: int = -1
    best_score: float = -math.inf
    best_loss: float = math.inf
    seconds: float = 0.0


def train(task: Task, config: ConfigDict, lora_config: lora.LoRAConfig, workdir: Path) -> Progress:
    """Trains to the end, or goes on from the last checkpoint in ``workdir``.

    Writes ``config.json``, ``adapter/`` (the best so far), ``checkpoints/``, ``metrics.jsonl``,
    TensorBoard events and ``curves.png``.

    Raises:
      FloatingPointError: the loss became NaN or infinite; the best adapter so far is kept.
      ValueError: the config and the model do not fit; or the workdir is another run's.
      OSError: the workdir can't be written; what was there is intact.
    """
    on = devices.find(config)
    task = devices.local(on, task, config)
    state, tx = stepping.initial_state(task, config, lora_config)
    _claim(workdir, config)  # not before all has been checked: a mistake claims nothing
    lines = [*task.notes, *devices.notes(on, task.base), *report(task.base, state.adapter)]
    print("\n".join(lines), flush=True)
    total = config.epochs * task.steps_per_epoch
    with checkpointing.manager(workdir / workdirs.CHECKPOINTS) as checkpoints:
        state, progress = _resumed(workdir, checkpoints, state)
        start = int(state.step)
        devices.agree(start)
        if start == total:
            print(f"This run is finished: all {total} steps are done.", flush=True)
            return progress
        state = stepping.usable(devices.place(on, stepping.storable(state), task.base))
        if on.pmap:
            task = task._replace(base=devices.stacked(on, task.base))
        steps = _Steps(
            stepping.make_train_step(task, tx, lora_config.dropout, on=on, like=state),
            stepping.make_eval_step(task, on),
        )
        with (workdirs.Log if devices.first() else workdirs.NoLog)(workdir, start) as log:
            run = Run(task, config, lora_config, workdir, log, on)
            try:
                return _loop(run, steps, checkpoints, state, progress)
            except FloatingPointError as error:
                raise FloatingPointError(_diverged(error, workdir)) from error


def _claim(workdir: Path, config: ConfigDict) -> None:
    """Takes the directory; of several processes the first does, and the others wait for it."""
    workdirs.check(workdir, config)
    if devices.first():
        workdirs.claim(workdir, config)
    devices.barrier("the workdir is claimed")


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
) -> Progress:
    """Runs the steps that are left, with evaluations and checkpoints between them."""
    host = functools.partial(devices.on_host, run.on)
    start, per_epoch = int(host(state.step)), run.task.steps_per_epoch
    total, every = run.config.epochs * per_epoch, run.config.checkpoint_every
    begun = time.perf_counter() - progress.seconds
    with Meter(
        run.log, start=start, total=total, per_epoch=per_epoch, log_every=run.config.log_every
    ) as meter:
        for done in range(start + 1, total + 1):
            batch = run.task.train_batch(done - 1)
            state, metrics = steps.train(state, run.task.base, batch)
            meter.add(done, metrics)
            at_epoch_end = done % per_epoch == 0
            if not (at_epoch_end or (every and done % every == 0)):
                continue
            # A line at each checkpoint, so that a run that goes on from there logs the same.
            meter.flush()
            if at_epoch_end:
                found = Evaluation(done, stepping.evaluate(steps.evaluate, state.adapter, run.task))
                progress = recorded(run, host(state.adapter), found, progress)
                if devices.first():
                    workdirs.plot_curves(run.workdir, run.task.score.name)
                meter.evaluated(run.task.score.name, progress.best_score)
            progress = progress._replace(seconds=time.perf_counter() - begun)
            stored = host(stepping.storable(state))
            checkpointing.save(checkpoints, done, stored, progress._asdict())
    return progress


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
    if devices.first():
        lora.save(
            run.workdir / workdirs.ADAPTER, adapter, run.lora_config,
            base=run.task.base_id, metadata=metadata,
        )  # fmt: skip
    return Progress(step, score, loss, progress.seconds)


def _is_better(score: Score, value: float, than: float) -> bool:
    return value > than if score.higher_is_better else value < than


def _diverged(error: FloatingPointError, workdir: Path) -> str:
    folder = workdir / workdirs.ADAPTER
    kept = f"the best adapter so far is kept in {folder}"
    if not folder.exists():
        kept = "there was no evaluation before, so no adapter is kept"
    return (
        f"{error}: training stopped; {kept}. Lower optimizer.learning_rate or lora.alpha, or set "
        "optimizer.clip_norm, in a new workdir."
    )
