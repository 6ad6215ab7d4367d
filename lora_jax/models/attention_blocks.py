"""Blocks of queries and of keys for attention that is computed pair by pair, and their scores."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.dropout import dropout
from lora_jax.models.attention_mask import Mask, Slots, find_visible_blocks, make_allowed
from lora_jax.models.relative_positions import RelativeBias, make_relative_bias

Array = jax.Array

# Axes: batch, group of heads, head of the group, query, key, width of a head.
PRODUCTS = "bgrqd,bgkd->bgrqk"


class Scoring(NamedTuple):
    """How scores are made of the products of queries and keys.

    Attributes:
      scale: factor of the products.
      softcap: bound of the absolute value of a scaled product, which a tanh keeps; None for none.
      bias: terms that are added, by the distance of query and key; None for none.
    """

    scale: float
    softcap: float | None = None
    bias: RelativeBias | None = None


class Inputs(NamedTuple):
    """The arrays that have a gradient.

    Attributes:
      query: blocks of queries ``(blocks, batch, groups, heads / groups, n, d)``, times the scale.
      key: blocks of keys ``(blocks, batch, groups, m, d)``.
      value: the same shape.
      bias: the values of a :class:`RelativeBias`, ``(heads, distances)``, or None.
    """

    query: Array
    key: Array
    value: Array
    bias: Array | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("mask", "queries", "keys", "visible", "first", "dropout_key"),
    meta_fields=("softcap", "rate"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What has no gradient.

    Attributes:
      mask: the mask, without its queries and keys.
      queries: what is known of the queries, with a leading axis of blocks in each part.
      keys: the same of the keys.
      visible: booleans ``(blocks of queries, blocks of keys)``, the pairs to compute; None for all.
      first: the lowest distance of the bias.
      dropout_key: PRNG key; None without dropout.
      softcap: as of :class:`Scoring`.
      rate: probability that a weight is dropped.
    """

    mask: Mask
    queries: Slots
    keys: Slots
    visible: Array | None
    first: Array | int
    dropout_key: Array | None
    softcap: float | None
    rate: float


class Rows(NamedTuple):
    """A block of queries: rows of the scores.

    Attributes:
      query: ``(batch, groups, heads / groups, n, d)``.
      slots: what is known of them.
      number: the number of the block.
      visible: booleans ``(blocks of keys,)``, or None.
    """

    query: Array
    slots: Slots
    number: Array
    visible: Array | None


class Columns(NamedTuple):
    """A block of keys: columns of the scores.

    Attributes:
      key: ``(batch, groups, m, d)``.
      value: the same shape.
      slots: what is known of them.
      number: the number of the block.
      visible: whether some query of the block at hand may see some of them, or None.
    """

    key: Array
    value: Array
    slots: Slots
    number: Array
    visible: Array | None


