"""The loop of a sweep: some runs of one group, step by step through the same compiled program.

Each run writes its directory as if it were alone: at true rank, with a checkpoint of its own. Which
runs go together is forgotten between one cohort and the next, so that a sweep that was killed may
go on in any arrangement.
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

import lora_jax as lora
from lora_jax.files import write_atomically
from lora_jax.sweeps import sweep_dirs, vmapped_step
from lora_jax.sweeps.progress_bar import Bar
from lora_jax.sweeps.trials import Point
from lora_jax.sweeps.vmapped_step import Member, Program
from lora_jax.training import (
    checkpointing,
    durations,
    loop,
    metric_logger,
    metric_writer,
    preemption,
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
      task: of all of them.
      plan: their length and their pauses.
      member: the run with an id, at step 0.
      shapes: that hold every one of them.
      dropout: whether any of them has dropout on its low-rank branches.
      options: what all of them are compiled with.
    """

    task: Task
    plan: durations.Plan
    member: Callable[[str], Member]
    shapes: PyTree
    dropout: bool
    options: vmapped_step.Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run under way: what it is, where it stands, and where it writes."""

    point: Point
    run: loop.Run
    checkpoints: Any
    initial: Member
    progress: loop.Progress
    diverged: int = 0  # the step whose loss was not finite; 0 for none


class Stop(NamedTuple):
    """Where a cohort stops, and the halving rung that it is evaluated for there, if any."""

    step: int
    rung: str = ""


def saved_step(workdir: Path, point: Point) -> int:
    """The step of the run's newest checkpoint; 0 for none."""
    directory = sweep_dirs.run_dir(workdir, point) / workdirs.CHECKPOINTS
    if not directory.is_dir():
        return 0
    with checkpointing.manager(directory) as checkpoints:
        return checkpoints.latest_step() or 0


def advance(
    group: Group,
    points: list[Point],
    *,
    on: Program,
    workdir: Path,
    to: Stop,
    bar: Bar,
    say: Callable[[str], None],
) -> None:
    """Takes runs that stand at one step on to another, and finishes those that are done.

    Nothing is done if they turn out to stand apart, since the newest checkpoint of one is damaged.

    Raises:
      Stopped: SIGTERM came; each run has a checkpoint to go on from.
    """
    with contextlib.ExitStack() as stack:
        found = [_open(stack, group, point, workdir, say) for point in points]
        jobs, states = [job for job, _ in found], [state for _, state in found]
        if len({int(state.step) for state in states}) > 1:
            return
        members = [j.initial._replace(state=s) for j, s in zip(jobs, states, strict=True)]
        padded = [vmapped_step.pad(m, group.shapes) for m in members]
        stacked = vmapped_step.place(on, vmapped_step.stack(padded, on.count))
        jobs = _loop(group, jobs, stacked, on=on, to=to, bar=bar)
    for job in jobs:
        if job.diverged or to.step == group.plan.total:
            _finish(workdir, job, job.diverged or to.step)
            bar.at(job.point, 1.0)


def settle(group: Group, point: Point, workdir: Path, say: Callable[[str], None]) -> bool:
    """Finishes a run whose newest checkpoint is its last: it was killed just before its result.

    Returns:
      Whether it was: it is not if that checkpoint is damaged.
    """
    with contextlib.ExitStack() as stack:
        job, state = _open(stack, group, point, workdir, say)
    if last := int(state.step) == group.plan.total:
        _finish(workdir, job, int(state.step))
    return last


def _finish(workdir: Path, job: Job, steps: int) -> None:
    status = sweep_dirs.DIVERGED if job.diverged else sweep_dirs.FINISHED
    values = {"status": status, "steps": steps, **_summary(job)}
    sweep_dirs.finish(workdir, job.point, values)


