"""Settings that turn silent numerical accidents into failures, and tests that compile fast."""

import os
import pathlib

from tests.helpers import xla_flags

# Read when JAX is first imported; a value that is set stays.
os.environ.setdefault("XLA_FLAGS", xla_flags.make_flags())
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


def pytest_collection_modifyitems(items):
    """Leaves out what XLA's older emitters, which round each program in its own way, can't show."""
    if not xla_flags.has_older_emitters(os.environ["XLA_FLAGS"]):
        return
    reason = "needs XLA's usual emitters: XLA_FLAGS=--xla_backend_optimization_level=0"
    for item in items:
        if item.get_closest_marker("rounding"):
            item.add_marker(pytest.mark.skip(reason=reason))


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


@pytest.fixture
def compilations():
    """A list of one number, of programs that JAX has compiled, or read from its cache; set it to 0."""
    counts = [0]

    def count(name, _, **__):
        counts[0] += name == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    yield counts
    jax.monitoring.unregister_event_duration_listener(count)
