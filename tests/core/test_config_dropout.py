"""The config's rate of dropout is honoured, or its absence is an error: per kernel, and overridden."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax.lowrank import LowRank

KEY = jax.random.key(3)
PARAMS = {k: jax.random.normal(jax.random.key(n), (8, 8)) for n, k in enumerate("qvo")}
X = jax.random.normal(jax.random.key(9), (5, 8))
fn = lambda p, x: jnp.tanh(x @ p["q"] + x @ p["v"]) @ p["o"]


def made(dropout=0.5, fn=fn, params=PARAMS, **fields):
    config = lora.LoRAConfig(rank=2, dropout=dropout, **fields)
    adapter = lora.init(KEY, fn, params, config, X)
    return jax.tree.map(lambda x: x + 0.3, adapter)


def call(adapter, fn=fn, params=PARAMS, **options):
    return lora.lift(fn, **options)(lora.bind(params, adapter), X)


def with_rates(adapter, **rates):
    new = {n: dataclasses.replace(adapter[n], dropout=rate) for n, rate in rates.items()}
    return adapter | new


def test_init_sets_it():
    assert {x.dropout for x in adapters.nodes(made(0.25)).values()} == {0.25}


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_with_a_key_it_is_that_of_an_explicit_rate(transform):
    adapter = made(0.5)
    run = lambda **options: transform(lambda a, k: call(a, dropout_key=k, **options))(adapter, KEY)
    np.testing.assert_array_equal(run(), run(dropout=0.5))
    assert not np.allclose(run(), run(dropout=0.0))
    # An explicit number overrides that of all kernels.
    np.testing.assert_array_equal(run(dropout=0.25), call_like(made(0.25), transform))


def call_like(adapter, transform):
    return transform(lambda a, k: call(a, dropout_key=k))(adapter, KEY)


def test_without_a_key_it_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"dropout 0.5 \(at 'o'\).*dropout_key=.*dropout=0.0"):
        call(made())
    with pytest.raises(ValueError, match="dropout_key"):
        jax.jit(jax.grad(lambda a: jnp.sum(call(a))))(made())


def test_for_evaluation_it_is_off():
    want = fn(lora.merge(PARAMS, made()), X)
    np.testing.assert_allclose(call(made(), dropout=0.0), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(call(made(0.0)), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(call(made(0.0), dropout_key=KEY), call(made(0.0)))


def test_rates_are_those_of_each_kernel():
    """A kernel without a rate has the branch that merge gives; the others vary with the key."""
    adapter = with_rates(made(0.0), q=0.5)
    alone = lambda name: lambda p, x: x @ p[name]
    other = lora.merge(PARAMS, adapter)
    for name in "vo":
        got = call(adapter, alone(name), dropout_key=KEY)
        np.testing.assert_allclose(got, X @ other[name], rtol=1e-4, atol=1e-4)
    outs = jax.vmap(lambda k: call(adapter, alone("q"), dropout_key=k))(jax.random.split(KEY, 4000))
    error = np.asarray(outs.std(0)) / 4000**0.5
    assert np.all(error > 0)  # each output depends on the draw
    assert np.all(np.abs(outs.mean(0) - X @ other["q"]) < 5 * error + 1e-4)


@pytest.mark.parametrize("loop", ["scan", "remat", "cond", "while", "vmap", "jit"])
def test_inside_control_flow(loop):
    stack = jnp.stack([PARAMS["q"], PARAMS["v"]])
    bodies = {
        "scan": lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0],
        "remat": lambda p, x: jax.checkpoint(lambda w, x: x @ w)(p["w"][0], x),
        "cond": lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ p["w"][0], lambda: x @ p["w"][1]),
        "while": lambda p, x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ p["w"][0]), x),
        "vmap": lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]),
        "jit": lambda p, x: jax.jit(lambda w, x: x @ w[1])(p["w"], x),
    }  # fmt: skip
    body, params = bodies[loop], {"w": stack}
    adapter = made(0.5, body, params)
    own = call(adapter, body, params, dropout_key=KEY)
    np.testing.assert_array_equal(own, call(adapter, body, params, dropout=0.5, dropout_key=KEY))
    assert not np.allclose(own, call(adapter, body, params, dropout=0.0))
    with pytest.raises(ValueError, match="dropout_key"):
        call(adapter, body, params)


def test_concatenated_kernels_have_one_rate():
    joint = lambda p, x: x @ jnp.concatenate([p["q"], p["v"]], axis=1)
    params = {k: PARAMS[k] for k in "qv"}
    adapter = made(0.5, joint, params)
    call(adapter, joint, params, dropout_key=KEY, strict=True)
    mixed = with_rates(adapter, q=0.25)
    with pytest.raises(ValueError, match="different rates of dropout"):
        call(mixed, joint, params, dropout_key=KEY)
    call(mixed, joint, params, dropout=0.5, dropout_key=KEY, strict=True)


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {}], ids=["explicit", "own"])
def test_a_function_may_return_its_parameters(options):
    both = lambda p, x: (fn(p, x), p)
    adapter = made(0.5)
    out, params = call(adapter, both, dropout_key=KEY, **options)
    np.testing.assert_array_equal(out, call(adapter, dropout_key=KEY, **options))
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-6),
        params,
        lora.merge(PARAMS, adapter),
    )


def test_a_kernel_that_must_be_formed_for_a_use_still_is_an_error():
    square = lambda p, x: x @ (p["q"] ** 2)
    adapter = {"q": made(0.5)["q"]}
    for options in ({}, {"dropout": 0.5}):
        with pytest.raises(ValueError, match="dropout needs it factored"):
            call(adapter, square, dropout_key=KEY, **options)
    np.testing.assert_allclose(
        call(adapter, square, dropout=0.0), square(lora.merge(PARAMS, adapter), X), rtol=1e-4
    )


def test_merge_explain_and_summary_do_not_mind():
    adapter, plain = made(0.5), made(0.0)
    jax.tree.map(
        np.testing.assert_array_equal, lora.merge(PARAMS, adapter), lora.merge(PARAMS, plain)
    )
    assert str(lora.explain(fn, PARAMS, adapter, X)) == str(lora.explain(fn, PARAMS, plain, X))
    assert lora.summary(PARAMS, adapter) == lora.summary(PARAMS, plain)


def test_a_loaded_adapter_is_for_inference(tmp_path):
    config = lora.LoRAConfig(rank=2, dropout=0.5)
    adapter = lora.init(KEY, fn, PARAMS, config, X)
    lora.save(tmp_path, adapter, config)
    loaded, again = lora.load(tmp_path, PARAMS)
    assert again.dropout == 0.5 and {x.dropout for x in loaded.values()} == {0.0}
    call(loaded)
    np.testing.assert_array_equal(
        call(loaded, dropout=again.dropout, dropout_key=KEY), call(adapter, dropout_key=KEY)
    )


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2, np.nan, None, "a", np.array(0.5)])
def test_rates_that_are_none(rate):
    with pytest.raises(ValueError, match=r"number in \[0, 1\)"):
        LowRank(jnp.zeros((3, 1)), jnp.zeros((1, 3)), 1.0, dropout=rate)
