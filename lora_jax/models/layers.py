"""Parts that the model families share: activations, norms, dropout, a stack of layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.typing import DTypeLike

from lora_jax import products
from lora_jax.dropout import dropout
from lora_jax.models.attention import WeightDropout

Array = jax.Array
PyTree = Any


@jax.checkpoint
def _gelu(x: Array) -> Array:
    """Computes ``x·Φ(x)`` (Hendrycks & Gimpel 2016), with erf as in the paper's code.

    The gradient starts again from ``x``, because these are the widest activations of the model, and
    erf costs less than writing it to memory and reading it back. It is computed in float32: in
    bfloat16, ``1 + erf`` has no digits left where ``x`` is far below zero.
    """
    high = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * high * (1 + lax.erf(high * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}


def layer_norm(epsilon: float, dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    """Makes a LayerNorm (Ba et al. 2016) that computes as torch's does."""
    # It makes two passes over the features, since E[x²] - E[x]² loses digits in float32.
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def dense(features: int, **fields: Any) -> nn.Dense:
    """Makes an ``nn.Dense`` that sums bfloat16 products in float32; see :mod:`lora_jax.products`.

    Args:
      features: size of the last axis of the result.
      **fields: further fields of ``nn.Dense``.
    """
    return nn.Dense(features, dot_general=products.dot_general, **fields)


class Embed(nn.Embed):
    """An ``nn.Embed`` whose ``attend`` sums bfloat16 products in float32."""

    def attend(self, query: Array) -> Array:
        """Multiplies ``query (..., features)`` by the rows of the table: ``(..., entries)``."""
        query, table = promote_dtype(query, self.embedding, dtype=self.dtype)
        return products.dot_general(query, table, (((query.ndim - 1,), (1,)), ((), ())))


class Dropout(nn.Module):
    """``nn.Dropout`` with half the random bits; see :func:`lora_jax.dropout.dropout`.

    Attributes:
      rate: probability that an entry becomes zero.
      deterministic: whether nothing is dropped; it is given here or in the call.
    """

    rate: float
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: Array, deterministic: bool | None = None) -> Array:
        """Drops entries of ``x``, with a key of the collection "dropout"."""
        if nn.merge_param("deterministic", self.deterministic, deterministic) or not self.rate:
            return x
        return dropout(x, self.rate, self.make_rng("dropout"))

    def of_weights(self, deterministic: bool) -> WeightDropout | None:
        """Returns what attention needs to drop its weights; None if nothing is dropped."""
        if deterministic or not self.rate:
            return None
        drop = lambda weights: self(weights, deterministic=False)
        return WeightDropout(self.rate, drop, lambda: self.make_rng("dropout"))


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + ε) · scale`` (Zhang & Sennrich 2019, eq. 4), computed in float32.

    Attributes:
      epsilon: the equation's ε.
      dtype: dtype of the result; the scale is float32.
      offset: number that is added to the scale (Gemma stores ``scale - 1``).
    """

    epsilon: float
    dtype: DTypeLike = jnp.float32
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalizes the last axis of ``x``, of any shape and floating-point dtype."""
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", init, x.shape[-1:], jnp.float32)
        high = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = jnp.mean(jnp.square(high), axis=-1, keepdims=True)
        scale = jnp.expand_dims(scale + self.offset, range(x.ndim - 1))
        return (high * lax.rsqrt(mean + self.epsilon) * scale).astype(self.dtype)


# The policies in jax.checkpoint_policies; the other names there are of functions that make one.
POLICIES = (
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
    "nothing_saveable",
)


def check_remat(remat: str) -> None:
    """Raises ValueError unless ``remat`` is one of "none", "full", or of :data:`POLICIES`."""
    choices = ("none", "full", *POLICIES)
    if remat not in choices:
        raise ValueError(f"remat must be one of {', '.join(choices)}; got {remat!r}")


