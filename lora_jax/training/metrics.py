"""Losses and accuracies as sums, so that batches of any size and padding combine exactly."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


class Sums(NamedTuple):
    """Sums over examples, each counted by its weight; scalars, float32 or the logits' if wider.

    Attributes:
      loss: sum of the cross-entropies, in nats.
      correct: sum of 1 for each example whose highest logit is that of its label.
      weight: sum of the weights.
    """

    loss: jax.Array
    correct: jax.Array
    weight: jax.Array


def cross_entropy(logits: jax.Array, labels: Array, weights: Array) -> Sums:
    """Sums ``-log softmax(logits)[label]`` and right answers, in float32 or wider.

    A row of weight 0 counts for nothing, whatever stands in it, NaN included; its gradient is 0.

    Args:
      logits: ``(B, num_labels)``, of any floating dtype.
      labels: ``(B,)``, integers.
      weights: ``(B,)``, 1 for an example and 0 for a row that fills the batch.

    >>> sums = cross_entropy(jnp.zeros((3, 2)), jnp.array([0, 0, 1]), jnp.array([1.0, 1.0, 0.0]))
    >>> [round(float(x), 4) for x in sums]
    [1.3863, 2.0, 2.0]
    """
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    weights = weights.astype(dtype)
    # Before the logarithm: 0 times a NaN would be a NaN, in the loss and in its gradient.
    real = jnp.where(weights[:, None] > 0, logits.astype(dtype), 0.0)
    log_probs = jax.nn.log_softmax(real, axis=-1)
    losses = -jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    correct = (jnp.argmax(real, axis=-1) == labels).astype(dtype)
    return Sums(jnp.sum(weights * losses), jnp.sum(weights * correct), jnp.sum(weights))


class Errors(NamedTuple):
    """Sums over examples of a regression, each counted by its weight; dtypes as in :class:`Sums`.

    Attributes:
      loss: sum of the squared errors.
      weight: sum of the weights.
    """

    loss: jax.Array
    weight: jax.Array


def squared_error(predictions: jax.Array, targets: Array, weights: Array) -> Errors:
    """Sums ``(prediction - target)²``, in float32 or wider.

    A row of weight 0 counts for nothing, whatever stands in it, NaN included; its gradient is 0.

    Args:
      predictions: ``(B,)``, of any floating dtype.
      targets: ``(B,)``.
      weights: ``(B,)``, 1 for an example and 0 for a row that fills the batch.

    >>> x = jnp.array([1.0, 3.0, 9.0])
    >>> [float(x) for x in squared_error(x, jnp.zeros(3), jnp.array([1.0, 1.0, 0.0]))]
    [10.0, 2.0]
    """
    dtype = jnp.promote_types(predictions.dtype, jnp.float32)
    weights = weights.astype(dtype)
    difference = jnp.where(weights > 0, predictions.astype(dtype) - targets.astype(dtype), 0.0)
    return Errors(jnp.sum(weights * jnp.square(difference)), jnp.sum(weights))


def combine(batches: Iterable[NamedTuple]) -> dict[str, float]:
    """Computes means over all examples of all batches, and their number.

    The sums are added up in float64 on the host, after all have been dispatched.

    Args:
      batches: tuples of sums, of one type, whose last field is the sum of weights.

    Returns:
      ``{"loss", "accuracy", "examples"}``, Python floats; a mean for each field, and "accuracy" for
      right answers.

    Raises:
      ValueError: there is no example at all.

    >>> combine([Sums(2.0, 1.0, 1.0), Sums(4.0, 2.0, 3.0)])
    {'loss': 1.5, 'accuracy': 0.75, 'examples': 4.0}
    """
    batches = list(batches)
    fields = batches[0]._fields if batches else ("weight",)
    sums = np.array([[float(x) for x in batch] for batch in batches], np.float64)
    *values, weight = sums.reshape(-1, len(fields)).sum(0).tolist()
    if not weight > 0:
        raise ValueError(
            "no examples to take a mean of: there are no batches, or no weight in them"
        )
    names = ("accuracy" if name == "correct" else name for name in fields[:-1])
    means = {name: value / weight for name, value in zip(names, values, strict=True)}
    return means | {"examples": weight}
