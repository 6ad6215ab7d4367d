"""Which leaves are kernels, and the roles of their axes: as a person would say them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

import lora_jax as lora
from lora_jax.adapter import nodes
from lora_jax.lowrank import LowRank

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def resized(table, n):
    """A table of positions ``(1, size·size, features)`` on a grid of another size."""
    size = round(table.shape[1] ** 0.5)
    grid = table.reshape(1, size, size, -1)
    return jax.image.resize(grid, (1, n, n, grid.shape[-1]), "bilinear").reshape(1, n * n, -1)


def patches(p, x):
    """FlexiViT: the kernel that embeds patches is resized by a constant matrix."""
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)), jnp.float32)
    rows = p["kernel"].reshape(9, *p["kernel"].shape[2:])
    kernel = jnp.einsum("mn,nio->mio", matrix, rows).reshape(2, 2, *rows.shape[1:])
    return lax.conv_general_dilated(
        x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def blocks(p, x):
    """A kernel in Pallas that reads one expert at a time."""

    def body(w, x, out):
        out[...] = x[...] @ w[...]

    return pl.pallas_call(
        body,
        grid=(3,),
        in_specs=[
            pl.BlockSpec((None, 4, 6), lambda k: (k, 0, 0)),
            pl.BlockSpec(x.shape, lambda k: (0, 0)),
        ],
        out_specs=pl.BlockSpec((None, x.shape[0], 6), lambda k: (k, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((3, x.shape[0], 6), x.dtype),
        interpret=True,
    )(p["w"], x)


def by_switch(p, x):
    """An expert for each example, by a ``switch`` under ``vmap``."""
    branches = [lambda x, w=w: x @ w for w in (p["first"], p["second"])]
    return jax.vmap(lambda x: lax.switch((x[0] > 0).astype(int), branches, x))(x)


FEATURES = jnp.sin(jnp.arange(20.0).reshape(5, 4))
ROLES = {
    "positions, resized": (
        lambda p, x: (x + resized(p["pos_embed"], 2)) @ p["w"],
        {"pos_embed": (1, 9, 4), "w": (4, 6)}, (4, 4), {"w": "io"},
    ),
    "positions, resized but for the first": (
        lambda p, x: (x + jnp.concatenate([p["pos"][:, :1], resized(p["pos"][:, 1:], 2)], 1)) @ p["w"],
        {"pos": (1, 10, 4), "w": (4, 6)}, (5, 4), {"w": "io"},
    ),
    "kernel of a convolution, resized": (
        patches, {"kernel": (3, 3, 2, 5)}, (4, 4, 2), {"kernel": "iiio"},
    ),
    "kernel that maps constants": (
        lambda p, x: (x + (jnp.tanh(FEATURES @ p["r"]) @ p["s"])[None]) @ p["w"],
        {"r": (4, 3), "s": (3, 4), "w": (4, 6)}, (5, 4), {"r": "io", "s": "io", "w": "io"},
    ),
    "kernel that maps constants, whose result meets queries": (
        lambda p, x: jnp.einsum("bqd,kd->bqk", x @ p["w"], FEATURES @ p["r"]),
        {"r": (4, 6), "w": (4, 6)}, (5, 4), {"r": "io", "w": "io"},
    ),
    "low-rank change of the model's own, of one constant factor": (
        lambda p, x: x @ (p["w"] + jnp.eye(4, 2) @ p["a"]),
        {"a": (2, 6), "w": (4, 6)}, (4,), {"a": "io", "w": "io"},
    ),
    "experts by switch": (
        by_switch, {"first": (4, 6), "second": (4, 6)}, (4,), {"first": "io", "second": "io"},
    ),
    "experts in blocks of a Pallas kernel": (blocks, {"w": (3, 4, 6)}, (4,), {"w": "bio"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("batch", [1, 3])
def test_all_linear_takes_kernels_alone(name, batch):
    fn, shapes, example, want = ROLES[name]
    params = {name: array(*shape) for name, shape in shapes.items()}
    config = lora.LoRAConfig(rank=2)
    adapter = lora.init(jax.random.key(0), fn, params, config, array(batch, *example))
    roles = {name: node.axes for name, node in nodes(adapter).items()}
    assert roles == want


@pytest.mark.parametrize("name", ROLES)
def test_lift_is_merge(name):
    fn, shapes, example, _ = ROLES[name]
    params = {name: array(*shape) for name, shape in shapes.items()}
    x = array(2, *example)
    adapter = lora.init(jax.random.key(0), fn, params, lora.LoRAConfig(rank=2), x)
    is_node = lambda node: isinstance(node, LowRank)
    adapter = jax.tree.map(
        lambda n: LowRank(n.a, array(*n.b.shape), n.scale, axes=n.axes), adapter, is_leaf=is_node
    )
    got = lora.lift(fn)(lora.bind(params, adapter), x)
    np.testing.assert_allclose(got, fn(lora.merge(params, adapter), x), rtol=1e-4, atol=1e-4)


def test_all_linear_says_what_it_cannot_look_into():
    """A primitive of somebody's own, without a jaxpr."""
    hidden = jax.extend.core.Primitive("hidden")
    hidden.def_abstract_eval(lambda x, w: jax.core.ShapedArray((x.shape[0], w.shape[1]), x.dtype))
    params, x = {"w": array(4, 6), "v": array(4, 6)}, array(5, 4)
    fn = lambda p, x: hidden.bind(x, p["w"])
    with pytest.raises(ValueError, match="Name those .* w goes into 'hidden', which can't be"):
        lora.init(jax.random.key(0), fn, params, lora.LoRAConfig(rank=2), x)
    fn = lambda p, x: hidden.bind(x, p["w"]) + x @ p["v"]
    with pytest.warns(UserWarning, match="w goes into 'hidden'"):
        adapter = lora.init(jax.random.key(0), fn, params, lora.LoRAConfig(rank=2), x)
    assert list(nodes(adapter)) == ["v"]
