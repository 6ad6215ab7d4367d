"""LoRA-GA: the first values are singular vectors of the gradient, which is never formed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import paths
from lora_jax.config import LoRAConfig
from lora_jax.methods.dora import DoRAOffset
from lora_jax.methods.offset import Offset
from tests.helpers import zoo
from tests.helpers.comparisons import assert_close

# Two passes of subspace iteration leave this of the angle to a vector whose neighbors are near.
NEAR = 0.98


@pytest.fixture(autouse=True)
def numbers():
    """The same numbers for a test whatever ran before it."""
    global RNG
    RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def setting(name):
    """A loss of a model of the zoo, its parameters, and two batches."""
    model = zoo.ZOO[name]()
    out = jax.eval_shape(model.fn, model.params, model.x)
    loss = lambda params, batch: jnp.mean((model.fn(params, batch[0]) - batch[1]) ** 2)
    is_float = jnp.issubdtype(model.x.dtype, jnp.floating)
    xs = (model.x, model.x / 2 if is_float else (model.x + 1) % 11)
    return loss, model.params, [(x, normal(*out.shape)) for x in xs], model.targets


def as_matrices(x, axes):
    order = [k for role in "bio" for k, r in enumerate(axes) if r == role]
    size = lambda role: int(np.prod([n for n, r in zip(x.shape, axes, strict=True) if r == role]))
    return np.transpose(np.asarray(x, np.float64), order).reshape(size("b"), size("i"), -1)


NAMES = ["mlp", "scanned", "conv", "experts", "tied", "nnx", "plain", "attention"]
MARKED = [pytest.param(n, marks=pytest.mark.slow) for n in NAMES]


@pytest.mark.parametrize("name", MARKED)
def test_factors_are_singular_vectors_of_the_mean_gradient(name):
    loss, params, batches, targets = setting(name)
    config = LoRAConfig(rank=1, alpha=3.0, targets=targets, init="lora_ga")
    adapter = lora.init_from_gradients(jax.random.key(0), loss, params, config, *batches)
    grad = jax.jit(jax.grad(loss))
    mean = jax.tree.map(lambda g, h: (g + h) / 2, *(grad(params, batch) for batch in batches))
    leaves = paths.named_leaves(mean)
    for leaf, node in adapters.nodes(adapter).items():
        assert isinstance(node, Offset) and node.scale == 3.0
        for g, a, b in zip(as_matrices(leaves[leaf], node.axes), *sides(node), strict=True):
            u, s, vh = np.linalg.svd(g, full_matrices=False)
            if s[1] < 1e-6 * s[0] or s[1] > 0.9 * s[0]:
                continue  # then the vectors are any of a plane
            size = g.shape[1] ** 0.25 / 4
            assert abs(a[:, 0] @ u[:, 0]) / size > NEAR, leaf
            assert np.linalg.norm(a) == pytest.approx(size, rel=1e-4)
            assert np.linalg.norm(b) == pytest.approx(size, rel=1e-4)
            assert abs(b[0] @ vh[0]) / size < 0.05, leaf  # the next one


def sides(node):
    n = node.axes.count("b")
    count = int(np.prod(node.a.shape[:n]))
    a, b = np.asarray(node.a, np.float64), np.asarray(node.b, np.float64)
    return a.reshape(count, -1, a.shape[-1]), b.reshape(count, b.shape[n], -1)


@functools.cache
def one_kernel():
    """A gradient whose singular values fall fast, as those of a few rows do."""
    x, y, w = normal(40, 20) * 0.6 ** jnp.arange(20)[None], normal(40, 15), normal(20, 15)
    loss = lambda params, batch: jnp.mean((jnp.tanh(batch[0] @ params["w"]) - batch[1]) ** 2)
    return loss, {"w": w}, (x, y)


def test_against_the_formula_of_the_paper():
    loss, params, batch = one_kernel()
    config = LoRAConfig(rank=2, init="lora_ga", targets=("w",))
    node = lora.init_from_gradients(jax.random.key(3), loss, params, config, batch)["w"]
    g = np.asarray(jax.grad(loss)(params, batch)["w"], np.float64)
    u, _, vh = np.linalg.svd(g)
    scale = 15**0.25 / 16**0.5
    # Signs, and turns within the two, are none of the formula's.
    assert_close(node.a @ node.a.T, scale**2 * u[:, :2] @ u[:, :2].T, rtol=0, atol=2e-3)
    assert_close(node.b.T @ node.b, scale**2 * vh[2:4].T @ vh[2:4], rtol=0, atol=2e-2)
    # The first step of gradient descent is in the directions of the two pairs.
    grads = jax.grad(lambda a: loss(lora.merge(params, {"w": a}), batch))(node)
    assert np.any(grads.a) and np.any(grads.b) and not np.any(grads.a0) and not np.any(grads.b0)


def test_starts_as_the_base_whatever_the_size_of_the_loss():
    loss, params, batch = one_kernel()
    config = LoRAConfig(rank=2, init="lora_ga", targets=("w",))
    key = jax.random.key(0)
    node = lora.init_from_gradients(key, loss, params, config, batch)["w"]
    np.testing.assert_array_equal(lora.merge(params, {"w": node})["w"], params["w"])
    smaller = lambda params, batch: 1e-3 * loss(params, batch)
    other = lora.init_from_gradients(key, smaller, params, config, batch)["w"]
    assert_close(other.a @ other.a.T, node.a @ node.a.T, rtol=0, atol=1e-3)


def test_with_dora_the_factors_are_the_same():
    loss, params, batch = one_kernel()
    make = lambda method: lora.init_from_gradients(
        jax.random.key(3), loss, params, LoRAConfig(rank=2, init="lora_ga", method=method), batch
    )["w"]
    node, plain = make("dora"), make("lora")
    assert isinstance(node, DoRAOffset)
    for name in ("a", "b", "a0", "b0"):
        np.testing.assert_array_equal(getattr(node, name), getattr(plain, name))
    np.testing.assert_allclose(node.magnitude, np.linalg.norm(params["w"], axis=0), rtol=1e-6)
    np.testing.assert_array_equal(lora.merge(params, {"w": node})["w"], params["w"])


@pytest.mark.slow
def test_a_quantized_base_gives_its_own_gradient():
    w, x, y = normal(64, 32), normal(30, 64), normal(30, 32)
    loss = lambda params, batch: jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)
    stored = lora.quantize({"w": w}, "int8", like={"w": "io"})
    config = LoRAConfig(rank=2, init="lora_ga", targets=("w",))
    run = lambda params: lora.init_from_gradients(jax.random.key(0), loss, params, config, (x, y))
    got, want = run(stored)["w"], run(lora.merge(stored, {}))["w"]
    assert_close(got.a @ got.a.T, want.a @ want.a.T, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "batches", "message"),
    [
        ({"init": "uniform"}, 1, "makes the first values init='lora_ga', .*init='uniform'"),
        ({"method": "vera", "init": "uniform", "alpha": 16}, 1, "has method='vera'"),
        ({"train_a": False}, 1, "init='lora_ga' makes a node of the kind 'offset'"),
        ({}, 0, "needs a batch"),
        ({"rank": 8}, 1, r"twice as many singular vectors as the rank, and of w there are \[15\]"),
        ({"targets": ("v",)}, 1, "targets entry 'v'|'v'"),
    ],
)
def test_refused_by_name(fields, batches, message):
    loss, params, batch = one_kernel()
    config = LoRAConfig(**({"rank": 2, "init": "lora_ga", "targets": ("w",)} | fields))
    with pytest.raises(ValueError, match=message):
        lora.init_from_gradients(jax.random.key(0), loss, params, config, *[batch] * batches)


def test_a_gradient_that_is_not_finite_is_refused():
    loss, params, (x, y) = one_kernel()
    config = LoRAConfig(rank=2, init="lora_ga", targets=("w",))
    with pytest.raises(ValueError, match="not finite at the base, by w"):
        lora.init_from_gradients(jax.random.key(0), loss, params, config, (x * jnp.nan, y))
