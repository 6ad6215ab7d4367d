"""What is known of a run from its start: when, where and with which versions it was begun."""

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

from lora_jax.files import write_atomically
from lora_jax.training.workdirs import ABOUT
from lora_jax.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def write(workdir: Path, **facts: Any) -> None:
    """Writes the file of a run or a sweep, if there is none: it is of the first start.

    Args:
      workdir: directory of the run, or of the sweep.
      **facts: JSON that is kept beside date, versions and hardware.

    Raises:
      OSError: it can't be written.
    """
    path = workdir / ABOUT
    if not path.exists():
        text = json.dumps(collect() | facts, indent=2, ensure_ascii=False) + "\n"
        write_atomically(path, text.encode())


def update(workdir: Path, **facts: Any) -> None:
    """Adds what is known at the end of a run.

    Raises:
      OSError: it can't be written.
    """
    text = json.dumps(read(workdir) | facts, indent=2, ensure_ascii=False) + "\n"
    write_atomically(workdir / ABOUT, text.encode())


def read(workdir: Path) -> dict[str, Any]:
    """Reads the file; of a run of earlier versions, or a damaged file, nothing is known."""
    try:
        content = json.loads((workdir / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def collect() -> dict[str, Any]:
    """Collects date, versions and hardware.

    >>> sorted(collect())
    ['hardware', 'started', 'versions']
    """
    versions = {"lora_jax": __version__, "Python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"started": now, "versions": versions, "hardware": describe_hardware()}


def describe_hardware() -> str:
    """Describes the devices, and for a CPU its model and the cores that this process may use."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform != "cpu":
        return f"{len(devices)} × {kind}"
    # Not all systems tell which cores a process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices_text = f", {len(devices)} JAX devices" if len(devices) > 1 else ""
    return f"{_find_processor()}, {cores} cores{devices_text}"


def _find_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())
