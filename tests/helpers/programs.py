"""Runs the programs as a user does, without the seconds that their imports take.

:func:`run` is ``python -m experiments.MODULE ARGUMENTS`` in a process of its own: its own flags,
its own devices, its own exit status. The process is a fork of one that has imported the libraries,
but none of the programs, and that has not asked JAX for a device. A few tests start a program for
real, with :func:`start`.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.places import ROOT


def run(module, *arguments, stdin="", timeout=300, env=None):
    """Runs a program to its end; the result is that of ``subprocess.run`` with text.

    Args:
      module: its name in ``experiments``.
      *arguments: as on the command line, in any type that has a text.
      stdin: what it reads.
      timeout: seconds, after which it is killed.
      env: variables of its environment beside those of this process. What JAX reads when it is
        imported (JAX_...) is that of this process; use :func:`start` to change it.
    """
    changes = os.environ | (env or {})
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        files[0].write_text(stdin)
        argv = [str(ROOT / "experiments" / f"{module}.py"), *map(str, arguments)]
        order = dict(module=module, argv=argv, files=[*map(str, files)], env=dict(changes))
        status = _ask(_server(), order, timeout)
        out, err = (path.read_text() if path.exists() else "" for path in files[1:])
    return subprocess.CompletedProcess(argv, status, out, err)


def start(module, *arguments, stdin="", timeout=300, env=None):
    """The same in a process that starts from nothing, as a user's does."""
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)], cwd=ROOT,
        capture_output=True, text=True, input=stdin, timeout=timeout, env=os.environ | (env or {}),
    )  # fmt: skip


def succeed(module, *arguments, **options):
    """What a run prints that ends well."""
    done = run(module, *arguments, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@functools.cache
def _server():
    """The process to fork from: one for each process of tests."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.programs"], cwd=ROOT, text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    atexit.register(_close, server)
    return server


def _close(server):
    server.stdin.close()
    server.wait(timeout=60)


def _ask(server, order, timeout):
    server.stdin.write(json.dumps(order | {"timeout": timeout}) + "\n")
    answer = json.loads(server.stdout.readline())
    if "late" in answer:
        raise subprocess.TimeoutExpired(order["argv"], timeout)
    return answer["status"]


# What the programs import, apart from one another.
LIBRARIES = (
    "flax.linen", "matplotlib.figure", "ml_collections.config_flags", "optax", "orbax.checkpoint", "tokenizers",
    "lora_jax.sweeps.report", "lora_jax.sweeps.scheduler", "lora_jax.tasks.chat", "lora_jax.tasks.classification",
    "lora_jax.tasks.e2e", "lora_jax.tasks.instruction_tuning", "lora_jax.training.train",
)  # fmt: skip


# ---- In the process that is forked ---------------------------------------------------------------


def _import_libraries():
    for name in LIBRARIES:
        importlib.import_module(name)


def _serve():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing else is to be an answer
    _import_libraries()
    gc.freeze()  # a fork then ends without a look at what it has not made
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            return _become(order)  # and ends as any program does
        print(json.dumps(_wait(pid, order["timeout"])), file=answers)
    return None


def _wait(pid, timeout):
    handle = os.pidfd_open(pid)
    ended, _, _ = select.select([handle], [], [], timeout)
    os.close(handle)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"status": status} if ended else {"late": True}


def _become(order):
    """Turns this process into the program."""
    modes = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
    for number, (path, mode) in enumerate(zip(order["files"], modes, strict=True)):
        file = os.open(path, mode, 0o600)
        os.dup2(file, number)
    sys.stdin = os.fdopen(0)
    os.environ.clear()
    os.environ.update(order["env"])
    sys.argv = order["argv"]
    with contextlib.suppress(BrokenPipeError):
        runpy.run_module(f"experiments.{order['module']}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
