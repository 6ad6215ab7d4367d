"""An adapted bias: ``bias + s·β``, beside the kernel whose scale it has."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.factors import BATCH, OUT, positions, wide_dtype
from lora_jax.nodes import Adapted, Field, with_array_scale
from lora_jax.registration import register

Array = jax.Array


@register
@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedBias(Adapted):
    """A bias with a trained term, ``bias + s·β``.

    Attributes:
      beta: ``(*batch, *out)``, the shape of the bias.
      scale: ``s``, that of the kernel beside it: a finite number, or a scalar array.
      w: frozen bias in a bound tree; None in an adapter.
      axes: role of each axis of the bias, "o" or "b".
      name: path of the bias in a bound tree, for messages.
      dropout: 0.0, since a bias has no input.

    >>> AdaptedBias(jnp.ones(2), 3.0).merge(jnp.zeros(2)).tolist()
    [3.0, 3.0]
    """

    kind: ClassVar[str] = "bias"
    is_kernel: ClassVar[bool] = False
    table: ClassVar[Mapping[str, Field]] = {
        "beta": Field("bo"),
        "scale": Field("", is_trained=False, scales="beta"),
    }

    beta: Array
    scale: Array | float
    w: Array | None = None
    axes: str = "o"
    name: str = ""
    dropout: float = 0.0

    def merge(self, w: Array) -> Array:
        """Computes ``w + s·β`` in float32 or wider, rounded once to the dtype of ``w``."""
        scale = lax.stop_gradient(jnp.asarray(with_array_scale(self).scale))
        dtype, order = wide_dtype(w.dtype, self.beta.dtype), positions(self.axes, BATCH + OUT)
        beta = jnp.transpose(self.beta, [order.index(k) for k in range(w.ndim)])
        return (w.astype(dtype) + scale.astype(dtype) * beta.astype(dtype)).astype(w.dtype)
