"""Adapters in the hands of others: jax.export, Flax's and Orbax's files, NNX, pickle."""

import copy
import os
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax import export

import lora_jax as lora
from lora_jax.adapter import as_data
from tests.helpers import slow
from tests.helpers.places import ROOT

KEY = jax.random.key(0)
PARAMS = {
    "up": {"kernel": jax.random.normal(jax.random.key(1), (8, 16)), "bias": jnp.ones(16)},
    "down": {"kernel": jax.random.normal(jax.random.key(2), (16, 4))},
}
X = jax.random.normal(jax.random.key(3), (6, 8))
fn = lambda p, x: jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"][None]) @ p["down"]["kernel"]


def made(alpha=7.0, dropout=0.25, seed=4):
    config = lora.LoRAConfig(rank=3, alpha=alpha, train=("bias",), dropout=dropout)
    adapter = lora.init(KEY, fn, PARAMS, config, X)
    draw = lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed), x.shape)
    return jax.tree.map(draw, adapter)


def loss(a, x=X):
    return jnp.mean(lora.lift(fn, dropout=0.0)(lora.bind(PARAMS, a), x) ** 2)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


class TestExport:
    def round_trip(self, f, *args):
        exported = export.export(jax.jit(f))(*args)
        return export.deserialize(exported.serialize()).call

    @pytest.mark.parametrize("change", [lambda a: a, as_data], ids=["number", "array"])
    def test_one_artifact_serves_every_adapter(self, change):
        run = lambda a, p, x: lora.lift(fn, strict=True, dropout=0.0)(lora.bind(p, a), x)
        call = self.round_trip(run, change(made()), PARAMS, X)
        for adapter in (made(), made(seed=5)):
            want = fn(lora.merge(PARAMS, adapter), X)
            np.testing.assert_allclose(call(change(adapter), PARAMS, X), want, rtol=1e-4, atol=1e-4)

    def test_another_alpha_is_another_structure_unless_it_is_data(self):
        run = lambda a, x: lora.lift(fn, dropout=0.0)(lora.bind(PARAMS, a), x)
        with pytest.raises(ValueError, match="pytree|PyTreeDef|tree"):
            self.round_trip(run, made(), X)(made(alpha=1.0), X)
        got = self.round_trip(run, as_data(made()), X)(as_data(made(alpha=1.0)), X)
        np.testing.assert_allclose(got, run(made(alpha=1.0), X), rtol=1e-4, atol=1e-4)

    def test_bound_trees_gradients_and_merge(self):
        bound = lora.bind(PARAMS, made())
        run = lambda tree, x: lora.lift(fn, dropout=0.0)(tree, x)
        got = self.round_trip(run, bound, X)(bound, X)
        np.testing.assert_allclose(got, run(bound, X), rtol=1e-4, atol=1e-4)
        got = self.round_trip(jax.grad(loss), made())(made())  # an adapter as a result, too
        want = jax.grad(loss)(made())
        assert jax.tree.structure(got) == jax.tree.structure(want)
        np.testing.assert_allclose(
            got["up"]["kernel"].a, want["up"]["kernel"].a, rtol=1e-3, atol=1e-4
        )
        got = self.round_trip(lora.merge, PARAMS, made())(PARAMS, made())
        assert jax.tree.structure(got) == jax.tree.structure(PARAMS)

    @pytest.mark.parametrize("dropout", slow.after(1, [False, True]))
    def test_symbolic_shapes(self, dropout):
        options = lambda key: {"dropout_key": key} if dropout else {"dropout": 0.0}
        run = lambda a, x, key: lora.lift(fn, **options(key))(lora.bind(PARAMS, a), x)
        (n,) = export.symbolic_shape("n")
        like = lambda x, shape: jax.ShapeDtypeStruct(shape, x.dtype)
        call = self.round_trip(run, made(), like(X, (n, 8)), like(KEY, ()))
        for rows in (6, 1, 11):
            x = jnp.resize(X, (rows, 8))
            np.testing.assert_allclose(
                call(made(), x, KEY), run(made(), x, KEY), rtol=1e-4, atol=1e-4
            )


