"""AdaLoRA: a low-rank term in the form of a singular value decomposition (Zhang et al. 2023).

Which of its triplets (a column of ``a``, an entry of ``e``, a row of ``b``) are kept is decided in
training: see :mod:`lora_jax.training.rank_budget`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.factors import A_AXES, B_AXES, BATCH, OUT, RANK, factor_shapes
from lora_jax.lowrank import scaled_b
from lora_jax.methods.start import Start
from lora_jax.nodes import Adapted, Field, Terms
from lora_jax.registration import register

Array = jax.Array
_STD = 0.02  # of the first values, as in PEFT


@register
@dataclasses.dataclass(frozen=True, eq=False)
class AdaLoRA(Adapted):
    """A term ``s·a·diag(e)·b`` (section 3.1), whose factors are kept near orthogonal.

    A triplet whose entry of ``e`` is zero changes nothing.

    Attributes:
      a: ``(*batch, *in, rank)``, the paper's ``Q`` transposed.
      b: ``(*batch, rank, *out)``, the paper's ``P`` transposed.
      e: ``(*batch, rank)``, the diagonal of the paper's ``Λ``; zero at first.
      scale: ``s``, a finite number, which becomes a Python float, or a scalar array.
    """

    kind: ClassVar[str] = "adalora"
    reads_kernel: ClassVar[bool] = False
    has_penalty: ClassVar[bool] = True
    table: ClassVar[Mapping[str, Field]] = {
        "a": Field(A_AXES),
        "b": Field(B_AXES, has_b_rate=True),
        "e": Field(BATCH + RANK),
        "scale": Field("", is_trained=False, scales="b"),
    }

    a: Array
    b: Array
    e: Array
    scale: Array | float
    w: Array | None = None
    axes: str = "io"
    name: str = ""
    dropout: float = 0.0

    def terms(self, w: Array) -> Terms:
        """Returns ``a``, and ``b`` with ``e`` and the scale."""
        n_out = self.axes.count(OUT)
        return Terms(self.a, self.e.reshape(*self.e.shape, *[1] * n_out) * scaled_b(self))

    def penalties(self) -> Array:
        """Computes ``‖aᵀa - I‖`` and ``‖bbᵀ - I‖`` (section 3.1) by Frobenius norms.

        Returns:
          ``(kernels, 2)``, a row for each entry along the batch axes.
        """
        n, rank = self.axes.count(BATCH), self.e.shape[-1]
        join = lambda x: x.reshape(-1, rank, math.prod(x.shape[n + 1 :]))
        norms = [_distance(join(x)) for x in (jnp.moveaxis(self.a, -1, n), self.b)]
        return jnp.stack(norms, axis=-1)


def _distance(rows: Array) -> Array:
    """Computes the distance of the rows of some matrices from orthonormal ones.

    Rows of zeros are those that a sweep has added, or that a file has lost: they do not count.
    """
    products = jnp.einsum("krx,ksx->krs", rows, rows)
    is_used = lax.stop_gradient(jnp.any(rows != 0, axis=-1)).astype(rows.dtype)
    identity = jax.vmap(jnp.diag)(is_used)
    square = jnp.sum(jnp.square(products - identity), axis=(1, 2))
    is_positive = square > 0  # the root has no derivative at zero
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, square, 1.0)), 0.0)


def start_adalora(start: Start) -> AdaLoRA:
    """Draws both factors from normal distributions; ``e`` is zero, so that the change is."""
    shapes = factor_shapes(start.shape, start.axes, start.rank)
    keys = jax.random.split(start.key)
    a, b = (
        _STD * jax.random.normal(key, shape, start.dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )
    batch = shapes[0][: start.axes.count(BATCH)]
    e = jnp.zeros((*batch, start.rank), start.dtype)
    return AdaLoRA(a, b, e, start.scale, axes=start.axes, dropout=start.dropout)
