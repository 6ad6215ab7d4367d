"""Equinox: layers that the library brings."""

import equinox as eqx
import jax

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("equinox")


class Block(eqx.Module):
    """Attention and a gated feed-forward part; weights are ``(out, in)``."""

    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.vmap(self.norm)(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(x)))


@LIBRARY.model("eqx.nn.MultiheadAttention and Linear")
def block(batch: int) -> Model:
    """A transformer's block."""
    keys = jax.random.split(jax.random.key(0), 3)
    up, down = eqx.nn.Linear(32, 48, key=keys[1]), eqx.nn.Linear(48, 32, key=keys[2])
    attention = eqx.nn.MultiheadAttention(2, 32, key=keys[0])
    return bridges.equinox(
        Block(attention, eqx.nn.LayerNorm(32), up, down), bridges.normal(batch, 32, 32)
    )


class Recurrent(eqx.Module):
    """A cell in a scan, after a convolution."""

    conv: eqx.nn.Conv1d
    cell: eqx.nn.GRUCell

    def __call__(self, x: jax.Array) -> jax.Array:
        step = lambda state, x: (self.cell(x, state),) * 2
        start = jax.numpy.zeros(self.cell.hidden_size)
        return jax.lax.scan(step, start, self.conv(x).T)[1]


@LIBRARY.model("eqx.nn.GRUCell and Conv1d")
def recurrent(batch: int) -> Model:
    """Kernels of a recurrent cell."""
    keys = jax.random.split(jax.random.key(0), 2)
    conv = eqx.nn.Conv1d(8, 16, 3, padding=1, key=keys[0])
    return bridges.equinox(
        Recurrent(conv, eqx.nn.GRUCell(16, 32, key=keys[1])), bridges.normal(batch, 8, 12)
    )
