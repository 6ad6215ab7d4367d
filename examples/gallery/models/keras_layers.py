"""Keras 3 on the JAX backend: layers that the library brings."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported

import keras

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("keras")


@LIBRARY.model("Embedding, MultiHeadAttention, LSTM", tables=("embeddings",))
def text(batch: int) -> Model:
    """A classifier of texts."""
    bridges.start_keras()
    inputs = keras.Input((32,), dtype="int32")
    x = keras.layers.Embedding(60, 32)(inputs)
    x = keras.layers.LayerNormalization()(x + keras.layers.MultiHeadAttention(2, 16)(x, x))
    model = keras.Model(inputs, keras.layers.Dense(9)(keras.layers.LSTM(16)(x)))
    return bridges.keras(model, bridges.ids(batch, 32, 60))


@LIBRARY.model("Conv2D, SeparableConv2D")
def images(batch: int) -> Model:
    """A classifier of images; a separable convolution is a depthwise one and a dense one."""
    bridges.start_keras()
    inputs = keras.Input((16, 16, 3))
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(16, 3, strides=2)(inputs))
    x = keras.layers.SeparableConv2D(32, 3)(keras.layers.ReLU()(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return bridges.keras(
        keras.Model(inputs, keras.layers.Dense(10)(x)), bridges.normal(batch, 16, 16, 3)
    )
