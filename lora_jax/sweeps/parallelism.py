"""The number of runs that go through a compiled step at a time, and the programs for them."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import jax

from lora_jax.sweeps import vmapped_step
from lora_jax.sweeps.trial_loop import Group
from lora_jax.sweeps.trials import Trial
from lora_jax.sweeps.vmapped_step import Program

# The fraction of the remaining time that may be spent on finding out whether more runs at a time
# are faster. On a CPU they rarely are, since a single run already keeps its cores busy.
_PROBE_SHARE = {"cpu": 0.01}
_DEFAULT_PROBE_SHARE = 0.5
_PROBE_GROWTH = 4  # from one number of runs at a time to the next that is tried
_PROBE_GAIN = 1.05  # throughput must grow by this, or the smaller number stays
_PROBE_STEPS = 3


def program_key(trial: Trial) -> str:
    """Returns a text that is equal for runs whose groups may share compiled steps.

    Such groups differ in their data alone.
    """
    config = trial.config
    model = f"{config.model.to_json()}{tuple(config.lora.targets)}{tuple(config.lora.train)}"
    return f"{model}{vmapped_step.make_options(config)}"


class Programs:
    """The programs of a sweep, each made when it is first needed, and the choice of their width."""

    def __init__(self, parallel: int | None) -> None:
        self._parallel = parallel
        self._programs: dict[tuple, Program] = {}
        self._width: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._compiling: Callable[[], AbstractContextManager] = contextlib.nullcontext

    def show_compilation(self, compiling: Callable[[], AbstractContextManager]) -> None:
        """Sets what each compilation goes on within, for programs that are made from now on."""
        self._compiling = compiling

    def get(self, group: Group, key: str, count: int) -> Program:
        """Returns the program for ``count`` runs; groups of equal key and shapes share it."""
        full_key = key, str(group.shapes), group.has_dropout, group.options, count
        if full_key not in self._programs:
            self._programs[full_key] = vmapped_step.make_program(
                group.task, count, has_dropout=group.has_dropout, options=group.options
            )._replace(compiling=self._compiling)
        return self._programs[full_key]

    def width(self, group: Group, key: str, runs: Sequence[Trial], steps: int) -> int:
        """Chooses how many of these runs to do at a time; ``steps`` is the sum of their steps."""
        if key not in self._width:
            fixed = self._parallel or (1 if len(runs) == 1 else 0)
            self._width[key] = fixed or self._measure(group, key, runs, steps)
        even = math.ceil(len(runs) / math.ceil(len(runs) / self._width[key]))  # 17 by 16: 9 and 8
        # The last runs go through the program that is there, with some of its places idle.
        self._last[key] = max(even, self._last.get(key, 0))
        return self._last[key]

    def narrow(self, key: str, count: int, error: Exception) -> None:
        """Halves the number of runs at a time, after running out of memory with ``count``.

        Raises:
          ValueError: it was one run at a time.
        """
        if count == 1:
            raise ValueError(
                "Not even one run at a time fits into memory: lower batch_size or data.buckets."
            ) from error
        self._width[key], self._last[key] = count // 2, 0

    def forget(self) -> None:
        """Forgets the last widths, since halving has left fewer runs."""
        self._last.clear()

    def compilations(self) -> dict[str, int]:
        """Counts how often each step was compiled, by its name."""
        names = [name for program in self._programs.values() for name, *_ in program.compiled]
        return {name: names.count(name) for name in sorted(set(names))}

    def _measure(self, group: Group, key: str, runs: Sequence[Trial], steps: int) -> int:
        """Tries one run for each device, then more at a time, while that pays."""
        share = _PROBE_SHARE.get(jax.default_backend(), _DEFAULT_PROBE_SHARE)
        devices, run = min(len(jax.devices()), len(runs)), runs[0].id
        best = width = devices
        seconds = _seconds(self.get(group, key, width), group, run) / width
        cost = vmapped_step.compile_seconds(self.get(group, key, width))
        while width < len(runs) and cost < share * steps * seconds:
            width = min(width * _PROBE_GROWTH, math.ceil(len(runs) / devices) * devices)
            wider = _seconds(self.get(group, key, width), group, run) / width
            if wider * _PROBE_GAIN > seconds:
                break
            best, seconds = width, wider
        return best


def _seconds(program: Program, group: Group, run: str) -> float:
    """Measures a step on copies of a run; returns infinity if there is not enough memory."""
    try:
        return _time(program, group, run)
    except jax.errors.JaxRuntimeError as error:
        check_memory(error)
        return math.inf


def _time(program: Program, group: Group, run: str) -> float:
    member = vmapped_step.pad(group.make_member(run), group.shapes)
    stacked = vmapped_step.stack([member] * program.count, program.count)
    members = vmapped_step.place(program, stacked)
    base, batch = vmapped_step.replicate(program, group.task.base), group.task.train_batch(0)
    times = []
    for _ in range(_PROBE_STEPS + 1):  # the first step is not like the others
        step = vmapped_step.compile_step(program, "train", members, base, batch)
        begin = time.perf_counter()
        members, _ = jax.block_until_ready(step(members, base, batch))
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def check_memory(error: Exception) -> None:
    """Raises an error again, unless it is one of memory.

    Raises:
      JaxRuntimeError: it is another error.
    """
    if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
        raise error
