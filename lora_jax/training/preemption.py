"""Stopping on request: SIGTERM, which schedulers send some time before they end a process.

The handler only takes note; the loop asks at each step, and stops where it can go on from.
"""

import shlex
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

_T = TypeVar("_T")
_asked = False  # no threading.Event: a second signal while the first sets it would wait forever


class Stopped(Exception):
    """The run was asked to stop, and has stopped at a checkpoint; the message says how to go on."""


class Interrupted(Exception):
    """An evaluation was left, since the run was asked to stop."""


@contextmanager
def on_sigterm() -> Iterator[None]:
    """Takes note of SIGTERM inside the block, however often it comes, in place of ending there.

    The old handler is back after the block. Only the main thread can have a handler; in another
    one nothing changes. Nor does it among several processes, where JAX's own handler must stay.
    """
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield
        return
    _note(False)
    old = signal.signal(signal.SIGTERM, lambda *_: _note(True))
    try:
        yield
    finally:
        _note(False)
        # None stands for a handler that was not set from Python, which can't be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if old is None else old)


def _note(asked: bool) -> None:
    global _asked
    _asked = asked


def requested(step: int) -> bool:
    """Whether to stop after ``step``: to be asked once a step, in order, by every process.

    Several processes agree on a step that none of them has passed yet.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return _asked


def unless_requested(items: Iterable[_T]) -> Iterator[_T]:
    """The same items, as long as no stop is asked for.

    Raises:
      Interrupted: it is.
    """
    for item in items:
        if _asked:
            raise Interrupted
        yield item


def command() -> str:
    """The command line of this process, to be pasted into a shell."""
    return shlex.join(sys.orig_argv)
