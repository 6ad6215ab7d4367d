"""Each rule of `lift`, its fallbacks, dropout, and what it leaves alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lora_jax as lora
from lora_jax.adapter import nodes
from lora_jax.lowrank import LowRank
from lora_jax.transform import forms
from tests.helpers import slow

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.fixture(autouse=True)
def _the_same_values_in_any_order_of_tests():
    RNG.bit_generator.state = np.random.default_rng(1).bit_generator.state


X = array(5, 4)
IDS = jnp.array([[1, 3], [0, 1]])


def made(fn, w, *args, rank=2, **config):
    """Parameters {"w": w} and an adapter on them with nothing zero."""
    params = {"w": w}
    config = lora.LoRAConfig(rank=rank, alpha=3.0, targets=("w",), **config)
    adapter = lora.init(jax.random.key(0), fn, params, config, *args)
    node = adapter["w"]
    b = jnp.asarray(RNG.normal(size=node.b.shape), node.b.dtype)
    return params, {"w": LowRank(node.a, b, node.scale, axes=node.axes)}


def check(fn, w, *args, axes=None, factored=True, rank=2, uses=None):
    """`lift` equals `merge` in value and gradient, staying factored or not as expected."""
    params, adapter = made(fn, w, *args, rank=rank)
    if axes is not None:
        assert adapter["w"].axes == axes
    lifted = lambda a: lora.lift(fn, strict=factored)(lora.bind(params, a), *args)
    merged = lambda a: fn(lora.merge(params, a), *args)
    total = lambda run: lambda a: jnp.sum(jnp.sin(run(a).astype(jnp.float32)))
    got, want = jax.jit(lifted)(adapter), jax.jit(merged)(adapter)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert got.dtype == want.dtype
    got, want = jax.jit(jax.grad(total(lifted)))(adapter), jax.jit(jax.grad(total(merged)))(adapter)
    for g, m in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Relative to the largest entry: a small one is the float32 sum of large ones of both signs.
        np.testing.assert_allclose(g, m, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(m).max()))
    use = lora.explain(fn, params, adapter, *args).kernels["w"]
    assert bool(use.fallbacks) != factored
    if uses is not None:
        assert use.factored == uses
    return use


W = array(4, 6)
FACTORED = {
    "right": (lambda p, x: x @ p["w"], W, X, "io"),
    "left": (lambda p, x: p["w"].T @ x.T, W, X, "io"),
    "stored (out, in)": (lambda p, x: x @ p["w"].T, array(6, 4), X, "oi"),
    "einsum with heads": (
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]), array(4, 2, 3), X, "ioo",
    ),
    "einsum from heads": (
        lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"]), array(2, 3, 4), array(5, 2, 3), "iio",
    ),
    "inputs in another order": (
        lambda p, x: jnp.einsum("bkh,hdk->bd", x, p["w"]), array(2, 4, 3), array(5, 3, 2), "ioi",
    ),
    "batched": (
        lambda p, x: jnp.einsum("ebd,edo->ebo", x, p["w"]), array(3, 4, 6), array(3, 5, 4), "bio",
    ),
    "batched, kernel first": (
        lambda p, x: jnp.einsum("deo,bed->obe", p["w"], x), array(4, 3, 6), array(5, 3, 4), "ibo",
    ),
    "stack that x lacks": (
        lambda p, x: jnp.einsum("bd,edo->ebo", x, p["w"]), array(3, 4, 6), X, "oio",
    ),
    "vmap over kernels": (
        lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), array(3, 4, 6), X, None,
    ),
    "reshape that splits": (
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(4, 2, 3)), W, X, "io",
    ),
    "reshape that joins": (
        lambda p, x: x @ p["w"].reshape(4, 6), array(4, 2, 3), X, "ioo",
    ),
    "new axis": (lambda p, x: x[None] @ p["w"][None], W, X, "io"),
    "broadcast": (
        lambda p, x: jnp.einsum("nbd,ndo->nbo", jnp.stack([x, 2 * x]),
                                jnp.broadcast_to(p["w"], (2, 4, 6))), W, X, "io",
    ),
    "squeeze": (lambda p, x: x @ p["w"][:, 0], array(4, 1, 6), X, "ibo"),
    "slice of outputs": (lambda p, x: x @ p["w"][:, 1:6:2], W, X, "io"),
    "slice of inputs": (lambda p, x: x[:, :3] @ p["w"][:3], W, X, "io"),
    "slice of a stack": (lambda p, x: x @ p["w"][1] + x @ p["w"][2], array(3, 4, 6), X, "bio"),
    "dynamic index of a stack": (
        lambda p, x: x @ lax.dynamic_index_in_dim(p["w"], x.shape[0] - 3, 0, keepdims=False),
        array(3, 4, 6), X, "bio",
    ),
    "split": (lambda p, x: x @ jnp.split(p["w"], 2, axis=1)[1], W, X, "io"),
    "concatenate outputs": (
        lambda p, x: x @ jnp.concatenate([p["w"], jnp.ones((4, 2)), 2 * jnp.ones((4, 1))], 1), W, X, "io",
    ),
    "concatenate inputs": (
        lambda p, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([jnp.ones((4, 6)), p["w"]], 0), W, X, "io",
    ),
    "stack": (
        lambda p, x: jnp.einsum("bd,ndo->nbo", x, jnp.stack([p["w"], jnp.ones((4, 6))])), W, X, "io",
    ),
    "unstack": (
        lambda p, x: x @ jnp.unstack(p["w"])[1], array(3, 4, 6), X, "bio",
    ),
    "lookup": (lambda p, ids: p["w"][ids], array(5, 6), IDS, "io"),
    "take": (lambda p, ids: jnp.take(p["w"], ids, axis=0), array(5, 6), IDS, "io"),
    "take of columns": (lambda p, ids: jnp.take(p["w"], ids, axis=1), array(6, 5), IDS, "oi"),
    "vmap of a lookup": (lambda p, ids: jax.vmap(jax.vmap(lambda i: p["w"][i]))(ids), array(5, 6), IDS, "io"),
    "vmap of a lookup of a column": (
        lambda p, ids: jax.vmap(lambda i: p["w"][:, i], out_axes=1)(ids[0]), array(6, 5), IDS, "oi",
    ),
    "vmap of a lookup in two axes": (
        lambda p, ids: jax.vmap(lambda i: p["w"][i, :, i])(ids[0]), array(5, 6, 4), IDS, "ioi",
    ),
    "vmap of a lookup in a table with one column": (
        lambda p, ids: jax.vmap(lambda i: p["w"][i])(ids[0]), array(5, 2, 1), IDS, "ioo",
    ),
    "cast": (
        lambda p, x: x.astype(jnp.bfloat16).astype(jnp.float32) @ p["w"].astype(jnp.float32), W, X, "io",
    ),
    "times a number": (lambda p, x: x @ (p["w"] * 0.5) + x @ (3 * p["w"]) - x @ -p["w"], W, X, "io"),
    "times a traced number": (lambda p, x: x @ (p["w"] * x[0, 0] / x[0, 1]), W, X, "io"),
    "reversed": (lambda p, x: x @ p["w"][::-1] + x @ p["w"][:, ::-1], W, X, "io"),
    "padded": (
        lambda p, x: jnp.pad(x, ((0, 0), (1, 0))) @ jnp.pad(p["w"], ((1, 0), (0, 2)), constant_values=7.0)[:, :6],
        W, X, "io",
    ),
    "ragged": (
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 0, 3])), array(3, 4, 6), X, "bio",
    ),
    "ragged, stored (out, in)": (
        lambda p, x: lax.ragged_dot(x, jnp.swapaxes(p["w"], 1, 2), jnp.array([2, 0, 3])),
        array(3, 6, 4), X, "boi",
    ),
    "stop_gradient": (lambda p, x: x @ p["w"] + 0 * x @ lax.stop_gradient(p["w"]), W, X, "io"),
    "conv NHWC": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 2), "SAME", rhs_dilation=(2, 1), dimension_numbers=("NHWC", "HWIO", "NHWC")),
        array(3, 3, 2, 4), array(2, 6, 6, 2), "iiio",
    ),
    "conv NCHW": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 1), [(1, 0), (2, 1)], lhs_dilation=(1, 2),
            dimension_numbers=("NCHW", "OIHW", "NCHW")),
        array(4, 2, 3, 3), array(2, 2, 6, 6), "oiii",
    ),
    "conv 1D": (
        lambda p, x: lax.conv_general_dilated(x, p["w"], (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC")),
        array(3, 2, 4), array(2, 6, 2), "iio",
    ),
    "conv in groups": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", feature_group_count=2, dimension_numbers=("NHWC", "HWIO", "NHWC")),
        array(3, 3, 2, 6), array(2, 5, 5, 4), "iiio",
    ),
    "depthwise conv": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", feature_group_count=4, dimension_numbers=("NHWC", "HWIO", "NHWC")),
        array(3, 3, 1, 8), array(2, 5, 5, 4), "iiio",
    ),
    "depthwise conv, stored (window, channels, multiplier)": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"].reshape(3, 3, 1, 8), (1, 1), "SAME", feature_group_count=4,
            dimension_numbers=("NHWC", "HWIO", "NHWC")),
        array(3, 3, 4, 2), array(2, 5, 5, 4), "iioo",
    ),
    "depthwise conv, stored with a multiplier of one": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"].reshape(3, 1, 4), (1,), "SAME", feature_group_count=4,
            dimension_numbers=("NHC", "HIO", "NHC")),
        array(3, 4, 1), array(2, 5, 4), "iob",
    ),
    "new axis that is contracted": (
        lambda p, x: jnp.einsum("bed,edo->bo", x[:, None], p["w"][None]), W, X, "io",
    ),
    "new axis that is contracted with the outputs": (
        lambda p, x: jnp.einsum("beo,edo->bd", (x @ p["w"])[:, None], p["w"][None]), W, X, "io",
    ),
    "jit": (lambda p, x: jax.jit(lambda w, x: x @ w.T)(p["w"].T, x), W, X, "io"),
    "remat": (lambda p, x: jax.checkpoint(lambda w: jnp.tanh(x @ w))(p["w"]), W, X, "io"),
    "cond": (
        lambda p, x: lax.cond(x[0, 0] > 9, lambda w: x @ w, lambda w: jnp.sin(x @ w), p["w"]), W, X, "io",
    ),
    "switch": (
        lambda p, x: lax.switch(2, [lambda w: x @ w, lambda w: -x @ w, lambda w: 3 * x @ w], p["w"]), W, X, "io",
    ),
    "constant of a scan": (
        lambda p, x: lax.scan(lambda c, y: (jnp.tanh(c @ p["w"]), y @ p["w"]), x, jnp.stack([x, -x]))[1],
        array(4, 4), X, "io",
    ),
    "scanned": (
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), c), x, p["w"], reverse=True)[0],
        array(3, 4, 4), X, "bio",
    ),
    "scanned twice": (
        lambda p, x: lax.scan(lambda c, ws: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), c, ws), x, p["w"])[0],
        array(2, 3, 4, 4), X, "bbio",
    ),
    "scanned in remat": (
        lambda p, x: lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, p["w"])[0],
        array(3, 4, 4), X, "bio",
    ),
    "handed out by a scan": (
        lambda p, x: x @ lax.scan(lambda c, w: (jnp.tanh(c @ w), w), x, p["w"])[1][1],
        array(3, 4, 4), X, "bio",
    ),
    "handed on by a branch": (
        lambda p, x: (lambda y, w: y @ w)(*lax.cond(
            x[0, 0] > 9, lambda w: (x, w), lambda w: (jnp.tanh(x @ w), w), p["w"])),
        array(4, 4), X, "io",
    ),
    "product with itself": (lambda p, x: 0.1 * x @ p["w"] @ (p["w"].T @ p["w"]), W, X, "io"),
    "product with itself, and no other use": (lambda p, x: x @ (p["w"] @ p["w"].T), W, X, "io"),
    "scale of columns": (lambda p, x: x @ (p["w"] * jnp.arange(1.0, 7.0)[None]), W, X, "io"),
    "scale of rows": (lambda p, x: x @ (p["w"] / jnp.arange(1.0, 5.0)[:, None]), W, X, "io"),
    "scale of experts": (
        lambda p, x: jnp.einsum("ebd,edo->ebo", jnp.stack([x] * 3), p["w"] * jnp.arange(1.0, 4.0)[:, None, None]),
        array(3, 4, 6), X, "bio",
    ),
    "scale of experts' columns": (
        lambda p, x: jnp.einsum("ebd,edo->ebo", jnp.stack([x] * 3), p["w"] * jnp.arange(1.0, 19.0).reshape(3, 1, 6)),
        array(3, 4, 6), X, "bio",
    ),
    "scale of heads": (
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(4, 2, 3) * jnp.arange(1.0, 3.0)[None, :, None]), W, X, "io",
    ),
    "plus an array": (lambda p, x: x @ (p["w"] + jnp.arange(24.0).reshape(4, 6)), W, X, "io"),
    "plus a row": (lambda p, x: x @ (jnp.arange(6.0)[None] + p["w"]), W, X, "io"),
    "an array minus it": (lambda p, x: x @ (jnp.arange(24.0).reshape(4, 6) - p["w"]), W, X, "io"),
    "plus itself, transposed": (lambda p, x: x @ (p["w"] + p["w"].T), array(4, 4), X, "io"),
    "minus itself, turned": (lambda p, x: x @ (p["w"] - p["w"][::-1]), W, X, "io"),
    "mean of two parts": (lambda p, x: x @ ((p["w"][:, :3] + p["w"][:, 3:]) / 2), W, X, "io"),
    "sum, scaled, in a jit": (
        lambda p, x: jax.jit(lambda w, x: x @ w)(2 * (p["w"] + jnp.ones((4, 6))) * jnp.arange(6.0)[None], x), W, X, "io",
    ),
    "repeated heads": (lambda p, x: x @ jnp.repeat(p["w"], 2, axis=1), W, X, "io"),
    "repeated inputs": (lambda p, x: jnp.tile(x, 2) @ jnp.repeat(p["w"], 2, axis=0), W, X, "io"),
    "repeated heads of a 3-D kernel": (
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, jnp.repeat(p["w"], 3, axis=1)), array(4, 2, 3), X, "ioo",
    ),
    "tiled": (lambda p, x: x @ jnp.tile(p["w"], (1, 2)), W, X, "io"),
    "tiled inputs and outputs": (lambda p, x: jnp.tile(x, 2) @ jnp.tile(p["w"], (2, 3)), W, X, "io"),
    "one for each example": (
        lambda p, x: jax.vmap(lambda w, x: x @ w)(jnp.broadcast_to(p["w"], (5, 4, 6)), x), W, X, "io",
    ),
    "chosen by a number": (lambda p, x: x @ jnp.where(x[0, 0] > 9, p["w"], 0.0), W, X, "io"),
    "chosen among its parts": (
        lambda p, x: x @ lax.select_n(x[0, 0] > 9, p["w"][:, :3], 2 * p["w"][:, 3:]), W, X, "io",
    ),
    "head in chunks of its outputs": (
        lambda p, x: lax.map(lambda w: jax.nn.logsumexp(x @ w.T, -1), p["w"].reshape(3, 2, 4)), array(6, 4), X, "oi",
    ),
    "head in chunks, stored the other way": (
        lambda p, x: lax.map(lambda w: jax.nn.logsumexp(x @ w, -1), p["w"].reshape(4, 3, 2).transpose(1, 0, 2)),
        W, X, "io",
    ),
    "inputs in chunks": (
        lambda p, x: lax.scan(lambda c, xw: (c + xw[0] @ xw[1], None), jnp.zeros((5, 6)),
                              (x.reshape(5, 2, 2).swapaxes(0, 1), p["w"].reshape(2, 2, 6)))[0],
        W, X, "io",
    ),
    "experts in chunks of their outputs": (
        lambda p, x: lax.map(lambda w: jnp.einsum("ebd,edo->beo", jnp.stack([x] * 3), w), p["w"].reshape(3, 4, 2, 3).transpose(2, 0, 1, 3)),
        array(3, 4, 6), X, "bio",
    ),
    "rounded to bfloat16": (lambda p, x: x @ lax.reduce_precision(p["w"], 8, 23), W, X, "io"),
    "behind a barrier": (lambda p, x: x @ lax.optimization_barrier((p["w"], x))[0], W, X, "io"),
    "named": (lambda p, x: x @ checkpoint_name(p["w"], "w"), W, X, "io"),
    "put on a device": (lambda p, x: x @ jax.device_put(p["w"], jax.devices()[0]), W, X, "io"),
    "columns by number": (lambda p, x: x @ p["w"][:, np.array([0, 2, 5])], W, X, "io"),
    "an expert for each token, by vmap": (
        lambda p, x: jax.vmap(lambda x, k: x @ p["w"][k])(x, jnp.array([0, 2, 1, 1, 0])), array(3, 4, 6), X, "bio",
    ),
    "two experts for each token": (
        lambda p, x: jnp.einsum("td,tkod->tko", x, p["w"][jnp.array([[0, 2], [1, 1], [2, 0], [0, 1], [1, 2]])]),
        array(3, 6, 4), X, "boi",
    ),
    "a layer by number": (
        lambda p, x: lax.fori_loop(0, 3, lambda k, x: jnp.tanh(x @ jnp.take(p["w"], k, axis=0)), x), array(3, 4, 4), X, "bio",
    ),
    "an expert for each token": (
        lambda p, x: jnp.einsum("td,tdo->to", x, p["w"][jnp.array([0, 2, 1, 1, 0])]), array(3, 4, 6), X, "bio",
    ),
    "carried by a loop": (
        lambda p, x: lax.scan(lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0])), None), (p["w"], x), length=3)[0][1],
        array(4, 4), X, "io",
    ),
    "changed in a jit that gives it back": (
        lambda p, x: x @ jax.jit(lambda w: w * jnp.arange(6.0)[None] + 1)(p["w"]), W, X, "io",
    ),
    "changed in a checkpoint that gives it back": (
        lambda p, x: x @ jax.checkpoint(lambda w: w * jnp.arange(6.0)[None] + 1)(p["w"]), W, X, "io",
    ),
    "changed for the branches": (
        lambda p, x: lax.cond(x[0, 0] > 9, lambda w: x @ w, lambda w: jnp.sin(x @ w), p["w"] + 1), W, X, "io",
    ),
    "changed for a loop": (
        lambda p, x: (lambda w: lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=2)[0])(p["w"] - 1),
        array(4, 4), X, "io",
    ),
    "changed to be scanned": (
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"] * jnp.arange(4.0)[None, None])[0],
        array(3, 4, 4), X, "bio",
    ),
    "changed to be carried": (
        lambda p, x: lax.scan(lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0])), None), (p["w"] / 2 + 1, x), length=2)[0][1],
        array(4, 4), X, "io",
    ),
    "changed by a scan that hands it out": (
        lambda p, x: x @ lax.scan(lambda c, w: (jnp.tanh(c @ w), w + 1), x, p["w"])[1][1],
        array(3, 4, 4), X, "bio",
    ),
    "third power": (lambda p, x: x @ jnp.linalg.matrix_power(p["w"], 3), array(4, 4), X, "io"),
}  # fmt: skip


@pytest.mark.parametrize("name", slow.after(24, FACTORED))
def test_stays_factored(name):
    fn, w, x, axes = FACTORED[name]
    check(fn, w, x, axes=axes)


FALLBACK = {
    "elementwise": (lambda p, x: x @ p["w"] + jnp.sum(p["w"] ** 2), W, X),
    "half of the inputs": (
        lambda p, x: jnp.sum(x @ p["w"].reshape(4, 6)) + jnp.einsum("h,hkd->kd", x[0, :2], p["w"].reshape(2, 2, 6)),
        W, X,
    ),
    "joins input and output": (lambda p, x: x @ p["w"] + jnp.tile(x, 6)[:, :24] @ p["w"].reshape(24, 1), W, X),
    "each entry changed before the only product": (lambda p, x: x @ jnp.tanh(p["w"]), W, X),
    "normalised by columns": (
        lambda p, x: x @ ((p["w"] - p["w"].mean(0, keepdims=True)) / p["w"].std(0, keepdims=True)), W, X,
    ),
    "masked": (lambda p, x: x @ jnp.where(jnp.tri(4, 6) > 0, p["w"], 0.0), W, X),
    "rounded to float8": (
        lambda p, x: x @ p["w"].astype(jnp.float8_e4m3fn).astype(jnp.float32) + 0 * (x @ p["w"]), W, X,
    ),
    "scale of rows and columns": (
        lambda p, x: x @ (p["w"] * jnp.arange(1.0, 25.0).reshape(4, 6)), W, X,
    ),
    "set into zeros": (lambda p, x: x @ jnp.zeros((4, 9)).at[:, :6].set(p["w"]), W, X),
    "updated in zeros": (
        lambda p, x: x @ lax.dynamic_update_slice(jnp.zeros((4, 9)), p["w"], (0, 0)), W, X,
    ),
    "set as rows of zeros": (
        lambda p, x: x @ jnp.zeros((4, 6)).at[np.array([0, 3])].set(p["w"]), array(2, 6), X,
    ),
    "a column of it scaled": (lambda p, x: x @ p["w"].at[:, 0].multiply(2.0), W, X),
    "Kronecker product": (lambda p, x: x @ jnp.kron(p["w"], jnp.ones((2, 1))), array(2, 3), X),
    "chosen for each example": (
        lambda p, x: jax.vmap(lambda k, x: lax.switch(k, [lambda x: x @ p["w"], lambda x: x[:3].sum() + x @ p["w"]], x))(
            jnp.array([0, 1, 0, 1, 1]), x), W, X,
    ),
    "a branch gives it": (
        lambda p, x: x @ lax.cond(x[0, 0] > 9, lambda: p["w"], lambda: 2 * p["w"]), W, X,
    ),
    "complex numbers": (lambda p, x: jnp.abs(x @ lax.complex(p["w"], 2 * p["w"])), W, X),
    "custom derivative on the way": (lambda p, x: x @ jax.nn.relu(p["w"]), W, X),
    "divides": (lambda p, x: x @ (1 / (3 + jnp.abs(p["w"]))), W, X),
    "custom derivative": (
        lambda p, x: jax.nn.relu(p["w"]).sum() + x @ p["w"], W, X,
    ),
    "changed by a loop": (
        lambda p, x: x @ p["w"] + lax.scan(lambda c, _: (c * 0.5, None), p["w"], length=2)[0][:1], W, X,
    ),
    "output of a branch": (
        lambda p, x: x @ p["w"]
        + jnp.tile(x @ lax.cond(x[0, 0] > 9, lambda w: w[:, :3], lambda w: w[:, 3:], p["w"]), 2), W, X,
    ),
    "batch axis used as an output": (
        lambda p, x: jnp.einsum("ebd,edo->ebo", jnp.stack([x, x, x]), p["w"])
        + jnp.einsum("bd,edo->ebo", x, jnp.sin(p["w"])),
        array(3, 4, 6), X,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", slow.after(8, FALLBACK))
def test_falls_back_and_is_still_right(name):
    fn, w, x = FALLBACK[name]
    use = check(fn, w, x, factored=False)
    assert use.fallbacks
    params, adapter = made(fn, w, x)
    with pytest.raises(ValueError, match="'w' would be formed in full.*strict=True forbids"):
        lora.lift(fn, strict=True)(lora.bind(params, adapter), x)
    with pytest.raises(ValueError, match="dropout needs it factored"):
        lifted = lora.lift(fn, dropout=0.5, dropout_key=jax.random.key(0))
        lifted(lora.bind(params, adapter), x)


CHANGED = {
    "times": lambda w: w * 0.3,
    "divided": lambda w: w / 3.0,
    "negative": lambda w: -w,
    "padded and cut": lambda w: jnp.pad(w, ((0, 0), (1, 1)))[:, 1:-1],
    "reversed twice": lambda w: w[::-1][::-1],
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_kernel_starts_as_the_base_bit_for_bit(name):
    fn = lambda p, x: x @ CHANGED[name](p["w"])
    w = array(64, 48)
    params, x = {"w": w}, array(5, 64)
    adapter = lora.init(jax.random.key(0), fn, params, lora.LoRAConfig(rank=2, targets=("w",)), x)
    lifted = lora.lift(fn, strict=True)(lora.bind(params, adapter), x)  # op by op, as written
    np.testing.assert_array_equal(lifted, fn(params, x))


SIDE_EFFECTS = {
    "callback": lambda w: jax.debug.callback(lambda _: None, w),
    "unused": lambda w: lax.sin(w),
    "two outputs": lambda w: lax.optimization_barrier((w, 2 * w)),
}


@pytest.mark.parametrize("name", SIDE_EFFECTS)
def test_what_else_happens_to_a_kernel_does_not_hide_its_product(name):
    def fn(p, x):
        SIDE_EFFECTS[name](p["w"])
        return x @ p["w"]

    params, adapter = made(fn, W, X)
    assert adapter["w"].axes == "io"
    got = lora.lift(fn)(lora.bind(params, adapter), X)
    np.testing.assert_allclose(got, fn(lora.merge(params, adapter), X), rtol=1e-5, atol=1e-5)


def test_while_loop():
    """Not reverse-differentiable in JAX, so values only."""

    def fn(p, x):
        return lax.while_loop(
            lambda c: jnp.sum(c @ p["w"]) * 0 + c[0, 0] < 6,
            lambda c: jnp.tanh(c @ p["w"]) + c + 2,
            x,
        )

    params, adapter = made(fn, array(4, 4), X)
    got = lora.lift(fn, strict=True)(lora.bind(params, adapter), X)
    np.testing.assert_allclose(got, fn(lora.merge(params, adapter), X), rtol=1e-5, atol=1e-5)
    assert lora.explain(fn, params, adapter, X).kernels["w"].factored == 2


def test_each_use_of_a_tied_kernel_is_factored():
    fn = lambda p, ids: jnp.tanh(p["w"][ids]) @ p["w"].T
    assert check(fn, array(5, 6), IDS, axes="io").factored == 2


def test_out_of_bounds_lookups_are_those_of_the_base():
    fn = lambda p, ids: jnp.take(p["w"], ids, axis=0, mode="fill", fill_value=7.0)
    params, adapter = made(fn, array(5, 6), IDS)
    ids = jnp.array([[1, 9]])
    got = lora.lift(fn, strict=True)(lora.bind(params, adapter), ids)
    np.testing.assert_allclose(got, fn(lora.merge(params, adapter), ids), rtol=1e-5)
    assert np.all(got[0, 1] == 7.0)


@pytest.mark.parametrize(
    "where", [dict(mode="clip"), dict(mode="promise_in_bounds"), dict(mode="fill", fill_value=7.0)]
)
def test_out_of_bounds_lookups_under_vmap_are_those_of_merge(where):
    """An index of an axis that is taken whole starts at 0, or, with a fill value, forms the sum."""
    dims = lax.GatherDimensionNumbers(
        offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0, 1)
    )
    fn = lambda p, at: lax.gather(p["w"], at, dims, slice_sizes=(1, 6), **where)
    params, adapter = made(lambda p, ids: p["w"][ids], array(5, 6), IDS)
    high = 1 if where["mode"] == "promise_in_bounds" else 9
    at = jnp.array([[1, 0], [high, 0], [2, 0 if high == 1 else 3]])
    got = lora.lift(fn)(lora.bind(params, adapter), at)
    np.testing.assert_allclose(got, fn(lora.merge(params, adapter), at), rtol=1e-5, atol=1e-6)
    (use,) = lora.explain(fn, params, adapter, at).kernels.values()
    assert bool(use.fallbacks) == (where["mode"] == "fill")


def test_remat_policy_is_kept():
    policy = jax.checkpoint_policies.save_only_these_names("kept")

    def fn(p, x):
        def body(w):
            y = checkpoint_name(jnp.tanh(x @ w), "kept")
            return jnp.sum(jnp.sin(y))

        return jax.checkpoint(body, policy=policy, prevent_cse=False)(p["w"])

    params, adapter = made(fn, W, X)
    closed = jax.make_jaxpr(lora.lift(fn))(lora.bind(params, adapter), X)
    (eqn,) = [e for e in closed.eqns if e.primitive.name in ("checkpoint", "remat2")]
    assert eqn.params["policy"] is policy and eqn.params["prevent_cse"] is False


def _primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for body in forms.bodies(eqn):
            yield from _primitives(body.jaxpr)


def test_never_forms_the_kernel_or_its_gradient():
    """No intermediate of the gradient has the kernel's shape."""
    w = array(64, 96)
    fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) ** 2)
    params, adapter = made(fn, w, array(5, 64))
    grad = jax.grad(lambda a: lora.lift(fn)(lora.bind(params, a), array(5, 64)))
    shapes = {v.aval.shape for e in _primitives(jax.make_jaxpr(grad)(adapter)) for v in e.outvars}
    assert w.shape not in shapes and w.shape[::-1] not in shapes


