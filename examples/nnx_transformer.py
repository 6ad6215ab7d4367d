"""A Flax NNX transformer; ``explain``: all kernels factored."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lora_jax as lora
from examples import common


class Block(nnx.Module):
    def __init__(self, dim: int, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, dim, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(dim, 64, rngs=rngs), nnx.Linear(64, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


def main() -> common.Result:
    """Predicts each token from itself and the others."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Embed(20, 32, rngs=rngs), Block(32, rngs), nnx.Linear(32, 20, rngs=rngs)
    )
    ids = jax.random.randint(jax.random.key(0), (8, 12), 0, 20)
    fn, params = lora.from_nnx(model)
    config = lora.LoRAConfig(rank=4, targets=("all-linear",))
    adapter = lora.init(jax.random.key(1), fn, params, config, ids)
    loss = lambda logits: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, ids))
    return common.ten_steps(fn, params, adapter, loss=loss, x=ids)


if __name__ == "__main__":
    main()
