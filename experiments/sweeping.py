"""What is run when: groups, cohorts within them, how many runs at a time, and halving.

Nothing is remembered but what is on disk, so that going on after a kill, after running out of
memory and after points were added is all the same: look at what each run lacks, and do that.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from experiments import classification, cohort, lockstep, points, sweepdirs, train
from experiments.bar import Bar
from experiments.cohort import Group, Stop
from experiments.lockstep import Program
from experiments.points import Point

# The part of the remaining time that finding out whether more runs at a time are faster may cost.
# On a CPU they rarely are: a single run already keeps its cores busy.
_PROBE_SHARE = {"cpu": 0.01}
_PROBE_SHARE_ELSEWHERE = 0.5
_PROBE_GROWTH = 4  # from one number of runs at a time to the next that is tried
_PROBE_GAIN = 1.05  # throughput must grow by this, or the smaller number stays
_PROBE_STEPS = 3


class Sweep(NamedTuple):
    """A sweep as it was asked for.

    Attributes:
      points: all of its runs.
      mine: those that this process is to do.
      workdir: of the sweep.
      parallel: runs at a time; None to find out.
      halving: of each so many runs one goes on after a rung; 0 for no halving.
      shard: which part this process does, i/n.
    """

    points: list[Point]
    mine: list[Point]
    workdir: Path
    parallel: int | None
    halving: int
    shard: str


class Programs:
    """The programs of a sweep, made when first asked for, and the choice of their width."""

    def __init__(self, parallel: int | None) -> None:
        self._parallel = parallel
        self._made: dict[tuple, Program] = {}
        self._width: dict[str, int] = {}
        self._last: dict[str, int] = {}

    def get(self, group: Group, key: str, count: int) -> Program:
        """The program for ``count`` runs of a group; those of equal key and shapes share it."""
        dropout = any(float(m.dropout) > 0 for m in group.members.values())
        place = key, str(group.shapes), dropout, count
        if place not in self._made:
            self._made[place] = lockstep.program(group.task, count, dropout=dropout)
        return self._made[place]

    def width(self, group: Group, key: str, runs: int, steps: int) -> int:
        """How many of ``runs`` runs to do at a time, that have ``steps`` steps left together."""
        if key not in self._width:
            found = self._parallel or (1 if runs == 1 else 0)
            self._width[key] = found or self._measured(group, key, runs, steps)
        even = math.ceil(runs / math.ceil(runs / self._width[key]))  # 17 by 16 are 9 and 8
        # The last runs go along in the program that is there, with idle places.
        self._last[key] = max(even, self._last.get(key, 0))
        return self._last[key]

    def narrow(self, key: str, count: int, error: Exception) -> None:
        """Halves the number of runs at a time, after running out of memory with ``count``.

        Raises:
          ValueError: it was one.
        """
        if count == 1:
            raise ValueError(
                "Not even one run at a time fits into memory: lower batch_size or data.buckets."
            ) from error
        self._width[key], self._last[key] = count // 2, 0

    def forget(self) -> None:
        """Lets the next runs have programs of their own: halving has left few of them."""
        self._last.clear()

    def compilations(self) -> dict[str, int]:
        """How often each step was compiled, by its name."""
        names = [name for made in self._made.values() for name, *_ in made.compiled]
        return {name: names.count(name) for name in sorted(set(names))}

    def _measured(self, group: Group, key: str, runs: int, steps: int) -> int:
        """Tries one run for each device, then more at a time, while that pays."""
        share = _PROBE_SHARE.get(jax.default_backend(), _PROBE_SHARE_ELSEWHERE)
        devices = min(len(jax.devices()), runs)
        best, width = devices, devices
        seconds = _seconds(self.get(group, key, width), group) / width
        cost = lockstep.compile_seconds(self.get(group, key, width))
        while width < runs and cost < share * steps * seconds:
            width = min(width * _PROBE_GROWTH, math.ceil(runs / devices) * devices)
            try:
                found = _seconds(self.get(group, key, width), group) / width
            except jax.errors.JaxRuntimeError as error:
                _check_memory(error)
                break
            if found * _PROBE_GAIN > seconds:
                break
            best, seconds = width, found
        return best


def _seconds(on: Program, group: Group) -> float:
    """The time of one of the first steps, tried on copies."""
    member = lockstep.pad(next(iter(group.members.values())), group.shapes)
    members = lockstep.place(on, lockstep.stack([member] * on.count, on.count))
    base, batch = lockstep.replicate(on, group.task.base), group.task.train_batch(0)
    times = []
    for _ in range(_PROBE_STEPS + 1):  # the first one is not like the others
        step = lockstep.compiled(on, "train", members, base, batch)
        begin = time.perf_counter()
        members, _ = jax.block_until_ready(step(members, base, batch))
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _check_memory(error: jax.errors.JaxRuntimeError) -> None:
    """Raises what is not an error of memory."""
    if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
        raise error


def prepare(members: Sequence[Point], pending: Sequence[Point]) -> Group:
    """Loads what the runs of a group share, and draws those that are pending.

    Args:
      members: all runs of the group, whose ranks decide its shapes whether or not they are pending.
      pending: those of them that are to be run.

    Raises:
      ValueError: runs and model do not fit; all such runs are in one message.
    """
    task, _ = classification.make_task(pending[0].config)
    found, problems = {}, {}
    for point in pending:
        try:
            found[point.id] = _member(task, point)
        except ValueError as error:
            problems.setdefault(str(error), []).append(points.label(point, point.values))
    if problems:
        lines = [f"{error} ({'; '.join(labels)})" for error, labels in problems.items()]
        raise ValueError(f"Some runs of the sweep can't be started: {' '.join(lines)}")
    kernels = lockstep.kernels(next(iter(found.values())))
    rank = lambda point, name: classification.lora_config(point.config).kernel_rank(name)
    largest = {max(members, key=lambda p, n=name: rank(p, n)).id for name in kernels}
    others = [_member(task, p) for p in members if p.id in largest and p.id not in found]
    return Group(task, found, lockstep.common_shapes([*found.values(), *others]))


def _member(task: train.Task, point: Point) -> lockstep.Member:
    return lockstep.member(task, point.config, classification.lora_config(point.config))


def run(sweep: Sweep, base: ConfigDict, say: Callable[[str], None]) -> dict[str, int]:
    """Does all that is left to do, and returns how often each step was compiled.

    Raises:
      ValueError: runs and model do not fit; the directory is another sweep's, or in use.
      OSError: it can't be written; what was there is intact.
    """
    programs = Programs(sweep.parallel)
    parts = points.groups(sweep.points)
    # A sweep of one group, the usual kind, keeps it through all rungs.
    ready = functools.lru_cache(maxsize=1)(functools.partial(_ready, sweep, parts, say))
    first = next((n for n, part in enumerate(parts) if unfinished(sweep, part)), None)
    if first is None:
        return {}
    ready(first)  # not before it has been checked: a mistake claims nothing
    sweepdirs.claim(sweep.workdir, base, sweep.halving)
    swept = points.swept([p.config for p in sweep.points])
    with sweepdirs.locked(sweep.workdir, sweep.shard), Bar(sweep.mine, swept) as bar:
        for point in sweep.mine:
            if found := sweepdirs.result(sweep.workdir, point):
                bar.at(point, 1.0)
                bar.found(point, found["best_accuracy"])
        for rung in [*range(1, rung_count(sweep) + 1), 0]:
            for number, part in enumerate(parts):
                if pending := unfinished(sweep, part):
                    _train(sweep, ready(number), pending, programs=programs, rung=rung, bar=bar)
            if rung:
                _drop(sweep, rung, say=say, bar=bar)
                programs.forget()
    return programs.compilations()


def unfinished(sweep: Sweep, among: Sequence[Point]) -> list[Point]:
    """The runs of this process that have no result yet."""
    mine = {point.id for point in sweep.mine}
    return [p for p in among if p.id in mine and sweepdirs.result(sweep.workdir, p) is None]


def _ready(
    sweep: Sweep, parts: list[list[Point]], say: Callable[[str], None], number: int
) -> Group:
    pending = unfinished(sweep, parts[number])
    group = prepare(parts[number], pending)
    ranks = [max(lockstep.ranks(m), default=0) for m in group.members.values()]
    say(
        f"group {number + 1} of {len(parts)}: {len(pending)} runs of {len(parts[number])} to do, "
        f"ranks {min(ranks)} to {max(ranks)} as one shape\n" + "\n".join(group.task.notes)
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


def _stop(sweep: Sweep, group: Group, point: Point, rung: int) -> Stop:
    total = point.config.epochs * group.task.steps_per_epoch
    rungs = rung_count(sweep)
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
    sweep: Sweep, group: Group, pending: list[Point], *, programs: Programs, rung: int, bar: Bar
) -> None:
    """Takes the pending runs of a group to their next stop, as many at a time as fit."""
    key = _program_key(pending[0])
    stop = _stop(sweep, group, pending[0], rung)  # one for the group: its runs are equally long
    while chosen := _next(sweep, pending, stop):
        steps = sum(stop.step - cohort.saved_step(sweep.workdir, p) for p in chosen)
        count = programs.width(group, key, len(chosen), steps)
        same = cohort.saved_step(sweep.workdir, chosen[0])
        chosen = [p for p in chosen if cohort.saved_step(sweep.workdir, p) == same][:count]
        try:
            on = programs.get(group, key, count)
            cohort.advance(group, chosen, on=on, workdir=sweep.workdir, to=stop, bar=bar)
        except jax.errors.JaxRuntimeError as error:
            _check_memory(error)
            programs.narrow(key, count, error)
    if not rung:
        for point in unfinished(sweep, pending):
            cohort.settle(group, point, sweep.workdir)


def _next(sweep: Sweep, pending: list[Point], stop: Stop) -> list[Point]:
    """The runs that have not come to the stop; those that were under way first."""
    at = {p.id: cohort.saved_step(sweep.workdir, p) for p in unfinished(sweep, pending)}
    late = [p for p in pending if p.id in at and at[p.id] < stop.step]
    return sorted(late, key=lambda p: -at[p.id])


def _program_key(point: Point) -> str:
    """Groups of equal keys differ in their data alone, and so may share compiled steps."""
    config = point.config
    return f"{config.model.to_json()}{tuple(config.lora.targets)}{tuple(config.lora.train)}"


def _drop(sweep: Sweep, rung: int, *, say: Callable[[str], None], bar: Bar) -> None:
    """Finishes the runs that are not among the best at a rung."""
    folder = functools.partial(sweepdirs.run_dir, sweep.workdir)
    seen = {p.id: cohort.rungs(folder(p)).get(str(rung)) for p in sweep.points}
    ranked = [p for p in sweep.points if seen[p.id]]
    ranked.sort(key=lambda p: (-seen[p.id]["accuracy"], seen[p.id]["loss"]))
    keep = survivors(len(sweep.points), sweep.halving, rung)
    losers = unfinished(sweep, ranked[keep:])
    for point in losers:
        entry = seen[point.id]
        values = {"status": sweepdirs.DROPPED, "steps": entry["step"], **entry["summary"]}
        sweepdirs.finish(sweep.workdir, point, values)
        bar.at(point, 1.0)
    if losers:
        say(f"rung {rung}: {len(losers)} runs dropped, {min(keep, len(ranked))} go on")
