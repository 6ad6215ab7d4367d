"""The order of a sweep's work: groups, runs that go together, and halving.

No state is kept but what is on disk. So going on is the same after a kill, after running out of
memory and after runs were added: look at what each run lacks, and do that.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lora_jax.sweeps import parallelism, sweep_dirs, trial_loop, trials, vmapped_step
from lora_jax.sweeps.parallelism import Programs
from lora_jax.sweeps.progress_bar import ProgressBar
from lora_jax.sweeps.trial_loop import Group, Stop
from lora_jax.sweeps.trials import Trial
from lora_jax.sweeps.vmapped_step import Member
from lora_jax.tasks import from_config
from lora_jax.training import about, durations, preemption, trackers
from lora_jax.training.task import Recipe, Task

_LOGGER = logging.getLogger("lora_jax.sweeps")
_CACHE_BYTES = 2**30  # size of the cache of runs at step 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep and the share of this process in it.

    Attributes:
      trials: all runs of the sweep.
      local_trials: runs that this process is to do.
      recipe: recipe of the runs' program.
      workdir: directory of the sweep.
      parallel: number of runs at a time; None to measure which number is fastest.
      halving: number of runs of which one goes on after a rung; 0 for no halving.
      shard: part of the sweep that this process does, i/n.
      axes: fields and their values, of a sweep that is a grid of the command line's; {} if not.
      say: takes each message; by default the logger ``lora_jax.sweeps``.
    """

    trials: list[Trial]
    local_trials: list[Trial]
    recipe: Recipe
    workdir: Path
    parallel: int | None = None
    halving: int = 0
    shard: str = "1/1"
    axes: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    say: Callable[[str], None] = _LOGGER.info


def prepare(
    recipe: Recipe,
    members: Sequence[Trial],
    pending: Sequence[Trial],
    say: Callable[[str], None] = _LOGGER.info,
) -> Group:
    """Loads what the runs of a group share, and checks that each pending run can start.

    Args:
      recipe: makes the task.
      members: all runs of the group, whose ranks decide its shapes whether or not they are pending.
      pending: runs of the group that are to be trained.
      say: takes a line about a tracker that has failed.

    Raises:
      ValueError: runs and model do not fit; the message has all such runs.
    """
    task, _ = recipe.make_task(pending[0].config)
    plan = durations.make_plan(pending[0].config, task.steps_per_epoch)  # the same for all of them
    make_member = _cached_maker(task, plan, members, pending[0])
    kernels = vmapped_step.adapted_kernels(make_member(pending[0].id))
    largest = [max(members, key=functools.partial(_rank_of, name)) for name in kernels]
    needed = {trial.id: trial for trial in (*pending, *largest)}.values()
    return Group(
        task=task,
        plan=plan,
        make_member=make_member,
        shapes=vmapped_step.common_shapes(_check_members(make_member, needed)),
        has_dropout=any(trial.config.lora.dropout > 0 for trial in members),
        options=vmapped_step.make_options(pending[0].config, *(x.config for x in members)),
        outlets=trackers.make_outlets(pending[0].config, say),
    )


