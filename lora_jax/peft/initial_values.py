"""PEFT's files of factors that started from a part of the base: PiSSA and OLoRA.

Such a file holds the trained factors alone. PEFT takes the part off the weights of the base when it
makes an adapter, and once more when it reads one, so that what was taken is computed again from the
original base. Here it is a frozen part of the node; see :mod:`lora_jax.methods.offset`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.factors import wide_dtype
from lora_jax.methods.initial_values import INITS
from lora_jax.methods.offset import Offset, WithOffset, to_plain
from lora_jax.methods.start import Start
from lora_jax.nodes import is_adapted
from lora_jax.quantized import is_quantized

W = TypeVar("W", bound=WithOffset)
COMPUTED = ("pissa", "olora")  # words of init_lora_weights that the base alone gives again
_CLOSE = 1e-5  # of the largest number of the kernel: a few roundings of a decomposition in float32


def rebuild(node: W, kernel: Any, init: str) -> W:
    """Puts the first values that ``init`` computes from a kernel into a node.

    Args:
      node: node with the trained factors.
      kernel: kernel of the base: an array, a quantized one, or only its shape.
      init: word of ``init_lora_weights``.

    Raises:
      ValueError: the kernel does not have its own numbers; the message goes on from its name.
    """
    if is_quantized(kernel):
        raise ValueError(
            f"is quantized, and init_lora_weights {init!r} took its first values from the plain "
            "kernel: give the plain base; saved again, the adapter is no longer bound to it"
        )
    if not isinstance(kernel, jax.Array | np.ndarray):
        raise ValueError(
            f"is given by its shape, and init_lora_weights {init!r} needs its numbers: give the "
            "parameters themselves"
        )
    start = Start(
        key=jax.random.key(0),
        name=node.name,
        kernel=kernel,
        axes=node.axes,
        rank=node.a.shape[-1],
        scale=float(node.scale),
        dtype=wide_dtype(kernel.dtype),
        dropout=0.0,
        init=init,
    )
    first = INITS[init](start)
    if not isinstance(first, Offset):
        raise ValueError(f"has first values {init!r}, which are no offset and can't be rebuilt")
    return dataclasses.replace(node, a0=first.a0, b0=first.b0)


def make_plain(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Writes offsets as factors of twice the rank, which any program reads, at the same scale.

    It is what PEFT's own conversion does: ``[a, a₀]`` and ``[b, −b₀]``.
    """
    return {n: to_plain(x) if isinstance(x, WithOffset) else x for n, x in nodes.items()}


def find_others(nodes: Mapping[str, Any], leaves: Mapping[str, Any], init: str) -> list[str]:
    """Says which kernels of an adapter did not start from what ``init`` computes of the base."""
    if init not in COMPUTED:
        return [f"init must be one of {', '.join(COMPUTED)}, or '' for no such word, got {init!r}"]
    adapted = {n: x for n, x in nodes.items() if is_adapted(x) and n in leaves}
    problems = [_describe_other(n, x, leaves[n], init) for n, x in adapted.items()]
    return [problem for problem in problems if problem]


def _describe_other(name: str, node: Any, kernel: Any, init: str) -> str:
    other = (
        f"{name} did not start from what init={init!r} computes of this base, so that PEFT could "
        "not compute it again; write it without that word (init='')"
    )
    if not isinstance(node, WithOffset):
        return other
    try:
        first = rebuild(node, kernel, init)
    except ValueError as error:
        return f"{name} {error}"
    moved = Offset(node.a0, node.b0, first.a0, first.b0, node.scale, axes=node.axes)
    difference = moved.merge(jnp.zeros(kernel.shape))
    is_close = jnp.max(jnp.abs(difference)) <= _CLOSE * jnp.max(jnp.abs(kernel))
    return "" if is_close else other
