"""NNX modules and Keras models as functions of a plain tree, and back."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lora
from lora_jax import paths
from tests.helpers.places import ROOT

X = jax.random.normal(jax.random.key(5), (3, 4))


class Net(nnx.Module):
    """With a list, a shared variable, and every kind of variable that is no parameter."""

    def __init__(self, rngs):
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.again = self.layers[0]
        self.calls = nnx.Variable(jnp.int32(0))

    def __call__(self, x, *, rngs=None, train=False):
        self.calls[...] += 1
        x = self.norm(self.up(x), use_running_average=not train)
        x = self.drop(x, deterministic=not train, rngs=rngs)
        for layer in self.layers:
            x = layer(x)
        return self.again(x)

    def first(self, x):
        return self.up(x)


@pytest.fixture
def net():
    return Net(nnx.Rngs(0))


class TestNNX:
    def test_paths_and_values(self, net):
        _, params = lora.from_nnx(net)
        assert list(paths.named_leaves(params)) == [
            "again/bias", "again/kernel", "layers/1/bias", "layers/1/kernel",
            "norm/bias", "norm/scale", "up/bias", "up/kernel",
        ]  # fmt: skip
        assert type(params) is dict and type(params["layers"]["1"]) is dict
        np.testing.assert_array_equal(params["up"]["kernel"], net.up.kernel[...])
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))

    def test_the_function_is_the_module_and_pure(self, net):
        fn, params = lora.from_nnx(net)
        want = net(X)
        for _ in range(2):
            np.testing.assert_array_equal(fn(params, X), want)
            np.testing.assert_allclose(jax.jit(fn)(params, X), want, rtol=1e-5, atol=1e-6)
        assert int(net.calls[...]) == 1  # the module's own call
        doubled = jax.tree.map(lambda x: 2 * x, params)
        lora.update_nnx(net, doubled)
        np.testing.assert_array_equal(fn(doubled, X), net(X))
        np.testing.assert_array_equal(fn(params, X), want)

    def test_other_methods(self, net):
        fn, params = lora.from_nnx(net, method="first")
        np.testing.assert_array_equal(fn(params, X), net.up(X))

    def test_random_numbers_are_an_argument(self, net):
        fn, params = lora.from_nnx(net)
        run = lambda k: fn(params, X, train=True, rngs=nnx.Rngs(dropout=jax.random.key(k)))
        np.testing.assert_array_equal(run(1), run(1))
        assert not np.allclose(run(1), run(2))
        np.testing.assert_array_equal(fn(params, X, train=True), fn(params, X, train=True))

    def test_adapted_trained_merged_and_put_back(self, net, tmp_path):
        fn, params = lora.from_nnx(net)
        config = lora.LoRAConfig(rank=2, targets=("up", "again"), train=("norm",))
        adapter = lora.init(jax.random.key(0), fn, params, config, X)
        uses = lora.explain(fn, params, adapter, X).kernels
        assert {n: use.factored for n, use in uses.items()} == {"again/kernel": 2, "up/kernel": 1}
        loss = lambda a: jnp.mean((lora.lift(fn)(lora.bind(params, a), X) - 1) ** 2)
        for _ in range(2):
            adapter = jax.tree.map(lambda x, g: x - 0.1 * g, adapter, jax.grad(loss)(adapter))
        lora.save(tmp_path, adapter, config)
        adapter, _ = lora.load(tmp_path, params)
        lora.update_nnx(net, lora.merge(params, adapter))
        lifted = lora.lift(fn, strict=True)(lora.bind(params, adapter), X)
        np.testing.assert_allclose(net(X), lifted, rtol=1e-4, atol=1e-5)

    def test_what_does_not_fit(self, net):
        fn, params = lora.from_nnx(net)
        less = {k: v for k, v in params.items() if k != "up"}
        for use in (lambda p: fn(p, X), lambda p: lora.update_nnx(net, p)):
            with pytest.raises(ValueError, match="up/bias, up/kernel missing, none unknown"):
                use(less)
            with pytest.raises(ValueError, match="none missing, more unknown"):
                use(params | {"more": jnp.ones(3)})
        with pytest.raises(ValueError, match=r"up/kernel has shape \(4, 6\), not \(6, 4\)"):
            lora.update_nnx(net, params | {"up": params["up"] | {"kernel": jnp.ones((6, 4))}})
        with pytest.raises(ValueError, match="Dropout has no nnx.Param"):
            lora.from_nnx(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))


KERAS = r"""
import os
import sys

import jax
import keras
import numpy as np

import lora_jax as lora
from lora_jax import paths

if keras.backend.backend() != "jax":
    try:
        lora.from_keras(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))
    except ValueError as error:
        assert "KERAS_BACKEND" in str(error), error
        sys.exit()
    raise AssertionError("another backend was accepted")

inputs = keras.Input((4,))
shared = keras.layers.Dense(4, name="shared")
y = keras.layers.BatchNormalization(name="norm")(shared(shared(inputs)))
y = keras.layers.Dropout(0.5)(keras.layers.Dense(3, name="out")(y))
model = keras.Model(inputs, y)
x = jax.random.normal(jax.random.key(0), (5, 4))
fn, params = lora.from_keras(model)
assert list(paths.named_leaves(params)) == [
    "norm/beta", "norm/gamma", "out/bias", "out/kernel", "shared/bias", "shared/kernel"
], params
before = [np.asarray(v) for v in model.variables]
np.testing.assert_array_equal(fn(params, x), model(x))
np.testing.assert_array_equal(fn(params, x, training=True), fn(params, x, training=True))
assert not np.allclose(fn(params, x, training=True), fn(params, x))
for old, new in zip(before, model.variables, strict=True):
    np.testing.assert_array_equal(old, new)

config = lora.LoRAConfig(rank=2, targets=("shared",), train=("out",))
adapter = lora.init(jax.random.key(1), fn, params, config, x)
assert lora.explain(fn, params, adapter, x).kernels["shared/kernel"].factored == 2
adapter = jax.tree.map(lambda x: x + 0.1, adapter)
lifted = lora.lift(fn, strict=True)(lora.bind(params, adapter), x)
lora.update_keras(model, lora.merge(params, adapter))
np.testing.assert_allclose(model(x), lifted, rtol=1e-4, atol=1e-5)

def refuses(says, use):
    try:
        use()
    except ValueError as error:
        assert says in str(error), error
    else:
        raise AssertionError(says)

refuses("norm/gamma, norm/beta missing", lambda: fn({k: params[k] for k in ("out", "shared")}, x))
wrong = params | {"out": {"bias": params["out"]["bias"], "kernel": params["shared"]["kernel"]}}
refuses("out/kernel has shape (4, 3), not (4, 4)", lambda: lora.update_keras(model, wrong))
refuses("not built", lambda: lora.from_keras(keras.Sequential([keras.layers.Dense(3)])))
model.trainable = False
refuses("model.trainable is False", lambda: lora.from_keras(model))

class Twice(keras.Model):
    def __init__(self):
        super().__init__()
        self.one, self.two = (keras.layers.Dense(4, name="same") for _ in range(2))

    def call(self, x):
        return self.two(self.one(x))

twice = Twice()
want = twice(x)
fn, params = lora.from_keras(twice)
assert len(jax.tree.leaves(params)) == 4, params
np.testing.assert_array_equal(fn(params, x), want)
"""


# In a process of its own: the backend is chosen when Keras is first imported.
@pytest.mark.parametrize("backend", ["jax", "numpy"])
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="extra `keras`")
@pytest.mark.slow
def test_keras(backend):
    env = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", KERAS], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
