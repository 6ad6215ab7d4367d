"""Language modelling: the loss of the tokens that count, and the task of learning them.

A text is a row of tokens, of which some count: those of a reply, say, and not those of the question
before it.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.data.batches import Batch, steps_per_epoch
from lora_jax.data.texts import Texts, eval_batches, train_batch
from lora_jax.models import checkpoints
from lora_jax.tasks import adapter_files, from_config
from lora_jax.tasks.language_model import TASK
from lora_jax.training import metrics
from lora_jax.training.task import Score, Task

PyTree = Any


def token_loss(logits: jax.Array, batch: Batch, *, smoothing: float = 0.0) -> metrics.Sums:
    """Sums the loss, right predictions, and their number over the tokens that count.

    The logits one place before a token predict it. With smoothing ``ε`` the target is the token
    with weight ``1 - ε`` and the uniform distribution with weight ``ε`` (Szegedy et al. 2016,
    section 7).

    Args:
      logits: ``(B, L, vocab)``.
      batch: ``input_ids`` and ``counts`` ``(B, L)``, ``weights`` ``(B,)``.
      smoothing: label smoothing ``ε``.

    >>> batch = {"input_ids": jnp.array([[1, 2, 3]]), "counts": jnp.array([[0, 1, 1]])}
    >>> sums = token_loss(jnp.zeros((1, 3, 4)), batch | {"weights": jnp.ones(1)})
    >>> [round(float(x), 3) for x in sums]
    [2.773, 0.0, 2.0]
    """
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    labels = jnp.asarray(batch["input_ids"])[:, 1:].reshape(-1)
    counts = jnp.asarray(batch["counts"])[:, 1:] * jnp.asarray(batch["weights"])[:, None]
    weights = counts.reshape(-1)
    sums = metrics.cross_entropy(flat, labels, weights)
    if not smoothing:
        return sums
    real = jnp.where(weights[:, None] > 0, flat.astype(sums.loss.dtype), 0.0)
    uniform = jnp.sum(weights * -jax.nn.log_softmax(real, axis=-1).mean(axis=-1))
    return sums._replace(loss=(1 - smoothing) * sums.loss + smoothing * uniform)


_INPUTS = ("input_ids", "attention_mask", "positions", "segment_ids")


def apply(model: nn.Module, params: PyTree, batch: Batch, key: jax.Array | None) -> jax.Array:
    """Computes the logits of a batch; with a key, with the model's own dropout."""
    rngs = None if key is None else {"dropout": key}
    arrays = {name: batch[name] for name in _INPUTS if name in batch}
    return model.apply(params, **arrays, deterministic=key is None, rngs=rngs)


def check(config: ConfigDict, least: Mapping[str, int]) -> None:
    """Checks the fields that every task of language modelling has.

    Args:
      config: config of a run.
      least: least values of the task's own fields, such as ``{"data.length": 2}``.

    Raises:
      ValueError: names the fields that are wrong.
    """
    from_config.check(config, {"data.alike": 0} | dict(least))
    if not 0 <= config.label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {config.label_smoothing}.")


def make_task(
    config: ConfigDict, loaded: checkpoints.Loaded, training: Texts, evaluation: Texts
) -> tuple[Task, lora.LoRAConfig]:
    """Makes the task of learning texts; also returns the settings of the adapter.

    The best adapter is the one with the lowest loss. The accuracy is that of predicted tokens.

    Raises:
      ValueError: a text is longer than the model has positions for, or than the buckets.
    """
    c, buckets = config.data, tuple(config.data.buckets)
    _check_positions(config, loaded)
    initial = adapter_files.load_initial(config, loaded)
    notes = _notes(config, loaded, training, evaluation)
    task = Task(
        apply=functools.partial(apply, loaded.model),
        metrics=functools.partial(token_loss, smoothing=config.label_smoothing),
        train_batch=functools.partial(
            train_batch,
            training,
            seed=c.seed,
            batch_size=config.batch_size,
            buckets=buckets,
            alike=c.alike,
        ),
        eval_batches=functools.partial(
            eval_batches, evaluation, batch_size=config.eval_batch_size, buckets=buckets
        ),
        steps_per_epoch=steps_per_epoch(len(training.offsets) - 1, config.batch_size),
        base=loaded.params,
        base_id=loaded.base_id,
        metadata=metadata(config),
        notes=adapter_files.add_notes(initial, notes),
        adapter=initial.adapter,
        fresh_head=initial.fresh_head,
        score=Score("loss", higher_is_better=False),
    )
    return task, initial.config


def metadata(config: ConfigDict) -> dict[str, Any]:
    """Returns what is needed, besides the adapter, to use it."""
    return {"task": TASK, "model": config.model.to_dict(), "seed": config.seed}


def _check_positions(config: ConfigDict, loaded: checkpoints.Loaded) -> None:
    positions = getattr(loaded.model.config, "positions", None)
    if positions is not None and config.data.buckets[-1] > positions:
        raise ValueError(
            f"data.buckets {tuple(config.data.buckets)} go beyond the {positions} positions that "
            f"{loaded.checkpoint.name} has; lower them."
        )


def _notes(
    config: ConfigDict, loaded: checkpoints.Loaded, training: Texts, evaluation: Texts
) -> tuple[str, ...]:
    """Returns the report at the start: the origin of model and data."""
    device = jax.devices()[0]
    return (
        f"model: {loaded.checkpoint.name} from {loaded.checkpoint.origin}",
        f"data: {config.data.source}, texts for training {_size(training)}, for evaluation "
        f"{_size(evaluation)}",
        from_config.describe_attention(config, loaded.model, config.data.buckets[-1]),
        f"device: {jax.device_count()} x {device.device_kind} ({device.platform})",
    )


def _size(texts: Texts) -> str:
    return f"{len(texts.offsets) - 1} ({int(texts.counts.sum()):,} tokens to learn)"
