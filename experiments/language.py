"""Language modelling: texts as batches, the loss of the tokens that count, and a task of them.

A text is a row of tokens, of which some count: those of a reply, say, and not those of the question
before it.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import lora_jax as lora
from experiments import adapters, classification, data, metrics, tasks
from lora_jax import peft, serialize
from lora_jax.models import checkpoints
from lora_jax.models.families import CAUSAL_LM

Batch = dict[str, np.ndarray]


class Texts(NamedTuple):
    """Tokens of ``n`` texts, ragged: text ``i`` is ``ids[offsets[i]:offsets[i + 1]]``.

    Attributes:
      ids: ``(total,)`` int32.
      offsets: ``(n + 1,)`` int64.
      counts: ``(total,)`` int32, 1 for each token that is to be learned, from those before it.
      pad_id: what fills a batch to its length; the attention mask hides it.
    """

    ids: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray
    pad_id: int = 0


def texts(rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_id: int = 0) -> Texts:
    """Texts from pairs of tokens: those that are given, then those that are to be learned.

    Raises:
      ValueError: a text has nothing to learn, or nothing to learn it from.

    >>> made = texts([([7, 8], [9]), ([5], [6, 6])])
    >>> made.ids.tolist(), made.counts.tolist()
    ([7, 8, 9, 5, 6, 6], [0, 0, 1, 0, 1, 1])
    """
    for k, (given, learned) in enumerate(rows):
        if not len(given) or not len(learned):
            raise ValueError(
                f"text {k} has {len(given)} tokens that are given and {len(learned)} to learn; "
                "both must be there"
            )
    whole = [np.array([*given, *learned], np.int32) for given, learned in rows]
    counts = [np.repeat([0, 1], [len(given), len(learned)]) for given, learned in rows]
    join = lambda parts: np.concatenate([np.zeros(0, np.int32), *parts], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, whole)], dtype=np.int64)
    return Texts(join(whole), offsets, join(counts), pad_id)


def train_batch(texts: Texts, step: int, **options: Any) -> Batch:
    """The training batch of ``step``, a pure function; options as :func:`data.train_batch`.

    Returns:
      ``input_ids``, ``attention_mask``, ``counts``, each ``(B, L)`` int32, and ``weights`` ``(B,)``
      float32, 1 for a text and 0 for a row that fills the batch.
    """
    return _batch(data.train_batch(_tokenized(texts), step, **options))


def eval_batches(texts: Texts, **options: Any) -> Iterator[Batch]:
    """All texts once; as :func:`data.eval_batches`, the batches as those of :func:`train_batch`."""
    return map(_batch, data.eval_batches(_tokenized(texts), **options))


def _tokenized(texts: Texts) -> data.Tokenized:
    # There, what is said of each token is which sentence of a pair it is of; here, if it counts.
    unused = np.zeros(len(texts.offsets) - 1, np.int32)
    return data.Tokenized(texts.ids, texts.offsets, unused, texts.pad_id, types=texts.counts)


def _batch(batch: Batch) -> Batch:
    names = {"token_type_ids": "counts"}
    return {names.get(name, name): x for name, x in batch.items() if name != "labels"}


def token_loss(logits: jax.Array, batch: Batch, *, smoothing: float = 0.0) -> metrics.Sums:
    """Sums over the tokens that count: of the loss, of right guesses, and of the tokens.

    A token is guessed by the logits one place before it. With smoothing ``ε`` its target is the
    token by ``1 - ε`` and every token alike by ``ε`` (Szegedy et al. 2016, section 7).

    Args:
      logits: ``(B, L, vocab)``.
      batch: ``input_ids`` and ``counts`` ``(B, L)``, ``weights`` ``(B,)``.
      smoothing: ``ε``.

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


