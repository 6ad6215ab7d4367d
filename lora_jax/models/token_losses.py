"""Losses of next tokens, without the logits of a whole batch.

The logits are by far the largest array of a language model: 8,192 tokens with a vocabulary of
128,256 make 4.2 GB of float32, and loss and gradient need two or three of them. Here a head is
applied to a few tokens of every row at a time, and the backward pass computes their logits again,
so that only those of one chunk exist. This costs the head's product once more. Where all logits
fit into one chunk, nothing is split and nothing is computed twice.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax import sharding

Array = jax.Array
Head = Callable[[Array], Array]

# Bytes of the logits of one chunk on one device: 522 tokens with a vocabulary of 128,256. Each
# chunk reads the whole kernel of the head three times, and with fewer than some 300 tokens an
# accelerator would wait for its memory (an H100 does 295 operations in the time of one byte).
CHUNK_BYTES = 2**28


class TokenLosses(NamedTuple):
    """What each token costs; arrays ``(B, L)``, and zeros where a token does not count.

    Attributes:
      loss: cross-entropy in nats, float32 or the logits' dtype if it is wider.
      correct: whether the highest logit is that of the label; the first of several that are equal.
    """

    loss: Array
    correct: Array


def compute_token_losses(
    head: Head, hidden: Array, labels: Array, is_counted: Array, *, smoothing: float = 0.0
) -> TokenLosses:
    """Computes the cross-entropy of each label, by chunks of tokens.

    With smoothing ``ε`` it is ``-(1 - ε) log p[label] - ε mean(log p)`` (Szegedy et al. 2016,
    section 7). What does not count has no gradient, whatever stands in it, NaN included. A label
    beyond the vocabulary has the loss NaN.

    Under ``jax.set_mesh`` rows stay split over the devices, and so does the vocabulary: each device
    has its own part of a chunk's logits, which is what the size of a chunk is measured by.

    Args:
      head: function of hidden states ``(B, n, D)`` that returns logits ``(B, n, vocab)``, each
        token's from its own states. It may close over traced arrays, adapted kernels under
        ``lora_jax.lift`` among them.
      hidden: ``(B, L, D)``.
      labels: ``(B, L)``, integers: the token that each position predicts.
      is_counted: ``(B, L)``, booleans.
      smoothing: label smoothing ``ε``.

    >>> hidden, labels = jnp.zeros((1, 2, 3)), jnp.array([[3, 0]])
    >>> head = lambda x: x @ jnp.ones((3, 4))
    >>> values = compute_token_losses(head, hidden, labels, jnp.array([[True, False]]))
    >>> [[round(x, 3) for x in row] for row in values.loss.tolist()], values.correct.tolist()
    ([[1.386, 0.0]], [[False, False]])
    """
    score = functools.partial(_score, head, smoothing)
    size = _chunk_size(jax.eval_shape(head, hidden))
    if size >= hidden.shape[1]:
        return score(hidden, labels, is_counted)
    chunks = [_split(x, size) for x in (hidden, labels, is_counted)]
    # A scan needs no barrier to keep the compiler from using the first logits again.
    again = jax.checkpoint(score, prevent_cse=False)
    values = jax.lax.map(lambda chunk: again(*chunk), chunks)
    return TokenLosses(*(_join(x, hidden.shape[1]) for x in values))


def _score(
    head: Head, smoothing: float, hidden: Array, labels: Array, is_counted: Array
) -> TokenLosses:
    """Computes the values of one chunk."""
    # Before the head: 0 times a NaN would be a NaN, in the gradient of the head.
    logits = head(sharding.split_rows(jnp.where(is_counted[..., None], hidden, 0)))
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    is_token = (labels >= 0) & (labels < logits.shape[-1])
    loss = jnp.where(is_token, _cross_entropy(smoothing, logits, labels), jnp.nan)
    correct = is_counted & (jnp.argmax(logits, axis=-1) == labels)
    return TokenLosses(jnp.where(is_counted, loss, 0), correct)


# With a rule of its own, by which the gradient is made of the logits in one go. JAX's rules would
# keep the exponentials of the sum for it, and so twice as much memory.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _cross_entropy(smoothing: float, logits: Array, labels: Array) -> Array:
    return _losses(smoothing, *_normalize(logits), labels)


@_cross_entropy.defjvp
def _cross_entropy_jvp(smoothing: float, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (logits, labels), (change, _) = primals, tangents
    shifted, log_total = _normalize(logits)
    probs = jnp.exp(shifted - log_total[..., None])
    # Not picked, so that its transpose is no scatter into an array of zeros.
    is_label = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 2) == labels[..., None]
    slope = ((probs - (1 - smoothing) * is_label - smoothing / logits.shape[-1]) * change).sum(-1)
    return _losses(smoothing, shifted, log_total, labels), slope


def _normalize(logits: Array) -> tuple[Array, Array]:
    """Returns the logits less their maximum, and the logarithm of the sum of their exponentials."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted, jnp.log(jnp.exp(shifted).sum(-1))


def _losses(smoothing: float, shifted: Array, log_total: Array, labels: Array) -> Array:
    picked = jnp.take_along_axis(shifted, labels[..., None], axis=-1, mode="clip")[..., 0]
    losses = log_total - (1 - smoothing) * picked
    return losses - smoothing * shifted.mean(-1) if smoothing else losses


def _chunk_size(logits: jax.ShapeDtypeStruct) -> int:
    """Returns the number of tokens of a row in a chunk, such that chunks are of nearly one size."""
    rows, length, vocab = logits.shape
    itemsize = jnp.promote_types(logits.dtype, jnp.float32).itemsize
    parts = sharding.count_parts(rows, (sharding.DATA, sharding.FSDP))
    parts *= sharding.count_parts(vocab, (sharding.TENSOR,))
    most = max(1, CHUNK_BYTES * parts // (rows * vocab * itemsize))
    return math.ceil(length / math.ceil(length / most))


def _split(x: Array, size: int) -> Array:
    """Splits ``(B, L, ...)`` to ``(chunks, B, size, ...)``, with zeros up to a whole chunk."""
    count = math.ceil(x.shape[1] / size)
    ends = [(0, 0)] * x.ndim
    ends[1] = (0, count * size - x.shape[1])
    return jnp.moveaxis(jnp.pad(x, ends).reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _join(x: Array, length: int) -> Array:
    """Inverts :func:`_split` for ``(chunks, B, size)``."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length]
