"""Settings that turn silent numerical accidents into failures, and tests that compile fast."""

import os

# The tests compile thousands of tiny programs and run each once: a third of their time is the
# optimiser of XLA's CPU backend. Read when JAX is first imported; a value that is set stays.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    return jax.random.key(7)
