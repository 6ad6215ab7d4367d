"""Tasks of GLUE as text to text (Raffel et al. 2020, section 2.4): the classes are words.

The model reads ``sst2 sentence: ...``, and writes ``positive`` or ``negative``. It is trained on
the likelihood of the right word, and judged by which of the words it finds likeliest, so that there
is always an answer, with a probability.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from lora_jax.data.examples import Examples
from lora_jax.tasks.glue import GlueTask
from lora_jax.training import metrics


class Words(NamedTuple):
    """What the model may write: a row of tokens for each class, its end included.

    Attributes:
      inputs: ``(classes, n)`` int32, what the decoder reads: the tokens, one later.
      tokens: ``(classes, n)`` int32, padded.
      mask: ``(classes, n)`` float32, 1 where there is a token.
    """

    inputs: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray


def to_prompts(examples: Examples, *, task: GlueTask) -> Examples:
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


def _to_prompt(task: GlueTask, texts: Sequence[str]) -> str:
    parts = [f"{field}: {text}" for field, text in zip(task.layout.text, texts, strict=True)]
    return " ".join([task.name, *parts])


def words(labels: Sequence[str], tokenizer: tokenizers.Tokenizer, config: Any) -> Words:
    """The tokens of the classes' names.

    Args:
      labels: the names, in the order of the classes.
      tokenizer: the model's own.
      config: the model's, for the tokens that start, end and pad.

    Raises:
      ValueError: two names have the same tokens, as unknown words have.
    """
    rows = [tokenizer.encode(label).ids for label in labels]
    end = [config.eos_token_id]
    rows = [row if row[-1:] == end else row + end for row in rows]
    if len(set(map(tuple, rows))) < len(rows):
        raise ValueError(
            f"model.labels {tuple(labels)} have the tokens {rows}: choose words that the model's "
            "tokeniser tells apart."
        )
    n = max(map(len, rows))
    pad = lambda row: row + [config.pad_token_id] * (n - len(row))
    tokens = np.array([pad(row) for row in rows], np.int32)
    start = np.full((len(rows), 1), config.decoder_start_token_id, np.int32)
    mask = np.arange(n)[None, :] < np.array([[len(row)] for row in rows])
    return Words(np.hstack([start, tokens[:, :-1]]), tokens, mask.astype(np.float32))


def apply(model: Any, words: Words, params: Any, batch: dict, key: jax.Array | None) -> jax.Array:
    """``log p(word | sentence)`` of each word ``(batch, classes)``; with a key, dropout is on."""
    rngs = None if key is None else {"dropout": key}
    run = lambda *args, **options: model.apply(
        params, *args, deterministic=key is None, rngs=rngs, **options
    )
    memory = run(batch["input_ids"], batch["attention_mask"], method="encode")
    shape = (batch["input_ids"].shape[0], words.tokens.shape[1])

    def score(inputs: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        logits = run(jnp.broadcast_to(inputs, shape), memory=memory, method="decode")
        tokens = jnp.broadcast_to(tokens, shape)[..., None]
        found = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens, axis=-1)
        return jnp.sum(found[..., 0] * mask[None, :], axis=-1)

    return jax.vmap(score, out_axes=1)(*words)


def likelihood(scores: jax.Array, labels: jax.Array, weights: jax.Array) -> metrics.Sums:
    """Sums of ``-log p(right word | sentence)``, and of sentences whose likeliest word is right.

    Args:
      scores: ``(B, classes)``, from :func:`apply`.
      labels: ``(B,)``, integers.
      weights: ``(B,)``, 1 for an example and 0 for a row that fills the batch.
    """
    right = jnp.take_along_axis(scores, labels[:, None], axis=-1)[:, 0]
    correct = (jnp.argmax(scores, axis=-1) == labels).astype(scores.dtype)
    return metrics.Sums(-jnp.sum(weights * right), jnp.sum(weights * correct), jnp.sum(weights))