def apply(model: Any, params: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
    """Logits of a batch; with a key, the model's own dropout is on."""
    rngs = None if key is None else {"dropout": key}
    given = {name: batch[name] for name in _INPUTS if name in batch}
    return model.apply(params, **given, deterministic=key is None, rngs=rngs)


def make_task(
    config: ConfigDict, loaded: checkpoints.Loaded, training: Texts, evaluation: Texts
) -> tuple[tasks.Task, lora.LoRAConfig]:
    """A task of learning texts, and the settings of the adapter, of one to go on from if any.

    The best adapter is the one with the lowest loss. The accuracy is that of the guessed tokens.

    Raises:
      ValueError: a text is longer than the model has positions for, or than the buckets.
    """
    c, buckets = config.data, tuple(config.data.buckets)
    _check_positions(config, loaded)
    start, settings, note = None, classification.lora_config(config), ""
    if config.adapter:
        start, theirs, note = adapters.start(config.adapter, loaded)
        settings = dataclasses.replace(theirs, dropout=config.lora.dropout)
    batches = {"seed": c.seed, "batch_size": config.batch_size, "buckets": buckets}
    task = tasks.Task(
        apply=functools.partial(apply, loaded.model),
        metrics=functools.partial(token_loss, smoothing=config.label_smoothing),
        train_batch=lambda step, **rows: train_batch(
            training, step, alike=c.alike, **batches, **rows
        ),
        eval_batches=lambda **rows: eval_batches(
            evaluation, batch_size=config.eval_batch_size, buckets=buckets, **rows
        ),
        steps_per_epoch=data.steps_per_epoch(len(training.offsets) - 1, config.batch_size),
        base=loaded.params,
        base_id=loaded.base_id,
        metadata=metadata(config),
        notes=(*_notes(config, loaded, training, evaluation), *([note] if note else [])),
        adapter=start,
        score=tasks.Score("loss", higher_is_better=False),
    )
    return task, settings


TASK = "language-modelling"


class LanguageModel(NamedTuple):
    """A base model with an adapter; ``notes`` say what was assumed where a file is silent."""

    loaded: checkpoints.Loaded
    adapter: Any
    config: lora.LoRAConfig
    notes: tuple[str, ...] = ()


def is_language(directory: str | Path, *, model: str | None = None) -> bool:
    """Whether an adapter, of either format, is for a causal language model.

    Raises:
      FileNotFoundError, ValueError: the adapter is missing or damaged.
    """
    if not peft.is_peft(directory):
        return serialize.read_metadata(directory).get("task") == TASK
    words = peft.read_words(directory)
    if words["task_type"]:
        return words["task_type"] == "CAUSAL_LM"
    name = model or words["base_model_name_or_path"]
    heads = checkpoints.resolve(name).config.get("architectures") if name else None
    return any(str(head).endswith(("LMHeadModel", "ForCausalLM")) for head in heads or [])


def load(directory: str | Path, *, model: str | None = None) -> LanguageModel:
    """Loads an adapter and the base that it was made for.

    Args:
      directory: of the adapter, as training leaves it or in PEFT's format.
      model: name or directory of the base, where it is no longer found under its old name.

    Raises:
      FileNotFoundError, ValueError: adapter or base is missing, damaged, or they do not belong
        together.
    """
    options: dict[str, Any] = {}
    if peft.is_peft(directory):
        name = model or peft.read_words(directory)["base_model_name_or_path"]
    else:
        about = serialize.read_metadata(directory).get("model", {})
        name = model or about.get("name")
        options |= classification.dtypes(about)
        options["scan_layers"] = about.get("scan_layers", False)
    if not name:
        raise ValueError(
            f"The adapter in {directory} does not name its base; give it with --model."
        )
    loaded = adapters.widened(checkpoints.load(name, head=CAUSAL_LM, **options))
    notes = (f"base {name}, from {loaded.checkpoint.origin}",) if peft.is_peft(directory) else ()
    return LanguageModel(loaded, *adapters.load(directory, loaded), notes)


def metadata(config: ConfigDict) -> dict[str, Any]:
    """What using the adapter takes, besides the adapter."""
    return {"task": TASK, "model": config.model.to_dict(), "seed": config.seed}


def check_sizes(config: ConfigDict, least: Mapping[str, int]) -> None:
    """Raises ValueError if a field ("data.seed") is below the least value that it may have."""
    for field, low in least.items():
        part, _, name = field.rpartition(".")
        value = (config[part] if part else config)[name]
        if value < low:
            raise ValueError(f"{field} must be at least {low}, got {value}.")
    buckets = tuple(config.data.buckets)
    if not buckets or any(low >= high for low, high in zip((0, *buckets), buckets, strict=False)):
        raise ValueError(f"data.buckets must be positive lengths that ascend, got {buckets}.")


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
    """The report at the start."""
    start = (f"going on from: {config.adapter}, with its settings",) if config.adapter else ()
    size = lambda t: f"{len(t.offsets) - 1} ({int(t.counts.sum()):,} tokens to learn)"
    device = jax.devices()[0]
    return (
        *start,
        f"model: {loaded.checkpoint.name} from {loaded.checkpoint.origin}",
        f"data: {config.data.source}, texts for training {size(training)}, for evaluation "
        f"{size(evaluation)}",
        f"device: {jax.device_count()} x {device.device_kind} ({device.platform})",
    )
