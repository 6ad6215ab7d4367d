"""The gradient of a batch's mean loss: at once, or from parts of the batch, one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def whole(
    fn: Callable, adapter: PyTree, batch: dict, key: jax.Array, *, axis: str | None = None
) -> tuple[PyTree, Any]:
    """The gradient of the mean loss of a batch, and the batch's sums.

    Args:
      fn: ``(adapter, batch, key) -> sums``, the first of losses, the last of weights.
      adapter: what the gradient is taken of.
      batch: arrays with a leading axis of rows.
      key: of all dropout.
      axis: of a ``pmap`` over devices that have some of the rows each; all get the result for all
        of the rows.
    """

    def loss(adapter: PyTree) -> tuple[jax.Array, Any]:
        sums = fn(adapter, batch, key)
        # Of all rows, not the mean of the devices' means: their weights may differ.
        return sums[0] / _of_all(sums[-1], axis), sums

    return _of_all(jax.grad(loss, has_aux=True)(adapter), axis)


def _of_all(tree: PyTree, axis: str | None) -> PyTree:
    return tree if axis is None else jax.lax.psum(tree, axis)


def accumulated(
    fn: Callable,
    adapter: PyTree,
    batch: dict,
    key: jax.Array,
    *,
    parts: int,
    axis: str | None = None,
) -> tuple[PyTree, Any]:
    """The same, with the activations of one part of the batch in memory at a time.

    The gradients of the parts' *sums* of losses are added up, and divided once by the weight of
    all: the mean of the parts' means would count a token of a part that has few of them for more.
    A part without any weight adds zero. Apart from rounding it is :func:`whole`, but for dropout:
    each part draws its own masks, where the whole batch draws one mask for all of its rows.

    Raises:
      ValueError: the rows can't be dealt out evenly.
    """
    dealt = {name: deal(x, parts) for name, x in batch.items()}

    def loss(adapter: PyTree, batch: dict, key: jax.Array) -> tuple[jax.Array, Any]:
        sums = fn(adapter, batch, key)
        return sums[0], sums

    gradient = jax.grad(loss, has_aux=True)
    plus = lambda x, y: x + y.astype(x.dtype)
    add = lambda so_far, part: (jax.tree.map(plus, so_far, gradient(adapter, *part)), None)
    inputs = (dealt, jax.random.split(key, parts))
    shapes = jax.eval_shape(gradient, adapter, *jax.tree.map(lambda x: x[0], inputs))
    total, _ = jax.lax.scan(add, jax.tree.map(_zeros, shapes), inputs)
    grads, sums = _of_all(total, axis)
    mean = lambda x, like: (x / sums[-1].astype(x.dtype)).astype(like.dtype)
    return jax.tree.map(mean, grads, adapter), sums


def deal(x: jax.Array, parts: int) -> jax.Array:
    """``(rows, ...)`` to ``(parts, rows / parts, ...)``: row ``r`` goes to part ``r % parts``.

    Dealt out like cards, the rows that a device holds of a sharded batch stay on it, and each part
    gets some of every device's.

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
