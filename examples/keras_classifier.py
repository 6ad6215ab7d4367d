"""A Keras 3 model on the JAX backend; ``explain``: all kernels factored."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported

import jax
import keras
import optax

import lora_jax as lora
from examples import common


def main() -> common.Result:
    """Classifies sequences of vectors by the sign of their first entry."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 16))
    x = keras.layers.MultiHeadAttention(2, 8, name="attention")(inputs, inputs)
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(x + inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    fn, params = lora.from_keras(model)
    x = jax.random.normal(jax.random.key(0), (32, 6, 16))
    config = lora.LoRAConfig(rank=2, targets=("attention",), train=("head",))
    adapter = lora.init(jax.random.key(1), fn, params, config, x)
    labels = (x[:, 0, 0] > 0).astype(int)
    loss = lambda y: optax.softmax_cross_entropy_with_integer_labels(y, labels).mean()
    return common.ten_steps(fn, params, adapter, loss=loss, x=x)


if __name__ == "__main__":
    main()