def test_code_without_kernels_is_left_as_it_is():
    def fn(p, x):
        y = lax.scan(lambda c, z: (jax.nn.relu(c + z), c), x, jnp.stack([x, x]))[0]
        return y @ p["w"]

    params, adapter = made(fn, W, X)
    of = lambda f, tree: [
        str(e.params["jaxpr"])
        for e in jax.make_jaxpr(f)(tree, X).eqns
        if e.primitive.name == "scan"
    ]
    assert of(lora.lift(fn), lora.bind(params, adapter)) == of(fn, params)


def test_custom_derivatives_of_activations_survive():
    @jax.custom_vjp
    def twice(x):
        return 2 * x

    twice.defvjp(lambda x: (2 * x, None), lambda _, g: (100 * g,))
    fn = lambda p, x: jnp.sum(twice(x @ p["w"]))
    params, adapter = made(fn, W, X)
    got = jax.grad(lambda a: lora.lift(fn)(lora.bind(params, a), X))(adapter)
    plain = jax.grad(lambda a: jnp.sum(X @ lora.merge(params, a)["w"]))(adapter)
    np.testing.assert_allclose(got["w"].b, 100 * plain["w"].b, rtol=1e-4)


def test_kernel_used_only_inside_a_custom_derivative_is_found():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    check(lambda p, x: product(x, p["w"]), W, X, axes="io", factored=False)