def _cached_maker(
    task: Task, plan: durations.Plan, members: Sequence[Trial], first: Trial
) -> Callable[[str], Member]:
    """Returns the function from a run's id to the run at step 0, with a cache."""
    by_id = {trial.id: trial for trial in members}

    def make_member(name: str) -> Member:
        config = by_id[name].config
        return vmapped_step.make_member(task, config, from_config.lora_config(config), plan=plan)

    size = sum(x.nbytes for x in jax.tree.leaves(_check_members(make_member, [first])[0]))
    # Many small adapters are all kept; of large ones, each is drawn again when its turn comes.
    return functools.lru_cache(maxsize=max(1, _CACHE_BYTES // size))(make_member)


def _rank_of(kernel: str, trial: Trial) -> int:
    return from_config.lora_config(trial.config).kernel_rank(kernel)


def _check_members(make_member: Callable[[str], Member], wanted: Iterable[Trial]) -> list[Member]:
    """Returns the shapes of runs, or raises one error for all that can't start.

    Raises:
      ValueError: config and model of a run do not fit.
    """
    members: list[Member] = []
    problems: dict[str, list[str]] = {}
    for trial in wanted:
        try:
            members.append(jax.tree.map(_without_data, make_member(trial.id)))
        except ValueError as error:
            problems.setdefault(str(error), []).append(trials.describe(trial, [*trial.values]))
    if problems:
        lines = [f"{error} ({'; '.join(runs)})" for error, runs in problems.items()]
        raise ValueError(f"Some runs of the sweep can't be started: {' '.join(lines)}")
    return members


def _without_data(x: np.ndarray) -> np.ndarray:
    """Returns an array of the same shape and dtype that takes no memory."""
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)


def run(sweep: Sweep, base: ConfigDict, programs: Programs | None = None) -> dict[str, int]:
    """Does all that is left to do, and returns how often each step was compiled.

    Args:
      sweep: the sweep.
      base: base config.
      programs: compiled steps of an earlier part of the sweep; by default there are none yet.

    Raises:
      ValueError: runs and model do not fit; or the directory is another sweep's, or in use.
      OSError: the directory can't be written; earlier checkpoints are intact.
      Stopped: SIGTERM came; each run has a checkpoint to go on from.
    """
    programs = programs or Programs(sweep.parallel)
    groups = trials.group(sweep.trials)
    # A sweep of one group, the usual kind, keeps it through all rungs.
    load = functools.lru_cache(maxsize=1)(functools.partial(_load_group, sweep, groups))
    first = next((n for n, members in enumerate(groups) if unfinished(sweep, members)), None)
    if first is None:
        return {}
    _find_stop(sweep, load(first), 0)  # before the claim, so that a mistake claims nothing
    sweep_dirs.claim(sweep.workdir, base, sweep.halving, sweep.axes)
    task = load(first).task
    about.write(sweep.workdir, base=task.base_id, notes=list(task.notes))
    varied = trials.varied_fields([trial.config for trial in sweep.trials])
    lock = sweep_dirs.lock(sweep.workdir, sweep.shard)
    with lock, preemption.handle_sigterm(), ProgressBar(sweep.local_trials, varied) as bar:
        _show_finished(sweep, bar)
        programs.show_compilation(bar.compiling)
        for rung in [*range(1, rung_count(sweep) + 1), 0]:
            for number, members in enumerate(groups):
                if pending := unfinished(sweep, members):
                    _train(sweep, load(number), pending, programs=programs, rung=rung, bar=bar)
            if rung:
                _drop(sweep, rung, bar)
                programs.forget()
    return programs.compilations()


def _show_finished(sweep: Sweep, bar: ProgressBar) -> None:
    for trial in sweep.local_trials:
        if result := sweep_dirs.read_result(sweep.workdir, trial):
            bar.set_progress(trial, 1.0, is_work=False)
            bar.set_best(trial, *sweep_dirs.best_score(result))


def unfinished(sweep: Sweep, members: Sequence[Trial]) -> list[Trial]:
    """Returns the runs of this process that have no result yet."""
    local = {trial.id for trial in sweep.local_trials}
    return [
        trial
        for trial in members
        if trial.id in local and sweep_dirs.read_result(sweep.workdir, trial) is None
    ]


def _load_group(sweep: Sweep, groups: list[list[Trial]], number: int) -> Group:
    members = groups[number]
    pending = unfinished(sweep, members)
    group = prepare(sweep.recipe, members, pending, sweep.say)
    ranks = [trial.config.lora.rank for trial in members]
    sweep.say(
        f"group {number + 1} of {len(groups)}: {len(pending)} runs of {len(members)} to do, "
        f"rank {min(ranks)} to {max(ranks)} in one shape\n" + "\n".join(group.task.notes)
    )
    return group


def rung_count(sweep: Sweep) -> int:
    """Returns how many times halving drops runs until one is left."""
    count, runs = 0, len(sweep.trials)
    while sweep.halving and runs > 1:
        runs = math.ceil(runs / sweep.halving)
        count += 1
    return count


def survivors(runs: int, halving: int, rung: int) -> int:
    """Returns how many runs go on after a rung.

    >>> [survivors(12, 3, rung) for rung in (1, 2, 3)]
    [4, 2, 1]
    """
    for _ in range(rung):
        runs = math.ceil(runs / halving)
    return runs


def rung_step(total: int, halving: int, rungs: int, rung: int) -> int:
    """Returns the step of a rung; each comes ``halving`` times later than the one before.

    >>> [rung_step(900, 3, 2, rung) for rung in (1, 2)]
    [100, 300]
    """
    return round(total / halving ** (rungs - rung + 1))


def _find_stop(sweep: Sweep, group: Group, rung: int) -> Stop:
    total, rungs = group.plan.total, rung_count(sweep)
    if total < sweep.halving**rungs:
        raise ValueError(
            f"--halving={sweep.halving} of {len(sweep.trials)} runs takes {rungs} rungs, for which "
            f"{total} steps are too few: train for {sweep.halving**rungs} steps or more, or leave "
            "halving out."
        )
    if not rung:
        return Stop(total)
    return Stop(rung_step(total, sweep.halving, rungs, rung), str(rung))


def _train(
    sweep: Sweep,
    group: Group,
    pending: list[Trial],
    *,
    programs: Programs,
    rung: int,
    bar: ProgressBar,
) -> None:
    """Takes the pending runs of a group to their next stop, as many at a time as fit."""
    key = parallelism.program_key(pending[0])
    stop = _find_stop(sweep, group, rung)
    saved_step = functools.partial(trial_loop.saved_step, sweep.workdir)
    while chosen := _select_next(sweep, pending, stop):
        steps = sum(stop.step - saved_step(trial) for trial in chosen)
        count = programs.width(group, key, chosen, steps)
        step = saved_step(chosen[0])
        chosen = [trial for trial in chosen if saved_step(trial) == step][:count]
        try:
            program = programs.get(group, key, count)
            trial_loop.advance(
                group, chosen, program=program, workdir=sweep.workdir, stop=stop, bar=bar,
                say=sweep.say,
            )  # fmt: skip
        except jax.errors.JaxRuntimeError as error:
            parallelism.check_memory(error)
            programs.narrow(key, count, error)
    if not rung:
        are_finished = [
            trial_loop.finish_if_done(group, trial, sweep.workdir, sweep.say)
            for trial in unfinished(sweep, pending)
        ]
        if not all(are_finished):  # a run whose last checkpoint is damaged has steps to do again
            _train(sweep, group, pending, programs=programs, rung=rung, bar=bar)


def _select_next(sweep: Sweep, pending: list[Trial], stop: Stop) -> list[Trial]:
    """Returns the runs that are not at the stop yet, those with the most steps first."""
    steps = {t.id: trial_loop.saved_step(sweep.workdir, t) for t in unfinished(sweep, pending)}
    late = [trial for trial in pending if trial.id in steps and steps[trial.id] < stop.step]
    return sorted(late, key=lambda trial: -steps[trial.id])


def _sort_key(entry: dict[str, Any]) -> tuple[float, float]:
    """Returns what runs are sorted by at a rung: the score, the best first, then the loss."""
    score, _ = sweep_dirs.best_score(entry["summary"])
    return -score.merit(entry[score.name]), entry["loss"]


def _drop(sweep: Sweep, rung: int, bar: ProgressBar) -> None:
    """Finishes the runs that are not among the best at a rung."""
    entries: dict[str, dict[str, Any]] = {}
    for trial in sweep.trials:
        rungs = trial_loop.read_rungs(sweep_dirs.run_dir(sweep.workdir, trial))
        entries[trial.id] = rungs.get(str(rung)) or {}
    ranked = [trial for trial in sweep.trials if entries[trial.id]]
    ranked.sort(key=lambda trial: _sort_key(entries[trial.id]))
    keep = survivors(len(sweep.trials), sweep.halving, rung)
    losers = unfinished(sweep, ranked[keep:])
    for trial in losers:
        entry = entries[trial.id]
        values = {"status": sweep_dirs.DROPPED, "steps": entry["step"], **entry["summary"]}
        sweep_dirs.finish(sweep.workdir, trial, values)
        bar.set_progress(trial, 1.0, is_work=False)
    if losers:
        sweep.say(f"rung {rung}: {len(losers)} runs dropped, {min(keep, len(ranked))} go on")
