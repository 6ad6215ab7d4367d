"""What is adapted: the same leaves whatever the inputs' sizes, only weights, and nothing silently."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental import sparse
from jax.experimental.custom_partitioning import custom_partitioning

import lora_jax as lora
from lora_jax import paths
from lora_jax.adapter import nodes
from lora_jax.transform import forms
from lora_jax.transform import lift as lift_module
from tests.helpers import slow

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
CONFIG = lora.LoRAConfig(rank=2)
normal = nn.initializers.normal(1.0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape) / 2, jnp.float32)


def adapted(fn, params, *args, config=CONFIG, **kwargs):
    """Names and roles of the kernels that the config chooses."""
    shapes = jax.eval_shape(lambda: lora.init(KEY, fn, params, config, *args, **kwargs))
    return {name: node.axes for name, node in nodes(shapes).items()}


class Vit(nn.Module):
    """A class token, registers, positions, a relative table, a layer scale, heads."""

    @nn.compact
    def __call__(self, x):
        n = x.shape[0]
        token, registers = self.param("cls", normal, (1, 1, 8)), self.param("reg", normal, (4, 8))
        x = jnp.concatenate(
            [jnp.tile(token, (n, 1, 1)), jnp.broadcast_to(registers[None], (n, 4, 8)), x], axis=1
        )
        x = x + self.param("pos", normal, (1, x.shape[1], 8))
        table = self.param("relative", normal, (2 * x.shape[1] - 1, 2))
        at = np.arange(x.shape[1])
        bias = table[at[:, None] - at[None, :] + x.shape[1] - 1].transpose(2, 0, 1)[None]
        q, k, v = (nn.DenseGeneral((2, 4), name=name)(x) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias)
        y = nn.DenseGeneral(8, axis=(-2, -1), name="o")(jnp.einsum("bhqk,bkhd->bqhd", weights, v))
        x = x + y * self.param("scale", normal, (1, 1, 8))
        return nn.Dense(3, name="head")(nn.LayerNorm()(x[:, 0]))


class Latents(nn.Module):
    """Queries that are learned meet projections, which are the kernels."""

    heads: int

    @nn.compact
    def __call__(self, x):
        latents = self.param("latents", normal, (4, 8))
        if not self.heads:  # one head, and no copy for each example
            q, k, v = (nn.Dense(8, name=n)(y) for n, y in [("q", latents), ("k", x), ("v", x)])
            weights = jax.nn.softmax(jnp.einsum("ld,bsd->bls", q, k))
            return nn.Dense(2, name="head")(jnp.einsum("bls,bsd->bld", weights, v))
        z = jnp.broadcast_to(latents[None], (x.shape[0], 4, 8))
        z = z + nn.MultiHeadDotProductAttention(self.heads, name="cross")(nn.LayerNorm()(z), x)
        return nn.Dense(2, name="head")(nn.gelu(nn.Dense(8, name="up")(z)).mean(1))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + self.param("pos", normal, (1, 5, 8))[:, : x.shape[1]]
        return nn.Dense(4, name="head")(
            nn.MultiHeadDotProductAttention(2, decode=True, name="self")(x)
        )


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.SpectralNorm(nn.Dense(6, name="dense"))(x, update_stats=True)
        return nn.BatchNorm(use_running_average=True)(x)


class CodeBook(nn.Module):
    """A code book that follows its inputs is state; the projections are kernels."""

    @nn.compact
    def __call__(self, x):
        book = self.variable("ema", "book", lambda: array(7, 8))
        x = nn.Dense(8, name="inp")(x)
        nearest = jnp.argmin(((x[:, None, :] - book.value[None]) ** 2).sum(-1), axis=-1)
        scores = x @ book.value.T
        return nn.Dense(3, name="out")(book.value[nearest]) + scores.mean()


QKVO = {"q": "ioo", "k": "ioo", "v": "ioo", "o": "iio"}
CROSS = {"cross/query": "ioo", "cross/key": "ioo", "cross/value": "ioo", "cross/out": "iio"}
SELF = {name.replace("cross", "self"): axes for name, axes in CROSS.items()}
MODELS = {
    "vision transformer": (Vit(), (6, 8), QKVO | {"head": "io"}),
    "latents with heads": (Latents(2), (6, 8), CROSS | {"up": "io", "head": "io"}),
    "latents with one head": (Latents(0), (6, 8), dict.fromkeys(("q", "k", "v", "head"), "io")),
    "cache": (Decoder(), (1, 8), SELF | {"head": "io"}),
    "statistics": (Normalised(), (8,), {"dense": "io"}),
    "code book": (CodeBook(), (8,), {"inp": "io", "out": "io"}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_models_have_the_same_kernels_for_every_batch(name):
    model, shape, wanted = MODELS[name]
    call = lambda v, x: model.apply(v, x, mutable=["cache", "batch_stats", "ema"])
    for batch in (1, 2, 5):
        x = array(batch, *shape)
        variables = model.init(KEY, jnp.zeros((batch, 5, 8)) if name == "cache" else x)
        got = adapted(call, variables, x)
        assert got == {f"params/{n}/kernel": axes for n, axes in wanted.items()}


STACK, SQUARE, W = array(8, 6, 6), array(6, 6), array(6, 5)
PERMUTED = jnp.array([0, 3, 1, 1, 7])
# name: (function of {"w"} or more and x (batch, 6), parameters, roles of what is adapted)
KINDS = {
    "position that is added": (
        lambda p, x: (x + p["pos"]) @ p["w"], {"w": W, "pos": array(1, 6)}, {"w": "io"},
    ),
    "position that is looked up by number": (
        lambda p, x: jnp.tanh(x + p["pos"][jnp.arange(1)]) @ p["w"], {"w": W, "pos": array(3, 6)}, {"w": "io"},
    ),
    "prefix that is concatenated": (
        lambda p, x: jnp.concatenate([p["prefix"], x]) @ p["w"], {"w": W, "prefix": array(1, 6)}, {"w": "io"},
    ),
    "memory that the input is written to": (
        lambda p, x: lax.dynamic_update_slice(p["memory"], x, (0, 0)) @ p["w"], {"w": W, "memory": array(9, 6)}, {"w": "io"},
    ),
    "layer scale": (lambda p, x: (x * p["gamma"]) @ p["w"], {"w": W, "gamma": array(1, 6)}, {"w": "io"}),
    "weights that are normalised": (
        lambda p, x: x @ (p["w"] * p["g"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)),
        {"w": W, "g": array(1, 5)}, {"w": "io"},
    ),
    "weights that are dropped at random": (
        lambda p, x: x @ (p["w"] * jax.random.bernoulli(KEY, 0.5, (6, 5))), {"w": W}, {"w": "io"},
    ),
    "two factors": (lambda p, x: x @ (p["a"] @ p["b"]), {"a": array(6, 3), "b": array(3, 5)}, {"a": "io", "b": "io"}),
    "two factors, transposed": (
        lambda p, x: x @ (p["a"] @ p["b"]).T, {"a": array(5, 3), "b": array(3, 6)}, {"a": "oi", "b": "oi"},
    ),
    "a kernel and two factors": (
        lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), {"w": W, "a": array(6, 3), "b": array(3, 5)},
        {"a": "io", "b": "io", "w": "io"},
    ),
    "power iteration first": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(jnp.ones(5) @ p["w"].T @ p["w"])), {"w": W}, {"w": "io"},
    ),
    "experts by token": (
        lambda p, x: jnp.einsum("td,tdo->to", jnp.tile(x[:1], (5, 1)), p["w"][PERMUTED]), {"w": STACK}, {"w": "bio"},
    ),
    "experts by a router": (
        lambda p, x: jax.vmap(lambda x, k: x @ p["w"][k])(x, jnp.argmax(x, axis=-1)), {"w": STACK}, {"w": "bio"},
    ),
    "experts by a router, taken": (
        lambda p, x: jnp.einsum("td,tdo->to", x, jnp.take(p["w"], jnp.argmax(x @ p["r"], -1), axis=0)),
        {"w": STACK, "r": array(6, 8)}, {"w": "bio", "r": "io"},
    ),
    "one expert for all": (
        lambda p, x: x @ lax.dynamic_index_in_dim(p["w"], jnp.argmax(x[0]), keepdims=False), {"w": STACK}, {"w": "bio"},
    ),
    "layers by number": (
        lambda p, x: lax.fori_loop(0, 8, lambda k, x: jnp.tanh(x @ jnp.take(p["w"], k, axis=0)), x), {"w": STACK}, {"w": "bio"},
    ),
    "embedding and tied head": (
        lambda p, x: p["e"][jnp.argmax(x, -1)] @ p["w"] @ p["e"].T, {"e": array(9, 6), "w": SQUARE}, {"e": "io", "w": "io"},
    ),
    "a start token that is a constant, and a tied head": (
        lambda p, x: jnp.tanh(x + p["e"][jnp.zeros(1, int)] @ p["q"]) @ p["e"].T,
        {"e": array(9, 6), "q": SQUARE}, {"e": "oi", "q": "io"},
    ),
    "two parameters of which the names say nothing": (
        lambda p, x: jnp.tanh(jnp.einsum("df,bd->bf", p["a"], jnp.broadcast_to(p["z"], (len(x), 6)))) + x @ p["b"],
        {"a": array(6, 5), "z": array(1, 6), "b": W}, None,
    ),
    "a batch that is closed over": (
        lambda p: (jnp.ones((1, 6)) + p["pos"]) @ p["w"], {"w": W, "pos": array(1, 6)}, {"w": "io"},
    ),
    "a window of each of several kernels": (
        lambda p, x: jnp.einsum(
            "td,edo->teo", x, jax.vmap(lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(1), 3, 1))(p["w"])
        ),
        {"w": STACK}, {"w": "oio"},
    ),
    "a window for each example": (
        lambda p, x: jax.vmap(lambda x: x @ lax.dynamic_slice_in_dim(p["w"], jnp.argmax(x), 2, 1))(x),
        {"w": W}, {"w": "io"},
    ),
    "carried by a loop that changes it": (
        lambda p, x: lax.scan(lambda c, _: (c * 0.5, x @ c), p["w"], length=3)[1], {"w": W}, {"w": "io"},
    ),
    "a router and a head that are small": (
        lambda p, x: jax.nn.softmax(x @ p["router"]) @ p["w"] @ p["head"],
        {"router": array(6, 4), "w": array(4, 6), "head": array(6, 1)},
        {"head": "io", "router": "io", "w": "io"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds_have_the_same_kernels_for_every_batch(name):
    fn, params, wanted = KINDS[name]
    for batch in (1, 2, 3):
        args = () if name == "a batch that is closed over" else (array(batch, 6),)
        wanted = wanted or adapted(fn, params, *args)  # the same, whichever they are
        assert adapted(fn, params, *args) == wanted


def test_a_batch_that_is_closed_over_beside_a_key():
    fn = lambda p, key: (jnp.ones((1, 6)) + p["pos"]) @ p["w"] * jax.random.uniform(key)
    assert adapted(fn, {"w": W, "pos": array(1, 6)}, KEY) == {"w": "io"}


def test_a_function_that_needs_the_values_of_its_inputs():
    fn = lambda p, x, n: (x[:, : int(n)] + p["pos"]) @ p["w"] if x[0, 0] < 9 else x
    params = {"w": array(3, 5), "pos": array(1, 3)}
    assert adapted(fn, params, np.ones((1, 6)), np.int32(3)) == {"w": "io"}


# ---- Uses inside other equations -----------------------------------------------------------------


def _mesh():
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def _shard_map(p, x):
    specs = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    return jax.shard_map(jnp.matmul, mesh=_mesh(), in_specs=specs[::-1], out_specs=specs[1])(
        x, p["w"]
    )


def _pallas(p, x):
    def body(x, w, o):
        o[...] = x[...] @ w[0]

    blocks = dict(
        in_specs=[
            pl.BlockSpec((len(x), 6), lambda k: (0, 0)),
            pl.BlockSpec((1, 6, 5), lambda k: (k, 0, 0)),
        ],
        out_specs=pl.BlockSpec((len(x), 5), lambda k: (k, 0)),
    )
    shape = jax.ShapeDtypeStruct((2 * len(x), 5), x.dtype)
    return pl.pallas_call(body, grid=(2,), out_shape=shape, interpret=True, **blocks)(x, p["w"])


@jax.custom_batching.custom_vmap
def _vmapped(x, w):
    return x @ w


@_vmapped.def_vmap
def _vmapped_rule(size, batched, x, w):
    return x @ w, True


_partitioned = custom_partitioning(lambda x, w: x @ w)
_partitioned.def_partition(
    partition=lambda *_: None,
    infer_sharding_from_operands=lambda *_: None,
    sharding_rule="i j, j k -> i k",
)
_product = jax.custom_vjp(lambda x, w: x @ w)
_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

HIDDEN = {
    "shard_map": (_shard_map, W, "io"),
    "pmap": (lambda p, x: jax.pmap(lambda w, x: x @ w, in_axes=(None, 0))(p["w"], x[None])[0], W, "io"),
    "custom_vjp": (lambda p, x: _product(x, p["w"]), W, "io"),
    "custom_vmap": (lambda p, x: _vmapped(x, p["w"]), W, "io"),
    "composite": (lambda p, x: lax.composite(lambda x, w: x @ w, "my.product")(x, p["w"]), W, "io"),
    "linear_call": (
        lambda p, x: jax.custom_derivatives.linear_call(lambda w, x: x @ w, lambda w, y: y @ w.T, p["w"], x), W, "io",
    ),
    "custom_partitioning": (lambda p, x: _partitioned(x, p["w"]), W, "io"),
    "cg": (
        lambda p, x: jax.scipy.sparse.linalg.cg(lambda v: p["w"] @ p["w"].T @ v + 9 * v, x[0])[0], SQUARE, "oi",
    ),
    "sparse product": (
        lambda p, x: x @ (sparse.BCOO((jnp.ones(6), jnp.stack([jnp.arange(6)] * 2, 1)), shape=(6, 6)) @ p["w"]), W, "io",
    ),
    "optimization_barrier": (lambda p, x: x @ lax.optimization_barrier(p["w"]), W, "io"),
    "tile": (lambda p, x: x @ jnp.tile(p["w"], (1, 2)), W, "io"),
    "set": (lambda p, x: x @ jnp.zeros((6, 9)).at[:, :5].set(p["w"]), W, "io"),
    "add": (lambda p, x: x @ jnp.zeros((6, 9)).at[:, 2:7].add(p["w"]), W, "io"),
    "dynamic_update_slice": (
        lambda p, x: x @ lax.dynamic_update_slice(jnp.zeros((6, 9)), p["w"], (0, 0)), W, "io",
    ),
    "symmetric": (lambda p, x: x @ (p["w"] + p["w"].T), SQUARE, "io"),
    "triangular": (lambda p, x: x @ jnp.tril(p["w"]), SQUARE, "io"),
    "columns": (lambda p, x: x @ p["w"][:, np.array([0, 2, 4])], W, "io"),
    "branch": (lambda p, x: x @ lax.cond(x[0, 0] > 0, lambda: p["w"], lambda: 2 * p["w"]), W, "io"),
    "switch": (
        lambda p, x: x @ lax.switch(jnp.argmax(x[0]) % 3, [lambda w: w, lambda w: -w, jnp.sin], p["w"]), W, "io",
    ),
    "convolution, vmapped": (
        lambda p, x: jax.vmap(lambda w: lax.conv_general_dilated(
            x[None, :, :, None], w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))(p["w"]),
        array(3, 2, 2, 1, 4), "oiiio",
    ),
}  # fmt: skip
# JAX has no derivatives of these, or none without more rules.
NO_GRADIENT = {"custom_partitioning", "custom_vmap", "composite", "linear_call"}


@pytest.mark.parametrize("name", slow.after(8, HIDDEN))
def test_a_kernel_inside_another_equation(name):
    fn, w, axes = HIDDEN[name]
    params, x = {"w": w}, array(4, 6)
    adapter = lora.init(KEY, fn, params, CONFIG, x)
    assert adapter["w"].axes == axes
    adapter = jax.tree.map(lambda a: a + 0.1 if a.ndim else a, adapter)
    lifted = lambda a: lora.lift(fn)(lora.bind(params, a), x)
    merged = lambda a: fn(lora.merge(params, a), x)
    close = lambda got, want: np.testing.assert_allclose(
        got, want, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(want).max())
    )
    close(lifted(adapter), merged(adapter))
    if name not in NO_GRADIENT:
        total = lambda f: lambda a: jnp.sum(jnp.sin(f(a)))
        jax.tree.map(close, jax.grad(total(lifted))(adapter), jax.grad(total(merged))(adapter))


def test_a_kernel_inside_a_pallas_call():
    params, x = {"w": array(2, 6, 5)}, array(4, 6)
    adapter = lora.init(KEY, _pallas, params, CONFIG, x)
    assert adapter["w"].axes == "bio"
    adapter = jax.tree.map(lambda a: a + 0.1 if a.ndim else a, adapter)
    got = lora.lift(_pallas)(lora.bind(params, adapter), x)
    np.testing.assert_allclose(got, _pallas(lora.merge(params, adapter), x), rtol=1e-5)


# ---- What is said --------------------------------------------------------------------------------


def test_an_opaque_use_is_guessed_for_a_named_matrix_and_said():
    eqx = pytest.importorskip("equinox")
    hidden = eqx.internal.noinline(lambda x, w: x @ w)
    fn, params, x = lambda p, x: hidden(x, p["w"]), {"w": W}, array(3, 6)
    with pytest.raises(ValueError, match="finds no kernel"):
        lora.init(KEY, fn, params, CONFIG, x)
    row = lora.tabulate(
        lambda p, x: fn(p, x) + x @ W, params | {"v": W}, lora.LoRAConfig(rank=2, targets=("w",)), x
    )
    assert row.rows["w"].action == "adapted"
    with pytest.warns(UserWarning, match="w can't be seen"):
        adapter = lora.init(KEY, fn, params, lora.LoRAConfig(rank=2, targets=("w",)), x)
    assert adapter["w"].axes == "io"
    given = lora.LoRAConfig(rank=2, roles={"w": "oi"})
    adapter = lora.init(KEY, fn, params, given, x)
    assert adapter["w"].axes == "oi"
    adapter = jax.tree.map(lambda a: a + 0.1 if a.ndim else a, adapter)
    got = lora.lift(fn)(lora.bind(params, adapter), x)
    np.testing.assert_allclose(got, fn(lora.merge(params, adapter), x), rtol=1e-5)


def test_given_roles():
    fn, x = lambda p, x: x @ p["w"], array(3, 6)
    config = lora.LoRAConfig(rank=2, targets=("w",), roles={"w": "oi"})
    assert adapted(fn, {"w": W}, x, config=config) == {"w": "oi"}
    assert lora.LoRAConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="roles.*'ioo'.*for 3 axes.*w has shape .6, 5"):
        adapted(fn, {"w": W}, x, config=lora.LoRAConfig(rank=2, roles={"w": "ioo"}))
    with pytest.raises(ValueError, match="roles entry 'v' matches no parameter"):
        adapted(fn, {"w": W}, x, config=lora.LoRAConfig(rank=2, roles={"v": "io"}))
    with pytest.raises(ValueError, match="roles entry 'w' matches no parameter"):  # none is adapted
        adapted(
            fn, {"w": W}, x, config=lora.LoRAConfig(targets=(), train=("w",), roles={"w": "io"})
        )
    params = {"w": W, "table": jnp.zeros((2, 3), jnp.int32)}
    with pytest.raises(ValueError, match="table, which holds int32: only floating-point"):
        adapted(fn, params, x, config=lora.LoRAConfig(rank=2, roles={"table": "io"}))
    for wrong in ("ii", "xy", 3, "oo"):
        with pytest.raises(ValueError, match="one letter for each axis"):
            lora.LoRAConfig(roles={"w": wrong})


def test_every_leaf_is_in_the_table():
    model, x = Vit(), array(1, 6, 8)
    variables = model.init(KEY, x)
    table = lora.tabulate(model.apply, variables, lora.LoRAConfig(rank=4, train=("head/bias",)), x)
    rows = {n.removeprefix("params/"): row for n, row in table.rows.items()}
    assert list(table.rows) == list(paths.named_leaves(variables))
    assert rows["head/kernel"].rank == 3 and "lowered from 4" in rows["head/kernel"].note
    assert rows["head/bias"].action == "trained"
    assert rows["q/kernel"].leaf.axes == "ioo" and rows["q/kernel"].action == "adapted"
    assert "combined by 'add' with what depends on the inputs" in rows["pos"].note
    assert "'concatenate'" in rows["cls"].note and "test_kernels.py" in rows["cls"].note
    assert (
        rows["relative"].leaf.kind == "lookup" and "not among the targets" in rows["relative"].note
    )
    assert all(row.note or row.action == "adapted" for row in table.rows.values())
    assert "1×11×8" in str(table) and len(str(table).splitlines()) == len(rows) + 1


def test_state_is_adapted_only_if_it_is_named():
    model, x = CodeBook(), array(2, 8)
    variables = model.init(KEY, x)
    table = lora.tabulate(model.apply, variables, CONFIG, x)
    assert "collection 'ema'" in table.rows["ema/book"].note
    named = lora.LoRAConfig(rank=2, targets=("book", "inp"))
    assert set(adapted(model.apply, variables, x, config=named)) == {
        "ema/book",
        "params/inp/kernel",
    }


def test_a_path_that_ends_in_params_is_no_collection():
    fn = lambda p, x: x @ p["ema_params"]["params"]["w"] @ p["ema_x"]["v"] + x @ p["params"]["u"]
    params = {
        "ema_params": {"params": {"w": W}},
        "ema_x": {"v": array(5, 4)},
        "params": {"u": array(6, 4)},
    }
    # Beside "params" stand collections, whatever they hold; "ema_x" is one, and not "x" beside "ema_".
    table = lora.tabulate(fn, params, CONFIG, array(3, 6))
    assert "collection 'ema_x'" in table.rows["ema_x/v"].note
    inner = {"ema_params": params["ema_params"], "ema_x": params["ema_x"]}
    fn = lambda p, x: x @ p["ema_params"]["params"]["w"] @ p["ema_x"]["v"]
    assert set(adapted(fn, inner, array(3, 6))) == {"ema_params/params/w", "ema_x/v"}


def test_variables_of_nnx_that_are_no_parameters():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.table = nnx.Linear(6, 5, rngs=rngs), nnx.Cache(array(5, 5))

        def __call__(self, x):
            return self.dense(x) @ self.table[...]

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    fn = lambda state, x: nnx.merge(graph, state)(x)
    assert adapted(fn, state, array(1, 6)) == {"dense/kernel": "io"}
    note = lora.tabulate(fn, state, CONFIG, array(1, 6)).rows["table"].note
    assert "type Cache, not nnx.Param" in note


def test_complex_kernels_are_named():
    params = {"w": array(6, 5), "c": array(5, 5) + 1j * array(5, 5)}
    fn = lambda p, x: jnp.abs((x @ p["w"]) @ p["c"])
    with pytest.warns(UserWarning, match="c is a kernel with roles 'io', but of complex numbers"):
        assert list(lora.init(KEY, fn, params, CONFIG, array(3, 6))) == ["w"]
    with pytest.raises(ValueError, match="complex numbers .complex64., which can't be adapted"):
        lora.init(KEY, fn, params, lora.LoRAConfig(rank=2, targets=("c",)), array(3, 6))
    pair = {"re": array(6, 5), "im": array(6, 5)}
    join = lambda p, x: jnp.abs(x @ lax.complex(p["re"], p["im"]))
    assert adapted(join, pair, array(3, 6)) == {"im": "io", "re": "io"}


def test_a_named_leaf_that_can_not_be_adapted_is_said():
    fn = lambda p, x: (x + p["pos"]) @ p["w"]
    params, x = {"w": W, "pos": array(1, 6)}, array(4, 6)
    with pytest.raises(ValueError, match="pos: is combined by 'add' with what depends on the inp"):
        lora.init(KEY, fn, params, lora.LoRAConfig(rank=1, targets=("pos",)), x)
    two = {"a": {"w": W}, "b": {"pos": array(1, 6)}}
    fn = lambda p, x: (x + p["b"]["pos"]) @ p["a"]["w"]
    with pytest.warns(UserWarning, match="Not adapted: b/pos is combined by 'add'"):
        lora.init(KEY, fn, two, lora.LoRAConfig(rank=1, targets=("re:.*",)), x)


def test_small_kernels_get_the_rank_that_they_allow():
    fn, x = lambda p, x: x @ p["w"] @ p["head"], array(3, 6)
    params = {"w": array(6, 5), "head": array(5, 2)}
    config = lora.LoRAConfig(rank=4, alpha=8)
    adapter = lora.init(KEY, fn, params, config, x)
    assert adapter["w"].a.shape == (6, 4) and adapter["head"].a.shape == (5, 2)
    assert float(adapter["w"].scale) == 2.0 and float(adapter["head"].scale) == 4.0  # alpha / rank
    for explicit in (dict(targets=("head",)), dict(rank_pattern={"head": 4})):
        with pytest.raises(ValueError, match="rank 4 is larger than the kernel 'head'"):
            lora.init(KEY, fn, params, lora.LoRAConfig(rank=4, **explicit), x)


def test_an_adapter_that_is_not_smaller_is_warned_of():
    fn, params = lambda p, x: x @ p["w"], {"w": array(6, 6)}
    with pytest.warns(UserWarning, match="of w are not smaller than their kernels"):
        lora.init(KEY, fn, params, lora.LoRAConfig(rank=3), array(2, 6))


# ---- Forms of equations that are not known -------------------------------------------------------


def _rename(jaxpr, primitive, old, new):
    """The jaxpr as another release of JAX might give it: a parameter has another name."""

    def renamed(eqn):
        if eqn.primitive.name != primitive:
            return eqn
        params = {new if k == old else k: v for k, v in eqn.params.items()}
        return eqn.replace(params=params)

    inner = jaxpr.jaxpr.replace(eqns=[renamed(e) for e in jaxpr.jaxpr.eqns])
    return (
        jaxpr.replace(jaxpr=inner)
        if inner is not jaxpr.jaxpr and jaxpr.jaxpr is not jaxpr
        else inner
    )


RENAMED = {
    "scan": ("length", lambda p, x: lax.scan(lambda c, _: (jnp.tanh(c @ p["v"]), None), x, length=2)[0] @ p["w"]),
    "while": (
        "body_jaxpr",
        lambda p, x: lax.while_loop(lambda c: c.sum() < 0, lambda c: c @ p["v"], x) @ p["w"],
    ),
    "cond": ("branches", lambda p, x: lax.cond(x[0, 0] > 0, lambda x: x @ p["v"], jnp.sin, x) @ p["w"]),
    "jit": ("jaxpr", lambda p, x: jax.jit(lambda v, x: jnp.tanh(x @ v))(p["v"], x) @ p["w"]),
    "dot_general": ("dimension_numbers", lambda p, x: jnp.tanh(x @ p["v"]) + jnp.sum(p["w"][PERMUTED[:2]])),
    "transpose": ("permutation", lambda p, x: jnp.tanh(x @ p["v"].T) @ p["w"]),
}  # fmt: skip


@pytest.mark.parametrize("primitive", RENAMED)
def test_an_unknown_form_is_said(monkeypatch, primitive):
    old, fn = RENAMED[primitive]
    params, x = {"v": SQUARE, "w": W}, array(3, 6)
    traced = lift_module._make_jaxpr
    monkeypatch.setattr(
        lift_module,
        "_make_jaxpr",
        lambda *a, **k: _rename(traced(*a, **k), primitive, old, "renamed"),
    )
    says = f"'{primitive}' has parameters .*renamed.* in jax {jax.__version__}"
    with pytest.raises(ValueError, match=says):
        lora.init(KEY, fn, params, lora.LoRAConfig(rank=2, targets=("v",)), x)
    table = lora.tabulate(fn, params | {"u": W}, lora.LoRAConfig(train=("u",), targets=()), x)
    assert table.rows["v"].action == "frozen"
    if primitive != "dot_general":  # without it there is no kernel at all
        with pytest.warns(UserWarning, match=f"(?s)Some kernels may not be adapted.*{says}"):
            adapter = lora.init(KEY, fn, params, CONFIG, x)
        assert list(adapter) == ["w"]


def test_an_unknown_form_is_said_by_explain(monkeypatch):
    fn = lambda p, x: lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, length=2)[0]
    params, x = {"w": SQUARE}, array(3, 6)
    adapter = jax.tree.map(
        lambda a: a + 0.1 if a.ndim else a, lora.init(KEY, fn, params, CONFIG, x)
    )

    def unknown(eqn):
        raise forms.UnknownForm(forms.describe_unknown(eqn))

    monkeypatch.setattr(forms, "scan", unknown)
    (reason,) = lora.explain(fn, params, adapter, x).kernels["w"].fallbacks
    assert "'scan' has parameters" in reason and jax.__version__ in reason
    got = lora.lift(fn)(lora.bind(params, adapter), x)
    np.testing.assert_allclose(got, fn(lora.merge(params, adapter), x), rtol=1e-5)


def test_state_that_is_named_and_can_not_be_adapted_is_said():
    fn = lambda v, x: (x @ v["params"]["w"]) * v["stats"]["mean"]
    variables = {"params": {"w": W}, "stats": {"mean": array(1, 5)}}
    named = lora.LoRAConfig(rank=1, targets=("w", "stats"))
    with pytest.raises(ValueError, match="stats/mean: is combined by 'mul' with what depends"):
        lora.init(KEY, fn, variables, named, array(3, 6))


def test_patterns_without_targets_are_errors():
    fn, params = lambda p, x: x @ p["w"], {"w": W}
    for field in (
        dict(rank_pattern={"w": 2}),
        dict(alpha_pattern={"w": 2}),
        dict(roles={"w": "io"}),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(field))} entry 'w' matches no"):
            lora.init(
                KEY, fn, params, lora.LoRAConfig(targets=(), train=("w",), **field), array(3, 6)
            )


def test_a_lowered_rank_survives_a_file(tmp_path):
    fn, params = lambda p, x: x @ p["w"] @ p["head"], {"w": array(6, 5), "head": array(5, 3)}
    config = lora.LoRAConfig(rank=4, alpha=16)
    adapter = lora.init(KEY, fn, params, config, array(2, 6))
    assert adapter["head"].scale == 16 / 3
    lora.save(tmp_path, adapter, config)
    loaded, _ = lora.load(tmp_path, params)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)


def test_a_number_times_a_kernel_that_is_returned_has_no_input_to_drop():
    fn = lambda p, x: (x @ p["w"], 2 * p["w"])
    params, x = {"w": W}, array(2, 6)
    adapter = jax.tree.map(lambda a: a + 0.1, lora.init(KEY, fn, params, CONFIG, x))
    bound = lora.bind(params, adapter)
    _, twice = lora.lift(fn, dropout=0.5, dropout_key=KEY)(bound, x)
    np.testing.assert_allclose(twice, 2 * lora.merge(params, adapter)["w"], rtol=1e-6)


def test_an_image_and_kernels_that_are_adapted():
    """A convolution of two kernels, of which the result goes into another one."""
    conv = lambda x, w: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    fn = lambda p, x: conv(conv(p["image"], p["v"]), p["w"]) * x
    params = {"image": array(1, 5, 5, 3), "v": array(3, 3, 3, 4), "w": array(3, 3, 4, 4)}
    config = lora.LoRAConfig(rank=1, targets=("image", "v", "w"), roles={"image": "biio"})
    adapter = lora.init(KEY, fn, params, config, array(2, 5, 5, 4))
    adapter = jax.tree.map(lambda a: a + 0.1, adapter)
    x = array(2, 5, 5, 4)
    got, want = lora.lift(fn)(lora.bind(params, adapter), x), fn(lora.merge(params, adapter), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
