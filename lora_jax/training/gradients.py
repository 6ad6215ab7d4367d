"""The gradient of a batch's mean loss: at once, or accumulated over micro-batches."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax.nodes import is_adapted

PyTree = Any
Batch = Mapping[str, Any]  # of arrays
LossFn = Callable[[PyTree, Batch, jax.Array], NamedTuple]


def compute(
    fn: LossFn, adapter: PyTree, batch: Batch, key: jax.Array, *, axis: str | None = None
) -> tuple[PyTree, NamedTuple]:
    """Computes the gradient of the mean loss of a batch, and the batch's sums.

    Args:
      fn: ``(adapter, batch, key) -> sums``; the first is that of losses, the last that of weights.
      adapter: tree with respect to which the gradient is taken.
      batch: arrays with a leading axis of rows.
      key: PRNG key of all dropout.
      axis: axis of a ``pmap`` over devices, each of which has some of the rows; all get the result
        for all rows.
    """

    def loss(adapter: PyTree) -> tuple[jax.Array, NamedTuple]:
        sums = fn(adapter, batch, key)
        # Divided by the weight of all rows: a mean of the devices' means would be another number
        # where their weights differ.
        return sums[0] / _sum_over(axis, sums[-1]), sums

    return _sum_over(axis, jax.grad(loss, has_aux=True)(adapter))


def global_norm(grads: PyTree) -> jax.Array:
    """Computes the norm of a gradient over all leaves of the adapter that are trained."""
    trained = zip(jax.tree.leaves(grads), jax.tree.leaves(lora.mask(grads)), strict=True)
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x, is_trained in trained if is_trained))


def add_penalty(grads: PyTree, adapter: PyTree, weight: float) -> PyTree:
    """Adds the gradient of the penalty of an adapter's nodes to that of the loss.

    Args:
      grads: gradient of the loss.
      adapter: adapter, of whose nodes some classes may have a penalty.
      weight: number that the mean of all penalties is multiplied by.
    """
    entries = adapters.nodes(adapter).values()
    if not weight or not any(is_adapted(x) and x.has_penalty for x in entries):
        return grads
    return jax.tree.map(jnp.add, grads, jax.grad(compute_penalty)(adapter, weight))


def compute_penalty(adapter: PyTree, weight: float) -> jax.Array:
    """Computes what the loss grows by: ``weight`` times the mean of all penalties."""
    nodes = [x for x in adapters.nodes(adapter).values() if is_adapted(x) and x.has_penalty]
    return weight * jnp.mean(jnp.concatenate([x.penalties().ravel() for x in nodes]))


def _sum_over(axis: str | None, tree: PyTree) -> PyTree:
    return tree if axis is None else jax.lax.psum(tree, axis)


def accumulate(
    fn: LossFn,
    adapter: PyTree,
    batch: Batch,
    key: jax.Array,
    *,
    parts: int,
    axis: str | None = None,
) -> tuple[PyTree, NamedTuple]:
    """Computes what :func:`compute` does, one micro-batch after the other.

    The activations of a single micro-batch are in memory at a time. The gradients of the
    micro-batches' *sums* of losses are added up, and divided once by the weight of all: a mean of
    their means would give more weight to a token of a micro-batch that has few of them. A
    micro-batch without any weight adds zero. The result is that of :func:`compute` but for rounding
    and dropout: each micro-batch draws its own masks, where the whole batch draws one mask for all
    of its rows.

    Raises:
      ValueError: ``parts`` does not divide the number of rows.
    """
    micro_batches = {name: deal(x, parts) for name, x in batch.items()}

    def loss(adapter: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, NamedTuple]:
        sums = fn(adapter, batch, key)
        return sums[0], sums

    gradient = jax.grad(loss, has_aux=True)

    def add(total: PyTree, part: tuple[Batch, jax.Array]) -> tuple[PyTree, None]:
        new = gradient(adapter, *part)
        return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, new), None

    inputs = (micro_batches, jax.random.split(key, parts))
    shapes = jax.eval_shape(gradient, adapter, *jax.tree.map(lambda x: x[0], inputs))
    total, _ = jax.lax.scan(add, jax.tree.map(_zeros, shapes), inputs)
    grads, sums = _sum_over(axis, total)
    mean = lambda x, like: (x / sums[-1].astype(x.dtype)).astype(like.dtype)
    return jax.tree.map(mean, grads, adapter), sums


def deal(x: jax.Array, parts: int) -> jax.Array:
    """Deals the rows of an array out like cards: row ``r`` goes to part ``r % parts``.

    So the rows that a device holds of a sharded batch stay on it, and each part gets some rows of
    every device.

    Args:
      x: ``(rows, ...)``.
      parts: number of parts.

    Returns:
      ``(parts, rows / parts, ...)``.

    Raises:
      ValueError: ``parts`` does not divide the number of rows.

    >>> deal(jnp.arange(6), 2).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    rows = x.shape[0]
    if rows % parts:
        raise ValueError(
            f"accumulate is {parts}, and the batch has {rows} rows, which {parts} does not divide."
        )
    return jnp.swapaxes(jnp.reshape(x, (rows // parts, parts, *x.shape[1:])), 0, 1)


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    # Sums of many 16-bit numbers need more digits than each of them has.
    return jnp.zeros(like.shape, jnp.promote_types(like.dtype, jnp.float32))
