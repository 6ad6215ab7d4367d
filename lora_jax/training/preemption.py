"""Stops on request: by SIGTERM, which schedulers send some time before they end a process.

The handler only sets a flag. The loop reads it at each step, and stops at a step that it can go on
from.
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
# No threading.Event: a second signal while the first one sets it would wait forever.
_is_requested = False


class Stopped(Exception):
    """The run was asked to stop, and has stopped at a checkpoint; the message says how to go on."""


class Interrupted(Exception):
    """An evaluation was broken off, since the run was asked to stop."""


@contextmanager
def handle_sigterm() -> Iterator[None]:
    """Makes SIGTERM a request to stop inside the block, however often it comes.

    The old handler is back after the block. Only the main thread can have a handler; in another
    one nothing changes. Nor does anything among several processes, where JAX's own handler must
    stay.
    """
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield
        return
    _set_requested(False)
    old = signal.signal(signal.SIGTERM, lambda *_: _set_requested(True))
    try:
        yield
    finally:
        _set_requested(False)
        # None stands for a handler that was not set from Python, which can't be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if old is None else old)


def _set_requested(value: bool) -> None:
    global _is_requested
    _is_requested = value


def is_requested(step: int) -> bool:
    """Returns whether to stop after ``step``.

    Every process must call it once a step, in order. Several processes agree on a step that none of
    them has passed yet.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return _is_requested


def until_requested(items: Iterable[_T]) -> Iterator[_T]:
    """Yields the items, as long as no stop is requested.

    Raises:
      Interrupted: a stop is requested.
    """
    for item in items:
        if _is_requested:
            raise Interrupted
        yield item


def command_line() -> str:
    """Returns the command line of this process, to be pasted into a shell."""
    return shlex.join(sys.orig_argv)
