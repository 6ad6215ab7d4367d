"""Kernels with a gain in moves and uses: lifted values and gradients are those of the definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.lowrank import LowRank, factor_shapes
from tests.helpers import slow, toy_method

RNG = np.random.default_rng(0)
IO, BIO = ("io", (4, 6)), ("bio", (3, 4, 6))
draw = lambda *shape: jnp.asarray(RNG.uniform(-1, 1, size=shape), jnp.float32)
X, Y = draw(5, 4), draw(5, 6)
C = draw(4, 6)
SIZES = jnp.array([2, 0, 3], jnp.int32)


def node(axes, shape, seed):
    a, b = factor_shapes(shape, axes, rank=2)
    return toy_method.make_like(LowRank(jnp.zeros(a), jnp.zeros(b), 1.5, axes=axes), seed)


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip


IMAGE, IDS = draw(2, 5, 5, 3), jnp.array([[0, 3], [2, 2]])
OF_SLICES = {
    "i": lambda w: lax.scan(lambda c, p: (c + p[0].T @ p[1], 0), jnp.zeros((5, 6)), (X.T.reshape(2, 2, 5), w.reshape(2, 2, 6)))[0],
    "o": lambda w: lax.map(lambda w: X @ w, w.T).T,
}  # fmt: skip

# What stays factored: the kernel's roles and shape, and the function.
FACTORED = {
    "product": (*IO, lambda w: X @ w),
    "transposed": (*IO, lambda w: Y @ w.T),
    "from the left": (*IO, lambda w: w.T @ X.T),
    "transposed from the left": (*IO, lambda w: w @ Y.T),
    "tied": (*IO, lambda w: jnp.tanh(w[IDS]) @ w.T),
    "rows that are outputs": ("oi", (4, 6), lambda w: jnp.tanh(w[IDS]) @ w.T),
    "out of bounds": (*IO, lambda w: jnp.nan_to_num(w.at[jnp.array([1, 9])].get(mode="fill"), nan=3.0)),
    "filled up": (*IO, lambda w: w.at[jnp.array([1, 9])].get(mode="fill", fill_value=5.0)),
    "filled up, rows that are outputs": ("oi", (4, 6), lambda w: (Y @ w.T, w.at[jnp.array([1, 9])].get(mode="fill", fill_value=5.0))),
    "clipped": (*IO, lambda w: w.at[jnp.array([1, 9])].get(mode="clip")),
    "under vmap": (*IO, lambda w: jax.vmap(lambda i: w[i])(IDS)),
    "stack": (*BIO, lambda w: jnp.einsum("zi,bio->zbo", X, w)),
    "paired stack": (*BIO, lambda w: jnp.einsum("zbi,bio->bzo", draw_like(5, 3, 4), w)),
    "paired stack, transposed": (*BIO, lambda w: jnp.einsum("zbo,bio->zbi", draw_like(5, 3, 6), w)),
    "heads": ("ioo", (4, 2, 3), lambda w: jnp.einsum("zi,ihd->zhd", X, w)),
    "heads, transposed": ("ioo", (4, 3, 2), lambda w: jnp.einsum("zhd,ihd->zi", Y.reshape(5, 3, 2), w)),
    "several inputs": ("iio", (2, 2, 6), lambda w: jnp.einsum("zij,ijo->zo", X.reshape(5, 2, 2), w)),
    "reshape": (*IO, lambda w: jnp.einsum("zij,ijod->zod", X.reshape(5, 2, 2), w.reshape(2, 2, 3, 2))),
    "slices": (*IO, lambda w: X[:, 1:3] @ lax.slice(w, (1, 0), (3, 6), (1, 2))),
    "dynamic slice": (*IO, lambda w: X @ lax.dynamic_slice_in_dim(w, jnp.int32(1), 3, 1)),
    "reverse": (*IO, lambda w: X @ w[::-1, ::-1]),
    "padded outputs": (*IO, lambda w: X @ jnp.pad(w, ((0, 0), (1, 2)), constant_values=0.5)),
    "padded inputs": (*IO, lambda w: draw_like(5, 6) @ lax.pad(w, np.float32(0), ((1, 1, 0), (0, 1, 1)))),
    "cropped": (*IO, lambda w: X[:, :3] @ lax.pad(w, np.float32(0.5), ((0, -1, 0), (0, 0, 0)))),
    "padded stack": (*BIO, lambda w: jnp.einsum("zi,bio->zbo", X, jnp.pad(w, ((1, 0), (0, 0), (0, 0)), constant_values=2.0))),
    "tiles": (*IO, lambda w: jnp.tile(X, 2) @ jnp.tile(w, (2, 2))),
    "repeats": (*IO, lambda w: X @ jnp.repeat(w, 2, axis=1)),
    "broadcast": (*IO, lambda w: jnp.einsum("zi,bio->zbo", X, jnp.broadcast_to(w, (3, 4, 6)))),
    "scaled": (*IO, lambda w: X @ (-2.0 * w / 3.0)),
    "scaled inputs": (*IO, lambda w: X @ (w * X[0][:, None])),
    "scaled outputs": (*IO, lambda w: X @ (w / (2 + Y[0])[None])),
    "precision": (*IO, lambda w: X @ lax.reduce_precision(w, 8, 20)),
    "side by side": (*IO, lambda w: X @ jnp.concatenate([w, C, 2 * w], 1)),
    "above, as a stack": (*IO, lambda w: jnp.einsum("zi,bio->zbo", X, jnp.stack([w, C, -w]))),
    "split": (*IO, lambda w: [X @ p for p in jnp.split(w, 3, 1)][1]),
    "unstack": (*BIO, lambda w: [X @ p for p in w][2]),
    "choice": (*IO, lambda w: X @ jnp.where(X[0, 0] < 9, w, C)),
    "choice by number": (*IO, lambda w: X @ lax.select_n(jnp.int32(1), C, w, -w)),
    "picked": (*BIO, lambda w: jnp.einsum("zi,zio->zo", X, w[jnp.array([0, 2, 1, 1, 0])])),
    "ragged": (*BIO, lambda w: lax.ragged_dot(X, w, SIZES)),
    "ragged, transposed": (*BIO, lambda w: lax.ragged_dot(Y, w.mT, SIZES)),
    "convolution": ("iiio", (3, 3, 3, 4), lambda w: conv(IMAGE, w)),
    "scan": (*BIO, lambda w: lax.scan(lambda c, w: (jnp.tanh(c @ w[:, :4]), c @ w), X, w)),
    "scan over inputs": (*IO, OF_SLICES["i"]),
    "scan over outputs": (*IO, OF_SLICES["o"]),
    "loop": (*IO, lambda w: lax.fori_loop(0, 2, lambda _, c: jnp.tanh(c @ w)[:, :4], X)),
    "branch": (*IO, lambda w: lax.cond(X[0, 0] < 9, lambda: X @ w, lambda: X @ (2 * w))),
    "call and checkpoint": (*IO, lambda w: jax.jit(jax.checkpoint(jax.jit(lambda w: X @ w)))(w)),
    "barrier": (*IO, lambda w: X @ lax.optimization_barrier(w)),
}  # fmt: skip

# What is formed, and a part of the reason.
FORMED = {
    "sum with an array": (*IO, lambda w: X @ (w + C), "adds to a kernel"),
    "sum with itself": (*IO, lambda w: X @ (w - w[::-1]), "adds to a kernel"),
    "below": (*IO, lambda w: draw_like(5, 8) @ jnp.concatenate([w, C], 0), "joins kernels along a side"),
    "padded inputs": (*IO, lambda w: draw_like(5, 5) @ jnp.pad(w, ((1, 0), (0, 0)), constant_values=0.5), "may not be zero"),
    "free stack": (*BIO, lambda w: jnp.einsum("zo,bio->zbi", Y, w), "a gain for each kernel"),
    "two sums": (*IO, lambda w: X @ (w @ w.T), "the other operand"),
    "entries": (*IO, lambda w: X @ jnp.tanh(w), "no rule"),
    "convolution over outputs": ("oooi", (3, 3, 3, 4), lambda w: conv(IMAGE, w), "convolution that sums over the outputs"),
    "transposed convolution": ("iiio", (1, 1, 4, 3), lambda w: conv(IMAGE, w.mT), "convolution that sums over the outputs"),
}  # fmt: skip


def draw_like(*shape):
    n = np.arange(np.prod(shape)).reshape(shape)
    return jnp.asarray((n * 0.618) % 1.0 - 0.5, jnp.float32)


def compare(axes, shape, fn, strict):
    params, adapter = {"w": draw(*shape)}, {"w": node(axes, shape, seed=1)}
    run = lambda p: fn(p["w"])
    mean = lambda tree: sum(jnp.mean(jnp.sin(x)) for x in jax.tree.leaves(tree))
    lifted = lambda a: lora.lift(run, strict=strict)(lora.bind(params, a))
    wanted = lambda a: run(toy_method.merge(params, a))
    got, want = (jax.value_and_grad(lambda a, f=f: mean(f(a)))(adapter) for f in (lifted, wanted))
    want[1]["w"] = dataclasses.replace(want[1]["w"], a=jnp.zeros_like(adapter["w"].a))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-5)
    for g, w in zip(*(jax.tree.leaves(f(adapter)) for f in (lifted, wanted)), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-5)
    return params, adapter, run


# By default one form of each kind; the others are slow.
SOME = {
    "product", "tied", "stack", "heads", "dynamic slice", "scaled", "picked", "convolution", "scan", "branch",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x in SOME else pytest.mark.slow) for x in FACTORED],
)
def test_stays_factored(name):
    compare(*FACTORED[name], strict=True)


@pytest.mark.parametrize("name", slow.after(4, FORMED))
def test_is_formed_and_explained(name):
    *case, reason = FORMED[name]
    params, adapter, run = compare(*case, strict=False)
    said = str(lora.explain(run, params, adapter))
    assert reason in said
    with pytest.raises(ValueError, match=r"strict=True forbids it"):
        lora.lift(run, strict=True)(lora.bind(params, adapter))


def test_no_sum_is_formed_and_no_gain_beside_the_kernel():
    """The jaxpr has no array of the kernel's shape but the kernel."""
    params, adapter = {"w": draw(4, 6)}, {"w": node(*IO, seed=2)}
    for run, x in ((lambda p, x: x @ p["w"], X), (lambda p, x: x @ p["w"].T, Y)):
        jaxpr = jax.make_jaxpr(lambda a, p, x: lora.lift(run)(lora.bind(p, a), x))(adapter, params, x)  # fmt: skip
        made = [v.aval.shape for eqn in jaxpr.jaxpr.eqns for v in eqn.outvars]
        assert (4, 6) not in made and made.count((6, 4)) <= (x is Y)  # the user's own transpose


