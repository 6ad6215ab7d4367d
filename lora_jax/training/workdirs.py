"""The directory of a run: names of its files, its config, and the lock on it."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lora_jax.files import write_atomically

CONFIG, METRICS, CURVES, ADAPTER = "config.json", "metrics.jsonl", "curves.png", "adapter"
CHECKPOINTS, EVENTS = "checkpoints", "tensorboard"
TRACKERS, ABOUT = "trackers.json", "about.json"
LOG = "log"  # section of a config that says where metrics go
SWEEP = "sweep.json"  # in the directory of a sweep, whose runs are in directories below it
# Fields, or sections, of a config that may differ between a run and its continuation.
MAY_CHANGE = ("checkpoint_keep", "guard", "mesh", "pmap", "replies", LOG)
# Fields that the configs of older runs lack, with the values that stand for what was done then.
ADDED = {
    "eval_at_start": False, "init_batches": 8, "model.quantize": "", "model.attention": "auto",
    "model.scan_layers": False,
    "lora.method": "lora", "lora.init": "uniform", "lora.train_a": True, "lora.projection_seed": 0,
    "lora.train_tokens": {}, "lora.adapt_bias": False, "data.add_tokens": [],
    "optimizer.b_rate": 1.0, "optimizer.embedding_rate": 1.0, "optimizer.orthogonality": 0.5,
    "optimizer.budget": {}, "optimizer.budget.target_rank": 0, "optimizer.budget.begin": 0.1,
    "optimizer.budget.end": 0.3, "optimizer.budget.every": 1, "optimizer.budget.beta1": 0.85,
    "optimizer.budget.beta2": 0.85,
}  # fmt: skip


def check(workdir: Path, config: ConfigDict) -> None:
    """Checks, without changing the directory, that a run with this config may use it.

    Raises:
      ValueError: it holds a run with another config (the message shows the differences), or
        checkpoints of an unknown one, or is a file, or holds links that lead out of it.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"The workdir {workdir} is a file; give a directory, new or of this run.")
    if (workdir / SWEEP).exists():
        raise ValueError(f"The workdir {workdir} is that of a sweep; use a new workdir for a run.")
    check_links(workdir)
    path = workdir / CONFIG
    if not path.exists():
        if (workdir / CHECKPOINTS).exists() or (workdir / ADAPTER).exists():
            raise ValueError(
                f"The workdir {workdir} holds a run, but not its {CONFIG}, so it is not known "
                "whether it is this one; use a new workdir."
            )
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); use a new workdir.") from error
    changes = list(differences(stored, to_json_types(config)))
    if changes:
        raise ValueError(
            f"The workdir {workdir} holds a run with another config: {'; '.join(changes)}. "
            f"Use a new workdir, or the old config, {path}, to go on with that run."
        )


def claim(workdir: Path, config: ConfigDict) -> None:
    """Takes the directory for a run with this config, unless the run has it already.

    Only the process that holds the directory's lock may call it.

    Raises:
      ValueError: as :func:`check`.
      OSError: it can't be written.
    """
    check(workdir, config)
    for pattern in (
        f".{CONFIG}.*",
        f".{METRICS}.*",
        f".{CURVES}.*",
        f".{TRACKERS}.*",
        f"{ADAPTER}/.adapter*",
    ):
        for leftover in workdir.glob(pattern):  # a process was killed while it wrote
            leftover.unlink(missing_ok=True)
    path = workdir / CONFIG
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(to_json_types(config), indent=2) + "\n").encode())


def to_json_types(config: ConfigDict) -> dict[str, Any]:
    """Converts a config to JSON types, in which tuples compare as they are stored."""
    return json.loads(config.to_json_best_effort())


def differences(old: Any, new: Any, field: str = "") -> Iterator[str]:
    """Yields a phrase for each field that differs between two configs, and may not."""
    name = field.removeprefix("config.")
    if name in MAY_CHANGE:
        return
    old = ADDED.get(name) if old is None else old
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(old.get(name), new.get(name), f"{field}.{name}".lstrip("."))
    elif old != new:
        yield f"{field} is {old!r} there and {new!r} here"


@contextlib.contextmanager
def lock(workdir: Path, name: str = ".lock", hint: str = "wait for it") -> Iterator[None]:
    """Locks the directory against other processes inside the block; makes it if need be.

    The system releases the lock when the process ends, however it ends.

    Args:
      workdir: directory of a run or of a sweep.
      name: name of the file that stands for the lock; each name is a lock of its own.
      hint: advice for the case that another process has the lock.

    Raises:
      ValueError: another process has the lock.
      OSError: the directory can't be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = os.open(workdir / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        message = f"The workdir {workdir} can't be written: {error.strerror}"
        raise OSError(error.errno, message) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"Another process is at work in {workdir}: {hint}.") from error
        yield
    finally:
        os.close(handle)


def check_links(workdir: Path) -> None:
    """Checks that no link in a directory, or in a folder of it, leads out of it.

    So nothing that is written there ends up elsewhere. The directory itself may be reached through
    a link.

    Raises:
      ValueError: names the links that do.
    """
    root = workdir.resolve()
    entries = [path for pattern in ("*", "*/*") for path in sorted(root.glob(pattern))]
    bad = [
        f"{path.relative_to(root)} -> {os.readlink(path)}"
        for path in entries
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root)
    ]
    if bad:
        raise ValueError(
            f"The workdir {workdir} holds links that lead out of it: {', '.join(bad[:10])}. Remove "
            "them, or move what they lead to to their place: a run writes nowhere else."
        )
