"""What is run when: groups, cohorts within them, how many runs at a time, and halving.

Nothing is remembered but what is on disk, so that going on after a kill, after running out of
memory and after points were added is all the same: look at what each run lacks, and do that.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lora_jax.sweeps import parallelism, sweep_dirs, trial_loop, trials, vmapped_step
from lora_jax.sweeps.parallelism import Programs
from lora_jax.sweeps.progress_bar import Bar
from lora_jax.sweeps.trial_loop import Group, Stop
from lora_jax.sweeps.trials import Point
from lora_jax.sweeps.vmapped_step import Member
from lora_jax.tasks import from_config
from lora_jax.training import durations, preemption
from lora_jax.training.task import Recipe, Task

_LOGGER = logging.getLogger("lora_jax.sweeps")
_CACHE_BYTES = 2**30  # of runs at step 0 that are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep as it was asked for.

    Attributes:
      points: all of its runs.
      mine: those that this process is to do.
      recipe: how the config of a run becomes its task.
      workdir: directory of the sweep.
      parallel: number of runs at a time; None to find out.
      halving: number of runs of which one goes on after a rung; 0 for no halving.
      shard: which part this process does, i/n.
      say: takes what there is to tell, by default the logger ``lora_jax.sweeps``.
    """

    points: list[Point]
    mine: list[Point]
    recipe: Recipe
    workdir: Path
    parallel: int | None = None
    halving: int = 0
    shard: str = "1/1"
    say: Callable[[str], None] = _LOGGER.info


