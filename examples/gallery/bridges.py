"""How a model of each kind of library becomes a function of its parameters.

``lines`` counts what a user writes for it: the lines of the function's body up to its ``return``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.gallery.model import Model


def ids(batch: int, length: int, size: int) -> jax.Array:
    """Random token ids, ``(batch, length)``, from 1 to ``size`` - 1."""
    return jax.random.randint(jax.random.key(7), (batch, length), 1, size)


def normal(*shape: int) -> jax.Array:
    """Random inputs."""
    return jax.random.normal(jax.random.key(8), shape)


def linen(module: Any, *args: Any) -> Model:
    """A Flax Linen module; collections other than the parameters are constants."""
    variables = module.init(jax.random.key(0), *args)
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    fn = lambda params, *args: module.apply({"params": params, **rest}, *args)
    return Model(fn=fn, params=params, args=args, lines=3)


def nnx(module: Any, *args: Any, call: Callable | None = None) -> Model:
    """A Flax NNX module; ``call`` says how it is called if not by itself."""
    from flax import nnx

    call = call or (lambda module, *args: module(*args))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    fn = lambda params, *args: call(nnx.merge(graph, params, rest, copy=True), *args)
    return Model(fn=fn, params=params, args=args, lines=2)


def equinox(module: Any, *args: Any, call: Callable | None = None) -> Model:
    """An Equinox module of one row, mapped over the rows."""
    import equinox as eqx

    call = call or (lambda module, *args: jax.vmap(module)(*args))
    params, static = eqx.partition(module, eqx.is_inexact_array)
    fn = lambda params, *args: call(eqx.combine(params, static), *args)
    return Model(fn=fn, params=params, args=args, lines=2)


def haiku(function: Callable, *args: Any) -> Model:
    """A function that uses Haiku modules; states are constants."""
    import haiku as hk

    pair = hk.transform_with_state(function)
    params, state = pair.init(jax.random.key(0), *args)
    fn = lambda params, *args: pair.apply(params, state, None, *args)[0]
    return Model(fn=fn, params=params, args=args, lines=3)


def start_keras() -> None:
    """Makes the next Keras model the first, whose variables have no numbers in their names."""
    import keras

    keras.utils.clear_session()
    keras.utils.set_random_seed(0)


def keras(model: Any, *args: Any) -> Model:
    """A Keras 3 model on the JAX backend, by ``stateless_call``."""
    trained = model.trainable_variables
    names = [v.path.replace("/", ".") + f"#{k}" for k, v in enumerate(trained)]
    params = {name: v.value for name, v in zip(names, trained, strict=True)}
    rest = [v.value for v in model.non_trainable_variables]

    def fn(params: dict[str, jax.Array], *args: Any) -> Any:
        return model.stateless_call([params[n] for n in names], rest, *args)[0]

    return Model(fn=fn, params=params, args=args, lines=6)


def moved(params: Any) -> Any:
    """Moves all parameters a little, so that no zero or one of an initial value hides a mistake."""
    rng = np.random.default_rng(0)

    def move(x: Any) -> Any:
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return jnp.asarray(x + 0.02 * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(move, params)
