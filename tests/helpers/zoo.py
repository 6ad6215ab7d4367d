"""Tiny models of every construction that `lift` must see through, each with biases and a head.

An entry gives a function of (params, x), its parameters and an input. Every model has a module
called "head" at the end and, but for the plain functions, standard Flax layers inside.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

D = 8


class Model(NamedTuple):
    fn: Callable
    params: Any
    x: jax.Array
    targets: tuple[str, ...] = ("all-linear",)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="up")(x))
        x = nn.LayerNorm()(nn.Dense(D, name="down")(x))
        return nn.Dense(3, name="head")(x)


class Block(nn.Module):
    """Pre-norm attention with 3-D kernels and a gated feed-forward part."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(y)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(D, name="down")(nn.gelu(nn.Dense(12, name="up")(y)))


class Stack(nn.Module):
    """Blocks one after another, or in one scan, with or without rematerialisation."""

    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        if self.scan:
            layers = nn.scan(
                lambda module, x, _: (module(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = layers(block(name="blocks"), x, None)
        else:
            for k in range(2):
                x = block(name=f"block_{k}")(x)
        return nn.Dense(3, name="head")(x)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(11, D, name="embed")
        x = Block(name="block")(table(ids))
        # "head" is the last layer before the tied output product.
        return table.attend(nn.Dense(D, name="head")(x))


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=(2, 1), name="first")(x))
        x = nn.relu(nn.Conv(8, (3, 3), padding="VALID", kernel_dilation=(1, 2), name="second")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        experts = nn.vmap(
            Mlp, in_axes=None, out_axes=0, axis_size=4,
            variable_axes={"params": 0}, split_rngs={"params": True},
        )(name="experts")(x)  # fmt: skip
        gate = nn.softmax(nn.Dense(4, name="gate")(x))
        return nn.Dense(3, name="head")(jnp.einsum("be,ebo->bo", gate, experts))


class Recurrent(nn.Module):
    optimized: bool = False

    @nn.compact
    def __call__(self, x):
        cell = nn.OptimizedLSTMCell(D) if self.optimized else nn.LSTMCell(D)
        return nn.Dense(3, name="head")(nn.RNN(cell, name="rnn")(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(D, 12, rngs=rngs), nnx.Linear(12, D, rngs=rngs)])
        self.head = nnx.Linear(D, 3, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return self.head(self.layers[1](nnx.gelu(self.layers[0](x))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


def _random_biases(params):
    """Biases and scales away from their initial 0 and 1, where mistakes would hide."""
    # numpy draws without a compilation for every shape.
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), x.dtype), params)


def _linen(module, x, **kwargs):
    params = jax.jit(module.init)(jax.random.key(0), x)
    return Model(module.apply, _random_biases(params), x, **kwargs)


def _nnx():
    graph, params, rest = nnx.split(NnxBlock(nnx.Rngs(0)), nnx.Param, ...)
    fn = lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)
    return Model(fn, _random_biases(params), _tokens())


def _plain():
    """Lists and dataclasses, kernels stored as (out, in), and a loop over stacked layers."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)
    params = [
        {"stack": normal(3, D, D), "bias": normal(3, D)},
        Layer(normal(D, D), normal(D)),
        {"head": Layer(normal(3, D), normal(3))},
    ]

    def fn(params, x):
        loop, layer, last = params
        body = lambda n, x: jnp.tanh(x @ loop["stack"][n] + loop["bias"][n][None, None])
        for n in range(3):
            x = body(n, x)
        x = jax.lax.cond(x.sum() > 1e6, lambda x: x, lambda x: jnp.tanh(x @ layer.kernel.T), x)
        x = x + layer.bias[None, None]
        return jnp.einsum("bld,od->blo", x, last["head"].kernel) + last["head"].bias[None, None]

    return Model(fn, params, _tokens())


def _tokens(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape or (2, 5, D)), jnp.float32)


ZOO = {
    "mlp": lambda: _linen(Mlp(), _tokens(4, D)),
    "attention": lambda: _linen(Stack(), _tokens()),
    "scanned": lambda: _linen(Stack(scan=True), _tokens()),
    "remat": lambda: _linen(Stack(remat=True), _tokens()),
    "scanned_remat": lambda: _linen(Stack(scan=True, remat=True), _tokens()),
    "tied": lambda: _linen(Tied(), jnp.array([[1, 2, 3], [10, 0, 2]])),
    "conv": lambda: _linen(Conv(), _tokens(2, 8, 8, 2)),
    "experts": lambda: _linen(Experts(), _tokens(4, D)),
    "lstm": lambda: _linen(Recurrent(), _tokens()),
    "lstm_optimized": lambda: _linen(Recurrent(optimized=True), _tokens()),
    "nnx": _nnx,
    "plain": _plain,
}
