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
    """``softmax(scale·QKᵀ + bias)·V`` for each head (Vaswani et al. 2017, eq. 1).

    Written for speed in three places. The heads go before the positions, so that both products
    and their gradients are plain matrix products, batched. The softmax's division comes after the
    weighted sum, where there are ``d`` numbers a query rather than one for each key, and so the
    unnormalised weights are all that is kept for the gradient (not in bfloat16, see below). The
    largest score is subtracted as a constant, because the result does not depend on it.

    Args:
      query: ``(batch, queries, heads, d)``.
      key: ``(batch, keys, heads, d)``.
      value: ``(batch, keys, heads, d)``.
      bias: added to the scores, for example the lowest float where the mask forbids a key; it
        broadcasts to ``(batch, heads, queries, keys)``. A row that is forbidden everywhere has
        equal weights.
      scale: of the products; None for ``1/√d``.
      softcap: the largest absolute value of a scaled product, reached by a tanh; None for no bound.
      drop: dropout of the weights; it scales what it keeps.

    Returns:
      ``(batch, queries, heads, d)`` in the dtype of ``value``; scores, weights' sum and result are
      computed in float32 at least.

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
        # The two parts of the scores' gradient cancel, so both must be rounded in the same place.
        weights, total = weights / total, 1.0
    weights = drop(weights.astype(value.dtype))
    y = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=high)
    return heads_first(y / total).astype(value.dtype)


def grouped_attention(query: Array, key: Array, value: Array, bias: Array, **options: Any) -> Array:
    """Attention with fewer heads of keys and values than of queries (Ainslie et al. 2023).

    The queries of a group stand beside each other as if they were further positions, so that no
    key or value is repeated.

    Args:
      query: ``(batch, queries, heads, d)``; ``heads / groups`` neighbours share a head of keys.
      key: ``(batch, keys, groups, d)``.
      value: ``(batch, keys, groups, d)``.
      bias: ``(batch or 1, 1, queries, keys)``.
      **options: as of :func:`attention`.

    Returns:
      As ``query``.

    >>> x = jnp.ones((1, 3, 4, 2))
    >>> grouped_attention(x, x[:, :, :2], x[:, :, :2], jnp.zeros((1, 1, 3, 3))).shape
    (1, 3, 4, 2)
    """
    batch, n, heads, d = query.shape
    groups = key.shape[2]
    apart = query.reshape(batch, n, groups, heads // groups, d).swapaxes(2, 3)
    bias = jnp.repeat(bias, heads // groups, axis=2)
    y = attention(apart.reshape(batch, -1, groups, d), key, value, bias, **options)
    return y.reshape(batch, n, -1, groups, d).swapaxes(2, 3).reshape(query.shape)