def prepare(recipe: Recipe, members: Sequence[Point], pending: Sequence[Point]) -> Group:
    """Loads what the runs of a group share, and sees that each that is pending can start.

    Args:
      recipe: makes the task.
      members: all runs of the group, whose ranks decide its shapes whether or not they are pending.
      pending: those of them that are to be run.

    Raises:
      ValueError: runs and model do not fit; all such runs are in one message.
    """
    task, _ = recipe.make_task(pending[0].config)
    plan = durations.plan(pending[0].config, task.steps_per_epoch)  # the same for all of them
    by_id = {point.id: point for point in members}
    member = lambda name: _member(task, by_id[name], plan)
    size = sum(x.nbytes for x in jax.tree.leaves(_checked(member, pending[:1])[0]))
    # Many small adapters are all kept; of large ones, each is drawn again when its turn comes.
    member = functools.lru_cache(maxsize=max(1, _CACHE_BYTES // size))(member)
    kernels = vmapped_step.kernels(member(pending[0].id))
    rank = lambda point, name: from_config.lora_config(point.config).kernel_rank(name)
    largest = [max(members, key=lambda p, n=name: rank(p, n)) for name in kernels]
    needed = {p.id: p for p in (*pending, *largest)}.values()
    shapes = vmapped_step.common_shapes(_checked(member, needed))
    dropout = any(point.config.lora.dropout > 0 for point in members)
    return Group(
        task=task,
        plan=plan,
        member=member,
        shapes=shapes,
        dropout=dropout,
        options=vmapped_step.options(pending[0].config),
    )


def _checked(member: Callable[[str], Member], wanted: Iterable[Point]) -> list[Any]:
    """The shapes of runs, or one error that has all that is wrong with them."""
    found, problems = [], {}
    for point in wanted:
        try:
            found.append(jax.tree.map(_shaped, member(point.id)))
        except ValueError as error:
            problems.setdefault(str(error), []).append(trials.label(point, point.values))
    if problems:
        lines = [f"{error} ({'; '.join(labels)})" for error, labels in problems.items()]
        raise ValueError(f"Some runs of the sweep can't be started: {' '.join(lines)}")
    return found


def _shaped(x: np.ndarray) -> np.ndarray:
    """An array of this shape and dtype that takes no memory."""
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)


def _member(task: Task, point: Point, plan: durations.Plan) -> Member:
    lora_config = from_config.lora_config(point.config)
    return vmapped_step.member(task, point.config, lora_config, plan=plan)


def run(sweep: Sweep, base: ConfigDict) -> dict[str, int]:
    """Does all that is left to do, and returns how often each step was compiled.

    Raises:
      ValueError: runs and model do not fit; the directory is another sweep's, or in use.
      OSError: it can't be written; what was there is intact.
      Stopped: SIGTERM came; each run has a checkpoint to go on from.
    """
    made = Programs(sweep.parallel)
    parts = trials.groups(sweep.points)
    # A sweep of one group, the usual kind, keeps it through all rungs.
    ready = functools.lru_cache(maxsize=1)(functools.partial(_ready, sweep, parts))
    first = next((n for n, part in enumerate(parts) if unfinished(sweep, part)), None)
    if first is None:
        return {}
    _stop(sweep, ready(first), 0)  # before the claim: a mistake claims nothing
    sweep_dirs.claim(sweep.workdir, base, sweep.halving)
    swept = trials.swept([p.config for p in sweep.points])
    locked = sweep_dirs.locked(sweep.workdir, sweep.shard)
    with locked, preemption.on_sigterm(), Bar(sweep.mine, swept) as bar:
        for point in sweep.mine:
            if found := sweep_dirs.result(sweep.workdir, point):
                bar.at(point, 1.0)
                bar.found(point, *sweep_dirs.best(found))
        for rung in [*range(1, rung_count(sweep) + 1), 0]:
            for number, part in enumerate(parts):
                if pending := unfinished(sweep, part):
                    _train(sweep, ready(number), pending, made=made, rung=rung, bar=bar)
            if rung:
                _drop(sweep, rung, bar)
                made.forget()
    return made.compilations()


def unfinished(sweep: Sweep, among: Sequence[Point]) -> list[Point]:
    """The runs of this process that have no result yet."""
    mine = {point.id for point in sweep.mine}
    return [p for p in among if p.id in mine and sweep_dirs.result(sweep.workdir, p) is None]


def _ready(sweep: Sweep, parts: list[list[Point]], number: int) -> Group:
    pending = unfinished(sweep, parts[number])
    group = prepare(sweep.recipe, parts[number], pending)
    ranks = [point.config.lora.rank for point in parts[number]]
    sweep.say(
        f"group {number + 1} of {len(parts)}: {len(pending)} runs of {len(parts[number])} to do, "
        f"rank {min(ranks)} to {max(ranks)} in one shape\n" + "\n".join(group.task.notes)
    )
    return group


def rung_count(sweep: Sweep) -> int:
    """How many times halving drops runs until one is left."""
    count, runs = 0, len(sweep.points)
    while sweep.halving and runs > 1:
        runs = math.ceil(runs / sweep.halving)
        count += 1
    return count


def survivors(runs: int, halving: int, rung: int) -> int:
    """How many runs go on after a rung.

    >>> [survivors(12, 3, rung) for rung in (1, 2, 3)]
    [4, 2, 1]
    """
    for _ in range(rung):
        runs = math.ceil(runs / halving)
    return runs


def rung_step(total: int, halving: int, rungs: int, rung: int) -> int:
    """The step of a rung: each comes ``halving`` times later than the one before.

    >>> [rung_step(900, 3, 2, rung) for rung in (1, 2)]
    [100, 300]
    """
    return round(total / halving ** (rungs - rung + 1))


def _stop(sweep: Sweep, group: Group, rung: int) -> Stop:
    total, rungs = group.plan.total, rung_count(sweep)
    if total < sweep.halving**rungs:
        raise ValueError(
            f"--halving={sweep.halving} of {len(sweep.points)} runs takes {rungs} rungs, for which "
            f"{total} steps are too few: train for {sweep.halving**rungs} steps or more, or leave "
            "halving out."
        )
    if not rung:
        return Stop(total)
    return Stop(rung_step(total, sweep.halving, rungs, rung), str(rung))


def _train(
    sweep: Sweep, group: Group, pending: list[Point], *, made: Programs, rung: int, bar: Bar
) -> None:
    """Takes the pending runs of a group to their next stop, as many at a time as fit."""
    key = parallelism.key(pending[0])
    stop = _stop(sweep, group, rung)
    while chosen := _next(sweep, pending, stop):
        steps = sum(stop.step - trial_loop.saved_step(sweep.workdir, p) for p in chosen)
        count = made.width(group, key, chosen, steps)
        same = trial_loop.saved_step(sweep.workdir, chosen[0])
        chosen = [p for p in chosen if trial_loop.saved_step(sweep.workdir, p) == same][:count]
        try:
            on = made.get(group, key, count)
            trial_loop.advance(
                group, chosen, on=on, workdir=sweep.workdir, to=stop, bar=bar, say=sweep.say
            )
        except jax.errors.JaxRuntimeError as error:
            parallelism.check_memory(error)
            made.narrow(key, count, error)
    if not rung:
        settled = [
            trial_loop.settle(group, point, sweep.workdir, sweep.say)
            for point in unfinished(sweep, pending)
        ]
        if not all(settled):  # those whose last checkpoint is damaged have some way to go again
            _train(sweep, group, pending, made=made, rung=rung, bar=bar)


def _next(sweep: Sweep, pending: list[Point], stop: Stop) -> list[Point]:
    """The runs that have not come to the stop; those that were under way first."""
    at = {p.id: trial_loop.saved_step(sweep.workdir, p) for p in unfinished(sweep, pending)}
    late = [p for p in pending if p.id in at and at[p.id] < stop.step]
    return sorted(late, key=lambda p: -at[p.id])


def _rank(entry: dict[str, Any]) -> tuple[float, float]:
    """What runs are sorted by at a rung: the score, the best first, then the loss."""
    score, _ = sweep_dirs.best(entry["summary"])
    return -score.merit(entry[score.name]), entry["loss"]


def _drop(sweep: Sweep, rung: int, bar: Bar) -> None:
    """Finishes the runs that are not among the best at a rung."""
    folder = functools.partial(sweep_dirs.run_dir, sweep.workdir)
    seen = {p.id: trial_loop.rungs(folder(p)).get(str(rung)) for p in sweep.points}
    ranked = [p for p in sweep.points if seen[p.id]]
    ranked.sort(key=lambda p: _rank(seen[p.id]))
    keep = survivors(len(sweep.points), sweep.halving, rung)
    losers = unfinished(sweep, ranked[keep:])
    for point in losers:
        entry = seen[point.id]
        values = {"status": sweep_dirs.DROPPED, "steps": entry["step"], **entry["summary"]}
        sweep_dirs.finish(sweep.workdir, point, values)
        bar.at(point, 1.0)
    if losers:
        sweep.say(f"rung {rung}: {len(losers)} runs dropped, {min(keep, len(ranked))} go on")
