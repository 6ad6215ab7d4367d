"""Attention by cuDNN, through ``jax.nn.dot_product_attention``: no scores, half the products.

It is for NVIDIA GPUs. Its values and gradients were compared with those of scores in float32 on an
H100 (jax 0.11.2); a CPU's tests go as far as its lowering for such a GPU.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import backend
from jax.typing import DTypeLike

from lora_jax.models import blockwise_attention
from lora_jax.models.attention_blocks import Scoring
from lora_jax.models.attention_mask import Mask, make_allowed

Array = jax.Array

DTYPES = ("bfloat16", "float16")
MAX_HEAD_SIZE = 128  # cuDNN takes up to 256 from Hopper on


def shape_problems(dtype: DTypeLike, head_size: int) -> Iterator[str]:
    """Says what keeps cuDNN from computing attention of a dtype, with heads of a size."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        yield f"activations are {name}, and it takes {' or '.join(DTYPES)}"
    if head_size > MAX_HEAD_SIZE or head_size % 8:
        yield f"heads have size {head_size}, and it takes multiples of 8 up to {MAX_HEAD_SIZE}"


def device_problems() -> Iterator[str]:
    """Says what is wrong with the device that JAX uses, and with its cuDNN."""
    client = backend.get_backend()
    if client.platform != "gpu" or "cuda" not in client.platform_version.lower():
        yield f"it is for NVIDIA GPUs, and JAX runs on {client.platform}"
        return
    x = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(_fused, x, x, x)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        yield f"JAX says {str(error)!r}"


def count_mask_bytes(batch: int, queries: int, keys: int) -> int:
    """Counts the bytes of a mask of segments, and of the gradient that cuDNN computes by it."""
    return 2 * 2 * batch * queries * keys


def attend(query: Array, key: Array, value: Array, mask: Mask, *, scale: float) -> Array:
    """Computes attention of a mask; the shapes are those of blockwise attention.

    cuDNN knows padding by the number of tokens of a row. Rows with padding elsewhere than at the
    end are found when the program runs, and computed block by block. Segments are given as a mask
    of all pairs of tokens, one for all heads: cuDNN has a form for texts one after another in a
    row, of which JAX's values are wrong (0.11.2, on an H100).

    Args:
      query: ``(batch, queries, heads, d)``.
      key: ``(batch, keys, groups, d)``.
      value: the same shape.
      mask: what the queries may see; if it is causal, there is a query for each key; if it has
        segments, the numbers of queries and of keys are even.
      scale: factor of the products.

    Returns:
      ``(batch, queries, heads, d)`` in the dtype of ``value``. What a query of padding gets is
      finite, and not specified.
    """
    if mask.keys.segments is not None:
        allowed = make_allowed(mask, mask.queries, mask.keys)[:, None]
        return _fused(query, key, value, scale=scale, is_causal=mask.causal, mask=allowed)
    fused = functools.partial(_attend_fused, mask, scale)
    is_token = mask.keys.is_token
    if is_token is None:
        return fused(query, key, value)
    is_token = is_token > 0
    is_right_padded = jnp.all(is_token[:, 1:] <= is_token[:, :-1])
    by_blocks = lambda q, k, v: blockwise_attention.attend(q, k, v, mask, Scoring(scale))
    return lax.cond(is_right_padded, fused, by_blocks, query, key, value)


def _attend_fused(mask: Mask, scale: float, query: Array, key: Array, value: Array) -> Array:
    """Computes attention of rows that are padded at the end, with the window if it holds."""
    options: dict[str, Any] = {"scale": scale, "is_causal": mask.causal}
    if not mask.causal and mask.keys.is_token is not None:
        # Under a causal mask, no token sees what comes after the last one.
        lengths = jnp.sum(mask.keys.is_token > 0, axis=1, dtype=jnp.int32)
        options["key_value_seq_lengths"] = jnp.maximum(lengths, 1)
    full: Callable[..., Array] = functools.partial(_fused, **options)
    if mask.window is None:
        return full(query, key, value)
    windowed = functools.partial(full, local_window_size=(mask.window - 1, 0))
    if mask.is_windowed is None:
        return windowed(query, key, value)
    return lax.cond(mask.is_windowed, windowed, full, query, key, value)


def _fused(query: Array, key: Array, value: Array, **options: Any) -> Array:
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **options)
