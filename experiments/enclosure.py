"""What keeps a run inside its directory, and every other process out of it."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


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
        if path.is_symlink() and not path.resolve().is_relative_to(root)
    ]
    if bad:
        raise ValueError(
            f"The workdir {workdir} holds links that lead out of it: {', '.join(bad[:10])}. Remove "
            "them, or move what they lead to to their place: a run writes nowhere else."
        )