def split(
    arrays: tuple[Array, Array, Array],
    mask: Mask,
    scoring: Scoring,
    drop: tuple[float, Array] | None,
    block: int,
) -> tuple[Inputs, Context]:
    """Splits the arguments of attention into blocks, of which the last one is padded.

    Args:
      arrays: queries ``(batch, n, heads, d)``, keys and values ``(batch, m, groups, d)``.
      mask: what the queries may see.
      scoring: how the scores are made.
      drop: rate and PRNG key of the dropout of weights; None for none.
      block: largest number of queries, and of keys, of a block.
    """
    query, key, value = arrays
    (batch, n, heads, d), m, groups = query.shape, key.shape[1], key.shape[2]
    rows, columns = _block_size(n, block), _block_size(m, block)
    query = (query * scoring.scale).reshape(batch, n, groups, heads // groups, d)
    bias = scoring.bias
    inputs = Inputs(
        _split(query.transpose(0, 2, 3, 1, 4), 3, rows),
        _split(key.swapaxes(1, 2), 2, columns),
        _split(value.swapaxes(1, 2), 2, columns),
        None if bias is None else bias.values,
    )
    queries = _split_slots(mask.queries, rows)
    keys = _split_slots(_mark_padding(mask.keys, m, columns), columns)
    visible = find_visible_blocks(mask, queries, keys)
    if visible is not None:
        visible = jnp.broadcast_to(visible, (len(inputs.query), len(inputs.key)))
    rate, dropout_key = (0.0, None) if drop is None else drop
    return inputs, Context(
        mask=dataclasses.replace(mask, queries=Slots(), keys=Slots()),
        queries=queries,
        keys=keys,
        visible=visible,
        first=0 if bias is None else bias.first,
        dropout_key=dropout_key,
        softcap=scoring.softcap,
        rate=rate,
    )


def join(results: Array, n: int) -> Array:
    """Joins results in blocks of queries, ``(blocks, ...)``, to ``(batch, n, heads, d)``."""
    blocks, batch, groups, per_group, size, d = results.shape
    y = results.transpose(1, 0, 4, 2, 3, 5)
    return y.reshape(batch, blocks * size, groups * per_group, d)[:, :n]


def _block_size(n: int, block: int) -> int:
    """Divides ``n`` into as few blocks as can be, all of one size, and as even as can be.

    >>> [_block_size(n, 512) for n in (3, 512, 513, 1500)]
    [3, 512, 264, 504]
    """
    size = -(-n // -(-n // block))
    return size if size == n else min(-(-size // 8) * 8, block)


def _split(x: Array, axis: int, size: int, mode: str = "constant") -> Array:
    """Splits an axis into blocks, whose number becomes the first axis; the last one is padded."""
    rest = -x.shape[axis] % size
    if rest:
        x = jnp.pad(x, [(0, rest * (k == axis)) for k in range(x.ndim)], mode=mode)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _split_slots(slots: Slots, size: int) -> Slots:
    """Splits what is known of queries or keys; what pads the last block holds no token."""
    index, is_token, segments = slots
    blocks: Any = None if index is None else _split(index, 0, size, "edge")
    return Slots(
        blocks,
        None if is_token is None else _split(is_token, 1, size),
        None if segments is None else _split(segments, 1, size, "edge"),
    )


def _mark_padding(keys: Slots, m: int, size: int) -> Slots:
    """Says which keys are tokens where the last block will be padded, if nothing says it yet."""
    if m % size == 0 or keys.is_token is not None:
        return keys
    return keys._replace(is_token=jnp.ones((1, m), bool))


def make_rows(inputs: Inputs, context: Context) -> Rows:
    """Makes all blocks of queries, with a leading axis in each part."""
    return Rows(inputs.query, context.queries, jnp.arange(len(inputs.query)), context.visible)


def make_columns(inputs: Inputs, context: Context, rows: Rows) -> Columns:
    """Makes all blocks of keys as a block of queries sees them, with a leading axis in each."""
    numbers = jnp.arange(len(inputs.key))
    return Columns(inputs.key, inputs.value, context.keys, numbers, rows.visible)


def score(
    context: Context, bias: Array | None, rows: Rows, columns: Columns
) -> tuple[Array, Array, Array]:
    """Computes the scores of a pair of blocks, in float32 or a wider dtype.

    Returns:
      The products after their bound, ``(batch, groups, heads / groups, n, m)``; the scores, which
      have the bias, too; and booleans, where they are allowed, which broadcast with them.
    """
    high = jnp.promote_types(rows.query.dtype, jnp.float32)
    products = jnp.einsum(PRODUCTS, rows.query, columns.key, preferred_element_type=high)
    if context.softcap is not None:
        products = context.softcap * jnp.tanh(products / context.softcap)
    allowed = make_allowed(context.mask, rows.slots, columns.slots)[:, None, None]
    if bias is None:
        return products, products, allowed
    terms = make_bias(context, bias, rows, columns)
    return products, products + terms.reshape(1, *products.shape[1:]), allowed


def make_bias(context: Context, bias: Array, rows: Rows, columns: Columns) -> Array:
    """Makes the bias of a pair of blocks, ``(heads, n, m)``."""
    relative = RelativeBias(bias, context.first)
    return make_relative_bias(relative, rows.slots.index, columns.slots.index)


def drop(context: Context, x: Array, rows: Rows, columns: Columns) -> Array:
    """Drops entries of a pair of blocks, the same whenever it is called for the pair."""
    if context.dropout_key is None:
        return x
    key = jax.random.fold_in(context.dropout_key, rows.number)
    return dropout(x, context.rate, jax.random.fold_in(key, columns.number))