def remat_layer(layer: type[nn.Module], remat: str, *, scan: bool = False) -> type[nn.Module]:
    """Returns a layer whose backward pass computes its activations again (Chen et al. 2016).

    Values, parameters and their names stay as they are. It is ``nn.remat``, with a policy by name.

    Args:
      layer: a class whose call takes ``(x, layer_inputs, shared_inputs, deterministic)``.
      remat: "none" for the layer as it is; "full" to keep the layer's inputs alone; or the name of
        the policy in ``jax.checkpoint_policies`` that says what else is kept.
      scan: whether the layer becomes the body of a scan, where no barrier is needed to keep XLA
        from merging the two computations.

    Raises:
      ValueError: there is no such policy.
    """
    check_remat(remat)
    if remat == "none":
        return layer
    policy = None if remat == "full" else getattr(jax.checkpoint_policies, remat)
    # The module is argument 0, and ``deterministic`` is a Python bool.
    return nn.remat(layer, policy=policy, prevent_cse=not scan, static_argnums=(4,))


class Layers(NamedTuple):
    """How a stack of layers is run.

    Attributes:
      count: number of layers.
      scan: whether one layer is compiled for all (``nn.scan``); its parameters then have a leading
        axis of layers.
      remat: what the backward pass computes again; see :func:`remat_layer`.
    """

    count: int  # type: ignore[assignment]  # it hides tuple.count
    scan: bool = False
    remat: str = "none"


def make_layers(
    layer: type[nn.Module],
    layers: Layers,
    *,
    methods: Mapping[str, int] | None = None,
    **fields: Any,
) -> nn.Module | list[nn.Module]:
    """Makes the layers of a stack in ``setup``; :func:`apply_layers` runs them.

    Args:
      layer: a class whose call takes ``(x, layer_inputs, shared_inputs, deterministic)``, and
        returns the new ``x`` and a result of the layer, such as its cache.
      layers: the number of layers, and how they are run.
      methods: further methods that a scan runs over, by name; each takes a carry and one more
        argument, of which the value is the layers' axis.
      **fields: the fields of every layer.

    Returns:
      For a scan, one module with the parameters of all layers stacked; otherwise a list.
    """
    layer = remat_layer(layer, layers.remat, scan=layers.scan)
    if not layers.scan:
        return [layer(**fields) for _ in range(layers.count)]
    rules = {
        "variable_axes": {"params": 0},
        "split_rngs": {"params": True, "dropout": True},
        "length": layers.count,
    }
    in_axes = {"__call__": (0, nn.broadcast, nn.broadcast), **(methods or {})}
    scan = nn.scan(
        layer, methods={name: {**rules, "in_axes": axes} for name, axes in in_axes.items()}
    )
    return scan(**fields)


def apply_layers(
    layers: nn.Module | Sequence[nn.Module],
    x: Array,
    layer_inputs: tuple[PyTree, ...] = (),
    shared_inputs: PyTree = None,
    *,
    deterministic: bool,
) -> tuple[Array, PyTree]:
    """Passes ``x`` through the layers that :func:`make_layers` made.

    Args:
      layers: one module for a scan, or one module for each layer.
      x: the input of the first layer.
      layer_inputs: inputs that differ from layer to layer. Each is None, or it is indexed by the
        number of the layer: for a scan, every array in it has a leading axis of layers.
      shared_inputs: inputs that are the same for every layer.
      deterministic: whether nothing is dropped.

    Returns:
      The output of the last layer, and the results of all layers: stacked by a scan, otherwise in a
      tuple.
    """
    if not isinstance(layers, Sequence):
        return layers(x, layer_inputs, shared_inputs, deterministic)
    results = []
    for k, layer in enumerate(layers):
        inputs = tuple(None if stack is None else stack[k] for stack in layer_inputs)
        x, result = layer(x, inputs, shared_inputs, deterministic)
        results.append(result)
    return x, tuple(results)


def check_inputs(positions: int, **inputs: Array) -> None:
    """Raises ValueError unless all inputs have one shape (batch, length), within the positions."""
    shapes = {name: x.shape for name, x in inputs.items()}
    first = next(iter(shapes.values()))
    if len(first) != 2 or len(set(shapes.values())) > 1:
        raise ValueError(f"The inputs must all have one shape (batch, length), got {shapes}.")
    if first[1] > positions:
        raise ValueError(
            f"{first[1]} tokens, and the model has positions for {positions}; truncate the input."
        )
