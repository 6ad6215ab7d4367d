"""Attention block by block, in plain JAX: no pass holds the scores of more than a pair of blocks.

It is FlashAttention (Dao et al. 2022, algorithms 1 and 4; Dao 2023, section 3.1): for each block of
queries, a scan over blocks of keys keeps the largest score so far, the sum of the weights and the
weighted sum of the values. The backward pass has the queries, keys, values, results and the
logarithm of each sum of weights, and computes the scores again. Memory is linear in the length, and
pairs of blocks in which no query may see a key are skipped.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax.models.attention_blocks import (
    PRODUCTS,
    Columns,
    Context,
    Inputs,
    Rows,
    Scoring,
    drop,
    join,
    make_bias,
    make_columns,
    make_rows,
    score,
    split,
)
from lora_jax.models.attention_mask import Mask
from lora_jax.transform.forms import vary, varying_axes

Array = jax.Array
PyTree = Any
T = TypeVar("T")

_SUMS = "bgrqk,bgkd->bgrqd"  # over keys, of values by weights
_BACK = "bgrqk,bgrqd->bgkd"  # over queries and heads of a group


class _Cotangents(NamedTuple):
    """What the gradient of a block of queries needs besides the block.

    Attributes:
      result: gradient by the result, ``(batch, groups, heads / groups, n, d)``.
      log_total: logarithm of the sum of the weights, without the last axis.
      mean: mean of the gradients by the weights, without the last axis.
    """

    result: Array
    log_total: Array
    mean: Array


class _Sums(NamedTuple):
    """Gradients that every block of queries adds to; the bias's is None where there is none."""

    key: Array
    value: Array
    bias: Array | None


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Mask,
    scoring: Scoring,
    *,
    drop: tuple[float, Array] | None = None,
    block: int | None = None,
) -> Array:
    """Computes attention; a query that may see no key gets zeros, and has no gradient.

    It has derivatives of every order by reverse mode, of which only the first takes memory that is
    linear in the length, and none by forward mode.

    Args:
      query: ``(batch, queries, heads, d)``; each ``heads / groups`` neighboring heads share a head
        of keys.
      key: ``(batch, keys, groups, d)``.
      value: the same shape.
      mask: what the queries may see.
      scoring: how the scores are made.
      drop: rate and PRNG key of the dropout of weights, for which each pair of blocks has a key of
        its own; None for none.
      block: largest number of queries, and of keys, of a block; None for
        that of :func:`default_block`.

    Returns:
      ``(batch, queries, heads, d)`` in the dtype of ``value``. The scores, the sums and the
      gradients' sums are computed in float32 or a wider dtype.

    >>> from lora_jax.models.attention_mask import make_padding_mask
    >>> x, mask = jnp.ones((1, 3, 4, 2)), make_padding_mask(jnp.array([[1, 1, 0]]))
    >>> attend(x, x[:, :, :2], x[:, :, :2], mask, Scoring(1.0), block=2).shape
    (1, 3, 4, 2)
    """
    inputs, context = split((query, key, value), mask, scoring, drop, block or default_block())
    return join(_attend(inputs, _tie(context, inputs.query)), query.shape[1])


def _tie(context: Context, query: Array) -> Context:
    """Makes the context seem to depend on the queries, without a change of values.

    The gradient of a scan over layers computes ahead of the scan what does not depend on the
    layer: of the mask, that would be the arrays of all pairs of blocks, at once.
    """
    leaves, treedef = jax.tree.flatten(context)
    is_key = lambda x: jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
    plain = [k for k, x in enumerate(leaves) if not is_key(x)]
    first = lax.stop_gradient(query[(0,) * query.ndim])
    *tied, _ = lax.optimization_barrier([*(leaves[k] for k in plain), first])
    for k, x in zip(plain, tied, strict=True):
        leaves[k] = x
    return jax.tree.unflatten(treedef, leaves)


def default_block() -> int:
    """Returns the largest number of queries, and of keys, of a block.

    The scores of a pair are to fit into a CPU's cache. Elsewhere fewer, larger products are better:
    on an H100, 1,024 took two thirds of the time of 512, and 2,048 no less.
    """
    return 256 if jax.default_backend() == "cpu" else 1024


@jax.custom_vjp
def _attend(inputs: Inputs, context: Context) -> Array:
    """Computes the results, in blocks of queries."""
    return _forward(inputs, context)[0]


def _forward(inputs: Inputs, context: Context) -> tuple[Array, Array]:
    """Computes the results, and the logarithms of the sums of weights, in blocks of queries."""
    step = lambda _, rows: (None, _forward_rows(inputs, context, rows))
    return lax.scan(step, None, make_rows(inputs, context))[1]


def _forward_rows(inputs: Inputs, context: Context, rows: Rows) -> tuple[Array, Array]:
    """Computes the results of one block of queries, and the logarithms of the sums of weights."""

    def step(carry: tuple[Array, ...], columns: Columns) -> tuple[tuple[Array, ...], None]:
        add: Any = functools.partial(_add_columns, context, inputs.bias, rows, columns)
        return _run_if(columns.visible, add, carry), None

    row, arrays = rows.query[..., 0], (rows, inputs, context)
    lowest = float(jnp.finfo(_high(row.dtype)).min)
    starts = (row, lowest), (row, 0.0), (rows.query, 0.0)
    carry = tuple(_full(like, number, arrays) for like, number in starts)
    (largest, total, result), _ = lax.scan(step, carry, make_columns(inputs, context, rows))
    sees_any = total > 0
    total = jnp.where(sees_any, total, 1.0)
    result = (result / total[..., None]).astype(inputs.value.dtype)
    return result, jnp.where(sees_any, largest + jnp.log(total), 0.0)


