"""Language modelling: the loss of the tokens that count, and the task of learning them.

A text is a row of tokens, of which some count: those of a reply, say, and not those of the question
before it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.data.batches import Batch, steps_per_epoch
from lora_jax.data.texts import Texts, eval_batches, train_batch
from lora_jax.models import checkpoints, token_ids
from lora_jax.models.token_losses import TokenLosses, compute_token_losses
from lora_jax.tasks import adapter_bases, adapter_files, from_config, originals
from lora_jax.tasks.language_model import TASK
from lora_jax.training import metrics
from lora_jax.training.task import Score, Task

PyTree = Any


_INPUTS = ("input_ids", "attention_mask", "positions", "segment_ids")


def apply(
    model: nn.Module,
    params: PyTree,
    batch: Batch,
    key: jax.Array | None,
    *,
    smoothing: float = 0.0,
) -> TokenLosses:
    """Computes the losses of a batch's tokens; with a key, with the model's own dropout.

    The states one place before a token predict it. The logits of the whole batch are never in
    memory: see :func:`lora_jax.models.token_losses.compute_token_losses`.

    Args:
      model: language model with ``compute_hidden`` and ``compute_logits``.
      params: its parameters.
      batch: the model's inputs ``(B, L)``, and ``counts`` ``(B, L)`` and ``weights`` ``(B,)``.
      key: PRNG key of the model's dropout, or None.
      smoothing: label smoothing.

    Returns:
      Arrays ``(B, L)``: at each place what the next token costs, and 0 at the last.
    """
    rngs = None if key is None else {"dropout": key}
    arrays = {name: batch[name] for name in _INPUTS if name in batch}
    options = {"deterministic": key is None, "rngs": rngs, "method": "compute_hidden"}
    run: Callable[..., Any] = model.apply
    hidden, _ = run(params, **arrays, **options)
    head = functools.partial(run, params, method="compute_logits")
    labels, is_counted = _move_back(batch["input_ids"]), _weigh(batch) > 0
    return compute_token_losses(head, hidden, labels, is_counted, smoothing=smoothing)


def token_loss(losses: TokenLosses, batch: Batch) -> metrics.Sums:
    """Sums the loss, right predictions, and their number over the tokens that count.

    Args:
      losses: those of :func:`apply`.
      batch: ``counts`` ``(B, L)``, ``weights`` ``(B,)``.

    >>> batch = {"counts": jnp.array([[0, 1, 1]]), "weights": jnp.ones(1)}
    >>> losses = TokenLosses(jnp.array([[0.5, 2.0, 0.0]]), jnp.array([[True, False, False]]))
    >>> [float(x) for x in token_loss(losses, batch)]
    [2.5, 1.0, 2.0]
    """
    weights = _weigh(batch).astype(losses.loss.dtype)
    loss, correct = (jnp.sum(weights * x.astype(weights.dtype)) for x in losses)
    return metrics.Sums(loss, correct, jnp.sum(weights))


def _weigh(batch: Batch) -> jax.Array:
    """Returns ``(B, L)``, what the token after each place counts."""
    return _move_back(batch["counts"]) * jnp.asarray(batch["weights"])[:, None]


def _move_back(x: ArrayLike) -> jax.Array:
    """Moves ``(B, L)`` by one place, with 0 at the last: as wide as the states, and as even."""
    return jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1)))


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
      ValueError: a text is longer than the model has positions for, or than the buckets, or has a
        token that is no row of the model's embedding.
    """
    c, buckets = config.data, tuple(config.data.buckets)
    _check_positions(config, loaded)
    for texts in (training, evaluation):
        token_ids.check(texts.ids, checkpoints.find_table(loaded))
    initial = adapter_files.load_initial(config, loaded)
    notes = _notes(config, loaded, training, evaluation)
    task = Task(
        apply=functools.partial(apply, loaded.model, smoothing=config.label_smoothing),
        metrics=token_loss,
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
        load_original=originals.make_loader(config, loaded),
        score=Score("loss", higher_is_better=False),
    )
    return task, initial.config


def metadata(config: ConfigDict) -> dict[str, Any]:
    """Returns what is needed, besides the adapter, to use it."""
    model = config.model.to_dict()
    if "name" in model:  # a model that is made from nothing has none
        model["name"] = adapter_bases.make_absolute(model["name"])
    return {"task": TASK, "model": model, "seed": config.seed}


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
