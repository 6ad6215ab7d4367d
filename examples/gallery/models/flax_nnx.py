"""Flax NNX: layers that the library brings."""

import jax
from flax import nnx

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("flax")


@LIBRARY.model("nnx.RNN(OptimizedLSTMCell)")
def lstm(batch: int) -> Model:
    """Two kernels in a loop over time."""
    model = nnx.RNN(nnx.OptimizedLSTMCell(16, 32, rngs=nnx.Rngs(0)))
    return bridges.nnx(model, bridges.normal(batch, 8, 16))


class Transformer(nnx.Module):
    """Layers of NNX, with adapters' usual places: attention, feed-forward part, tied head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(60, 32, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(32, 48, rngs=rngs), nnx.Linear(48, 32, rngs=rngs)
        self.conv, self.norm = nnx.Conv(32, 32, 3, rngs=rngs), nnx.RMSNorm(32, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        x = x + self.attention(self.norm(x))
        return self.embed.attend(self.conv(x + self.down(nnx.gelu(self.up(x)))))


@LIBRARY.model("nnx layers with a tied head")
def transformer(batch: int) -> Model:
    """A kernel that is looked up and multiplied."""
    return bridges.nnx(Transformer(nnx.Rngs(0)), bridges.ids(batch, 32, 60))
