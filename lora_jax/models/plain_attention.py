"""Attention as one program of XLA's, which writes the scores of all queries and keys to memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import products

Array = jax.Array


def attend(query: Array, key: Array, value: Array, bias: Array, **options: Any) -> Array:
    """Computes attention, also with fewer heads of keys than of queries (Ainslie et al. 2023).

    The query heads of a group are treated as further positions, so that no key or value is copied.

    Args:
      query: ``(batch, queries, heads, d)``; each ``heads / groups`` neighboring heads share a head
        of keys.
      key: ``(batch, keys, groups, d)``.
      value: ``(batch, keys, groups, d)``.
      bias: term that is added to the scores, such as that of
        :func:`lora_jax.models.attention_mask.make_bias`: ``(batch or 1, 1, queries or 1, keys)``;
        where there are as many groups as heads, it may differ from head to head.
      **options: ``scale``, ``softcap`` and ``drop``, as of :func:`attend_ungrouped`.

    Returns:
      ``(batch, queries, heads, d)`` in the dtype of ``value``.

    >>> x = jnp.ones((1, 3, 4, 2))
    >>> attend(x, x[:, :, :2], x[:, :, :2], jnp.zeros((1, 1, 3, 3))).shape
    (1, 3, 4, 2)
    """
    batch, n, heads, d = query.shape
    groups = key.shape[2]
    if groups == heads:
        return attend_ungrouped(query, key, value, bias, **options)
    query = query.reshape(batch, n, groups, heads // groups, d).swapaxes(2, 3)
    bias = jnp.repeat(bias, heads // groups, axis=2) if bias.shape[2] > 1 else bias
    y = attend_ungrouped(query.reshape(batch, -1, groups, d), key, value, bias, **options)
    return y.reshape(batch, n, -1, groups, d).swapaxes(2, 3).reshape(batch, n, heads, d)


def attend_ungrouped(
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Array:
    """Computes ``softmax(scale·QKᵀ + bias)·V`` for each head (Vaswani et al. 2017, eq. 1).

    Three things make it fast. The axis of heads is moved before that of positions, so that both
    products and their gradients are batched matrix products. The softmax's division comes after the
    weighted sum, where a query has ``d`` numbers rather than one for each key, so that only the
    weights before the division are kept for the gradient (except in bfloat16, see below). The
    largest score is subtracted as a constant, because the result does not depend on it.

    Args:
      query: ``(batch, queries, heads, d)``.
      key: ``(batch, keys, heads, d)``.
      value: ``(batch, keys, heads, d)``.
      bias: term that is added to the scores; it broadcasts to ``(batch, heads, queries, keys)``.
      scale: factor of the products; None for ``1/√d``.
      softcap: bound of the absolute value of a scaled product, which a tanh keeps; None for none.
      drop: dropout of the weights; it scales those that it keeps.

    Returns:
      ``(batch, queries, heads, d)`` in the dtype of ``value``. The scores, the sum of the weights
      and the result are computed in float32 or a wider dtype.
    """
    high = jnp.promote_types(query.dtype, jnp.float32)
    heads_first = lambda x: x.swapaxes(1, 2)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = map(heads_first, (query * factor, key, value))
    heads = (0, 1), (0, 1)
    product = functools.partial(products.dot_general, preferred_element_type=high)
    scores = product(query, key, (((3,), (3,)), heads))
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores + bias
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    total: Array | float = weights.sum(-1, keepdims=True)
    if value.dtype != high:
        # The two terms of the scores' gradient cancel, so they must be rounded in the same place.
        weights, total = weights / total, 1.0
    weights = drop(weights.astype(value.dtype))
    y = product(weights, value, (((3,), (2,)), heads))
    return heads_first(y / total).astype(value.dtype)
