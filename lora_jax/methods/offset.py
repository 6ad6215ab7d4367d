"""First values that are no change: ``W' = W + s·a·b − s·a₀·b₀`` with frozen ``a₀``, ``b₀``.

PiSSA, OLoRA and LoRA-GA start from factors whose product is not zero, and take it off the base
beforehand. Here the base stays as it is: what is taken off is a part of the adapter.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from lora_jax.factors import A_AXES, B_AXES, BATCH
from lora_jax.lowrank import LowRank, scaled_b
from lora_jax.nodes import Adapted, Field, Terms
from lora_jax.registration import register

Array = jax.Array


class WithOffset(Adapted):
    """A node whose low-rank term is ``s·a·b − s·a₀·b₀``.

    Attributes:
      plain: class of nodes with the term ``s·a·b`` alone, and the other fields of this one.
      a: ``(*batch, *in, rank)``.
      b: ``(*batch, rank, *out)``.
      a0: first value of ``a``, frozen.
      b0: first value of ``b``, frozen.
      scale: ``s``, a finite number, which becomes a Python float, or a scalar array.
    """

    plain: ClassVar[type[Adapted]]

    a: Array
    b: Array
    a0: Array
    b0: Array
    scale: Array | float


@register
@dataclasses.dataclass(frozen=True, eq=False)
class Offset(WithOffset):
    """A low-rank term less the one that it started from: ``s·a·b − s·a₀·b₀``.

    Attributes:
      a: ``(*batch, *in, rank)``.
      b: ``(*batch, rank, *out)``.
      a0: first value of ``a``, frozen.
      b0: first value of ``b``, frozen.
      scale: ``s``, a finite number, which becomes a Python float, or a scalar array.
      w: frozen kernel in a bound tree; None in an adapter.
      axes: role of each kernel axis, for example "io".
      name: path of the kernel in a bound tree, for messages.
      dropout: rate in [0, 1) of the dropout on the input of both terms, for :func:`lora_jax.lift`.

    Raises:
      ValueError: the scale is NaN or infinite, or the rate of dropout is out of its range.

    >>> node = Offset(*2 * (jnp.ones((3, 1)), jnp.ones((1, 2))), scale=2.0)
    >>> node.merge(jnp.zeros((3, 2))).tolist()
    [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """

    kind: ClassVar[str] = "offset"
    reads_kernel: ClassVar[bool] = False
    plain: ClassVar[type[Adapted]] = LowRank
    table: ClassVar[Mapping[str, Field]] = {
        "a": Field(A_AXES),
        "b": Field(B_AXES, has_b_rate=True),
        "a0": Field(A_AXES, is_trained=False),
        "b0": Field(B_AXES, is_trained=False),
        "scale": Field("", is_trained=False, scales="b"),
    }

    a: Array
    b: Array
    a0: Array
    b0: Array
    scale: Array | float
    w: Array | None = None
    axes: str = "io"
    name: str = ""
    dropout: float = 0.0

    def terms(self, w: Array) -> Terms:
        """Returns factors of twice the rank, ``[a − a₀, a₀]`` and ``s·[b, b − b₀]``."""
        return offset_terms(self)


def offset_terms(node: WithOffset) -> Terms:
    """Computes ``[a − a₀, a₀]`` and ``s·[b, b − b₀]``, factors of twice the rank.

    They are the same as ``[a, a₀]`` and ``s·[b, −b₀]``, whose two products would cancel only up to
    rounding. Here one factor of each product starts as zeros, so that the adapted kernel starts as
    the frozen one bit for bit. Half of each gradient comes from either product.
    """
    moved = dataclasses.replace(node, b=node.b - node.b0)
    a = jnp.concatenate([node.a - node.a0, node.a0], axis=-1)
    b = jnp.concatenate([scaled_b(node), scaled_b(moved)], axis=node.axes.count(BATCH))
    return Terms(a, b)


def to_plain(node: WithOffset) -> Adapted:
    """Returns a node of twice the rank without an offset: ``[a, a₀]`` and ``[b, −b₀]``.

    The two terms have the same product, at the same scale, and no rounding of their own.
    """
    fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    a0, b0 = fields.pop("a0"), fields.pop("b0")
    a = jnp.concatenate([node.a, a0], axis=-1)
    b = jnp.concatenate([node.b, -b0], axis=node.axes.count(BATCH))
    return node.plain(**fields | {"a": a, "b": b})
