"""`dot_general` over random layouts: the factored product equals numpy's, in any order of axes."""

import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import lora_jax as lora
from lora_jax.lowrank import LowRank, factor_shapes
from lora_jax.transform.kernel import axis_groups
from lora_jax.transform.lift import trace

sizes = st.integers(1, 3)


@st.composite
def layouts(draw):
    """A kernel's axes in random order, and an operand that shares its inputs and some batch axes."""
    roles = draw(st.permutations(
        "i" * draw(st.integers(1, 2)) + "o" * draw(st.integers(1, 2)) + "b" * draw(st.integers(0, 2))
    ))  # fmt: skip
    kernel = [(string.ascii_lowercase[k], role, draw(sizes)) for k, role in enumerate(roles)]
    contracted = draw(st.sampled_from("io"))
    shared = [axis for axis in kernel if axis[1] == "b" and draw(st.booleans())]
    contracting = [axis for axis in kernel if axis[1] == contracted]
    own = [(string.ascii_uppercase[k], "x", draw(sizes)) for k in range(draw(st.integers(0, 2)))]
    operand = draw(st.permutations(shared + contracting + own))
    return kernel, operand, draw(st.permutations(contracting)), draw(st.permutations(shared))


dtypes = st.sampled_from([(jnp.float32, 1e-4), (jnp.bfloat16, 0.1), (jnp.float16, 2e-2)])


cases = given(layouts(), dtypes, st.booleans(), st.integers(1, 3), st.integers(0, 2**31))


@settings(max_examples=15, deadline=None, derandomize=True)
@cases
def test_any_layout(layout, dtype, kernel_first, rank, seed):
    check_layout(layout, dtype, kernel_first, rank, seed)


@settings(max_examples=100, deadline=None, derandomize=True)
@cases
@pytest.mark.slow
def test_many_layouts(layout, dtype, kernel_first, rank, seed):
    check_layout(layout, dtype, kernel_first, rank, seed)


def check_layout(layout, dtype, kernel_first, rank, seed):
    kernel, operand, contracting, shared = layout
    dtype, tolerance = dtype
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape) / 2
    axes = "".join(role for _, role, _ in kernel)
    shape = [n for _, _, n in kernel]
    a_shape, b_shape = factor_shapes(shape, axes, rank)
    w, a, b = normal(*shape), normal(*a_shape), normal(*b_shape)
    x = normal(*[n for _, _, n in operand])

    where = lambda side, names: [[axis[0] for axis in side].index(name) for name, *_ in names]
    pairs = lambda names: (where(operand, names), where(kernel, names))
    (x_in, k_in), (x_batch, k_batch) = pairs(contracting), pairs(shared)
    dims = ((x_in, k_in), (x_batch, k_batch))
    if kernel_first:
        dims = ((k_in, x_in), (k_batch, x_batch))
    product = lambda p, x: lax.dot_general(*((p, x) if kernel_first else (x, p)), dims)

    node = LowRank(
        jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.float32(0.5), axes=axes
    )
    params = {"w": jnp.asarray(w, dtype)}
    bound = lora.bind(params, {"w": node})
    call = lambda p, x: product(p["w"], x)
    got = lora.lift(call, strict=True)(bound, jnp.asarray(x, dtype))

    # Independently: einsum of numpy in float64, axes named once each.
    letters = lambda role: "".join(name for name, r, _ in kernel if r == role)
    subscripts = f"{letters('b')}{letters('i')}Z,{letters('b')}Z{letters('o')}->"
    full = w + 0.5 * np.einsum(subscripts + "".join(name for name, *_ in kernel), a, b)
    own = [name for name, *_ in operand if name.isupper()]
    free = [name for name, *_ in kernel if name not in [n for n, *_ in (*contracting, *shared)]]
    out = [name for name, *_ in shared] + (free + own if kernel_first else own + free)
    want = np.einsum(
        f"{''.join(n for n, *_ in operand)},{''.join(n for n, *_ in kernel)}->{''.join(out)}",
        x,
        full,
    )
    assert got.dtype == dtype
    scale = 1 + np.max(np.abs(want), initial=0)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance * scale)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_groups_of_a_reshape(shape, data):
    """Every group holds as many elements on both sides, and together they cover both shapes."""
    size = int(np.prod(shape))
    new = []
    while size > 1 or data.draw(st.booleans()):
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        new.append(data.draw(st.sampled_from(divisors)))
        size //= new[-1]
        if len(new) > 8:
            new.append(size)
            break
    groups = axis_groups(tuple(shape), tuple(new))
    assert [k for old, _ in groups for k in old] == list(range(len(shape)))
    assert [k for _, added in groups for k in added] == list(range(len(new)))
    for old, added in groups:
        assert np.prod([shape[k] for k in old]) == np.prod([new[k] for k in added])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.permutations(range(4)), st.integers(0, 2**31))
@pytest.mark.slow
def test_moves_commute_with_forming_the_kernel(permutation, seed):
    """A chain of moves on the factors equals the same moves on the formed kernel."""
    rng = np.random.default_rng(seed)
    axes = "".join(rng.permutation(list("bioo")))
    shape = rng.integers(2, 4, 4)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in factor_shapes(shape, axes, 2))
    w = jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"w": w}
    bound = lora.bind(params, {"w": LowRank(a, b, jnp.float32(1), axes=axes)})

    def chain(w):
        w = jnp.transpose(w, permutation)[:, 1:, ::2]
        w = w.reshape(*w.shape[:2], 1, *w.shape[2:])
        return jnp.concatenate([w, w, jnp.ones(w.shape)], axis=int(seed % 5))

    got = lora.lift(lambda p: chain(p["w"]))(bound)
    want = chain(lora.merge(params, {"w": LowRank(a, b, jnp.float32(1), axes=axes)})["w"])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    if jax.__version_info__ >= (0, 9):  # before, a slice with strides was a lookup
        (event,) = trace(lambda p: chain(p["w"]), (bound,), {})
        assert event.primitive == "output"  # it was kept factored up to there
