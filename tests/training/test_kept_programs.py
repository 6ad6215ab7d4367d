"""Compiled functions on disk: what is kept is run, what has changed is not, and no result differs."""

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lora_jax.training import kept_programs
from lora_jax.training.kept_programs import Program, open_store
from lora_jax.training.train import train
from tests.helpers import tiny_task


@pytest.fixture(autouse=True)
def cache(tmp_path):
    """A cache of JAX's own that is empty and takes everything, as what is kept was written there."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path / "cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def make_step(addend=1.0):
    """A function of this process: a jitted one of its own, so that nothing is in JAX's memory."""
    traced = []

    def step(state, base, batch):
        traced.append(batch["x"].shape)
        out = batch["x"] @ state["a"] @ base["w"] + addend
        noise = jax.random.normal(jax.random.fold_in(state["key"], state["step"]), ())
        return state | {"a": state["a"] + noise, "step": state["step"] + 1}, out

    return jax.jit(step, donate_argnums=0), traced


def make_arguments(rows=5):
    state = {"a": jnp.ones((3, 2)), "step": jnp.asarray(0), "key": jax.random.key(0)}
    return state, {"w": jnp.ones((2, 4))}, {"x": np.ones((rows, 3), np.float32)}


def start(directory, step, description="a config"):
    """A start of a program, with what earlier ones have written."""
    store = open_store(directory, description)
    return Program("train", step, store, donates=True), store


def finish(store):
    store._workers.shutdown()  # as at the end of a process


def run(directory, step, description="a config", rows=5):
    program, store = start(directory, step, description)
    state, out = program(*make_arguments(rows))
    state, again = program(state, *make_arguments(rows)[1:])
    finish(store)
    return np.asarray(state["a"]), np.asarray(out), np.asarray(again)


def files(directory, suffix=".program"):
    return sorted(path for path in directory.iterdir() if path.suffix == suffix)


@pytest.mark.parametrize("is_large", [False, True])
def test_a_second_start_traces_and_compiles_nothing(tmp_path, compilations, monkeypatch, is_large):
    if is_large:
        monkeypatch.setattr(kept_programs, "_MOST_COPIED", 10)
    step, traced = make_step()
    first = run(tmp_path / "kept", step)
    assert len(traced) == 1 and len(files(tmp_path / "kept")) == 1
    step, traced = make_step()
    program, store = start(tmp_path / "kept", step)
    arguments = make_arguments()
    jax.block_until_ready(jax.device_put(arguments[0], may_alias=False))
    compilations[0] = 0
    state, out = program(*arguments)
    state, again = program(state, *arguments[1:])
    assert compilations[0] == 0 and len(traced) == 1
    assert arguments[0]["a"].is_deleted()  # it is donated as by the jitted function
    finish(store)
    for got, want in zip((state["a"], out, again), first, strict=True):
        np.testing.assert_array_equal(got, want)
    jitted, _ = make_step()
    state, out = jitted(*make_arguments())
    np.testing.assert_array_equal(out, first[1])


def test_each_shape_of_a_batch_has_its_program(tmp_path, compilations):
    step, _ = make_step()
    program, store = start(tmp_path / "kept", step)
    for rows in (5, 7, 5):
        program(*make_arguments(rows))
    finish(store)
    (index,) = files(tmp_path / "kept", ".json")
    assert len(files(tmp_path / "kept")) == 2 == len(json.loads(index.read_text()))
    step, traced = make_step()
    program, store = start(tmp_path / "kept", step)
    outputs = [program(*make_arguments(rows))[1] for rows in (7, 5, 7)]
    finish(store)
    assert [x.shape for x in outputs] == [(7, 4), (5, 4), (7, 4)] and len(traced) == 2


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("is_ahead", [False, True])
def test_what_has_changed_is_compiled_and_its_results_count(
    tmp_path, monkeypatch, is_ahead, is_large
):
    """The kept function has run, and has taken its state, when it turns out to be another.

    It has not, where the state is too large for a copy.
    """
    if is_large:
        monkeypatch.setattr(kept_programs, "_MOST_COPIED", 10)
    step, _ = make_step(1.0)
    run(tmp_path / "kept", step)
    step, traced = make_step(2.0)
    program, store = start(tmp_path / "kept", step)
    arguments = make_arguments()
    if is_ahead:
        program.prepare(*jax.tree.map(kept_programs.describe, arguments))
        assert not traced
    state, out = program(*arguments)
    finish(store)
    jitted, _ = make_step(2.0)
    want_state, want = jitted(*make_arguments())
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(state["a"], want_state["a"])
    assert int(state["step"]) == 1
    # From now on this one is what such a start finds.
    step, traced = make_step(2.0)
    _, store = start(tmp_path / "kept", step)
    (kept,) = [store.find(name) for name in store._loads]
    assert kept.fingerprint == store.fingerprint(step.lower(*make_arguments()))
    finish(store)


