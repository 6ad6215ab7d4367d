"""Products of bfloat16: values and gradients of float32 sums, in any order of axes."""

import re
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import lora_jax as lora
from lora_jax import products

MATRIX = (((1,), (0,)), ((), ()))


@st.composite
def layouts(draw):
    """The axes of two operands in random order, and which of them are paired."""
    name = iter(string.ascii_letters)
    axes = lambda most: [(next(name), draw(st.integers(1, 3))) for _ in range(draw(most))]
    summed, batch = axes(st.integers(0, 2)), axes(st.integers(0, 2))
    x, y = axes(st.integers(0, 2)), axes(st.integers(0, 2))
    x, y = (draw(st.permutations(free + summed + batch)) for free in (x, y))
    return x, y, draw(st.permutations(summed)), draw(st.permutations(batch))


def draw_integers(seed, axes):
    """Small whole numbers, whose sums of products bfloat16 holds exactly."""
    shape = [n for _, n in axes]
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


@given(layouts(), st.sampled_from([jnp.bfloat16, jnp.float32]))
@settings(max_examples=25, deadline=None)
def test_values_and_gradients(layout, result):
    x_axes, y_axes, summed, batch = layout
    dims = tuple(
        tuple(tuple(axes.index(k) for k in group) for axes in (x_axes, y_axes))
        for group in (summed, batch)
    )
    x, y = draw_integers(0, x_axes), draw_integers(1, y_axes)
    narrow = [jnp.asarray(v, jnp.bfloat16) for v in (x, y)]
    run = lambda x, y: products.bfloat16_dot_general(x, y, dims, None, jnp.dtype(result))
    got, pull = jax.vjp(run, *narrow)
    free = lambda axes: [k for k in axes if k not in summed and k not in batch]
    out = [*batch, *free(x_axes), *free(y_axes)]
    letters = [",".join("".join(k for k, _ in axes) for axes in pair) for pair in
               ((x_axes, y_axes), (out, y_axes), (out, x_axes))]  # fmt: skip
    name = lambda axes: "".join(k for k, _ in axes)
    np.testing.assert_array_equal(got, np.einsum(f"{letters[0]}->{name(out)}", x, y))
    assert got.dtype == result
    g = draw_integers(2, out)
    by_x, by_y = pull(jnp.asarray(g, result))
    assert by_x.dtype == by_y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(by_x, np.einsum(f"{letters[1]}->{name(x_axes)}", g, y))
    np.testing.assert_array_equal(by_y, np.einsum(f"{letters[2]}->{name(y_axes)}", g, x))


def test_every_product_of_the_gradient_has_narrow_operands_and_float32_sums():
    x, w = jnp.ones((4, 3), jnp.bfloat16), jnp.ones((3, 2), jnp.bfloat16)
    multiply = lambda x, w: products.bfloat16_dot_general(x, w, MATRIX, None, jnp.dtype(x.dtype))
    loss = lambda x, w: multiply(x, w).astype(jnp.float32).sum()
    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    types = [re.findall(r"tensor<[\dx]*(\w+)>", line) for line in lines]
    assert types == [["bf16", "bf16", "f32"]] * len(lines) and len(lines) >= 2


def test_sums_are_not_rounded_on_the_way():
    """256 + 1 + ... + 1: in bfloat16 each of the ones would be lost."""
    x = jnp.asarray([[256.0] + [1.0] * 64], jnp.bfloat16)
    y = products.dot_general(x, jnp.ones((65, 1), jnp.bfloat16), MATRIX)
    assert y.tolist() == [[320.0]]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.int32])
def test_other_dtypes_are_those_of_lax(dtype):
    x, w = jnp.ones((4, 3), dtype), jnp.ones((3, 2), dtype)
    ours = jax.make_jaxpr(lambda x, w: products.dot_general(x, w, MATRIX))(x, w)
    assert str(ours) == str(jax.make_jaxpr(lambda x, w: lax.dot_general(x, w, MATRIX))(x, w))


def test_mixed_dtypes_are_those_of_lax():
    x, w = jnp.ones((4, 3), jnp.bfloat16), jnp.ones((3, 2), jnp.float32)
    assert products.dot_general(x, w, MATRIX).dtype == jnp.float32


# ---- Through lift --------------------------------------------------------------------------------


def apply(params, x):
    return products.dot_general(x, params["w"], (((x.ndim - 1,), (0,)), ((), ())))


def transposed(params, x):
    return products.dot_general(params["w"], x, (((0,), (x.ndim - 1,)), ((), ()))).T


def by_rows(params, x):
    return jax.vmap(lambda row: apply(params, row))(x)


