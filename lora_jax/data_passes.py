"""What first values that need data share: passes over batches, and matrices of factors."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.adapter import bind
from lora_jax.factors import BATCH
from lora_jax.lowrank import LowRank
from lora_jax.whole_arrays import gather

PyTree = Any
Array = jax.Array
Loss = Callable[[PyTree, Any], Array]
Nodes = Mapping[str, LowRank]


def make_gradient_sum(
    transform: Callable[..., Any], loss_fn: Loss, params: PyTree, batches: Sequence[Any]
) -> Callable[[Nodes], dict[str, LowRank]]:
    """Returns the function from factors to the gradient by them, summed over batches.

    Parameters and batches may lie on the devices of several processes, each of which then gives the
    same factors, and gets all of the gradient.

    Args:
      transform: makes a function of bound parameters of one of plain ones, as ``lift`` does.
      loss_fn: loss of (params, batch).
      params: frozen parameters.
      batches: batches, one of which is seen at a time.
    """

    @jax.jit
    def of_batch(nodes: dict[str, LowRank], params: PyTree, batch: Any) -> dict[str, LowRank]:
        loss = lambda nodes: transform(loss_fn)(bind(params, paths.nest(nodes)), batch)
        return jax.grad(loss)(nodes)

    def of_all(nodes: Nodes) -> dict[str, LowRank]:
        sums = of_batch(dict(nodes), params, batches[0])
        for batch in batches[1:]:
            sums = jax.tree.map(jnp.add, sums, of_batch(dict(nodes), params, batch))
        return jax.tree.map(gather, sums)

    return of_all


def to_columns(a: Array, node: LowRank) -> Array:
    """Joins the axes of ``a (*batch, *in, rank)`` to ``(n, in, rank)``."""
    n = math.prod(a.shape[: node.axes.count(BATCH)])
    return a.reshape(n, -1, a.shape[-1])


@jax.jit
def orthonormalize(x: Array) -> Array:
    """Returns orthonormal columns with the span of those of ``x (n, rows, columns)``."""
    return jnp.linalg.qr(x)[0]
