"""A step that is compiled in a thread: found by the call, once, and its errors told by the call."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.training import loop
from lora_jax.training.compile_ahead import compile_ahead
from tests.helpers import tiny_task


def make_arguments():
    state = {"a": jnp.ones((3, 2)), "step": jnp.asarray(0), "key": jax.random.key(0)}
    return state, {"w": jnp.ones((2, 4), jnp.bfloat16)}, {"x": np.ones((5, 3), np.float32)}


def step(state, base, batch):
    out = batch["x"] @ state["a"] @ base["w"]
    noise = jax.random.normal(state["key"], ())
    return state | {"a": state["a"] + noise, "step": state["step"] + 1}, out


def test_the_call_compiles_nothing(compilations):
    run = jax.jit(step, donate_argnums=0)
    arguments = make_arguments()
    compilations[0] = 0
    with compile_ahead(run, *arguments):
        pass
    assert compilations[0] == 1
    state, out = run(*arguments)
    state, _ = run(state, *arguments[1:])
    assert compilations[0] == 1
    np.testing.assert_array_equal(out, np.full((5, 4), 6.0))
    assert arguments[0]["a"].is_deleted()  # donated by the call, not before


def test_the_block_goes_on_meanwhile():
    """The thread waits for a line of the block, so that the two are really side by side."""
    reached, entered = threading.Event(), threading.Event()

    def traced(x):
        entered.set()
        assert reached.wait(60)
        return x + 1

    with compile_ahead(jax.jit(traced), jnp.zeros(())):
        assert entered.wait(60)
        reached.set()


def test_what_fails_ahead_fails_at_the_call():
    def wrong(x):
        raise ValueError("wrong shapes")

    run = jax.jit(wrong)
    with compile_ahead(run, jnp.zeros(3)):
        pass
    with pytest.raises(ValueError, match="wrong shapes"):
        run(jnp.zeros(3))


def test_an_error_of_the_block_waits_for_the_compilation():
    with pytest.raises(KeyError), compile_ahead(jax.jit(jnp.sin), jnp.zeros(3)):
        raise KeyError("batch")


def test_a_run_compiles_no_more_than_without(compilations, tmp_path, monkeypatch):
    """The loop hands over what its call will have: the same state, base and batch."""

    def count(name):
        compilations[0] = 0
        tiny_task.run(tmp_path / name, eval_at_start=True)
        return compilations[0]

    count("first")  # operations outside of the steps are compiled once a process
    ahead = count("ahead")
    monkeypatch.setattr(loop, "compile_ahead", lambda *args: contextlib.nullcontext())
    assert count("without") == ahead > 0
