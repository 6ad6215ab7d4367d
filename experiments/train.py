"""The training loop: one for every task, and for every kind of adapter.

A task brings a function of (params, batch, key), batches by step, and metrics. The base parameters
are an argument of the compiled step: neither donated nor closed over, and never changed.
"""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

import lora_jax as lora
from experiments import checkpointing, optimisers, workdirs

PyTree = Any
Batch = dict[str, np.ndarray]


class Task(NamedTuple):
    """What the loop needs to know of a task.

    Attributes:
      apply: ``(params, batch, key or None) -> logits``; no key, no dropout.
      metrics: ``(logits, batch) -> (sum of losses, correct answers, number of examples)``.
      train_batch: the batch of a step, a pure function of the step.
      eval_batches: makes the batches of one evaluation.
      steps_per_epoch: how many steps see every training example once.
      base: the frozen parameters.
      base_id: their content hash.
      metadata: saved with the adapter, so that it can be used without the config.
      notes: lines for the report at the start.
    """

    apply: Callable
    metrics: Callable
    train_batch: Callable[[int], Batch]
    eval_batches: Callable[[], Iterable[Batch]]
    steps_per_epoch: int
    base: PyTree
    base_id: str
    metadata: dict
    notes: tuple[str, ...] = ()


class TrainState(NamedTuple):
    """All that changes during training."""

    step: jax.Array
    adapter: PyTree
    opt_state: PyTree
    key: jax.Array


class Progress(NamedTuple):
    """The best evaluation so far; step -1 for none."""

    best_step: int = -1
    best_accuracy: float = -1.0
    best_loss: float = math.inf


def make_train_step(task: Task, tx: optax.GradientTransformation, dropout: float) -> Callable:
    """``(state, base, batch) -> (state, metrics)``, compiled; the state is donated."""

    def step(state: TrainState, base: PyTree, batch: Batch) -> tuple[TrainState, tuple]:
        model_key, branch_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        apply = lora.lift(task.apply, dropout=dropout, dropout_key=branch_key)

        def loss(adapter: PyTree) -> tuple[jax.Array, tuple]:
            logits = apply(lora.bind(base, adapter), batch, model_key)
            total, correct, count = task.metrics(logits, batch)
            return total / count, (total, correct, count)

        grads, metrics = jax.grad(loss, has_aux=True)(state.adapter)
        updates, opt_state = tx.update(grads, state.opt_state, state.adapter)
        adapter = optax.apply_updates(state.adapter, updates)
        return TrainState(state.step + 1, adapter, opt_state, state.key), metrics

    return jax.jit(step, donate_argnums=0)


def make_eval_step(task: Task) -> Callable:
    """``(adapter, base, batch) -> metrics``, compiled."""

    def step(adapter: PyTree, base: PyTree, batch: Batch) -> tuple:
        logits = lora.lift(task.apply)(lora.bind(base, adapter), batch, None)
        return task.metrics(logits, batch)

    return jax.jit(step)


def evaluate(eval_step: Callable, adapter: PyTree, task: Task) -> tuple[float, float]:
    """Mean loss and accuracy over all evaluation examples, each counted once."""
    sums = [eval_step(adapter, task.base, batch) for batch in task.eval_batches()]
    loss, correct, count = (sum(float(x) for x in column) for column in zip(*sums, strict=True))
    return loss / count, correct / count


def initial_state(task: Task, config: ConfigDict, lora_config: lora.LoRAConfig) -> tuple:
    """The state at step 0, and the optimiser."""
    key = jax.random.key(config.seed)
    init_key, run_key = jax.random.split(key)
    adapter = lora.init(init_key, task.apply, task.base, lora_config, task.train_batch(0), None)
    tx = optimisers.make(config.optimizer, adapter, config.epochs * task.steps_per_epoch)
    state = TrainState(jnp.int32(0), adapter, tx.init(adapter), jax.random.key_data(run_key))
    return state._replace(key=jax.random.wrap_key_data(state.key)), tx


def train(task: Task, config: ConfigDict, lora_config: lora.LoRAConfig, workdir: Path) -> Progress:
    """Trains to the end, or goes on from the last checkpoint in ``workdir``.

    Writes ``adapter/`` (the best so far), ``checkpoints/``, ``metrics.jsonl``, TensorBoard events
    and ``curves.png``.

    Raises:
      FloatingPointError: the loss became NaN or infinite; the best adapter so far is kept.
      ValueError: the config and the model do not fit.
    """
    state, tx = initial_state(task, config, lora_config)
    total = config.epochs * task.steps_per_epoch
    print("\n".join([*task.notes, lora.summary(task.base, state.adapter)]), flush=True)
    with (
        checkpointing.manager(workdir / "checkpoints") as checkpoints,
        workdirs.Log(workdir) as log,
    ):
        state, progress = _resumed(checkpoints, state)
        log.rewind(int(state.step))
        run = _Run(task, config, lora_config, workdir, checkpoints, log)
        train_step = make_train_step(task, tx, lora_config.dropout)
        progress = _loop(run, train_step, make_eval_step(task), state, progress, total)
    workdirs.plot_curves(workdir)
    return progress