def test_other_trees_around_the_same_numbers_are_those_of_the_caller(tmp_path):
    """None of the names is that of an earlier start."""
    named = lambda name: jax.jit(lambda state, batch: {name: state["a"] + batch["x"]})
    arguments = lambda name: ({name: jnp.ones(3)}, {"x": np.ones(3, np.float32)})
    store = open_store(tmp_path / "kept", "")
    assert Program("f", named("old"), store)(*arguments("a")).keys() == {"old"}
    finish(store)
    store = open_store(tmp_path / "kept", "")
    assert Program("f", named("new"), store)(*arguments("a")).keys() == {"new"}
    finish(store)
    other = jax.jit(lambda state, batch: {"new": state["b"] + batch["x"]})
    store = open_store(tmp_path / "kept", "")
    assert Program("f", other, store)(*arguments("b")).keys() == {"new"}
    finish(store)


def test_a_program_that_is_prepared_is_not_compiled_again(tmp_path, compilations):
    step, traced = make_step()
    program, store = start(tmp_path / "kept", step)
    program.prepare(*jax.tree.map(kept_programs.describe, make_arguments()))
    arguments = make_arguments()
    compilations[0] = 0
    program(*arguments)
    finish(store)
    assert compilations[0] == 0 and len(traced) == 1 and files(tmp_path / "kept")


