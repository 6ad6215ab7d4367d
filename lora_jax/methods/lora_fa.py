"""LoRA-FA: plain LoRA with ``a`` frozen at its first values (Zhang et al. 2023, section 3)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from lora_jax.factors import A_AXES
from lora_jax.lowrank import LowRank
from lora_jax.nodes import Adapted, Field
from lora_jax.registration import register


@register
@dataclasses.dataclass(frozen=True, eq=False)
class FrozenA(LowRank):
    """A low-rank term ``s·a·b`` of which ``b`` alone is trained.

    The gradient of ``b`` needs ``x·a`` and not ``x``, so that the backward pass keeps ``rank``
    numbers of each input in place of all. The arrays are those of a
    :class:`~lora_jax.lowrank.LowRank`, in files as well.
    """

    kind: ClassVar[str] = "lora_fa"
    table: ClassVar[Mapping[str, Field]] = {
        **LowRank.table,
        "a": Field(A_AXES, is_trained=False),
    }


def freeze_a(node: Adapted, init: str) -> FrozenA:
    """Returns the node with ``a`` frozen.

    Raises:
      ValueError: the first values ``init`` make a node with other terms than ``a`` and ``b``.
    """
    if type(node) is not LowRank:
        raise ValueError(
            f"train_a=False is for first values that make plain factors, and init={init!r} makes a "
            f"node of the kind {node.kind!r}. Choose another init, or leave train_a at True."
        )
    return FrozenA(**{f.name: getattr(node, f.name) for f in dataclasses.fields(node)})
