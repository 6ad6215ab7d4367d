"""dm-haiku: functions that use Haiku's modules."""

import haiku as hk
import jax
import jax.numpy as jnp

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("dm-haiku")


@LIBRARY.model("hk.nets.ResNet v2")
def resnet(batch: int) -> Model:
    """Strided convolutions; batch statistics are constants."""
    options = {"resnet_v2": True, "bottleneck": True, "channels_per_group": (32, 32, 64, 64)}

    def network(x: jax.Array) -> jax.Array:
        return hk.nets.ResNet((1, 1, 1, 1), 10, **options)(x, is_training=hk.running_init())

    return bridges.haiku(network, bridges.normal(batch, 32, 32, 3))


@LIBRARY.model("hk.nets.MobileNetV1")
def mobilenet(batch: int) -> Model:
    """Depthwise convolutions."""

    def network(x: jax.Array) -> jax.Array:
        net = hk.nets.MobileNetV1((1, 2), (16, 32), 10)
        return net(x, is_training=hk.running_init())

    return bridges.haiku(network, bridges.normal(batch, 16, 16, 3))


@LIBRARY.model("hk.LSTM and hk.GRU")
def recurrent(batch: int) -> Model:
    """Cells under dynamic_unroll."""

    def network(x: jax.Array) -> jax.Array:
        lstm, gru = hk.LSTM(16), hk.GRU(16)
        x, _ = hk.dynamic_unroll(lstm, x, lstm.initial_state(x.shape[1]))
        x, _ = hk.dynamic_unroll(gru, x, gru.initial_state(x.shape[1]))
        return hk.Linear(9)(x)

    return bridges.haiku(network, bridges.normal(8, batch, 16))


@LIBRARY.model("transformer of hk.MultiHeadAttention", tables=("embeddings", "pos"))
def transformer(batch: int) -> Model:
    """Trained positions that are added to the embedding."""

    def network(ids: jax.Array) -> jax.Array:
        x = hk.Embed(60, 32)(ids)
        x = x + hk.get_parameter("pos", (ids.shape[1], 32), init=jnp.ones)
        for _ in range(2):
            y = hk.LayerNorm(-1, True, True)(x)
            x = x + hk.MultiHeadAttention(2, 16, model_size=32, w_init_scale=1.0)(y, y, y)
            x = x + hk.nets.MLP((48, 32), activation=jax.nn.gelu)(hk.LayerNorm(-1, True, True)(x))
        return hk.Linear(60)(x)

    return bridges.haiku(network, bridges.ids(batch, 32, 60))