def test_narrow_products_are_scaled_in_the_gains_precision():
    """A bfloat16 product is scaled in float32 and rounded once more: half an ulp of the result."""
    params = {"w": draw(64, 32).astype(jnp.bfloat16)}
    x = draw(16, 64).astype(jnp.bfloat16)
    adapter = {"w": node("io", (64, 32), seed=3)}
    silent = {"w": dataclasses.replace(adapter["w"], b=jnp.zeros((2, 32)))}
    got = lora.lift(lambda p: x @ p["w"], strict=True)(lora.bind(params, silent))
    want = np.asarray(x @ params["w"], np.float32) * (1 + np.asarray(adapter["w"].g))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2**-8)


EXPLICIT = {
    "as the kernel": (X, (), lambda x, w: x @ w),
    "on every device": (X, (), lambda x, w: jnp.einsum("zi,io->zo", x, w, out_sharding=P())),
    "summed": (Y, (None, "m"), lambda y, w: jnp.einsum("zo,io->zi", y, w, out_sharding=P())),
    "summed, input whole": (Y, (), lambda y, w: jnp.einsum("zo,io->zi", jax.sharding.reshard(y, P(None, "m")), w, out_sharding=P())),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLICIT)
def test_explicit_sharding(name):
    """The gain lies where the axis that it scales lies, and the result where it would anyway."""
    x, x_spec, product = EXPLICIT[name]
    mesh = jax.make_mesh((1,), ("m",), axis_types=(AxisType.Explicit,))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    w, made = draw(4, 6), node(*IO, seed=4)
    split = {"a": put(made.a), "d": put(made.d), "b": put(made.b, None, "m"), "g": put(made.g, "m")}
    with jax.set_mesh(mesh):
        params, adapter = {"w": put(w, None, "m")}, {"w": dataclasses.replace(made, **split)}
        fn = lambda p, x: product(x, p["w"])
        run = lambda a, p, x: lora.lift(fn, strict=True)(lora.bind(p, a), x)
        args = params, put(x, *x_spec)
        got, base = jax.jit(run)(adapter, *args), jax.jit(fn)(*args)
        assert jax.typeof(got) == jax.typeof(base)
        want = jax.jit(fn)({"w": put(toy_method.merge_kernel(w, made), None, "m")}, args[1])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
