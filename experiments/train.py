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

import lora_jax as lora
from experiments import checkpointing, metrics, optimisers, workdirs
from experiments.meter import Meter
from lora_jax import adapter as adapters
from lora_jax import lowrank, paths

PyTree = Any
Batch = dict[str, np.ndarray]


class Score(NamedTuple):
    """The number of an evaluation that selects the best adapter.

    Attributes:
      name: "loss", or a name among the task's metrics and scores.
      higher_is_better: whether more of it is better.
    """

    name: str = "accuracy"
    higher_is_better: bool = True


class Task(NamedTuple):
    """What the loop needs to know of a task.

    Attributes:
      apply: ``(params, batch, key or None) -> logits``; no key, no dropout.
      metrics: ``(logits, batch) -> sums``, a NamedTuple such as :class:`metrics.Sums`; its first
        field is the sum of losses, its last the sum of weights.
      train_batch: the batch of a step, a pure function of the step.
      eval_batches: makes the batches of one evaluation.
      steps_per_epoch: how many steps see every training example once.
      base: the frozen parameters.
      base_id: their content hash.
      metadata: saved with the adapter, so that it can be used without the config.
      notes: lines for the report at the start.
      adapter: to start from, in place of a fresh one.
      base_of: the frozen parameters as a run with another seed has them, for tasks that draw some
        by the run's seed: ``base``, with other arrays for those leaves alone. None if none are.
      score: what selects the best adapter.
      scores: ``(logits of all evaluation examples, in their order) -> numbers by name``, for what
        is no mean over examples. None if the means are all.
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
    adapter: PyTree | None = None
    base_of: Callable[[int], PyTree] | None = None
    score: Score = Score()
    scores: Callable[[np.ndarray], dict[str, float]] | None = None


class TrainState(NamedTuple):
    """All that changes during training."""

    step: jax.Array
    adapter: PyTree
    opt_state: PyTree
    key: jax.Array


class Progress(NamedTuple):
    """The best evaluation so far (step -1 for none), and the seconds that the run has taken."""

    best_step: int = -1
    best_score: float = -math.inf
    best_loss: float = math.inf
    seconds: float = 0.0


def train_step(task: Task, tx: optax.GradientTransformation, dropout: Any) -> Callable:
    """``(state, base, batch) -> (state, metrics)``, a pure function.

    The dropout rate, and the numbers in ``tx``, may be JAX scalars: a sweep maps over them.
    """

    def step(state: TrainState, base: PyTree, batch: Batch) -> tuple[TrainState, tuple]:
        model_key, branch_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        apply = lora.lift(task.apply, dropout=dropout, dropout_key=branch_key)

        def loss(adapter: PyTree) -> tuple[jax.Array, tuple]:
            logits = apply(lora.bind(base, adapter), batch, model_key)
            sums = task.metrics(logits, batch)
            return sums[0] / sums[-1], sums

        grads, sums = jax.grad(loss, has_aux=True)(state.adapter)
        updates, opt_state = tx.update(grads, state.opt_state, state.adapter)
        adapter = optax.apply_updates(state.adapter, updates)
        return TrainState(state.step + 1, adapter, opt_state, state.key), sums

    return step


def make_train_step(task: Task, tx: optax.GradientTransformation, dropout: float) -> Callable:
    """:func:`train_step`, compiled; the state is donated."""
    # As an array, so that one minus the rate is rounded as in a sweep, and the masks are the same.
    rate = jnp.asarray(dropout, float) if dropout else 0.0
    return jax.jit(train_step(task, tx, rate), donate_argnums=0)


def eval_step(task: Task) -> Callable:
    """``(adapter, base, batch) -> (sums, logits if the task wants them)``, a pure function."""

    def step(adapter: PyTree, base: PyTree, batch: Batch) -> tuple:
        logits = lora.lift(task.apply)(lora.bind(base, adapter), batch, None)
        return task.metrics(logits, batch), None if task.scores is None else logits

    return step


def make_eval_step(task: Task) -> Callable:
    """:func:`eval_step`, compiled."""
    return jax.jit(eval_step(task))


def evaluate(eval_step: Callable, adapter: PyTree, task: Task) -> dict[str, float]:
    """Loss and scores over all evaluation examples, each counted once."""
    batches = task.eval_batches()
    return gathered(task, [(batch, *eval_step(adapter, task.base, batch)) for batch in batches])


def gathered(task: Task, results: list[tuple[Batch, Any, Any]]) -> dict[str, float]:
    """Loss and scores from each batch of an evaluation with its sums and logits."""
    values = metrics.combine([sums for _, sums, _ in results])
    values.pop("examples")
    if task.scores is not None:
        logits = {
            int(index): row
            for batch, _, rows in results
            for index, row in zip(batch["index"], np.asarray(rows), strict=True)
        }
        values |= task.scores(np.stack([logits[k] for k in range(len(logits))]))
    return values


def initial_state(task: Task, config: ConfigDict, lora_config: lora.LoRAConfig) -> tuple:
    """The state at step 0, and the optimiser."""
    key = jax.random.key(config.seed)
    init_key, run_key = jax.random.split(key)
    if task.adapter is None:
        adapter = lora.init(init_key, task.apply, task.base, lora_config, task.train_batch(0), None)
    else:  # a copy, since the step donates its state
        adapter = jax.tree.map(lambda x: jnp.array(x, copy=True), task.adapter)
    tx = optimisers.make(config.optimizer, adapter, config.epochs * task.steps_per_epoch)
    state = TrainState(jnp.int32(0), adapter, tx.init(adapter), jax.random.key_data(run_key))
    return state._replace(key=jax.random.wrap_key_data(state.key)), tx


def train(task: Task, config: ConfigDict, lora_config: lora.LoRAConfig, workdir: Path) -> Progress:
    """Trains to the end, or goes on from the last checkpoint in ``workdir``.

    Writes ``config.json``, ``adapter/`` (the best so far), ``checkpoints/``, ``metrics.jsonl``,
    TensorBoard events and ``curves.png``.

    Raises:
      FloatingPointError: the loss became NaN or infinite; the best adapter so far is kept.
      ValueError: the config and the model do not fit; or the workdir is another run's.
      OSError: the workdir can't be written; what was there is intact.
    """
    state, tx = initial_state(task, config, lora_config)
    workdirs.claim(workdir, config)  # not before all has been checked: a mistake claims nothing
    print("\n".join([*task.notes, *report(task.base, state.adapter)]), flush=True)
    total = config.epochs * task.steps_per_epoch
    with checkpointing.manager(workdir / workdirs.CHECKPOINTS) as checkpoints:
        state, progress = _resumed(workdir, checkpoints, state)
        start = int(state.step)
        if start == total:
            print(f"This run is finished: all {total} steps are done.", flush=True)
            return progress
        steps = _Steps(make_train_step(task, tx, lora_config.dropout), make_eval_step(task))
        with workdirs.Log(workdir, start) as log:
            run = Run(task, config, lora_config, workdir, log)
            try:
                return _loop(run, steps, checkpoints, state, progress)
            except FloatingPointError as error:
                raise FloatingPointError(_diverged(error, workdir)) from error


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
    found = checkpointing.restore(checkpoints, storable(state))
    if found is None:
        return state, Progress()
    stored, progress = found[0], Progress(**found[1])
    if progress.best_step >= 0 and not (workdir / workdirs.ADAPTER).is_dir():
        raise FileNotFoundError(
            f"The run in {workdir} has its best adapter from step {progress.best_step}, and its "
            f"folder {workdirs.ADAPTER} is gone: put it back, or use a new workdir."
        )
    print(f"Going on from the checkpoint of step {int(stored.step)}.", flush=True)
    return usable(stored), progress


def storable(state: TrainState) -> TrainState:
    """The state with its PRNG key as plain integers."""
    return state._replace(key=jax.random.key_data(state.key))


def usable(stored: TrainState) -> TrainState:
    """The inverse of :func:`storable`."""
    return stored._replace(key=jax.random.wrap_key_data(stored.key))


def _loop(
    run: Run, steps: _Steps, checkpoints: Any, state: TrainState, progress: Progress
) -> Progress:
    """Runs the steps that are left, with evaluations and checkpoints between them."""
    start, per_epoch = int(state.step), run.task.steps_per_epoch
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
                found = Evaluation(done, evaluate(steps.evaluate, state.adapter, run.task))
                progress = recorded(run, state.adapter, found, progress)
                workdirs.plot_curves(run.workdir, run.task.score.name)
                meter.evaluated(run.task.score.name, progress.best_score)
            progress = progress._replace(seconds=time.perf_counter() - begun)
            checkpointing.save(checkpoints, done, storable(state), progress._asdict())
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