class TestFlaxSerialization:
    @pytest.mark.parametrize("change", [lambda a: a, as_data], ids=["number", "array"])
    def test_an_adapter(self, change):
        adapter, empty = change(made()), change(made(seed=7))
        assert_same(serialization.from_bytes(empty, serialization.to_bytes(adapter)), adapter)
        state = serialization.to_state_dict(adapter)
        assert set(state["up"]["kernel"]) == {"a", "b", "scale"}
        assert_same(serialization.from_state_dict(empty, state), adapter)
        bound = lora.bind(PARAMS, adapter)
        like = lora.bind(PARAMS, empty)
        assert_same(serialization.from_bytes(like, serialization.to_bytes(bound)), bound)

    def test_the_scale_is_that_of_the_file(self):
        data = serialization.to_bytes(made(alpha=1.0))
        assert_same(serialization.from_bytes(made(), data), made(alpha=1.0))

    @pytest.mark.parametrize("order", slow.after(1, ["flax first", "flax after", "flax late"]))
    def test_in_any_order_of_imports(self, order):
        """Flax is not imported with the library: it is told when both are there."""
        after = "import lora_jax as lora\nfrom lora_jax.lowrank import LowRank"
        make = "node = LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)), 2.0)"
        flax = "from flax import serialization"
        lines = {
            "flax first": [flax, after, make],
            "flax after": [after, flax, make],
            "flax late": [after, make, flax, "node = jax.tree.map(jnp.zeros_like, node)"],
        }[order]
        tail = "serialization.from_bytes(node, serialization.to_bytes({'w': node}['w']))"
        code = "\n".join(["import jax, jax.numpy as jnp", *lines, tail])
        subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), cwd=ROOT)

    def test_other_states_are_refused(self):
        state = serialization.to_state_dict(made())
        del state["up"]["kernel"]["scale"]
        with pytest.raises(ValueError, match=r"\['a', 'b', 'scale'\].*\['a', 'b'\]"):
            serialization.from_state_dict(made(), state)

    def test_a_train_state(self):
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
        start = lambda adapter: TrainState.create(apply_fn=fn, params=adapter, tx=tx)

        @jax.jit
        def step(state):
            return state.apply_gradients(grads=jax.grad(loss)(state.params))

        state = step(step(start(made())))
        again = serialization.from_bytes(start(made(seed=8)), serialization.to_bytes(state))
        assert_same(jax.tree.leaves(again), jax.tree.leaves(state))
        assert_same(step(again).params, step(state).params)
        assert state.params["up"]["kernel"].scale == 7 / 3
        assert loss(state.params) < loss(made())


def test_orbax(tmp_path):
    adapter = made()
    state = {"adapter": adapter, "opt": optax.adamw(1e-2).init(adapter)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = {"adapter": made(seed=8), "opt": optax.adamw(1e-2).init(adapter)}
        assert_same(checkpointer.restore(tmp_path / "state", like), state)


@pytest.mark.parametrize("change", [lambda a: a, as_data, lambda a: lora.bind(PARAMS, a)])
def test_pickle_and_copies(change):
    tree = change(made())
    for again in (pickle.loads(pickle.dumps(tree)), copy.deepcopy(tree), copy.copy(tree)):
        assert_same(again, tree)


def unboxed(tree):
    is_param = lambda x: isinstance(x, nnx.Param)
    return jax.tree.map(lambda x: x[...] if is_param(x) else x, tree, is_leaf=is_param)


class TestNNX:
    def test_an_optimizer_trains_an_adapter_of_params(self):
        """Beside optax on the plain adapter."""
        adapter, tx = jax.tree.map(nnx.Param, made()), optax.adamw(1e-2, weight_decay=0.1)
        optimizer = nnx.Optimizer(adapter, tx, wrt=nnx.Param)

        @nnx.jit
        def step(adapter, optimizer):
            value, grads = nnx.value_and_grad(loss)(adapter)
            optimizer.update(adapter, grads)
            return value

        values = [float(step(adapter, optimizer)) for _ in range(5)]
        plain, state, wants = made(), tx.init(made()), []
        for _ in range(5):
            value, grads = jax.value_and_grad(loss)(plain)
            updates, state = tx.update(grads, state, plain)
            plain = optax.apply_updates(plain, updates)
            wants.append(float(value))
        np.testing.assert_allclose(values, wants, rtol=1e-4)
        assert wants[-1] < wants[0]
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
            unboxed(adapter),
            plain,
        )

    def test_everything_takes_it(self, tmp_path):
        boxed, plain = jax.tree.map(nnx.Param, made()), made()
        assert_same(lora.merge(PARAMS, boxed), lora.merge(PARAMS, plain))
        assert jax.tree.structure(lora.labels(boxed)) == jax.tree.structure(boxed)
        assert lora.summary(PARAMS, boxed) == lora.summary(PARAMS, plain)
        assert str(lora.explain(fn, PARAMS, boxed, X)) == str(lora.explain(fn, PARAMS, plain, X))
        config = lora.LoRAConfig(rank=3, alpha=7.0)
        for folder, adapter in (("boxed", boxed), ("plain", plain)):
            lora.save(tmp_path / folder, adapter, config)
        files = [sorted(p.name for p in (tmp_path / f).iterdir()) for f in ("boxed", "plain")]
        assert files[0] == files[1]  # named after their content

    def test_as_a_part_of_a_module(self):
        class Tuned(nnx.Module):
            def __init__(self):
                self.adapter = nnx.data(jax.tree.map(nnx.Param, made()))

            def __call__(self, x):
                return lora.lift(fn, dropout=0.0)(lora.bind(PARAMS, self.adapter), x)

        module = Tuned()
        optimizer = nnx.Optimizer(module, optax.sgd(1e-2), wrt=nnx.Param)
        before = module(X)
        grads = nnx.grad(lambda m: jnp.mean(m(X) ** 2))(module)
        optimizer.update(module, grads)
        want = jax.tree.map(lambda x, g: x - 1e-2 * g, made(), jax.grad(loss)(made()))
        got = unboxed(module.adapter)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), got, want)
        assert not np.allclose(before, module(X))


def test_snippets_of_the_document(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "other_libraries.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) >= 5
    space = {}
    for snippet in snippets:
        exec(compile(snippet, "other_libraries.md", "exec"), space)
