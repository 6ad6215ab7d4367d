"""The attention core that the models share, and the masks of its scores."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def make_padding_mask(attention_mask: Array) -> Array:
    """Allows every query all keys that hold a token.

    Args:
      attention_mask: ``(batch, keys)``, positive where there is a token, 0 at padding.

    Returns:
      Booleans ``(batch, 1, 1, keys)``, for heads and queries alike.

    >>> make_padding_mask(jnp.array([[1, 0]])).tolist()
    [[[[True, False]]]]
    """
    return (attention_mask > 0)[:, None, None, :]


def make_causal_mask(attention_mask: Array, queries: Array) -> Array:
    """Allows each query the keys that hold a token and do not come after it.

    Args:
      attention_mask: ``(batch, keys)``, positive where there is a token, 0 at padding.
      queries: integers ``(n,)``, the places of the queries among the keys.

    Returns:
      Booleans ``(batch, 1, n, keys)``, for all heads alike.

    >>> make_causal_mask(jnp.array([[0, 1, 1]]), jnp.array([1, 2])).tolist()
    [[[[False, True, False], [False, True, True]]]]
    """
    keys = jnp.arange(attention_mask.shape[1])
    is_before = keys[None, :] <= queries[:, None]
    return is_before[None, None] & make_padding_mask(attention_mask)


def mask_to_bias(mask: Array, bias: Array | float = 0.0) -> Array:
    """Returns what :func:`attention` adds to the scores: ``bias``, or the lowest float32.

    The sum is taken in float32 before the softmax: a key that is not allowed has weight exactly
    zero, and a query that is allowed no key (padding) has equal weights rather than NaN.

    Args:
      mask: booleans, true where a query may see a key.
      bias: added to the scores that are allowed; it broadcasts with the mask.

    Returns:
      Float32, or the dtype of ``bias`` if that is wider, in the shape of both broadcast together.
    """
    return jnp.where(mask, bias, jnp.finfo(jnp.float32).min)


def attention(
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
      bias: term that is added to the scores, such as that of :func:`mask_to_bias`; it broadcasts to
        ``(batch, heads, queries, keys)``.
      scale: factor of the products; None for ``1/√d``.
      softcap: bound of the absolute value of a scaled product, which a tanh keeps; None for none.
      drop: dropout of the weights; it scales those that it keeps.

    Returns:
      ``(batch, queries, heads, d)`` in the dtype of ``value``. The scores, the sum of the weights
      and the result are computed in float32 or a wider dtype.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> attention(x, x, x, jnp.zeros((1, 1, 1, 3))).shape
    (1, 3, 2, 4)
    """
    high = jnp.promote_types(query.dtype, jnp.float32)
    heads_first = lambda x: x.swapaxes(1, 2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = map(heads_first, (query * scale, key, value))
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=high)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores + bias
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    if value.dtype != high:
        # The two terms of the scores' gradient cancel, so they must be rounded in the same place.
        weights, total = weights / total, 1.0
    weights = drop(weights.astype(value.dtype))
    y = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=high)
    return heads_first(y / total).astype(value.dtype)


def grouped_attention(query: Array, key: Array, value: Array, bias: Array, **options: Any) -> Array:
    """Computes attention with fewer heads of keys than of queries (Ainslie et al. 2023).

    The query heads of a group are treated as further positions, so that no key or value is copied.

    Args:
      query: ``(batch, queries, heads, d)``; each ``heads / groups`` neighboring heads share a head
        of keys.
      key: ``(batch, keys, groups, d)``.
      value: ``(batch, keys, groups, d)``.
      bias: ``(batch or 1, 1, queries, keys)``.
      **options: further arguments of :func:`attention`.

    Returns:
      ``(batch, queries, heads, d)`` in the dtype of ``value``.

    >>> x = jnp.ones((1, 3, 4, 2))
    >>> grouped_attention(x, x[:, :, :2], x[:, :, :2], jnp.zeros((1, 1, 3, 3))).shape
    (1, 3, 4, 2)
    """
    batch, n, heads, d = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, n, groups, heads // groups, d).swapaxes(2, 3)
    bias = jnp.repeat(bias, heads // groups, axis=2)
    y = attention(query.reshape(batch, -1, groups, d), key, value, bias, **options)
    return y.reshape(batch, n, -1, groups, d).swapaxes(2, 3).reshape(batch, n, heads, d)