def test_arguments_reach_the_function_as_they_are():
    def fn(p, x, *, train, scale, name):
        assert train is True and name == "n" and isinstance(scale, float)
        assert np.asarray(x).shape == (5, 4)  # concrete outside jit
        return {"y": scale * (x @ p["w"]), "same": x}

    params, adapter = made(functools.partial(fn, train=True, scale=2.0, name="n"), W, X)
    out = lora.lift(fn)(lora.bind(params, adapter), X, train=True, scale=2.0, name="n")
    np.testing.assert_allclose(
        out["y"], 2 * X @ lora.merge(params, adapter)["w"], rtol=1e-5, atol=1e-5
    )
    assert lora.lift(fn).__name__ == "fn"


def test_without_an_adapter_it_is_the_function():
    fn = lambda p, x: x @ p["w"]
    np.testing.assert_array_equal(lora.lift(fn)({"w": W}, X), fn({"w": W}, X))


def test_an_unbound_adapter_is_refused():
    fn = lambda p, x: x @ p["w"]
    _, adapter = made(fn, W, X)
    with pytest.raises(ValueError, match="bind"):
        lora.lift(fn)(adapter, X)


class TestDropout:
    fn = staticmethod(lambda p, x: x @ p["w"])

    def run(self, key, rate=0.5, fn=None, w=W, x=X):
        fn = fn or self.fn
        params, adapter = made(fn, w, x)
        adapter = {"w": dataclasses.replace(jax.tree.map(jnp.ones_like, adapter["w"]), scale=1.0)}
        out = lora.lift(fn, dropout=rate, dropout_key=key)(lora.bind(params, adapter), x)
        return out, fn(params, x), adapter["w"]

    def test_acts_on_the_input_of_the_branch_only(self):
        x = jnp.eye(64, 4) + 1  # every product with a column of ones shows what was dropped
        key = jax.random.key(3)
        out, base, node = self.run(key, rate=0.25, x=x)
        branch = np.asarray(out - base)[:, 0] / node.a.shape[-1]
        # Each of four inputs is dropped or divided by 0.75, in every possible combination.
        inputs = np.asarray(x) / 0.75
        masks = np.array(np.meshgrid(*[[0, 1]] * 4)).reshape(4, -1).T
        possible = (masks[None] * inputs[:, None]).sum(-1)
        assert np.all(np.min(np.abs(possible - branch[:, None]), axis=1) < 1e-3)
        assert len(np.unique(np.round(branch, 3))) > 4

    def test_keeps_the_mean(self):
        outs = jax.vmap(lambda k: self.run(k)[0])(jax.random.split(jax.random.key(0), 4000))
        _, base, node = self.run(jax.random.key(0))
        full = base + node.a.shape[-1] * X.sum(1, keepdims=True) @ jnp.ones((1, 6))
        error = np.asarray(outs.std(0)) / 4000**0.5
        assert np.all(np.abs(outs.mean(0) - full) < 5 * error + 1e-4)

    def test_every_use_draws_its_own_mask(self):
        out, base, _ = self.run(
            jax.random.key(0), fn=lambda p, x: jnp.stack([x @ p["w"], x @ p["w"]])
        )
        assert not np.allclose(out[0] - base[0], out[1] - base[1])

    def test_every_step_of_a_loop_draws_its_own_mask(self):
        fn = lambda p, x: lax.scan(lambda c, _: (c, x @ p["w"]), 0, length=3)[1]
        out, base, _ = self.run(jax.random.key(0), fn=fn)
        branch = out - base
        assert not np.allclose(branch[0], branch[1]) and not np.allclose(branch[1], branch[2])

    def test_every_step_of_a_while_loop_draws_its_own_mask(self):
        def fn(p, x):
            body = lambda c: (c[0] + 1, c[1].at[c[0]].set(x @ p["w"]))
            return lax.while_loop(lambda c: c[0] < 2, body, (0, jnp.zeros((2, 5, 6))))[1]

        out, base, _ = self.run(jax.random.key(0), fn=fn)
        branch = out - base
        assert not np.allclose(branch[0], branch[1])

    @pytest.mark.parametrize("name", ["lookup", "conv NHWC", "scanned", "remat", "cond", "batched"])
    def test_acts_in_every_kind_of_use(self, name):
        fn, w, x, _ = FACTORED[name]
        params, adapter = made(fn, w, x)
        bound = lora.bind(params, adapter)
        plain = lora.lift(fn)(bound, x)
        one = lora.lift(fn, dropout=0.5, dropout_key=jax.random.key(1))(bound, x)
        two = lora.lift(fn, dropout=0.5, dropout_key=jax.random.key(2))(bound, x)
        again = lora.lift(fn, dropout=0.5, dropout_key=jax.random.key(1))(bound, x)
        assert not np.allclose(plain, one) and not np.allclose(one, two)
        np.testing.assert_array_equal(one, again)

    def test_recomputation_uses_the_same_mask(self):
        fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) ** 2)
        params, adapter = made(fn, W, X)
        key = jax.random.key(5)
        run = lambda f: jax.grad(
            lambda a: lora.lift(f, dropout=0.5, dropout_key=key)(lora.bind(params, a), X)
        )(adapter)
        # The same equations in the same places, but for the checkpoint around them.
        want = jax.grad(
            lambda a: jax.checkpoint(
                lambda a: lora.lift(fn, dropout=0.5, dropout_key=key)(lora.bind(params, a), X)
            )(a)
        )(adapter)
        np.testing.assert_allclose(run(fn)["w"].a, want["w"].a, rtol=1e-5, atol=1e-6)

    def test_rate_may_be_traced(self):
        params, adapter = made(self.fn, W, X)
        run = lambda rate: lora.lift(self.fn, dropout=rate, dropout_key=jax.random.key(0))(
            lora.bind(params, adapter), X
        )
        np.testing.assert_allclose(jax.jit(run)(0.0), run(0.0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(jax.jit(run)(0.5), run(0.5), rtol=1e-5, atol=1e-6)

    def test_bad_settings(self):
        for rate in (-0.1, 1.0, 2):
            with pytest.raises(ValueError, match="dropout must be in"):
                lora.lift(self.fn, dropout=rate, dropout_key=jax.random.key(0))
        with pytest.raises(ValueError, match="needs a PRNG key"):
            lora.lift(self.fn, dropout=0.1)


def test_float32_adapter_leaves_activations_in_bfloat16():
    """Of the size of an activation, only sums are in float32, and nothing is kept for the gradient."""
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    params, adapter = made(
        fn, array(64, 48).astype(jnp.bfloat16), array(32, 64).astype(jnp.bfloat16)
    )
    assert adapter["w"].a.dtype == jnp.float32
    x = array(32, 64).astype(jnp.bfloat16)
    run = lambda adapter, x: lora.lift(fn)(lora.bind(params, adapter), x)
    is_wide = lambda aval: aval.dtype == jnp.float32 and aval.shape[:1] == (32,)
    closed = jax.make_jaxpr(run)(adapter, x)
    wide = {e.primitive.name for e in _primitives(closed) for v in e.outvars if is_wide(v.aval)}
    assert wide <= {"dot_general", "convert_element_type", "add"}
    result, pull = jax.vjp(run, adapter, x)
    assert result.dtype == jnp.bfloat16
    kept = jax.tree.leaves(pull)
    assert any(y.shape == (32, 48) for y in kept) and not [y.shape for y in kept if is_wide(y)]


def test_explain_says_where_and_why():
    def fn(p, x):
        return x @ p["w"] + jnp.sum(p["w"] ** 2)

    params, adapter = made(fn, W, X)
    text = str(lora.explain(fn, params, adapter, X))
    assert "w: factored 1, formed 1" in text
    assert "no rule keeps a low-rank sum factored here" in text and "test_lift.py" in text


def test_explain_takes_shapes_and_counts_a_loop_once():
    fn = FACTORED["scanned"][0]
    params, adapter = made(fn, array(3, 4, 4), X)
    shapes = jax.eval_shape(lambda t: t, params)
    report = lora.explain(fn, shapes, adapter, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert report.kernels["w"].factored == 1


def test_explain_shows_a_kernel_that_is_never_used():
    fn = lambda p, x: x @ p["w"]
    params, adapter = made(fn, W, X)
    report = lora.explain(lambda p, x: x, params, adapter, X)
    assert report.kernels["w"] == report.kernels["w"].__class__(0, ())
    assert "never used" in str(report)


def test_shared_jit_counts_each_call():
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    fn = lambda p, x: layer(p["w"], layer(p["w"], x))
    assert check(fn, array(4, 4), X).factored == 2


def test_gradient_inside_the_function():
    """A function that differentiates itself (an energy model, say), with a checkpoint inside."""

    def fn(p, x):
        energy = lambda x: jnp.sum(jax.checkpoint(lambda x: jnp.tanh(x @ p["w"]) ** 2)(x))
        return jax.grad(energy)(x)

    check(fn, W, X, axes="io")


def test_lift_of_a_lifted_function():
    inner = lambda p, x: jnp.tanh(x @ p["w"])
    params, adapter = made(inner, W, X)
    fn = lambda v, x: lora.lift(inner)(lora.bind(params, adapter), x) @ v["v"]
    outer = {"v": array(6, 3)}
    config = lora.LoRAConfig(rank=1, targets=("v",))
    second = lora.init(jax.random.key(0), fn, outer, config, X)
    second["v"] = LowRank(second["v"].a, jnp.ones_like(second["v"].b), second["v"].scale)
    got = lora.lift(fn, strict=True)(lora.bind(outer, second), X)
    want = inner(lora.merge(params, adapter), X) @ lora.merge(outer, second)["v"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert list(nodes(second)) == ["v"]


@pytest.mark.parametrize("dtype", "e3m4 e4m3 e4m3b11fnuz e4m3fn e4m3fnuz e5m2 e5m2fnuz".split())
def test_float8_kernels_that_are_cast_up_before_the_product(dtype):
    """Beside the product in float32; `merge` rounds the sum to the kernel's own dtype."""
    dtype = jnp.dtype(f"float8_{dtype}")
    params = {"w": W.astype(dtype)}
    fn = lambda p, x: x @ p["w"].astype(jnp.float32)
    adapter = lora.init(jax.random.key(0), fn, params, lora.LoRAConfig(rank=2, alpha=3.0), X)
    assert adapter["w"].a.dtype == jnp.float32
    got = lora.lift(fn, strict=True)(lora.bind(params, adapter), X)
    np.testing.assert_array_equal(got, fn(params, X))
    node = dataclasses.replace(adapter["w"], b=0.1 + adapter["w"].b)
    whole = np.asarray(params["w"]).astype(np.float32) + 1.5 * np.asarray(node.a @ node.b)
    got = lora.lift(fn, strict=True)(lora.bind(params, {"w": node}), X)
    np.testing.assert_allclose(got, np.asarray(X) @ whole, rtol=1e-4, atol=1e-4)
    merged = lora.merge(params, {"w": node})["w"]
    assert merged.dtype == dtype
    np.testing.assert_array_equal(np.asarray(merged), whole.astype(dtype))
