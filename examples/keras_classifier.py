"""A Keras 3 model on the JAX backend, by ``stateless_call``; ``explain``: all kernels factored."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported

import jax
import keras
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import lora_jax as lora
from examples import common


def main() -> common.Result:
    """Classifies sequences of vectors by the sign of their first entry."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 16))
    x = keras.layers.MultiHeadAttention(2, 8, name="attention")(inputs, inputs)
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(x + inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    paths = [tuple(v.path.split("/")) for v in model.trainable_variables]
    params = unflatten_dict({tuple(v.path.split("/")): v.value for v in model.trainable_variables})

    def fn(params: dict, x: jax.Array) -> jax.Array:
        variables = [flatten_dict(params)[path] for path in paths]  # in the model's order
        return model.stateless_call(variables, model.non_trainable_variables, x)[0]

    x = jax.random.normal(jax.random.key(0), (32, 6, 16))
    config = lora.LoRAConfig(rank=2, targets=("attention",), train=("head",))
    adapter = lora.init(jax.random.key(1), fn, params, config, x)
    labels = (x[:, 0, 0] > 0).astype(int)
    loss = lambda y: optax.softmax_cross_entropy_with_integer_labels(y, labels).mean()
    return common.ten_steps(fn, params, adapter, loss=loss, x=x)


if __name__ == "__main__":
    main()
