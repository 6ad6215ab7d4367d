"""What the model families share: activations, norms, the mask's bias, a stack of layers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.dropout import dropout

Array = jax.Array


@jax.checkpoint
def _gelu(x: Array) -> Array:
    """``x·Φ(x)`` (Hendrycks & Gimpel 2016), with erf as in the paper's code.

    Its gradient starts again from ``x``: erf is cheaper than writing it for the widest activations
    of the model and reading it back. A bfloat16 ``1 + erf`` would have no digits left on the left.
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


def layer_norm(epsilon: float, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm (Ba et al. 2016) as torch computes it."""
    # Two passes over the features: E[x²] - E[x]² loses digits in float32.
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class Dropout(nn.Module):
    """``nn.Dropout`` with half the random bits; see :func:`lora_jax.dropout.dropout`.

    Attributes:
      rate: probability of a zero.
      deterministic: whether nothing is dropped; here or in the call.
    """

    rate: float
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: Array, deterministic: bool | None = None) -> Array:
        """Drops entries of ``x``; the key comes from the collection "dropout"."""
        if nn.merge_param("deterministic", self.deterministic, deterministic) or not self.rate:
            return x
        return dropout(x, self.rate, self.make_rng("dropout"))


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + ε) · scale`` (Zhang & Sennrich 2019, eq. 4), computed in float32.

    Attributes:
      epsilon: ε.
      dtype: of the result; the scale is float32.
      offset: added to the scale (Gemma stores ``scale - 1``).
    """

    epsilon: float
    dtype: Any = jnp.float32
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last axis."""
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", init, x.shape[-1:], jnp.float32)
        high = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = jnp.mean(jnp.square(high), axis=-1, keepdims=True)
        scale = jnp.expand_dims(scale + self.offset, range(x.ndim - 1))
        return (high * lax.rsqrt(mean + self.epsilon) * scale).astype(self.dtype)


def mask_bias(attention_mask: Array) -> Array:
    """What :func:`attention` adds to the scores: ``(batch, keys)`` to ``(batch, 1, 1, keys)``.

    Added in float32 before the softmax: a masked position has weight exactly zero, and a row with
    none left has equal weights rather than NaN.
    """
    return jnp.where(attention_mask > 0, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]


# Policies of jax.checkpoint_policies that are ready to use; the other names there make policies.
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
    known = ("none", "full", *POLICIES)
    if remat not in known:
        raise ValueError(f"remat must be one of {', '.join(known)}; got {remat!r}")


def rematted(layer: Any, remat: str, *, scan: bool = False, static: tuple[int, ...] = ()) -> Any:
    """A layer whose backward pass computes its activations again (Chen et al. 2016).

    Values, parameters and their names stay as they are. ``nn.remat``, by the name of what is kept.

    Args:
      layer: a module class, or a function of a module and arrays.
      remat: "none" for the layer as it is; "full" to keep the layer's inputs alone; or the name of
        the policy in ``jax.checkpoint_policies`` that says what else is kept.
      scan: whether it will be the body of a scan, where no barrier is needed to keep XLA from
        merging the two computations.
      static: positions of arguments that are no arrays; that of the module is 0.

    Raises:
      ValueError: there is no such policy.
    """
    check_remat(remat)
    if remat == "none":
        return layer
    policy = None if remat == "full" else getattr(jax.checkpoint_policies, remat)
    return nn.remat(layer, policy=policy, prevent_cse=not scan, static_argnums=static)


class Layers(NamedTuple):
    """How a stack of layers is run.

    Attributes:
      count: number of layers.
      scan: whether one layer is compiled for all (``nn.scan``); its parameters then have a leading
        axis of layers.
      remat: as :func:`rematted`.
    """

    count: int
    scan: bool = False
    remat: str = "none"


def repeat(
    make: Callable[[str], nn.Module], layers: Layers, x: Array, *args: Any, **static: Any
) -> Array:
    """Passes ``x`` through ``count`` layers, called inside a compact method.

    Args:
      make: a layer by its name: "layer_0", "layer_1", ..., or "layer" for a scan.
      layers: how many, and how they are run.
      x: the first layer's input.
      *args: further arrays, the same for each layer.
      **static: further arguments that are no arrays, such as ``deterministic``.
    """
    run = lambda layer, x, *args: layer(x, *args, **static)
    run = rematted(run, layers.remat, scan=layers.scan)
    if not layers.scan:
        for k in range(layers.count):
            x = run(make(f"layer_{k}"), x, *args)
        return x
    scanned = nn.scan(
        lambda layer, x, *args: (run(layer, x, *args), None),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=layers.count,
    )
    return scanned(make("layer"), x, *args)[0]


def check_inputs(positions: int, **inputs: Array) -> None:
    """Raises ValueError unless the inputs share one shape (batch, length) that has positions."""
    shapes = {name: x.shape for name, x in inputs.items()}
    first = next(iter(shapes.values()))
    if len(first) != 2 or len(set(shapes.values())) > 1:
        raise ValueError(f"The inputs must all have one shape (batch, length), got {shapes}.")
    if first[1] > positions:
        raise ValueError(
            f"{first[1]} tokens, and the model has positions for {positions}; truncate the input."
        )