def in_a_loop(params, x):
    return lax.scan(lambda carry, row: (carry, apply(params, row)), 0, x)[1]


def recomputed(params, x):
    return jax.checkpoint(apply)(params, x)


@pytest.mark.parametrize("fn", [apply, transposed, by_rows, in_a_loop, recomputed])
def test_lift_keeps_it_factored(fn):
    """Values of `lift` and of `merge`, and gradients of both, with a kernel that is one product."""
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (5, 8)), jnp.bfloat16)
    params = {"w": jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (8, 6)), jnp.bfloat16)}
    adapter = lora.init(jax.random.key(0), fn, params, lora.LoRAConfig(rank=2), x)
    assert adapter["w"].axes == "io"
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    lifted = lambda adapter: lora.lift(fn, strict=True)(lora.bind(params, adapter), x)
    merged = lambda adapter: fn(lora.merge(params, adapter), x)
    total = lambda run: lambda adapter: jnp.sum(jnp.square(run(adapter).astype(jnp.float32)))
    assert lifted(adapter).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        lifted(adapter).astype(np.float32), merged(adapter).astype(np.float32), atol=0.03
    )
    ours, theirs = (jax.tree.leaves(jax.grad(total(run))(adapter)) for run in (lifted, merged))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=0.02 * float(jnp.abs(b).max()))


def test_a_quantized_kernel_is_decoded_at_the_product():
    """Inside the checkpoint, so that no pass keeps the numbers."""
    x = jnp.ones((4, 64), jnp.bfloat16)
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.bfloat16)}
    codes = lora.quantize(params, scheme="int8", like={"w": "io"}, targets=("w",))
    got = lora.lift(apply)(codes, x)
    np.testing.assert_allclose(
        got.astype(np.float32), apply(lora.merge(codes, {}), x).astype(np.float32), atol=0.05
    )
    jaxpr = jax.make_jaxpr(lambda codes: lora.lift(apply)(codes, x))(codes)
    assert [eqn.primitive.name for eqn in jaxpr.eqns][-1] in ("checkpoint", "remat", "remat2")


def test_the_branch_asks_for_no_less_than_the_function():
    """For float64 of bfloat16 operands, too, where there are such numbers."""
    x, params = jnp.ones((3, 4), jnp.bfloat16), {"w": jnp.ones((4, 4), jnp.bfloat16)}
    wide = lambda p, x: lax.dot_general(x, p["w"], MATRIX, preferred_element_type=jnp.float64)
    with jax.enable_x64(True):
        adapter = lora.init(jax.random.key(0), wide, params, lora.LoRAConfig(rank=1), x)
        closed = jax.make_jaxpr(lambda a: lora.lift(wide)(lora.bind(params, a), x))(adapter)
        products_of = [e for e in closed.eqns if e.primitive.name == "dot_general"]
        types = [e.outvars[0].aval.dtype.name for e in products_of]
    assert types == ["float64", "float32", "float64"]


def test_a_product_that_nobody_uses():
    """JAX leaves a call with nothing in it where only another result is wanted."""
    x, params = jnp.ones((3, 4), jnp.bfloat16), {"w": jnp.ones((4, 4), jnp.bfloat16)}
    fn = jax.jit(lambda p, x: (apply(p, x), x.sum()))
    adapter = lora.init(jax.random.key(0), fn, params, lora.LoRAConfig(rank=1), x)
    count = jax.jit(lambda x: lora.lift(fn)(lora.bind(params, adapter), x)[1])
    assert count(x) == lora.lift(lambda p, x: fn(p, x)[1])(params, x) == 12


def test_dropout_and_a_call_of_the_same_name():
    """A user's function that has the name of the product, and is none, is looked into."""

    @jax.jit
    def bfloat16_dot_general(x, w):
        return jnp.tanh(x @ w) @ w.T

    x, params = jnp.ones((3, 4), jnp.bfloat16), {"w": jnp.ones((4, 4), jnp.bfloat16) / 8}
    fn = lambda p, x: bfloat16_dot_general(x, p["w"])
    adapter = lora.init(jax.random.key(0), fn, params, lora.LoRAConfig(rank=1), x)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    y = lora.lift(fn)(lora.bind(params, adapter), x)
    np.testing.assert_allclose(
        y.astype(np.float32), fn(lora.merge(params, adapter), x).astype(np.float32), atol=0.05
    )
    dropped = lora.lift(apply, dropout=0.5, dropout_key=jax.random.key(1))
    assert jnp.isfinite(dropped(lora.bind(params, adapter), x)).all()
