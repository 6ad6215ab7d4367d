"""Random chains of rearrangements, control flow and products: `lift` is `merge`, whatever they are.

A chain takes a kernel whose axes have roles, moves it by steps, each perhaps inside a `jit`, a
`cond` or the like, and multiplies the input by what comes out, perhaps inside a loop. The labels of
the axes are kept on the way, so that the product sums over the inputs: `init` must find these roles.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import lora_jax as lora
from lora_jax.lowrank import LowRank, factor_shapes
from tests.helpers import toy_method

ROLES = ("io", "oi", "bio", "ibo", "iio", "ioo", "oio", "oib", "biio", "ioio", "bioo", "obio")
# Unit roundoffs are 6e-8 and 4e-3; a chain has some ten roundings of sums of some ten terms, and
# `merge` rounds the kernel once more than `lift`.
DTYPES = {"float32": 2e-5, "bfloat16": 6e-2}


def constants(*shape, dtype):
    """Numbers between a half and two that nothing happens to cancel."""
    n = np.arange(math.prod(shape)).reshape(shape)
    return jnp.asarray(0.5 + (n * 0.618) % 1.5, dtype)


# ---- Steps ---------------------------------------------------------------------------------------
#
# Each takes the kernel, the roles of its axes and what was drawn, and gives kernel and roles.


def transpose(w, roles, draw):
    order = draw(st.permutations(range(w.ndim)))
    return lambda w: jnp.transpose(w, order), "".join(roles[k] for k in order)


def split_axis(w, roles, draw):
    k = draw(st.integers(0, w.ndim - 1))
    n = draw(st.sampled_from([d for d in range(1, w.shape[k] + 1) if w.shape[k] % d == 0]))
    shape = (*w.shape[:k], n, w.shape[k] // n, *w.shape[k + 1 :])
    return lambda w: w.reshape(shape), roles[:k] + roles[k] + roles[k:]


def join_axes(w, roles, draw):
    pairs = [k for k in range(w.ndim - 1) if roles[k] == roles[k + 1]]
    if not pairs:
        return None
    k = draw(st.sampled_from(pairs))
    shape = (*w.shape[:k], w.shape[k] * w.shape[k + 1], *w.shape[k + 2 :])
    return lambda w: w.reshape(shape), roles[:k] + roles[k + 1 :]


def cut(w, roles, draw):
    k, stride = draw(st.integers(0, w.ndim - 1)), draw(st.integers(1, 2))
    start = draw(st.integers(0, w.shape[k] - 1))
    where = (*[slice(None)] * k, slice(start, None, stride))
    return lambda w: w[where], roles


def cut_at_a_number(w, roles, draw):
    k = draw(st.integers(0, w.ndim - 1))
    size = draw(st.integers(min(2, w.shape[k]), w.shape[k]))  # one of several makes a batch axis
    return lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(1), size, k), roles


def pick(w, roles, draw):
    k = draw(st.integers(0, w.ndim - 1))
    rows = np.array(draw(st.lists(st.integers(0, w.shape[k] - 1), min_size=1, max_size=3)))
    return lambda w: jnp.take(w, rows, axis=k, mode="clip"), roles


def pad(w, roles, draw):
    k, low, high = (draw(st.integers(0, n)) for n in (w.ndim - 1, 1, 1))
    widths = [(low, high) if axis == k else (0, 0) for axis in range(w.ndim)]
    value = draw(st.sampled_from([0.0, 0.5]))
    return lambda w: jnp.pad(w, widths, constant_values=value), roles


def concatenate(w, roles, draw):
    k, first = draw(st.integers(0, w.ndim - 1)), draw(st.booleans())
    other = draw(st.sampled_from(["constant", "itself", "its negative"]))
    make = {
        "constant": lambda w: constants(*w.shape, dtype=w.dtype),
        "itself": lambda w: w,
        "its negative": lambda w: -w[::-1],
    }[other]
    parts = lambda w: [w, make(w)] if first else [make(w), w]
    return lambda w: jnp.concatenate(parts(w), k), roles


def stack(w, roles, draw):
    k = draw(st.integers(0, w.ndim))
    return lambda w: jnp.stack([w, w / 2], k), roles[:k] + "o" + roles[k:]


def unstack(w, roles, draw):
    return lambda w: jnp.stack([0.5 + w, w])[1], roles


def repeat(w, roles, draw):
    k = draw(st.integers(0, w.ndim - 1))
    again = draw(st.sampled_from([jnp.repeat, lambda w, n, axis: jnp.tile(w, [n if d == axis else 1 for d in range(w.ndim)])]))  # fmt: skip
    return lambda w: again(w, 2, axis=k), roles


def reverse(w, roles, draw):
    k = draw(st.integers(0, w.ndim - 1))
    return lambda w: lax.rev(w, [k]), roles


def split(w, roles, draw):
    k = draw(st.integers(0, w.ndim - 1))
    if w.shape[k] % 2:
        return None
    return lambda w: (lambda a, b: a + b / 2)(*jnp.split(w, 2, k)), roles


def scale(w, roles, draw):
    return lambda w: -w * 0.7 / jnp.float32(0.9).astype(w.dtype), roles


def scale_side(w, roles, draw):
    side = draw(st.sampled_from("iob"))
    shape = [n if role in (side, "b") else 1 for n, role in zip(w.shape, roles, strict=True)]
    divides = draw(st.booleans())
    change = (lambda w, s: w / s) if divides else (lambda w, s: s * w)
    return lambda w: change(w, constants(*shape, dtype=w.dtype)), roles


def scale_entries(w, roles, draw):
    return lambda w: w * constants(*w.shape, dtype=w.dtype), roles


def add(w, roles, draw):
    shape = [n if draw(st.booleans()) else 1 for n in w.shape]
    return lambda w: w - constants(*shape, dtype=w.dtype), roles


def add_itself(w, roles, draw):
    k = draw(st.integers(0, w.ndim - 1))
    return lambda w: w + lax.rev(w, [k]) / 2, roles


def choose(w, roles, draw):
    flag = draw(st.booleans())
    return lambda w: jnp.where(flag, w, 0.5 * w[::-1]), roles


def write(w, roles, draw):
    k = draw(st.integers(0, w.ndim - 1))
    shape = [n + (axis == k) for axis, n in enumerate(w.shape)]
    where = tuple(slice(0, n) for n in w.shape)
    return lambda w: jnp.ones(shape, w.dtype).at[where].add(w), roles


STEPS = [
    *(transpose, split_axis, join_axes, cut, cut_at_a_number, pick, pad, concatenate, stack),
    *(unstack, repeat, reverse, split, scale, scale_side, scale_entries, add, add_itself, choose),
    write,
]


# ---- Control flow --------------------------------------------------------------------------------


def by_shard_map(f):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    spec = PartitionSpec()

    def run(*args):
        specs = tuple(spec for _ in args)
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=spec)(*args)

    return run


def by_cond(f):
    return lambda *args: lax.cond(jnp.sum(args[-1]) > -1e9, f, lambda *a: 2 * f(*a), *args)


AROUND_STEPS = {
    "nothing": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "nested": lambda f: jax.jit(jax.checkpoint(jax.jit(f))),
    "cond": by_cond,
    "shard_map": by_shard_map,
    "vmap": lambda f: lambda w: jax.vmap(f)(w[None])[0],
    "scan": lambda f: lambda w: lax.scan(lambda c, w: (c, f(w)), 0, w[None])[1][0],
}


def in_a_scan(f):
    def run(w, x):
        body = lambda c, _: (c / 2 + f(w, x), None)
        return lax.scan(body, f(w, x), length=2)[0]

    return run


def carried(f):
    def run(w, x):
        body = lambda c, _: ((c[0], c[1] / 2 + f(c[0], x)), None)
        return lax.scan(body, (w, f(w, x)), length=2)[0][1]

    return run


def in_a_loop(f):
    return lambda w, x: lax.fori_loop(0, 2, lambda _, c: c / 2 + f(w, x), f(w, x))


AROUND_PRODUCTS = {
    "nothing": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "cond": by_cond,
    "closure": lambda f: lambda w, x: lax.cond(x.sum() > -1e9, lambda: f(w, x), lambda: -f(w, x)),
    "scan": in_a_scan,
    "carry": carried,
    "loop": in_a_loop,
    "shard_map": by_shard_map,
    "vmap": lambda f: lambda w, x: jax.vmap(lambda x: f(w, x[None])[0])(x),
    "vmap of both": lambda f: lambda w, x: jax.vmap(f)(jnp.stack([w, w]), jnp.stack([x, x]))[1],
    "nested": lambda f: jax.jit(jax.checkpoint(jax.jit(f))),
}


def product(roles):
    """``x`` times the kernel: sums over its inputs, pairs its batch axes, keeps its outputs."""
    letters = "cdefghjklm"[: len(roles)]
    of = lambda role: "".join(c for c, r in zip(letters, roles, strict=True) if r == role)
    equation = f"z{of('b')}{of('i')},{letters}->z{of('b')}{of('o')}"
    return lambda w, x: jnp.einsum(equation, x, w)


def sliced(roles):
    """The same, in a scan over the first axis of the kernel: halves of it, or its batch entries."""
    role = roles[0]
    if role == "b":
        inner, where = product(roles[1:]), 1
        pairs = lambda w, x: (w, jnp.moveaxis(x, where, 0))
        return lambda w, x: jnp.moveaxis(lax.map(lambda p: inner(*p), pairs(w, x)), 0, 1)
    halves = lambda w, k: jnp.moveaxis(w.reshape(*w.shape[:k], 2, -1, *w.shape[k + 1 :]), k, 0)
    inner, where = product(roles), 1 + roles.count("b")
    if role == "o":
        parts = lambda w, x: lax.map(lambda w: inner(w, x), halves(w, 0))
        return lambda w, x: jnp.concatenate(list(parts(w, x)), where)
    step = lambda c, p: (c + inner(*p), None)
    start = lambda w, x: jnp.zeros_like(inner(w, x))
    return lambda w, x: lax.scan(step, start(w, x), (halves(w, 0), halves(x, where)))[0]


# ---- Chains --------------------------------------------------------------------------------------


class Chain(NamedTuple):
    """A function of the kernel and an input, and the shapes that it takes."""

    text: str
    run: object
    shape: tuple
    roles: str
    example: tuple
    dtype: str

    def __repr__(self):
        return f"{self.dtype}{self.shape} {self.roles}: {self.text}"


@st.composite
def chains(draw, dtypes=("bfloat16", "float32")):
    roles, dtype = draw(st.sampled_from(ROLES)), draw(st.sampled_from(dtypes))
    shape = tuple(draw(st.sampled_from([2, 3, 4])) for _ in roles)
    w, now, run, text = jax.ShapeDtypeStruct(shape, dtype), roles, lambda w: w, []
    for _ in range(draw(st.integers(0, 4))):
        step, around = draw(st.sampled_from(STEPS)), draw(st.sampled_from(sorted(AROUND_STEPS)))
        result = step(w, now, draw)
        if result is None:
            continue
        moved = AROUND_STEPS[around](result[0])
        after = jax.eval_shape(moved, w)
        # An axis of which one entry is left is that of a stack, whatever it was.
        picks_one = after.ndim == w.ndim and after.shape.count(1) > w.shape.count(1)
        if after.size > 400 or after.ndim > 6 or picks_one:
            continue
        w, now, run = after, result[1], _then(run, moved)
        text.append(f"{step.__name__} in {around}")
    around, by_slices = draw(st.sampled_from(sorted(AROUND_PRODUCTS))), draw(st.booleans())
    # An axis that is scanned entry by entry is a batch axis; its halves keep its role.
    use_slices = by_slices and (now[0] == "b" or (w.shape[0] % 2 == 0 and w.shape[0] > 2))
    last = AROUND_PRODUCTS[around]((sliced if use_slices else product)(now))
    example = tuple(n for role in "bi" for n, r in zip(w.shape, now, strict=True) if r == role)
    text.append(f"product in {around}{' by slices' if use_slices else ''}")
    fn = lambda p, x: last(run(p["w"]), x)
    return Chain(" > ".join(text), fn, shape, roles, example, dtype)


def _then(first, second):
    return lambda w: second(first(w))


def check(chain):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.uniform(-1, 1, size=shape), chain.dtype)
    params = {"w": array(*chain.shape)}
    config = lora.LoRAConfig(rank=1, targets=("w",))
    for batch in (1, 2, 3):
        x = jax.ShapeDtypeStruct((batch, *chain.example), chain.dtype)
        found = lora.tabulate(chain.run, params, config, x).rows["w"].leaf.axes
        assert found == chain.roles, f"found {found!r} with a batch of {batch}"
    shapes = factor_shapes(chain.shape, chain.roles, rank=1)
    a, b = (jnp.asarray(rng.uniform(-1, 1, size=shape), jnp.float32) for shape in shapes)
    adapter = {"w": LowRank(a, b, jnp.float32(0.5), axes=chain.roles)}
    compare(chain, params, adapter, array(2, *chain.example), lora.merge)


def check_with_gain(chain):
    """The same with a gain for each output, beside a definition that is an einsum."""
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.uniform(-1, 1, size=shape), chain.dtype)
    a, b = (jnp.zeros(shape) for shape in factor_shapes(chain.shape, chain.roles, rank=1))
    adapter = {"w": toy_method.make_like(LowRank(a, b, 0.5, axes=chain.roles))}
    params = {"w": array(*chain.shape)}
    compare(chain, params, adapter, array(2, *chain.example), toy_method.merge)


def compare(chain, params, adapter, x, merge):
    got, want = results(chain, params, adapter, x, merge)
    for g, m in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, m = np.asarray(g, np.float32), np.asarray(m, np.float32)
        np.testing.assert_allclose(g, m, rtol=0, atol=DTYPES[chain.dtype] * (1 + np.abs(m).max()))


def results(chain, params, adapter, x, merge):
    """Values and gradients, lifted and merged, by one program that XLA does not optimise much."""

    def both(adapter, params, x):
        lifted = lambda a: lora.lift(chain.run)(lora.bind(params, a), x)
        merged = lambda a: chain.run(merge(params, a), x)
        return [_value_and_grad(f, adapter) for f in (lifted, merged)]

    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(both, compiler_options=options)(adapter, params, x)


def _value_and_grad(f, adapter):
    """The value, and in float32 the gradient, of which roundings in bfloat16 would hide the most."""

    def total(adapter):
        y = f(adapter)
        return jnp.mean(y.astype(jnp.float32)), y

    if jax.eval_shape(f, adapter).dtype != jnp.float32:
        return [f(adapter)]
    gradient, y = jax.grad(total, has_aux=True)(adapter)
    node = gradient["w"]
    return [y, *(getattr(node, name) for name, field in node.table.items() if field.is_trained)]


# Every example compiles a program of its own, so that a search for a smaller one takes an hour.
quick = functools.partial(
    settings,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@quick(max_examples=12)
@given(chains())
def test_a_random_chain(chain):
    check(chain)


@quick(max_examples=30)
@given(chains(dtypes=("float32",)))
@pytest.mark.slow
def test_a_random_chain_with_a_gain(chain):
    check_with_gain(chain)


@pytest.mark.slow
@quick(max_examples=400)
@given(chains(dtypes=("float32",)))
def test_many_random_chains_with_a_gain(chain):
    check_with_gain(chain)


@pytest.mark.slow
@quick(max_examples=600)
@given(chains(dtypes=("float32",)))
def test_many_random_chains(chain):
    check(chain)


@pytest.mark.slow
@quick(max_examples=400)
@given(chains(dtypes=("bfloat16",)))
def test_many_random_chains_in_bfloat16(chain):
    check(chain)