def _add_columns(
    context: Context,
    bias: Array | None,
    rows: Rows,
    columns: Columns,
    carry: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """Adds a block of keys to the largest score, the sum of the weights, and that of the values."""
    largest, total, result = carry
    _, scores, allowed = score(context, bias, rows, columns)
    new = jnp.maximum(largest, jnp.where(allowed, scores, jnp.finfo(scores.dtype).min).max(-1))
    weights = _exponentiate(scores, new, allowed)
    shrink = jnp.exp(largest - new)
    kept = drop(context, weights, rows, columns).astype(columns.value.dtype)
    more = jnp.einsum(_SUMS, kept, columns.value, preferred_element_type=result.dtype)
    return new, total * shrink + weights.sum(-1), result * shrink[..., None] + more


def _save(inputs: Inputs, context: Context) -> tuple[Array, tuple]:
    result, log_total = _forward(inputs, context)
    return result, (inputs, context, result, log_total)


def _backward(saved: tuple[Inputs, Context, Array, Array], gradient: Array) -> tuple[Inputs, None]:
    """Computes the gradients by queries, keys, values and bias."""
    inputs, context, result, log_total = saved
    high = _high(gradient.dtype)
    mean = jnp.sum(result.astype(high) * gradient.astype(high), -1)
    blocks = make_rows(inputs, context), _Cotangents(gradient, log_total, mean)
    zeros = lambda x: _full(x, 0.0, (saved, gradient))
    sums = jax.tree.map(zeros, _Sums(inputs.key, inputs.value, inputs.bias))
    step = lambda sums, block: _backward_rows(inputs, context, sums, *block)
    sums, query = lax.scan(step, sums, blocks)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), Inputs(query, *sums), inputs), None


_attend.defvjp(_save, _backward)


def _backward_rows(
    inputs: Inputs, context: Context, sums: _Sums, rows: Rows, cotangents: _Cotangents
) -> tuple[_Sums, Array]:
    """Adds the gradients of one block of queries to the sums, and returns that by the queries."""

    def step(
        carry: tuple[Array, Array | None], block: tuple[Columns, Array, Array]
    ) -> tuple[tuple[Array, Array | None], tuple[Array, Array]]:
        columns, key, value = block

        def add(sums: tuple[Array, _Sums]) -> tuple[Array, _Sums]:
            more = _differentiate(context, inputs.bias, rows, columns, cotangents)
            return jax.tree.map(jnp.add, sums, more)

        query, bias = carry
        query, sums = _run_if(columns.visible, add, (query, _Sums(key, value, bias)))
        return (query, sums.bias), (sums.key, sums.value)

    query = _full(rows.query, 0.0, (inputs, context, rows, cotangents))
    blocks = make_columns(inputs, context, rows), sums.key, sums.value
    (query, bias), (key, value) = lax.scan(step, (query, sums.bias), blocks)
    return _Sums(key, value, bias), query


def _differentiate(
    context: Context,
    bias: Array | None,
    rows: Rows,
    columns: Columns,
    cotangents: _Cotangents,
) -> tuple[Array, _Sums]:
    """Computes a pair of blocks' part of the gradients."""
    products, scores, allowed = score(context, bias, rows, columns)
    einsum = functools.partial(jnp.einsum, preferred_element_type=scores.dtype)
    weights = _exponentiate(scores, cotangents.log_total, allowed)
    kept = drop(context, weights, rows, columns).astype(columns.value.dtype)
    by_weights = einsum(PRODUCTS, cotangents.result, columns.value)
    by_weights = drop(context, by_weights, rows, columns)
    by_scores = weights * (by_weights - cotangents.mean[..., None])
    by_bias = _differentiate_bias(context, bias, rows, columns, by_scores)
    if context.softcap is not None:
        by_scores = by_scores * (1.0 - jnp.square(products / context.softcap))
    by_scores = by_scores.astype(rows.query.dtype)
    by_key, by_value = einsum(_BACK, by_scores, rows.query), einsum(_BACK, kept, cotangents.result)
    return einsum(_SUMS, by_scores, columns.key), _Sums(by_key, by_value, by_bias)


def _differentiate_bias(
    context: Context, bias: Array | None, rows: Rows, columns: Columns, by_scores: Array
) -> Array | None:
    """Computes a pair of blocks' part of the gradient by the bias's values."""
    if bias is None:
        return None
    terms, pull = jax.vjp(lambda bias: make_bias(context, bias, rows, columns), bias)
    (found,) = pull(by_scores.sum(0).reshape(terms.shape).astype(terms.dtype))
    return found.astype(_high(bias.dtype))


def _exponentiate(scores: Array, by: Array, allowed: Array) -> Array:
    """Computes ``exp(scores - by)`` for each row, and 0 where nothing is allowed."""
    # The inner one keeps what is not allowed from becoming infinite, in derivatives too.
    return jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - by[..., None], 0.0)), 0.0)


def _run_if(visible: Array | None, run: Callable[[T], T], x: T) -> T:
    return run(x) if visible is None else lax.cond(visible, run, lambda x: x, x)


def _high(dtype: DTypeLike) -> DTypeLike:
    return jnp.promote_types(dtype, jnp.float32)


def _full(like: Array, number: float, arrays: PyTree) -> Array:
    """Fills an array of the shape of another, whose type has the places of all ``arrays``."""
    return vary(jnp.full_like(like, number, _high(like.dtype)), varying_axes(arrays))
