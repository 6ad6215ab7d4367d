"""Plain LoRA: ``W' = W + s·BA`` (Hu et al. 2021, section 4.1, eq. 3)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.factors import A_AXES, B_AXES, IN, factor_shapes, positions, wide_dtype
from lora_jax.nodes import Adapted, Field, Terms, with_array_scale
from lora_jax.registration import register

Array = jax.Array


@register
@dataclasses.dataclass(frozen=True, eq=False)
class LowRank(Adapted):
    """A low-rank term ``s·a·b``, alone or with the kernel that it is added to.

    As a pytree it has the leaves ``a`` and ``b``, and ``w`` in a bound tree. A scale that is a
    number belongs to the structure, so that no optimizer, average or clipping can change it; one
    that is an array is a leaf, so that a sweep can map over it (see
    :func:`lora_jax.adapter.as_data`). Neither ever has a gradient.

    Attributes:
      a: ``(*batch, *in, rank)``, the paper's ``A`` transposed.
      b: ``(*batch, rank, *out)``, the paper's ``B`` transposed.
      scale: ``s``, a finite number, which becomes a Python float, or a scalar array.
      w: frozen kernel in a bound tree; None in an adapter.
      axes: role of each kernel axis, for example "io".
      name: path of the kernel in a bound tree, for messages.
      dropout: rate in [0, 1) of the dropout on the input of the branch, for :func:`lora_jax.lift`.

    Raises:
      ValueError: the scale is NaN or infinite, or the rate of dropout is out of its range.

    >>> node = LowRank(jnp.zeros((3, 1)), jnp.zeros((1, 2)), 4)
    >>> len(jax.tree.leaves(node)), node.scale
    (2, 4.0)
    """

    kind: ClassVar[str] = "lora"
    reads_kernel: ClassVar[bool] = False
    table: ClassVar[Mapping[str, Field]] = {
        "a": Field(A_AXES),
        "b": Field(B_AXES, has_b_rate=True),
        "scale": Field("", is_trained=False, scales="b"),
    }

    a: Array
    b: Array
    scale: Array | float
    w: Array | None = None
    axes: str = "io"
    name: str = ""
    dropout: float = 0.0

    def terms(self, w: Array) -> Terms:
        """Returns ``a`` and ``s·b``; the frozen kernel stays as it is."""
        return Terms(self.a, scaled_b(self))


def scaled_b(node: Any) -> Array:
    """Computes ``s·b`` in the wider precision of the two, where the scale costs least.

    No gradient reaches the scale, which is a hyperparameter.

    Args:
      node: node of any method with the fields ``b`` and ``scale``.
    """
    b, scale = node.b, jnp.asarray(with_array_scale(node).scale)
    narrow = min(b.dtype.itemsize, scale.dtype.itemsize) < 2  # JAX promotes these to nothing
    dtype = wide_dtype(b.dtype) if narrow else jnp.promote_types(b.dtype, scale.dtype)
    return b.astype(dtype) * lax.stop_gradient(scale).astype(dtype)


def init_a(key: Array, shape: Sequence[int], axes: str, rank: int, dtype: Any) -> Array:
    """Draws ``a ~ U(-1/√fan_in, 1/√fan_in)``; ``b`` starts at zero, so ``ΔW`` does.

    These are the initial values of loralib, PEFT and torchtune (a Kaiming-uniform draw with
    ``a=√5``), where the paper has a Gaussian (section 4.1).
    """
    fan_in = math.prod(shape[k] for k in positions(axes, IN))
    a_shape, _ = factor_shapes(shape, axes, rank)
    return jax.random.uniform(key, a_shape, dtype, -(fan_in**-0.5), fan_in**-0.5)
