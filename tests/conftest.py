"""Settings that turn silent numerical accidents into failures, and tests that compile fast."""

import os
import pathlib

# The tests compile thousands of tiny programs and run each once. Without LLVM's optimizer, and with
# XLA's older emitters of fused loops, that takes half of the processor time. Read when JAX is first
# imported; a value that is set stays (`XLA_FLAGS= make test` tests with what users run).
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
# Whatever was compiled is kept in the checkout, for other processes and the next run.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).resolve().parents[1] / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from absl import logging

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def quiet():
    """As the commands have it: Orbax logs a failed save with its traceback, which keeps files open."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="session")
def left_alone(tmp_path_factory):
    """The outcome of a run of ``tiny_task`` that nothing happened to."""
    from tests.helpers import tiny_task

    workdir = tmp_path_factory.mktemp("left_alone")
    tiny_task.run(workdir)
    return tiny_task.outcome(workdir)


@pytest.fixture
def key():
    return jax.random.key(7)