class _Run(NamedTuple):
    task: Task
    config: ConfigDict
    lora_config: lora.LoRAConfig
    workdir: Path
    checkpoints: Any
    log: Any


def _resumed(checkpoints: Any, state: TrainState) -> tuple[TrainState, Progress]:
    found = checkpointing.restore(checkpoints, _storable(state))
    if found is None:
        return state, Progress()
    stored, progress = found
    state = stored._replace(key=jax.random.wrap_key_data(stored.key))
    print(f"Going on from the checkpoint of step {int(state.step)}.", flush=True)
    return state, Progress(**progress)


def _storable(state: TrainState) -> TrainState:
    return state._replace(key=jax.random.key_data(state.key))


def _loop(
    run: _Run,
    train_step: Callable,
    eval_step: Callable,
    state: TrainState,
    progress: Progress,
    total: int,
) -> Progress:
    """Runs the steps that are left, with evaluations and checkpoints between them."""
    start, per_epoch = int(state.step), run.task.steps_per_epoch
    every = run.config.checkpoint_every
    meter = _Meter(run, start, total)
    previous = None
    for step in range(start, total):
        state, metrics = train_step(state, run.task.base, run.task.train_batch(step))
        # Looked at one step late, so that the device need not wait for the host.
        meter.add(step, previous)
        previous = metrics
        done = step + 1
        at_epoch_end, at_checkpoint = done % per_epoch == 0, every and done % every == 0
        if at_epoch_end or at_checkpoint:
            meter.add(done, previous)
            previous = None
        if at_epoch_end:
            progress = _evaluated(run, eval_step, state, progress)
            meter.show_accuracy(progress)
        if at_epoch_end or at_checkpoint:
            checkpointing.save(run.checkpoints, done, _storable(state), progress._asdict())
    meter.close()
    return progress


def _evaluated(run: _Run, eval_step: Callable, state: TrainState, progress: Progress) -> Progress:
    """Evaluates, and keeps the adapter if it is the best so far."""
    step = int(state.step)
    loss, accuracy = evaluate(eval_step, state.adapter, run.task)
    run.log.write(
        step, epoch=step / run.task.steps_per_epoch, eval_loss=loss, eval_accuracy=accuracy
    )
    if not math.isfinite(loss):
        raise FloatingPointError(_diverged(run.workdir, step, loss))
    if accuracy <= progress.best_accuracy:
        return progress
    metadata = {**run.task.metadata, "step": step, "accuracy": accuracy, "loss": loss}
    lora.save(
        run.workdir / "adapter", state.adapter, run.lora_config,
        base=run.task.base_id, metadata=metadata,
    )  # fmt: skip
    return Progress(step, accuracy, loss)


def _diverged(workdir: Path, step: int, loss: float) -> str:
    kept = "the best adapter so far is kept in " + str(workdir / "adapter")
    if not (workdir / "adapter").exists():
        kept = "there was no evaluation before, so no adapter is kept"
    return (
        f"The loss is {loss} at step {step}: training stopped; {kept}. Lower "
        "optimizer.learning_rate or lora.alpha, or set optimizer.clip_norm, in a new workdir."
    )


class _Meter:
    """Checks, averages, logs and shows the training metrics."""

    def __init__(self, run: _Run, start: int, total: int) -> None:
        self._run, self._since, self._sums = run, start, []
        self._clock = time.perf_counter()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=1)

    def add(self, done: int, metrics: tuple | None) -> None:
        """Takes the metrics of step number ``done`` (1 for the first); None for none."""
        if metrics is None:
            return
        loss, correct, count = (float(x) for x in metrics)
        if not math.isfinite(loss):
            self._bar.close()
            raise FloatingPointError(_diverged(self._run.workdir, done, loss))
        self._sums.append((loss, correct, count))
        self._bar.update(1)
        at_epoch_end = done % self._run.task.steps_per_epoch == 0
        if done % self._run.config.log_every == 0 or at_epoch_end:
            self._flush(done)

    def _flush(self, done: int) -> None:
        loss, correct, count = (sum(column) for column in zip(*self._sums, strict=True))
        now = time.perf_counter()
        shown = {"loss": loss / count, "accuracy": correct / count}
        speed = count / (now - self._clock)
        self._run.log.write(
            done, epoch=done / self._run.task.steps_per_epoch, **shown, examples_per_second=speed
        )
        self._bar.set_postfix_str(
            f"loss {shown['loss']:.3f}, accuracy {shown['accuracy']:.3f}, {speed:.0f} examples/s"
        )
        self._sums, self._clock = [], now

    def show_accuracy(self, progress: Progress) -> None:
        """Shows the best evaluation beside the bar; its time is no training time."""
        self._bar.set_description(f"best validation accuracy {progress.best_accuracy:.4f}")
        self._clock = time.perf_counter()

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
