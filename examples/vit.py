"""A ViT in Linen; ``explain``: all kernels factored, the convolution that embeds patches too."""

import flax.linen as nn
import jax
import optax

import lora_jax as lora
from examples import common


class ViT(nn.Module):
    dim: int = 32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(self.dim, (4, 4), strides=(4, 4), name="patches")(images)
        x = x.reshape(len(x), -1, self.dim)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, 16, self.dim))
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.dim)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(3, name="head")(x.mean(1))


def main() -> common.Result:
    """Tells which of three channels is the brightest."""
    images = jax.random.normal(jax.random.key(0), (32, 16, 16, 3))
    params = ViT().init(jax.random.key(1), images)
    config = lora.LoRAConfig(rank=4, targets=("all-linear",), train=("head",))
    adapter = lora.init(jax.random.key(2), ViT().apply, params, config, images)
    labels = images.mean((1, 2)).argmax(-1)
    loss = lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return common.ten_steps(ViT().apply, params, adapter, loss=loss, x=images)


if __name__ == "__main__":
    main()
