"""The compilation of a step in a thread, while the main one does something else."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax

from lora_jax.training.kept_programs import Program, describe

PyTree = Any


@contextlib.contextmanager
def compile_ahead(step: Any, *args: PyTree) -> Iterator[None]:
    """Compiles a function while the block runs; a call after it finds the program in JAX's caches.

    At the end of the block the compilation is waited for, since the call would start another. What
    fails here fails at the call once more, and is told there. The function and its arguments are
    for a single device; nothing is computed, and arguments may be donated in the block.

    Args:
      step: a function that ``jax.jit`` has returned, or a program around it.
      args: arguments of the call, or others of their shapes and dtypes.
    """
    shapes = jax.tree.map(describe, args)

    def compile_step() -> None:
        with contextlib.suppress(Exception):
            if isinstance(step, Program):
                step.prepare(*shapes)
            else:
                step.lower(*shapes).compile()

    thread = threading.Thread(target=compile_step, name="compile ahead")
    thread.start()
    try:
        yield
    finally:
        thread.join()
