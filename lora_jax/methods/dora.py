"""DoRA: a trained magnitude for each output of a kernel (Liu et al. 2024, section 4.1, eq. 5).

With ``V = W + a·b`` a kernel becomes ``W' = m ⊙ V / ‖V‖``, where ``‖V‖`` has the norm of each
output over the inputs, and is a constant to the gradient (section 4.3). Here this is ``gain ⊙ W +
a·b`` with the gain ``m / ‖V‖`` on both terms, and the norm is found without forming ``V``; see
:mod:`lora_jax.methods.output_norms`.

The low-rank term is that of plain LoRA, or an offset. Both classes of nodes take it from the
functions of the other methods, and give it the gain.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.factors import A_AXES, B_AXES, BATCH, GAIN_AXES
from lora_jax.lowrank import LowRank, scaled_b
from lora_jax.methods.offset import Offset, WithOffset, offset_terms
from lora_jax.methods.output_norms import compute_change, compute_gain, compute_norms
from lora_jax.methods.start import Start
from lora_jax.nodes import Adapted, Field, Terms
from lora_jax.quantized import Quantized
from lora_jax.registration import register

Array = jax.Array


@register
@dataclasses.dataclass(frozen=True, eq=False)
class DoRA(Adapted):
    """A kernel whose outputs have trained magnitudes, and directions with a low-rank term.

    An output whose frozen kernel is zero has the magnitude zero, and the gain one until its
    low-rank term is no longer zero.

    Attributes:
      a: ``(*batch, *in, rank)``, the paper's ``A`` transposed.
      b: ``(*batch, rank, *out)``, the paper's ``B`` transposed.
      magnitude: ``m``, ``(*batch, *out)``, which is trained.
      norm: ``‖W‖``, ``(*batch, *out)``, the norms of the kernel that the adapter was made for.
      scale: ``s``, a finite number, which becomes a Python float, or a scalar array.
      w: frozen kernel in a bound tree; None in an adapter.
      axes: role of each kernel axis, for example "io".
      name: path of the kernel in a bound tree, for messages.
      dropout: rate in [0, 1) of the dropout on the input of the branch, for :func:`lora_jax.lift`.

    >>> w = jnp.array([[3.0, 0.0], [4.0, 1.0]])
    >>> a, b, norm = jnp.ones((2, 1)), jnp.zeros((1, 2)), compute_norms(w, "io")
    >>> DoRA(a, b, 2 * norm, norm, 1.0).merge(w)
    Array([[6., 0.],
           [8., 2.]], dtype=float32)
    """

    kind: ClassVar[str] = "dora"
    reads_kernel: ClassVar[bool] = False  # but for its product with a, which `project` computes
    table: ClassVar[Mapping[str, Field]] = {
        "a": Field(A_AXES),
        "b": Field(B_AXES, has_b_rate=True),
        "magnitude": Field(GAIN_AXES, has_b_rate=True),
        "norm": Field(GAIN_AXES, is_trained=False),
        "scale": Field("", is_trained=False, scales="b"),
    }

    a: Array
    b: Array
    magnitude: Array
    norm: Array
    scale: Array | float
    w: Array | None = None
    axes: str = "io"
    name: str = ""
    dropout: float = 0.0

    def terms(self, w: Array | Quantized) -> Terms:
        """Returns ``a``, ``gain · s·b`` and the gain."""
        return _scale_outputs(self, w, Terms(self.a, scaled_b(self)))


@register
@dataclasses.dataclass(frozen=True, eq=False)
class DoRAOffset(WithOffset):
    """The same with first values that are no change: ``V = W + s·a·b − s·a₀·b₀``.

    Attributes:
      a: ``(*batch, *in, rank)``.
      b: ``(*batch, rank, *out)``.
      a0: first value of ``a``, frozen.
      b0: first value of ``b``, frozen.
      magnitude: ``m``, ``(*batch, *out)``, which is trained.
      norm: ``‖W‖``, ``(*batch, *out)``, the norms of the kernel that the adapter was made for.
      scale: ``s``, a finite number, which becomes a Python float, or a scalar array.
      w: frozen kernel in a bound tree; None in an adapter.
      axes: role of each kernel axis, for example "io".
      name: path of the kernel in a bound tree, for messages.
      dropout: rate in [0, 1) of the dropout on the input of both terms, for :func:`lora_jax.lift`.

    >>> w = jnp.array([[3.0, 0.0], [4.0, 1.0]])
    >>> factors, norm = 2 * (jnp.ones((2, 1)), jnp.ones((1, 2))), compute_norms(w, "io")
    >>> DoRAOffset(*factors, 2 * norm, norm, 1.0).merge(w)
    Array([[6., 0.],
           [8., 2.]], dtype=float32)
    """

    kind: ClassVar[str] = "dora_offset"
    reads_kernel: ClassVar[bool] = False
    plain: ClassVar[type[Adapted]] = DoRA
    table: ClassVar[Mapping[str, Field]] = {
        "a": Field(A_AXES),
        "b": Field(B_AXES, has_b_rate=True),
        "a0": Field(A_AXES, is_trained=False),
        "b0": Field(B_AXES, is_trained=False),
        "magnitude": Field(GAIN_AXES, has_b_rate=True),
        "norm": Field(GAIN_AXES, is_trained=False),
        "scale": Field("", is_trained=False, scales="b"),
    }

    a: Array
    b: Array
    a0: Array
    b0: Array
    magnitude: Array
    norm: Array
    scale: Array | float
    w: Array | None = None
    axes: str = "io"
    name: str = ""
    dropout: float = 0.0

    def terms(self, w: Array | Quantized) -> Terms:
        """Returns factors of twice the rank, the second with the gain, and the gain."""
        return _scale_outputs(self, w, offset_terms(self))


def _scale_outputs(node: DoRA | DoRAOffset, w: Array | Quantized, term: Terms) -> Terms:
    """Returns the terms of ``m ⊙ (W + a·b) / ‖W + a·b‖`` for the low-rank term of a node."""
    a, b = term.a, term.b
    change = compute_change(*lax.stop_gradient((w, a, b)), node.axes)
    # Behind the barrier it is one number for each output, and not computed for each row.
    gain = lax.optimization_barrier(compute_gain(node.magnitude, node.norm, change))
    beside_rank = lax.expand_dims(gain, [node.axes.count(BATCH)])
    return Terms(a, b * beside_rank.astype(b.dtype), gain)


_CLASSES: dict[type[Adapted], type[DoRA | DoRAOffset]] = {LowRank: DoRA, Offset: DoRAOffset}


def add_magnitudes(start: Start, factors: Adapted) -> Adapted:
    """Makes the first node of a kernel from its factors: the magnitudes are those of the outputs.

    Args:
      start: the kernel.
      factors: node of plain LoRA, or of an offset, whose term is zero.

    Raises:
      ValueError: there are no numbers to take the magnitudes from, or the node is another one.
    """
    cls = _CLASSES.get(type(factors))
    if cls is None:
        raise ValueError(
            f"method 'dora' can't start with init {start.init!r}, which gives {start.name!r} a "
            f"node of the kind {factors.kind!r}; choose another of them."
        )
    start.require_numbers("method='dora'")
    norm = compute_norms(start.kernel, start.axes).astype(start.dtype)
    fields = {f.name: getattr(factors, f.name) for f in dataclasses.fields(factors)}
    # The magnitude is another array than the norm, so that a step may donate both.
    return cls(**fields, magnitude=jnp.array(norm, copy=True), norm=norm)
