"""Several processes that are one run: how each of them finds the others, and how it ends.

Each process has some of the devices, and runs the same program. The first one writes, and speaks.
"""

import os
import sys
from typing import Any, NoReturn

import jax
from absl import flags

_COORDINATOR = flags.DEFINE_string("coordinator", None, "Address of process 0, HOST:PORT.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes the run has.", 1)
_PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.", 0)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Find the other processes by what Slurm, Kubernetes or a TPU pod tells."
)

# Seconds. A process that has died is noticed by a connection that breaks, or after this time.
_START, _HEARTBEAT, _END = 300, 30, 60


def start() -> None:
    """Joins the other processes, if the flags or the environment tell of any.

    Raises:
      ValueError: what they tell is not complete, or wrong; or the others are not there in time.
    """
    given = _given()
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given) and not _DISTRIBUTED.value:
        return
    if missing and not _DISTRIBUTED.value:
        raise ValueError(
            f"{', '.join(missing)} must be given, too, to make one run of several processes; or "
            "--distributed alone, where Slurm, Kubernetes or a TPU pod tells them."
        )
    _check(given)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address=given["coordinator"],
            num_processes=given["processes"],
            process_id=given["process"],
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


def _given() -> dict[str, Any]:
    """What the flags say, or else the variables that JAX has for the same."""
    number = lambda name: int(text) if (text := os.environ.get(name, "")).isdecimal() else None
    either = lambda flag, other: other if flag.value is None else flag.value
    return {
        "coordinator": either(_COORDINATOR, os.environ.get("JAX_COORDINATOR_ADDRESS")),
        "processes": either(_PROCESSES, number("JAX_NUM_PROCESSES")),
        "process": either(_PROCESS, number("JAX_PROCESS_ID")),
    }


def _check(given: dict) -> None:
    coordinator, count, number = given.values()
    if coordinator and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"--coordinator={coordinator}: an address has the form HOST:PORT.")
    if None not in (count, number) and number >= count:
        raise ValueError(
            f"--process={number} --processes={count}: processes are numbered from 0 to {count - 1}."
        )


def fail(status: int) -> int:
    """Ends a process that has failed, at once if there are others, so that they notice.

    A usual end would wait for them, who wait for this one.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        _leave(status)
    return status


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
