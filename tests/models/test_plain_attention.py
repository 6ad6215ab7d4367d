"""The attention core against softmax(QK'/sqrt(d) + bias)V, written out in NumPy in float64."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import plain_attention as module

LOWEST = np.finfo(np.float32).min


def expected(query, key, value, bias, keep=1.0):
    """The result, and the gradients of ``(result * g).sum()`` as a function of ``g``."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    root = query.shape[-1] ** -0.5
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) * root + np.asarray(bias, np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)

    def gradients(g):
        d_weights = np.einsum("bqhd,bkhd->bhqk", g, value) * keep
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
        return (
            np.einsum("bhqk,bkhd->bqhd", d_scores, key) * root,
            np.einsum("bhqk,bqhd->bkhd", d_scores, query) * root,
            np.einsum("bhqk,bqhd->bkhd", weights * keep, g),
        )

    return np.einsum("bhqk,bkhd->bqhd", weights * keep, value), gradients


def inputs(queries=5, keys=7, *, mask=(7, 3), seed=0):
    rng = np.random.default_rng(seed)
    query, g = rng.normal(size=(2, len(mask), queries, 3, 4))
    key, value = 2 * rng.normal(size=(2, len(mask), keys, 3, 4))
    attended = np.arange(keys) < np.array(mask)[:, None]
    bias = np.where(attended, 0.0, LOWEST).astype(np.float32)[:, None, None, :]
    return (query, key, value), bias, g


@functools.partial(jax.jit, static_argnames="drop")
def pull(args, bias, g, drop=lambda weights: weights):
    y, back = jax.vjp(lambda *args: module.attend(*args, bias, drop=drop), *args)
    return y, back(g)


def check(got, want, g, tolerance):
    value, gradients = want
    np.testing.assert_allclose(got[0], value, rtol=0, atol=tolerance)
    for x, y in zip(got[1], gradients(g), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def test_doctest():
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("mask", [(7, 7), (7, 3), (1, 0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-6), ("float64", 1e-13)])
def test_values_and_gradients(mask, dtype, tolerance):
    args, bias, g = inputs(mask=mask)
    with jax.enable_x64(dtype == "float64"):
        cast = [jnp.asarray(x, dtype) for x in args]
        got = pull(cast, jnp.asarray(bias), jnp.asarray(g, dtype))
        assert {x.dtype for x in [got[0], *got[1]]} == {jnp.dtype(dtype)}
        check(jax.device_get(got), expected(*args, bias), g, tolerance)


def test_no_weight_on_masked_keys_and_equal_weights_without_any():
    (query, key, value), bias, _ = inputs(mask=(4, 0))
    y = module.attend(*(jnp.asarray(x, jnp.float32) for x in (query, key, value)), bias)
    other = value.copy()
    other[0, 4:] = 1e6
    moved = module.attend(*(jnp.asarray(x, jnp.float32) for x in (query, key, other)), bias)
    np.testing.assert_array_equal(y[0], moved[0])
    mean = np.broadcast_to(value[1].mean(0), y[1].shape)
    np.testing.assert_allclose(y[1], mean, rtol=0, atol=2e-6)


def test_large_scores_do_not_overflow():
    args, bias, g = inputs()
    args = (300 * args[0], args[1], args[2])
    got = pull([jnp.asarray(x, jnp.float32) for x in args], bias, jnp.asarray(g, jnp.float32))
    # Scores of some thousands have absolute errors of 1e-4 or so in float32, and gradients by the
    # key are 300 times as large as elsewhere.
    np.testing.assert_allclose(got[0], expected(*args, bias)[0], rtol=0, atol=5e-3)
    assert all(np.isfinite(x).all() for x in got[1])


def test_dropped_weights():
    args, bias, g = inputs()
    kept = np.random.default_rng(1).random((2, 3, 5, 7)) < 0.8
    keep = kept / 0.8
    drop = lambda weights: weights * jnp.asarray(keep, weights.dtype)
    got = pull([jnp.asarray(x, jnp.float32) for x in args], bias, jnp.asarray(g, jnp.float32), drop)
    check(got, expected(*args, bias, keep), g, 5e-6)


def test_a_bias_of_its_own_for_each_query():
    args, _, g = inputs(queries=7, mask=(7, 7))
    bias = np.where(np.tri(7, dtype=bool), 0.0, LOWEST).astype(np.float32)[None, None]
    got = pull([jnp.asarray(x, jnp.float32) for x in args], bias, jnp.asarray(g, jnp.float32))
    check(got, expected(*args, bias), g, 5e-6)


def test_bfloat16():
    args, bias, g = inputs()
    low = [jnp.asarray(x, jnp.bfloat16) for x in args]
    low_g = jnp.asarray(g, jnp.bfloat16)
    got = pull(low, bias, low_g)
    assert {x.dtype for x in [got[0], *got[1]]} == {jnp.dtype(jnp.bfloat16)}
    as_float = jax.tree.map(lambda x: x.astype(jnp.float32), got)
    # bfloat16 keeps 8 bits; a few roundings of 2^-9, relative to the largest value of up to 5.
    check(as_float, expected(*low, bias), np.asarray(low_g, np.float64), 0.03)


def test_the_second_derivative_and_forward_mode():
    args, bias, _ = inputs()
    args = [jnp.asarray(x, jnp.float32) for x in args]
    f = lambda query: module.attend(query, *args[1:], bias).sum()
    tangent = jnp.ones_like(args[0])
    _, forward = jax.jvp(f, (args[0],), (tangent,))
    np.testing.assert_allclose(forward, jax.grad(f)(args[0]).sum(), rtol=1e-4, atol=1e-4)
    assert np.isfinite(jax.jvp(jax.grad(f), (args[0],), (tangent,))[1]).all()