def summary(progress: loop.Progress, member: Member, score: Score) -> dict[str, Any]:
    """What a result says of any run; None where there was no evaluation."""
    seen = progress.best_step >= 0
    adapter = member.state.adapter
    sizes = jax.tree.map(lambda x, trained: x.size if trained else 0, adapter, lora.mask(adapter))
    return {
        "best_step": progress.best_step if seen else None,
        "score": score.name,
        "higher_is_better": score.higher_is_better,
        f"best_{score.name}": progress.best_score if seen else None,
        "best_loss": progress.best_loss if seen else None,
        "trainable_parameters": sum(jax.tree.leaves(sizes)),
        "seconds": round(progress.seconds, 3),
    }


def _summary(job: Job) -> dict[str, Any]:
    return summary(job.progress, job.initial, job.run.task.score)


def rungs(directory: Path) -> dict[str, dict[str, Any]]:
    """The evaluations for halving that the run in a directory has had, by rung."""
    path = directory / RUNGS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _open(
    stack: contextlib.ExitStack,
    group: Group,
    point: Point,
    workdir: Path,
    say: Callable[[str], None],
) -> tuple[Job, PyTree]:
    """Opens the directory of a run, and finds where it stands."""
    initial, directory = group.member(point.id), sweep_dirs.run_dir(workdir, point)
    workdirs.claim(directory, point.config)
    folder = directory / workdirs.CHECKPOINTS
    checkpoints = stack.enter_context(
        checkpointing.manager(folder, keep=point.config.checkpoint_keep)
    )
    found = checkpointing.restore(checkpoints, initial.state, say)
    state, progress = found or (initial.state, {})
    state = jax.tree.map(np.asarray, state)
    log = stack.enter_context(metric_writer.MetricWriter(directory, int(state.step)))
    config = point.config
    task = dataclasses.replace(group.task, metadata=group.task.metadata | {"seed": config.seed})
    lora_config = lora.LoRAConfig.from_dict(config.lora.to_dict())
    run = loop.Run(
        task=task, config=config, lora_config=lora_config, workdir=directory, plan=group.plan,
        log=log,
    )  # fmt: skip
    return Job(
        point=point,
        run=run,
        checkpoints=checkpoints,
        initial=initial,
        progress=loop.stored_progress(progress),
    ), state


def _loop(
    group: Group, jobs: list[Job], members: Member, *, on: Program, to: Stop, bar: Bar
) -> list[Job]:
    task, plan = group.task, group.plan
    start, config = int(members.state.step[0]), jobs[0].run.config
    base, clock, sums = vmapped_step.replicate(on, task.base), _Clock(on), []
    for done in range(start + 1, to.step + 1):
        batch = task.train_batch(done - 1)
        members, new = vmapped_step.call(on, "train", members, base, batch)
        sums.append(new)
        for job in jobs:
            bar.at(job.point, done / plan.total)
        evaluates = durations.evaluates(plan, done)
        line = evaluates or done == to.step or done % config.log_every == 0
        stop = preemption.requested(done)
        pause = done == to.step or stop or durations.saves(plan, done)
        if not pause and not line:
            continue
        jobs, sums = _looked_at(jobs, done, sums), []
        if line:
            jobs = _logged(jobs, done, type(new), clock.lap("log"))
        if not pause:
            continue
        rung = to.rung if done == to.step else ""
        found = []
        if evaluates or rung:
            found = _evaluations(task, jobs, members, on=on, base=base, step=done)
        jobs = _timed(jobs, clock.lap("progress"))
        states = jax.device_get(members.state)
        jobs = _recorded(jobs, states.adapter, found, noted=evaluates, rung=rung)
        for k, job in enumerate(jobs):
            _save(job, states, k)
            best = job.progress.best_score if job.progress.best_step >= 0 else None
            bar.found(job.point, task.score, best)
        if all(job.diverged for job in jobs):
            break
        if stop and done < to.step:
            _stop(jobs)
    return jobs


class _Clock:
    """Seconds since the last lap of a name, without those that compilation took."""

    def __init__(self, on: Program) -> None:
        self._on, self._last = on, {}
        self._begin = self._now()

    def _now(self) -> float:
        return time.perf_counter() - vmapped_step.compile_seconds(self._on)

    def lap(self, name: str) -> float:
        now, last = self._now(), self._last.get(name, self._begin)
        self._last[name] = now
        return max(now - last, 1e-9)


