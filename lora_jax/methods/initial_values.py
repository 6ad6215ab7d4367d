"""The first values of factors, by the names that ``LoRAConfig(init=...)`` takes."""

from collections.abc import Callable

import jax.numpy as jnp

from lora_jax.factors import factor_shapes
from lora_jax.lowrank import LowRank, init_a
from lora_jax.methods.start import Start


def _draw_uniform(start: Start) -> LowRank:
    """Draws ``a`` uniformly, with ``b = 0``; see :func:`lora_jax.lowrank.init_a`."""
    _, b_shape = factor_shapes(start.shape, start.axes, start.rank)
    return LowRank(
        a=init_a(start.key, start.shape, start.axes, start.rank, start.dtype),
        b=jnp.zeros(b_shape, start.dtype),
        scale=start.scale,
        axes=start.axes,
        dropout=start.dropout,
    )


# With each of these an adapted kernel starts as the frozen one, bit for bit.
INITS: dict[str, Callable[[Start], LowRank]] = {"uniform": _draw_uniform}
