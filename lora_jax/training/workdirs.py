"""The directory of a run: the names in it, its config, and what keeps others out of it."""

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
SWEEP = "sweep.json"  # in the directory of a sweep, whose runs are in directories below it
# Fields, or sections, of a config that may differ between a run and its continuation.
MAY_CHANGE = ("checkpoint_keep", "guard", "mesh", "pmap")


def check(workdir: Path, config: ConfigDict) -> None:
    """Finds out, without a change to it, whether a run with this config may use the directory.

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
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); use a new workdir.") from error
    changes = list(differences(theirs, plain(config)))
    if changes:
        raise ValueError(
            f"The workdir {workdir} holds a run with another config: {'; '.join(changes)}. "
            "Use a new workdir, or the old config to go on with that run."
        )


def claim(workdir: Path, config: ConfigDict) -> None:
    """Takes the directory for this config, or finds that it already has it.

    Only the process that holds its lock may do so.

    Raises:
      ValueError: as :func:`check`.
      OSError: it can't be written.
    """
    check(workdir, config)
    for pattern in (f".{CONFIG}.*", f".{METRICS}.*", f".{CURVES}.*", f"{ADAPTER}/.adapter*"):
        for left in workdir.glob(pattern):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
    path = workdir / CONFIG
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(plain(config), indent=2) + "\n").encode())


def plain(config: ConfigDict) -> Any:
    """The config as JSON types; through JSON, so that tuples compare as they are stored."""
    return json.loads(config.to_json_best_effort())


def differences(old: Any, new: Any, field: str = "") -> Iterator[str]:
    """Says which fields of two configs differ that may not, in a sentence each."""
    if field.removeprefix("config.") in MAY_CHANGE:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(old.get(name), new.get(name), f"{field}.{name}".lstrip("."))
    elif old != new:
        yield f"{field} is {old!r} there and {new!r} here"


@contextlib.contextmanager
def locked(workdir: Path, name: str = ".lock", hint: str = "wait for it") -> Iterator[None]:
    """Keeps a second process from working in the directory at the same time; makes it if need be.

    The system lets go of the lock when the process ends, however it ends.

    Args:
      workdir: of a run or of a sweep.
      name: of the file that stands for the lock; each is a lock of its own.
      hint: what to do if another process has it.

    Raises:
      ValueError: another process has it.
      OSError: the directory can't be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = os.open(workdir / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        said = f"The workdir {workdir} can't be written: {error.strerror}"
        raise OSError(error.errno, said) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"Another process is at work in {workdir}: {hint}.") from error
        yield
    finally:
        os.close(handle)


def check_links(workdir: Path) -> None:
    """Sees that nothing that is written in a directory would be written elsewhere.

    The directory itself may be reached through a link. Within it, and within its folders, a link
    must not lead out of it.

    Raises:
      ValueError: names the links that do.
    """
    root = workdir.resolve()
    found = [path for pattern in ("*", "*/*") for path in sorted(root.glob(pattern))]
    bad = [
        f"{path.relative_to(root)} -> {os.readlink(path)}"
        for path in found
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root)
    ]
    if bad:
        raise ValueError(
            f"The workdir {workdir} holds links that lead out of it: {', '.join(bad[:10])}. Remove "
            "them, or move what they lead to to their place: a run writes nowhere else."
        )