def _stop(jobs: list[Job]) -> NoReturn:
    for job in jobs:
        checkpointing.wait(job.checkpoints)
    raise preemption.Stopped(
        "Stopped, as asked, with a checkpoint of each run that was under way. To go on:\n"
        f"  {preemption.command()}"
    )


def _looked_at(jobs: list[Job], done: int, sums: list) -> list[Job]:
    """Keeps the sums of each run until its next line, and marks runs whose loss is not finite."""
    values = np.asarray(jax.device_get(sums), np.float64)  # (steps, fields, runs)
    first = done - len(sums) + 1
    new = []
    for k, job in enumerate(jobs):
        bad = np.flatnonzero(~np.isfinite(values[:, 0, k]))
        if not job.diverged and bad.size:
            job = dataclasses.replace(job, diverged=first + int(bad[0]))
        pending = [*job.progress.pending, *values[:, :, k].tolist()]
        new.append(
            dataclasses.replace(job, progress=dataclasses.replace(job.progress, pending=pending))
        )
    return new


def _logged(jobs: list[Job], done: int, kind: type, seconds: float) -> list[Job]:
    """Writes a line for each run that has not diverged."""
    new = []
    for job in jobs:
        if not job.diverged:
            line = metric_logger.means(
                [kind(*x) for x in job.progress.pending], seconds / len(jobs)
            )
            job.run.log.write(done, epoch=done / job.run.task.steps_per_epoch, **line)
        new.append(dataclasses.replace(job, progress=dataclasses.replace(job.progress, pending=())))
    return new


def _evaluations(
    task: Task, jobs: list[Job], members: Member, *, on: Program, base: PyTree, step: int
) -> list[loop.Evaluation]:
    batches = list(task.eval_batches())
    found = [vmapped_step.call(on, "evaluate", members, base, batch) for batch in batches]
    found = jax.device_get(found)
    of_run = lambda k: jax.tree.map(lambda x: x[k], found)
    results = [
        [(batch, *result) for batch, result in zip(batches, of_run(k), strict=True)]
        for k in range(len(jobs))
    ]
    return [loop.Evaluation(step, combine(task, result)) for result in results]


def _recorded(
    jobs: list[Job], adapters: PyTree, found: list[loop.Evaluation], *, noted: bool, rung: str
) -> list[Job]:
    """Keeps adapters that are the best so far, and what halving wants to know."""
    new = list(jobs)
    for k, evaluation in enumerate(found):
        job = jobs[k]
        if job.diverged:
            continue
        adapter = vmapped_step.cut(vmapped_step.unstack(adapters, k), job.initial.state.adapter)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves((adapter, evaluation))):
            new[k] = dataclasses.replace(job, diverged=evaluation.step)
            continue
        if noted:
            progress = loop.record(job.run, adapter, evaluation, job.progress)
            new[k] = dataclasses.replace(job, progress=progress)
        if rung:
            _write_rung(new[k], rung, evaluation)
    return new


def _timed(jobs: list[Job], seconds: float) -> list[Job]:
    """Adds each run's share of the time since the last pause."""
    add = lambda progress: dataclasses.replace(
        progress, seconds=progress.seconds + seconds / len(jobs)
    )
    return [dataclasses.replace(job, progress=add(job.progress)) for job in jobs]


def _write_rung(job: Job, rung: str, found: loop.Evaluation) -> None:
    """Notes how the run did at a rung, and the result that it has should it be dropped there."""
    entry = {"step": found.step, **found.values, "summary": _summary(job)}
    text = json.dumps(rungs(job.run.workdir) | {rung: entry}, indent=2)
    write_atomically(job.run.workdir / RUNGS, text.encode())


def _save(job: Job, states: TrainState, index: int) -> None:
    """Saves a checkpoint of a run, unless it has diverged."""
    if not job.diverged:
        state = vmapped_step.cut(vmapped_step.unstack(states, index), job.initial.state)
        progress = dataclasses.asdict(job.progress)
        job.run.log.sync()
        checkpointing.save(job.checkpoints, int(state.step), state, progress)
