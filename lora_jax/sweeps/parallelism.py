"""How many runs go through a compiled step at a time, and the programs made for it."""

import math
import time
from collections.abc import Sequence

import jax

from lora_jax.sweeps import vmapped_step
from lora_jax.sweeps.trial_loop import Group
from lora_jax.sweeps.trials import Point
from lora_jax.sweeps.vmapped_step import Program

# The part of the remaining time that finding out whether more runs at a time are faster may cost.
# On a CPU they rarely are: a single run already keeps its cores busy.
_PROBE_SHARE = {"cpu": 0.01}
_PROBE_SHARE_ELSEWHERE = 0.5
_PROBE_GROWTH = 4  # from one number of runs at a time to the next that is tried
_PROBE_GAIN = 1.05  # throughput must grow by this, or the smaller number stays
_PROBE_STEPS = 3


def key(point: Point) -> str:
    """Groups of equal keys differ in their data alone, and so may share compiled steps."""
    config = point.config
    model = f"{config.model.to_json()}{tuple(config.lora.targets)}{tuple(config.lora.train)}"
    return f"{model}{vmapped_step.options(config)}"


class Programs:
    """The programs of a sweep, made when first asked for, and the choice of their width."""

    def __init__(self, parallel: int | None) -> None:
        self._parallel = parallel
        self._made: dict[tuple, Program] = {}
        self._width: dict[str, int] = {}
        self._last: dict[str, int] = {}

    def get(self, group: Group, key: str, count: int) -> Program:
        """The program for ``count`` runs of a group; those of equal key and shapes share it."""
        place = key, str(group.shapes), group.dropout, count
        if place not in self._made:
            self._made[place] = vmapped_step.program(
                group.task, count, dropout=group.dropout, options=group.options
            )
        return self._made[place]

    def width(self, group: Group, key: str, runs: Sequence[Point], steps: int) -> int:
        """How many of these runs to do at a time, that have ``steps`` steps left together."""
        if key not in self._width:
            found = self._parallel or (1 if len(runs) == 1 else 0)
            self._width[key] = found or self._measured(group, key, runs, steps)
        even = math.ceil(len(runs) / math.ceil(len(runs) / self._width[key]))  # 17 by 16: 9 and 8
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

    def _measured(self, group: Group, key: str, runs: Sequence[Point], steps: int) -> int:
        """Tries one run for each device, then more at a time, while that pays."""
        share = _PROBE_SHARE.get(jax.default_backend(), _PROBE_SHARE_ELSEWHERE)
        devices, run = min(len(jax.devices()), len(runs)), runs[0].id
        best = width = devices
        seconds = _seconds(self.get(group, key, width), group, run) / width
        cost = vmapped_step.compile_seconds(self.get(group, key, width))
        while width < len(runs) and cost < share * steps * seconds:
            width = min(width * _PROBE_GROWTH, math.ceil(len(runs) / devices) * devices)
            found = _seconds(self.get(group, key, width), group, run) / width
            if found * _PROBE_GAIN > seconds:
                break
            best, seconds = width, found
        return best


def _seconds(on: Program, group: Group, run: str) -> float:
    """The time of one of the first steps, tried on copies of a run; infinite for no memory."""
    try:
        return _time(on, group, run)
    except jax.errors.JaxRuntimeError as error:
        check_memory(error)
        return math.inf


def _time(on: Program, group: Group, run: str) -> float:
    member = vmapped_step.pad(group.member(run), group.shapes)
    members = vmapped_step.place(on, vmapped_step.stack([member] * on.count, on.count))
    base, batch = vmapped_step.replicate(on, group.task.base), group.task.train_batch(0)
    times = []
    for _ in range(_PROBE_STEPS + 1):  # the first one is not like the others
        step = vmapped_step.compiled(on, "train", members, base, batch)
        begin = time.perf_counter()
        members, _ = jax.block_until_ready(step(members, base, batch))
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def check_memory(error: jax.errors.JaxRuntimeError) -> None:
    """Raises what is not an error of memory."""
    if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
        raise error
