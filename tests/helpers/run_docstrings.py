"""Runs the docstrings of the modules that it is given, and prints the report of those that fail.

Each module is imported by a process of its own, since flags of several programs may share a name: a fork of this one,
which has imported what is slow to import and is not theirs.
"""

import doctest
import importlib
import os
import sys

import flax.linen  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import optax  # noqa: F401
import orbax.checkpoint  # noqa: F401
import tensorflow_datasets  # noqa: F401


def passes(name):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    try:
        failed = doctest.testmod(importlib.import_module(name)).failed
        sys.stdout.flush()
        os._exit(failed > 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


if __name__ == "__main__":
    failed = [name for name in sys.argv[1:] if not passes(name)]
    print(f"{len(sys.argv) - 1} modules, failed: {failed}")
    sys.exit(bool(failed))
