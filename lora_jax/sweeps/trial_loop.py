"""The loop of a sweep: some runs of a group, step by step through the same compiled program.

Each run writes its directory as if it were alone: at its true rank, with its own checkpoints. Which
runs share the program is not stored, so that a sweep that was killed may go on in any arrangement.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp

import lora_jax as lora
from lora_jax.files import write_atomically
from lora_jax.sweeps import sweep_dirs, vmapped_step
from lora_jax.sweeps.progress_bar import ProgressBar
from lora_jax.sweeps.trials import Trial
from lora_jax.sweeps.vmapped_step import Member, Program
from lora_jax.training import (
    checkpointing,
    durations,
    loop,
    metric_logger,
    metric_writer,
    preemption,
    trackers,
    workdirs,
)
from lora_jax.training.evaluation import combine
from lora_jax.training.state import TrainState
from lora_jax.training.task import Score, Task

PyTree = Any
RUNGS = "rungs.json"  # evaluations for halving, in the directory of a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that one program can train.

    Attributes:
      task: task of all of them.
      plan: length and intervals of each of them.
      make_member: ``id -> run at step 0``.
      shapes: shapes that hold every one of them.
      has_dropout: whether any of them has dropout on its low-rank branches.
      options: settings that the step is compiled with.
      outlets: trackers of all of them.
    """

    task: Task
    plan: durations.Plan
    make_member: Callable[[str], Member]
    shapes: PyTree
    has_dropout: bool
    options: vmapped_step.Options
    outlets: trackers.Outlets = dataclasses.field(default_factory=trackers.Outlets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run under way.

    Attributes:
      trial: config of the run.
      run: the run as :mod:`loop` has it.
      checkpoints: checkpoints of the run.
      initial: the run at step 0.
      progress: progress of the run.
      diverged: step whose loss was not finite; 0 for none.
    """

    trial: Trial
    run: loop.Run
    checkpoints: ocp.CheckpointManager
    initial: Member
    progress: loop.Progress
    diverged: int = 0


class Stop(NamedTuple):
    """A step at which runs stop, and the rung of halving that they are evaluated for, if any."""

    step: int
    rung: str = ""


def saved_step(workdir: Path, trial: Trial) -> int:
    """Returns the step of the run's newest checkpoint; 0 for none."""
    directory = sweep_dirs.run_dir(workdir, trial) / workdirs.CHECKPOINTS
    if not directory.is_dir():
        return 0
    with checkpointing.manager(directory) as checkpoints:
        return checkpoints.latest_step() or 0


def advance(
    group: Group,
    trials: list[Trial],
    *,
    program: Program,
    workdir: Path,
    stop: Stop,
    bar: ProgressBar,
    say: Callable[[str], None],
) -> None:
    """Takes runs that are at the same step on to a stop, and finishes those that are done.

    Nothing is done if they are at different steps, since the newest checkpoint of one is damaged.

    Raises:
      Stopped: SIGTERM came; each run has a checkpoint to go on from.
    """
    with contextlib.ExitStack() as stack:
        opened = [_open(stack, group, trial, workdir, say) for trial in trials]
        jobs, states = [job for job, _ in opened], [state for _, state in opened]
        if len({int(state.step) for state in states}) > 1:
            return
        members = [j.initial._replace(state=s) for j, s in zip(jobs, states, strict=True)]
        padded = [vmapped_step.pad(m, group.shapes) for m in members]
        stacked = vmapped_step.place(program, vmapped_step.stack(padded, program.count))
        jobs = _loop(group, jobs, stacked, program=program, stop=stop, bar=bar)
        for job in jobs:
            if job.diverged:
                job.run.log.mark_failed()
    for job in jobs:
        if job.diverged or stop.step == group.plan.total:
            _finish(workdir, job, job.diverged or stop.step)
            bar.set_progress(job.trial, 1.0)


def finish_if_done(group: Group, trial: Trial, workdir: Path, say: Callable[[str], None]) -> bool:
    """Finishes a run whose newest checkpoint is its last: it was killed just before its result.

    Returns:
      Whether the run is finished; it is not if that checkpoint is damaged.
    """
    with contextlib.ExitStack() as stack:
        job, state = _open(stack, group, trial, workdir, say)
    is_done = int(state.step) == group.plan.total
    if is_done:
        _finish(workdir, job, int(state.step))
    return is_done


def _finish(workdir: Path, job: Job, steps: int) -> None:
    status = sweep_dirs.DIVERGED if job.diverged else sweep_dirs.FINISHED
    values = {"status": status, "steps": steps, **_summarize(job)}
    sweep_dirs.finish(workdir, job.trial, values)


def summarize(progress: loop.Progress, member: Member, score: Score) -> dict[str, Any]:
    """Returns the part of a result that any run has; values are None without an evaluation."""
    has_evaluation = progress.best_step >= 0
    adapter = member.state.adapter
    sizes = jax.tree.map(lambda x, trained: x.size if trained else 0, adapter, lora.mask(adapter))
    return {
        "best_step": progress.best_step if has_evaluation else None,
        "score": score.name,
        "higher_is_better": score.higher_is_better,
        f"best_{score.name}": progress.best_score if has_evaluation else None,
        "best_loss": progress.best_loss if has_evaluation else None,
        "trainable_parameters": sum(jax.tree.leaves(sizes)),
        "seconds": round(progress.seconds, 3),
    }


def _summarize(job: Job) -> dict[str, Any]:
    return summarize(job.progress, job.initial, job.run.task.score)


def read_rungs(directory: Path) -> dict[str, dict[str, Any]]:
    """Reads the evaluations for halving that the run in a directory has had, by rung."""
    path = directory / RUNGS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _open(
    stack: contextlib.ExitStack,
    group: Group,
    trial: Trial,
    workdir: Path,
    say: Callable[[str], None],
) -> tuple[Job, TrainState]:
    """Opens the directory of a run, and reads its newest state."""
    initial, directory = group.make_member(trial.id), sweep_dirs.run_dir(workdir, trial)
    workdirs.claim(directory, trial.config)
    folder = directory / workdirs.CHECKPOINTS
    checkpoints = stack.enter_context(
        checkpointing.manager(folder, keep=trial.config.checkpoint_keep)
    )
    checkpoint = checkpointing.restore(checkpoints, initial.state, say)
    state, words = checkpoint or (initial.state, {})
    state, progress = jax.tree.map(np.asarray, state), loop.parse_progress(words)
    config = trial.config
    run = loop.Run(
        task=dataclasses.replace(group.task, metadata=group.task.metadata | {"seed": config.seed}),
        config=config,
        lora_config=lora.LoRAConfig.from_dict(config.lora.to_dict()),
        workdir=directory,
        log=stack.enter_context(
            metric_writer.MetricWriter(
                directory, int(state.step), progress.evaluated, _log_settings(group, trial, workdir)
            )
        ),
        plan=group.plan,
    )
    job = Job(trial=trial, run=run, checkpoints=checkpoints, initial=initial, progress=progress)
    return job, state


def _log_settings(group: Group, trial: Trial, workdir: Path) -> trackers.Settings:
    directory, names = sweep_dirs.run_dir(workdir, trial), {"name": trial.name}
    names["group"] = workdir.resolve().name
    info = trackers.make_info(trial.config, directory, store=workdir, **names)
    return trackers.make_settings(trial.config, info, group.outlets, group.task.score)


def _loop(
    group: Group,
    jobs: list[Job],
    members: Member,
    *,
    program: Program,
    stop: Stop,
    bar: ProgressBar,
) -> list[Job]:
    task, plan = group.task, group.plan
    start, log_every = int(members.state.step[0]), jobs[0].run.config.log_every
    base, clock, metrics = vmapped_step.replicate(program, task.base), _Clock(program), []
    if start == 0 and durations.is_evaluation_due(plan, 0):
        jobs = _evaluate_at_start(task, jobs, members, program=program, base=base)
        clock.lap("log")  # the speed of the first line is that of its steps
    for step in range(start + 1, stop.step + 1):
        batch = task.train_batch(step - 1)
        members, new = vmapped_step.call(program, "train", members, base, batch)
        metrics.append(new)
        for job in jobs:
            bar.set_progress(job.trial, step / plan.total)
        is_last, is_due = step == stop.step, durations.is_evaluation_due(plan, step)
        is_line_due = is_due or is_last or step % log_every == 0
        is_stop_requested = preemption.is_requested(step)
        is_pause = is_last or is_stop_requested or durations.is_checkpoint_due(plan, step)
        if not is_pause and not is_line_due:
            continue
        jobs, metrics = _collect(jobs, step, metrics), []
        if is_line_due:
            jobs = _log(jobs, step, type(new[0]), clock.lap("log"))
        if not is_pause:
            continue
        rung = stop.rung if is_last else ""
        evaluations = []
        if is_due or rung:
            evaluations = _evaluate(task, jobs, members, program=program, base=base, step=step)
        jobs = _add_seconds(jobs, clock.lap("progress"))
        states = jax.device_get(members.state)
        jobs = _record(jobs, states.adapter, evaluations, is_due=is_due, rung=rung)
        for k, job in enumerate(jobs):
            _save(job, states, k)
            if job.progress.best_step >= 0:
                bar.set_best(job.trial, task.score, job.progress.best_score)
        if all(job.diverged for job in jobs):
            break
        if is_stop_requested and not is_last:
            _stop(jobs)
    return jobs


class _Clock:
    """Measures seconds since the last lap of a name, without those of compilation."""

    def __init__(self, program: Program) -> None:
        self._program, self._last = program, dict[str, float]()
        self._begin = self._now()

    def _now(self) -> float:
        return time.perf_counter() - vmapped_step.compile_seconds(self._program)

    def lap(self, name: str) -> float:
        now, last = self._now(), self._last.get(name, self._begin)
        self._last[name] = now
        return max(now - last, 1e-9)


def _stop(jobs: list[Job]) -> NoReturn:
    for job in jobs:
        checkpointing.wait(job.checkpoints)
    raise preemption.Stopped(
        "Stopped, as asked, with a checkpoint of each run that was under way. To go on:\n"
        f"  {preemption.command_line()}"
    )


def _replace_progress(job: Job, **changes: Any) -> Job:
    return dataclasses.replace(job, progress=dataclasses.replace(job.progress, **changes))


def _collect(jobs: list[Job], step: int, metrics: list[tuple]) -> list[Job]:
    """Keeps the metrics of each run until its next line; marks runs whose loss is not finite."""
    rows = [[*sums, norm] for sums, norm in jax.device_get(metrics)]
    values = np.asarray(rows, np.float64)  # (steps, fields and the norm, runs)
    first, new = step - len(metrics) + 1, []
    for k, job in enumerate(jobs):
        bad = np.flatnonzero(~np.isfinite(values[:, 0, k]))
        if not job.diverged and bad.size:
            job = dataclasses.replace(job, diverged=first + int(bad[0]))
        pending = [*job.progress.pending, *values[:, :, k].tolist()]
        new.append(_replace_progress(job, pending=pending))
    return new


def _log(jobs: list[Job], step: int, sums_type: type, seconds: float) -> list[Job]:
    """Writes a line for each run that has not diverged."""
    for job in jobs:
        if not job.diverged:
            rows, rates = job.progress.pending, loop.make_rates(job.run)(step)
            epoch = step / job.run.task.steps_per_epoch
            line = metric_logger.means(rows, sums_type, seconds=seconds / len(jobs))
            job.run.log.write(step, epoch=epoch, **line, **rates)
    return [_replace_progress(job, pending=()) for job in jobs]


def _evaluate_at_start(
    task: Task, jobs: list[Job], members: Member, *, program: Program, base: PyTree
) -> list[Job]:
    """Makes the evaluations before the first step, of runs with fresh adapters."""
    evaluations = _evaluate(task, jobs, members, program=program, base=base, step=0)
    return _record(jobs, jax.device_get(members.state.adapter), evaluations, is_due=True, rung="")


def _evaluate(
    task: Task, jobs: list[Job], members: Member, *, program: Program, base: PyTree, step: int
) -> list[loop.Evaluation]:
    batches = list(task.eval_batches())
    results = [vmapped_step.call(program, "evaluate", members, base, batch) for batch in batches]
    results = jax.device_get(results)
    evaluations = []
    for k in range(len(jobs)):
        of_run = jax.tree.map(lambda x, k=k: x[k], results)
        pairs = zip(batches, of_run, strict=True)
        values = combine(task, [(batch, *result) for batch, result in pairs])
        evaluations.append(loop.Evaluation(step, values))
    return evaluations


def _record(
    jobs: list[Job],
    adapters: PyTree,
    evaluations: list[loop.Evaluation],
    *,
    is_due: bool,
    rung: str,
) -> list[Job]:
    """Keeps adapters that are the best so far, and the evaluations of a rung."""
    new = list(jobs)
    for k, evaluation in enumerate(evaluations):
        job = jobs[k]
        if job.diverged:
            continue
        adapter = vmapped_step.cut(vmapped_step.unstack(adapters, k), job.initial.state.adapter)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves((adapter, evaluation))):
            new[k] = dataclasses.replace(job, diverged=evaluation.step)
            continue
        if is_due:
            progress = loop.record(job.run, adapter, evaluation, job.progress)
            new[k] = dataclasses.replace(job, progress=progress)
        if rung:
            _write_rung(new[k], rung, evaluation)
    return new


def _add_seconds(jobs: list[Job], seconds: float) -> list[Job]:
    """Adds each run's share of the time since the last pause."""
    share = seconds / len(jobs)
    return [_replace_progress(job, seconds=job.progress.seconds + share) for job in jobs]


def _write_rung(job: Job, rung: str, evaluation: loop.Evaluation) -> None:
    """Stores the run's evaluation at a rung, and the result that it has if it is dropped there."""
    entry = {"step": evaluation.step, **evaluation.values, "summary": _summarize(job)}
    text = json.dumps(read_rungs(job.run.workdir) | {rung: entry}, indent=2)
    write_atomically(job.run.workdir / RUNGS, text.encode())


def _save(job: Job, states: TrainState, index: int) -> None:
    """Saves a checkpoint of a run, unless it has diverged."""
    if not job.diverged:
        state = vmapped_step.cut(vmapped_step.unstack(states, index), job.initial.state)
        progress = dataclasses.asdict(job.progress)
        job.run.log.sync()
        checkpointing.save(job.checkpoints, int(state.step), state, progress)
