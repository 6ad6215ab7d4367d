"""Bounds of memory and time for what reads damaged files, and the errors that it may raise."""

import contextlib
import resource
import time
import tracemalloc
from pathlib import Path

CLEAN = (ValueError, KeyError, OSError)  # FileNotFoundError is an OSError

ROOM = 3 << 30  # bytes of address space beyond what the process has: no mutation may want them


@contextlib.contextmanager
def bounded(size, traced=True):
    """Python's own memory to a multiple of a file's size, all memory and the time absolutely.

    Python's tracing of its memory can crash where threads of other libraries end (CPython 3.11).
    """
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, limits[1]))
    if traced:
        tracemalloc.start()
    begun = time.process_time()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]  # 0 if it is not traced
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert peak < 30 * size + 20e6, peak
    assert time.process_time() - begun < 20


def refused(load, size, traced=True):
    """The error, or None and what was loaded."""
    with bounded(size, traced):
        try:
            return None, load()
        except CLEAN as error:
            assert str(error) and len(str(error)) < 20_000
            return error, None
