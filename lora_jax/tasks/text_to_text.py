"""Classification as text to text (Raffel et al. 2020, section 2.4): the classes are words.

The model reads ``sst2 sentence: ...``, and writes ``positive`` or ``negative``. It is trained on
the likelihood of the right word. Its prediction is the word that it finds most likely, so that
there is always an answer, with a probability.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from lora_jax.data.batches import Batch
from lora_jax.data.examples import Examples
from lora_jax.models.t5_config import T5Config
from lora_jax.tasks.text_task import TextTask
from lora_jax.training import metrics

PyTree = Any


class LabelTokens(NamedTuple):
    """The tokens of the labels: a row for each class, with the token that ends a text.

    Attributes:
      inputs: ``(classes, n)`` int32, inputs of the decoder: the tokens, shifted by one.
      tokens: ``(classes, n)`` int32, padded.
      mask: ``(classes, n)`` float32, 1 for tokens and 0 for padding.
    """

    inputs: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray


def to_prompts(examples: Examples, *, task: TextTask) -> Examples:
    """Writes the examples as T5 was asked about them, each as a single text.

    >>> from lora_jax.tasks.glue import TASKS
    >>> to_prompts(Examples(("Fine.",), None), task=TASKS["sst2"]).sentences
    ('sst2 sentence: Fine.',)
    >>> to_prompts(Examples(("A.",), None, ("B.",)), task=TASKS["mnli"]).sentences
    ('mnli premise: A. hypothesis: B.',)
    """
    columns = [x for x in (examples.sentences, examples.pairs) if x is not None]
    sentences = [_to_prompt(task, texts) for texts in zip(*columns, strict=True)]
    return examples._replace(sentences=tuple(sentences), pairs=None)


def _to_prompt(task: TextTask, texts: Sequence[str]) -> str:
    parts = [f"{field}: {text}" for field, text in zip(task.texts, texts, strict=True)]
    return " ".join([task.name, *parts])


def encode_labels(
    labels: Sequence[str], tokenizer: tokenizers.Tokenizer, config: T5Config
) -> LabelTokens:
    """Converts the names of the classes to tokens.

    Args:
      labels: names of the classes, in their order.
      tokenizer: tokenizer of the model.
      config: config of the model, for the tokens that start, end and pad a text.

    Raises:
      ValueError: two names have the same tokens, as unknown words do.
    """
    rows = [tokenizer.encode(label).ids for label in labels]
    end = [config.eos_token_id]
    rows = [row if row[-1:] == end else row + end for row in rows]
    if len(set(map(tuple, rows))) < len(rows):
        raise ValueError(
            f"model.labels {tuple(labels)} have the tokens {rows}: choose words that the model's "
            "tokenizer tells apart."
        )
    n = max(map(len, rows))
    tokens = np.full((len(rows), n), config.pad_token_id, np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    start = np.full((len(rows), 1), config.decoder_start_token_id, np.int32)
    mask = np.arange(n)[None, :] < np.array([[len(row)] for row in rows])
    return LabelTokens(np.hstack([start, tokens[:, :-1]]), tokens, mask.astype(np.float32))


def apply(
    model: nn.Module, labels: LabelTokens, params: PyTree, batch: Batch, key: jax.Array | None
) -> jax.Array:
    """Computes ``log p(label | sentence)``, ``(batch, classes)``; with a key, with dropout."""
    rngs = None if key is None else {"dropout": key}
    apply_model: Any = model.apply
    run = functools.partial(apply_model, params, deterministic=key is None, rngs=rngs)
    memory = run(batch["input_ids"], batch["attention_mask"], method="encode")
    shape = (batch["input_ids"].shape[0], labels.tokens.shape[1])

    def score(inputs: metrics.Array, tokens: metrics.Array, mask: metrics.Array) -> jax.Array:
        logits = run(jnp.broadcast_to(inputs, shape), memory=memory, method="decode")
        tokens = jnp.broadcast_to(tokens, shape)[..., None]
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens, axis=-1)
        return jnp.sum(log_probs[..., 0] * mask[None, :], axis=-1)

    return jax.vmap(score, out_axes=1)(labels.inputs, labels.tokens, labels.mask)


def likelihood(scores: jax.Array, labels: metrics.Array, weights: metrics.Array) -> metrics.Sums:
    """Sums ``-log p(right label | sentence)``, and sentences whose most likely label is right.

    Args:
      scores: ``(B, classes)``, from :func:`apply`.
      labels: ``(B,)``, integers.
      weights: ``(B,)``, 1 for an example and 0 for a row that fills the batch.
    """
    log_probs = jnp.take_along_axis(scores, labels[:, None], axis=-1)[:, 0]
    correct = (jnp.argmax(scores, axis=-1) == labels).astype(scores.dtype)
    return metrics.Sums(-jnp.sum(weights * log_probs), jnp.sum(weights * correct), jnp.sum(weights))
