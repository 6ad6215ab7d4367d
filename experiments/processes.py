"""Several processes that are one run: how each of them joins the others, and how it ends.

Each process has some of the devices, and runs the same program. The first one writes and prints.
"""

import os
import sys
from typing import Any, NoReturn

from absl import flags

from experiments import lazy

with lazy.imports():
    import jax

_COORDINATOR = flags.DEFINE_string("coordinator", None, "Address of process 0, HOST:PORT.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes the run has.", 1)
_PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.", 0)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Find the other processes by Slurm, Kubernetes or a TPU pod."
)

# Seconds. A process that has died is detected when its connection breaks, or after this time.
_START, _HEARTBEAT, _END = 300, 30, 60


def start() -> None:
    """Joins the other processes, if flags or environment name any.

    Raises:
      ValueError: flags and environment are not complete, or wrong; or the others do not come in
        time.
    """
    settings = _read_settings()
    missing = [f"--{name}" for name, value in settings.items() if value is None]
    if len(missing) == len(settings) and not _DISTRIBUTED.value:
        return
    if missing and not _DISTRIBUTED.value:
        raise ValueError(
            f"{', '.join(missing)} must be given, too, to make one run of several processes; or "
            "--distributed alone, under Slurm, Kubernetes or on a TPU pod."
        )
    _check(settings)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address=settings["coordinator"],
            num_processes=settings["processes"],
            process_id=settings["process"],
            cluster_detection_method=None if _DISTRIBUTED.value else "deactivate",
            initialization_timeout=_START,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_END,
        )
    except RuntimeError as error:
        raise ValueError(
            f"This process could not join the others within {_START} s: {error}. Start all of "
            "them, with the same --coordinator and --processes, each with its own --process."
        ) from error
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _read_settings() -> dict[str, Any]:
    """Reads the flags, or else the variables that JAX has for the same."""
    coordinator = _COORDINATOR.value
    if coordinator is None:
        coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
    return {
        "coordinator": coordinator,
        "processes": _number(_PROCESSES, "JAX_NUM_PROCESSES"),
        "process": _number(_PROCESS, "JAX_PROCESS_ID"),
    }


def _number(flag: flags.FlagHolder, variable: str) -> int | None:
    if flag.value is not None:
        return flag.value
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else None


def _check(settings: dict) -> None:
    coordinator, count, number = settings.values()
    if coordinator and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"--coordinator={coordinator}: an address has the form HOST:PORT.")
    if None not in (count, number) and number >= count:
        raise ValueError(
            f"--process={number} --processes={count}: processes are numbered from 0 to {count - 1}."
        )


def fail(status: int) -> int:
    """Ends a process that has failed, at once if there are others, so that they notice.

    A usual end would wait for the others, which wait for this one.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        _leave(status)
    return status


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
