"""Functions of a plain parameter tree, made of the modules of Flax NNX and the models of Keras.

A module that holds its arrays becomes ``fn(params, *args, **kwargs)`` with ``params`` a nested
dictionary, which is what :func:`lora_jax.init` and all else here takes. Flax and Keras are imported
when they are needed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lora_jax import paths

PyTree = Any
Array = jax.Array


def from_nnx(module: Any, *, method: str = "__call__") -> tuple[Callable, dict[str, Any]]:
    """Makes a function of its parameters out of an NNX module.

    The parameters are the ``nnx.Param`` variables; the dictionary has their attribute paths, with
    the numbers of a list as strings. All other variables (batch statistics, caches, random states,
    ...) stay in the function with the values that they have now. Each call starts from these
    values, and its changes are dropped. So dropout draws the same mask in each call, unless its
    random numbers are an argument, ``fn(params, x, rngs=nnx.Rngs(dropout=key))``.

    Args:
      module: the module, which is neither changed nor kept.
      method: name of the method to call.

    Returns:
      ``fn(params, *args, **kwargs)`` and ``params``, arrays of the module's shapes and dtypes.

    Raises:
      ValueError: the module has no ``nnx.Param``; in the function: ``params`` has other paths.

    >>> from flax import nnx
    >>> module = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
    >>> fn, params = from_nnx(module)
    >>> jax.tree.map(jax.numpy.shape, params)
    {'layers': {'0': {'bias': (4,), 'kernel': (3, 4)}}}
    >>> fn(params, jax.numpy.ones((2, 3))).shape
    (2, 4)
    """
    from flax import nnx

    if any(x.__module__.startswith("flax.linen") for x in type(module).__mro__):
        raise TypeError(
            f"{type(module).__name__} is a Linen module, whose apply is a function of parameters "
            "already: give module.apply in place of from_nnx(module)."
        )
    graph, state, *rest = nnx.split(module, nnx.Param, ...)
    named = _named_params(state, f"The module {type(module).__name__} has no nnx.Param")
    names, structure = list(named), jax.tree.structure(state)

    def fn(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        new = jax.tree.unflatten(structure, _order_leaves(params, names))
        # A copy: NNX refuses to change, inside a trace, variables that were made outside.
        return getattr(nnx.merge(graph, new, *rest, copy=True), method)(*args, **kwargs)

    return fn, paths.nest(named)


def update_nnx(module: Any, params: PyTree) -> None:
    """Puts parameters into an NNX module, in place: the inverse of :func:`from_nnx`.

    Args:
      module: the module that was given to :func:`from_nnx`.
      params: parameters with the same paths as there, such as merged ones.

    Raises:
      ValueError: the paths or shapes are not the module's.

    >>> from flax import nnx
    >>> module = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    >>> fn, params = from_nnx(module)
    >>> update_nnx(module, jax.tree.map(jax.numpy.zeros_like, params))
    >>> float(abs(module(jax.numpy.ones((1, 3)))).max())
    0.0
    """
    from flax import nnx

    state = nnx.state(module, nnx.Param)
    named = paths.named_leaves(state)
    leaves = _order_leaves(params, named)
    _check_shapes(named, leaves)
    nnx.update(module, jax.tree.unflatten(jax.tree.structure(state), leaves))


def from_keras(model: Any) -> tuple[Callable, dict[str, Any]]:
    """Makes a function of its parameters out of a Keras 3 model on the JAX backend.

    The parameters are the trainable variables; the dictionary has their Keras paths, layer by
    layer. All other variables (moving averages, states of random generators, ...) stay in the
    function with the values that they have now. Each call starts from these values, and its changes
    are dropped, so that dropout with ``training=True`` draws the same mask each time.

    Args:
      model: built ``keras.Model`` or layer; the function keeps it, and does not change it.

    Returns:
      ``fn(params, *args, **kwargs)``, which gives what ``model(*args, **kwargs)`` does, and
      ``params``.

    Raises:
      ImportError: Keras is not installed.
      ValueError: Keras has another backend; the model is not built, or has no trainable variable;
        in the function: ``params`` has other paths.

    >>> import keras  # doctest: +SKIP
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])  # doctest: +SKIP
    >>> fn, params = from_keras(model)  # doctest: +SKIP
    >>> jax.tree.map(jax.numpy.shape, params)  # doctest: +SKIP
    {'sequential': {'dense': {'bias': (4,), 'kernel': (3, 4)}}}
    """
    variables = _keras_variables(model)
    named = {name: variable.value for name, variable in variables.items()}
    names, rest = list(named), [variable.value for variable in model.non_trainable_variables]

    def fn(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        return model.stateless_call(_order_leaves(params, names), rest, *args, **kwargs)[0]

    return fn, paths.nest(named)


def update_keras(model: Any, params: PyTree) -> None:
    """Puts parameters into a Keras model, in place: the inverse of :func:`from_keras`.

    Args:
      model: the model that was given to :func:`from_keras`.
      params: parameters with the same paths as there, such as merged ones.

    Raises:
      ImportError, ValueError: as :func:`from_keras`; or the shapes are not the model's.
    """
    variables = _keras_variables(model)
    leaves = _order_leaves(params, variables)
    _check_shapes(variables, leaves)
    for variable, leaf in zip(variables.values(), leaves, strict=True):
        variable.assign(leaf)


def _named_params(state: Any, problem: str) -> dict[str, Array]:
    if not jax.tree.leaves(state):
        raise ValueError(f"{problem}, so there is nothing to adapt.")
    return paths.named_leaves(state)


def _order_leaves(params: PyTree, names: Sequence[str] | Mapping[str, Any]) -> list[Any]:
    """Returns the leaves of a parameter tree in the order of their names in the module."""
    named = paths.named_leaves(params)
    if set(named) != set(names):
        missing = [n for n in names if n not in named]
        unknown = [n for n in named if n not in names]
        raise ValueError(
            f"The parameters are not those of the module: {paths.listing(missing)} missing, "
            f"{paths.listing(unknown)} unknown; the module has {paths.listing(names)}."
        )
    return [named[name] for name in names]


def _check_shapes(named: Mapping[str, Any], leaves: Sequence[Any]) -> None:
    wrong = [
        f"{name} has shape {tuple(old.shape)}, not {tuple(new.shape)}"
        for (name, old), new in zip(named.items(), leaves, strict=True)
        if tuple(old.shape) != tuple(new.shape)
    ]
    if wrong:
        raise ValueError(f"The parameters do not fit the module: {'; '.join(wrong)}.")


def _keras_variables(model: Any) -> dict[str, Any]:
    """Returns the trainable variables by path; one with the path of another gets a number."""
    try:
        import keras
    except ImportError as error:
        raise ImportError("from_keras needs Keras 3: pip install keras.") from error
    if keras.backend.backend() != "jax":
        raise ValueError(
            f"Keras runs on {keras.backend.backend()!r}, and its arrays must be JAX's: set "
            'os.environ["KERAS_BACKEND"] = "jax" before Keras is imported.'
        )
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} is not built, so it has no variables yet: call it once, or "
            "give it a keras.Input."
        )
    if not model.trainable_variables:
        raise ValueError(
            f"The model {model.name!r} has no trainable variables, and these are what can be "
            "adapted. If model.trainable is False, set it to True: the base stays as it is in any "
            "case, since the adapter alone is trained."
        )
    variables: dict[str, Any] = {}
    for variable in model.trainable_variables:
        name, count = variable.path, 1
        while name in variables:
            name, count = f"{variable.path}_{count}", count + 1
        variables[name] = variable
    return variables