DAMAGES = {
    "empty": lambda data: b"",
    "no header": lambda data: b"5 2\nno program",
    "no text": lambda data: b"\xff\n",
    "cut": lambda data: data[:1000],
    "a bit": lambda data: data[:-500] + bytes([data[-500] ^ 1]) + data[-499:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_read_is_replaced(tmp_path, cache, damage):
    step, _ = make_step()
    want = run(tmp_path / "kept", step)
    (path,) = files(tmp_path / "kept")
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    _, store = start(tmp_path / "kept", make_step()[0])
    assert [store.find(name) for name in store._loads] == [None] and not path.exists()
    finish(store)
    for file in cache.iterdir():  # or else JAX would find it there, and it would not be written
        file.unlink()
    step, _ = make_step()
    for got, expected in zip(run(tmp_path / "kept", step), want, strict=True):
        np.testing.assert_array_equal(got, expected)
    step, _ = make_step()
    _, store = start(tmp_path / "kept", step)
    assert [store.find(name) is not None for name in store._loads] == [True]
    finish(store)


@pytest.mark.parametrize("content", ["", "[]", '{"train": 1}', "no JSON"])
def test_an_index_that_cannot_be_read_is_none(tmp_path, content):
    step, _ = make_step()
    run(tmp_path / "kept", step)
    (index,) = files(tmp_path / "kept", ".json")
    index.write_text(content)
    step, _ = make_step()
    run(tmp_path / "kept", step)
    assert len(json.loads(index.read_text())) == 1


def test_a_function_that_fails_where_it_is_loaded_is_removed(tmp_path, monkeypatch):
    """As one does that JAX had read from its own cache, in jaxlib 0.10."""
    step, _ = make_step()
    run(tmp_path / "kept", step)
    step, _ = make_step()
    program, store = start(tmp_path / "kept", step)

    def fail(outputs):
        monkeypatch.undo()
        raise jax.errors.JaxRuntimeError("NOT_FOUND: Function wrapped_convert.14 not found")

    monkeypatch.setattr(jax, "block_until_ready", fail)
    state, out = program(*make_arguments())
    np.testing.assert_array_equal(out, make_step()[0](*make_arguments())[1])
    finish(store)
    assert int(state["step"]) == 1 and not files(tmp_path / "kept")


def test_what_jax_reads_from_its_own_cache_is_not_written(tmp_path):
    step, _ = make_step()
    run(tmp_path / "kept", step)
    step, _ = make_step()
    want = run(tmp_path / "other", step)  # compiled by nobody: JAX has it
    assert not files(tmp_path / "other") and files(tmp_path / "other", ".json")
    step, _ = make_step()
    for got, expected in zip(run(tmp_path / "other", step), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_starts_of_other_kinds_share_what_is_the_same(tmp_path):
    step, _ = make_step()
    run(tmp_path / "kept", step, "one")
    step, _ = make_step()
    run(tmp_path / "kept", step, "another")
    assert len(files(tmp_path / "kept")) == 1 and len(files(tmp_path / "kept", ".json")) == 2
    step, _ = make_step()
    _, store = start(tmp_path / "kept", step, "another")
    assert all(store.find(name) for name in store._loads) and store._loads
    finish(store)


def test_what_calls_python_is_not_kept(tmp_path):
    def step(state, batch):
        shape = jax.ShapeDtypeStruct((3,), jnp.float32)
        return jax.pure_callback(np.sin, shape, state + batch["x"], vmap_method="sequential")

    store = open_store(tmp_path / "kept", "")
    program = Program("f", jax.jit(step), store)
    out = program(jnp.ones(3), {"x": np.ones(3, np.float32)})
    np.testing.assert_allclose(out, np.sin(np.full(3, 2.0)), rtol=1e-6)
    finish(store)
    assert not (tmp_path / "kept").exists()


def test_a_place_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    step, _ = make_step()
    want = run(tmp_path / "kept", step)
    for got, expected in zip(run(tmp_path / "file" / "kept", step), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_the_oldest_go_first(tmp_path, monkeypatch):
    names = ["a", "b", "c"]
    for name, addend in zip(names, (1.0, 2.0, 3.0), strict=True):
        step, _ = make_step(addend)
        if name == "c":
            sizes = [path.stat().st_size for path in (tmp_path / "kept").iterdir()]
            monkeypatch.setattr(kept_programs, "MAX_BYTES", sum(sizes) + max(sizes) // 2)
            run(tmp_path / "kept", make_step(1.0)[0], "a")  # used again, so that b is the oldest
        run(tmp_path / "kept", step, name)
    found = {}
    for name in names:
        _, store = start(tmp_path / "kept", make_step()[0], name)
        found[name] = len(store._loads)
        finish(store)
    assert found == {"a": 1, "b": 0, "c": 1}


def test_a_program_that_fails_early_does_not_wait_for_what_is_not_loaded(tmp_path, monkeypatch):
    for rows in (5, 6, 7):
        run(tmp_path / "kept", make_step()[0], rows=rows)
    release, loaded = threading.Event(), []

    def load(path):
        assert release.wait(60)
        loaded.append(path)

    monkeypatch.setattr(kept_programs, "_load", load)
    with open_store(tmp_path / "kept", "a config") as store:
        assert len(store._loads) == 3
    release.set()
    finish(store)
    assert len(loaded) <= 1  # the one that had begun


@pytest.mark.parametrize("setting", ["jax_disable_jit", "jax_debug_nans"])
def test_settings_that_ask_for_something_else_are_kept_to(tmp_path, setting):
    jax.config.update(setting, True)
    try:
        assert open_store(tmp_path, "") is None
    finally:
        jax.config.update(setting, False)
    assert open_store(tmp_path / "kept", "") is not None


def test_what_others_may_write_is_not_run(tmp_path):
    step, _ = make_step()
    run(tmp_path / "kept", step)
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
    for mode, is_used in ((0o770, False), (0o702, False), (0o755, True)):
        (tmp_path / "kept").chmod(mode)
        assert (open_store(tmp_path / "kept", "") is not None) == is_used


def test_a_run_is_the_same_with_a_store(tmp_path):
    """To the bit, its lines and its adapter: one that writes it, one that finds it, one without."""
    outcomes = []
    for name in ("first", "second", "without"):
        store = None if name == "without" else open_store(tmp_path / "kept", "")
        if name == "second":
            assert {key.split()[0] for key in store._loads} == {"train", "evaluate"}
        config = tiny_task.config(eval_at_start=True)
        train(tiny_task.task(), config, tiny_task.LORA, tmp_path / name, store=store)
        if store is not None:
            finish(store)
        outcomes.append(tiny_task.outcome(tmp_path / name))
    assert outcomes[0] == outcomes[1] == outcomes[2]
