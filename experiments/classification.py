"""The text-classification task: model, data and metrics, from a config."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tokenizers
from ml_collections import ConfigDict

import lora_jax as lora
from experiments import adapters, data, metrics, optimisers, text_to_text, train
from lora_jax.models import checkpoints, registry
from lora_jax.models.families import CLASSIFIER, SEQ2SEQ_LM

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def lora_config(config: ConfigDict) -> lora.LoRAConfig:
    """The library's config from the ``lora`` part of an experiment's."""
    return lora.LoRAConfig.from_dict(config.lora.to_dict())


def settings(config: lora.LoRAConfig) -> ConfigDict:
    """The inverse of :func:`lora_config`: for the run's directory, what holds in the run."""
    fields = {n: x for n, x in config.to_dict().items() if n != "origin"}
    return ConfigDict({n: tuple(x) if isinstance(x, list) else x for n, x in fields.items()})


def dtype(name: str) -> Any:
    """The dtype called ``name``."""
    if name not in DTYPES:
        raise ValueError(f"model.dtype must be one of {sorted(DTYPES)}, got {name!r}.")
    return DTYPES[name]


def apply(model: Any, params: Any, batch: dict, key: jax.Array | None) -> jax.Array:
    """Logits of a batch; with a key, the model's own dropout is on."""
    rngs = None if key is None else {"dropout": key}
    return model.apply(
        params, batch["input_ids"], batch["attention_mask"], deterministic=key is None, rngs=rngs
    )


class Scoring(NamedTuple):
    """How a model classifies.

    Attributes:
      prompts: what it reads for the sentences.
      apply: ``(params, batch, key or None) -> scores (batch, classes)``; their softmax is the
        classes' probabilities.
      metrics: ``(scores, batch) -> sums``.
    """

    prompts: Callable[[data.Examples], data.Examples]
    apply: Callable
    metrics: Callable


def load_model(name: str | Path, **options: Any) -> checkpoints.Loaded:
    """Loads a model that classifies: with a classifier, or, as T5, by writing the class.

    Raises:
      FileNotFoundError, ValueError: as :func:`checkpoints.load`, which takes the options.
    """
    models = registry.find(checkpoints.resolve(name).config).models
    text = CLASSIFIER not in models and SEQ2SEQ_LM in models
    return checkpoints.load(name, head=SEQ2SEQ_LM if text else CLASSIFIER, **options)


def scoring(
    loaded: checkpoints.Loaded, labels: Sequence[str], tokenizer: tokenizers.Tokenizer
) -> Scoring:
    """How the model, whose tokeniser this is, tells the labels apart."""
    if loaded.head == SEQ2SEQ_LM:
        words = text_to_text.words(labels, tokenizer, loaded.model.config)
        score = functools.partial(text_to_text.apply, loaded.model, words)
        prompts, measure = text_to_text.prompts, text_to_text.likelihood
    else:
        score = functools.partial(apply, loaded.model)
        prompts, measure = lambda examples: examples, metrics.cross_entropy
    return Scoring(prompts, score, lambda x, b: measure(x, b["labels"], b["weights"]))


def make_task(config: ConfigDict) -> tuple[train.Task, lora.LoRAConfig]:
    """Loads model and data, and an adapter to go on from, whose settings then hold."""
    c = config.data
    loaded = load_model(
        config.model.name,
        num_labels=config.model.num_labels,
        key=_head_key(config.seed),
        dtype=dtype(config.model.dtype),
    )
    _check_positions(config, loaded)
    training, evaluation = load_examples(config)
    tokenizer = checkpoints.load_tokenizer(loaded.checkpoint)
    ways = scoring(loaded, config.model.labels, tokenizer)
    train_set, eval_set = (
        data.tokenize(ways.prompts(examples), tokenizer, max_length=c.max_length)
        for examples in (training, evaluation)
    )
    buckets = tuple(c.buckets)
    start, lora_settings = None, lora_config(config)
    if config.adapter:
        start, theirs = adapters.load(config.adapter, loaded)
        lora_settings = dataclasses.replace(theirs, dropout=config.lora.dropout)
    task = train.Task(
        apply=ways.apply,
        metrics=ways.metrics,
        train_batch=lambda step: data.train_batch(
            train_set,
            step,
            seed=c.seed,
            batch_size=config.batch_size,
            buckets=buckets,
            alike=c.alike,
        ),
        eval_batches=lambda: data.eval_batches(
            eval_set, batch_size=config.eval_batch_size, buckets=buckets
        ),
        steps_per_epoch=data.steps_per_epoch(len(training.labels), config.batch_size),
        base=loaded.params,
        base_id=loaded.base_id,
        metadata=metadata(config),
        notes=_notes(config, loaded, train_set, len(evaluation.labels)),
        adapter=start,
        base_of=lambda seed: checkpoints.redraw(loaded, _head_key(seed)),
    )
    return task, lora_settings


def _head_key(seed: int) -> jax.Array:
    """The key of what the checkpoint lacks: a run's seed draws its head, too."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def longest(loaded: checkpoints.Loaded) -> int | None:
    """The most tokens that the model has positions for; None where they are relative."""
    return getattr(loaded.model.config, "max_position_embeddings", None)


def _check_positions(config: ConfigDict, loaded: checkpoints.Loaded) -> None:
    positions = longest(loaded)
    if positions is not None and config.data.buckets[-1] > positions:
        raise ValueError(
            f"data.buckets {tuple(config.data.buckets)} go beyond the {positions} positions that "
            f"{loaded.checkpoint.name} has; lower them, and data.max_length."
        )


def load_examples(config: ConfigDict) -> tuple[data.Examples, data.Examples]:
    """Training and evaluation examples.

    With ``data.holdout`` the evaluation examples come from the training split, after those that are
    trained on: for choosing hyperparameters without a look at the validation set.
    """
    c = config.data
    load = functools.partial(
        data.load, c.source, data_dir=c.data_dir or None, num_labels=config.model.num_labels
    )
    everything = load("train")
    if not c.holdout:
        return data.subset(everything, c.train_examples, c.seed), load("validation")
    total = len(everything.labels)
    count = c.train_examples or total - c.holdout
    if count < 1 or count + c.holdout > total:
        raise ValueError(
            f"data.train_examples {c.train_examples} and data.holdout {c.holdout} do not fit into "
            f"the {total} training examples of {c.source}."
        )
    both = data.subset(everything, count + c.holdout, c.seed)
    part = lambda s: data.Examples(both.sentences[s], both.labels[s])
    return part(slice(0, count)), part(slice(count, None))


def metadata(config: ConfigDict) -> dict[str, Any]:
    """What using the adapter takes, besides the adapter."""
    return {
        "task": "text-classification",
        "model": config.model.to_dict() | {"labels": list(config.model.labels)},
        "max_length": config.data.max_length,
        "buckets": list(config.data.buckets),
        "seed": config.seed,
    }


def _notes(
    config: ConfigDict, loaded: checkpoints.Loaded, train_set: data.Tokenized, n_eval: int
) -> tuple[str, ...]:
    """The report at the start: where everything comes from, and what will be compiled."""
    fresh = f"; fresh: {', '.join(loaded.fresh)}" if loaded.fresh else ""
    n_train = len(train_set.offsets) - 1
    steps = config.epochs * data.steps_per_epoch(n_train, config.batch_size)
    lengths = data.bucket_lengths_used(
        train_set,
        steps,
        seed=config.data.seed,
        batch_size=config.batch_size,
        buckets=tuple(config.data.buckets),
        alike=config.data.alike,
    )
    shapes = ", ".join(f"{count} of {length} tokens" for length, count in lengths.items())
    device = jax.devices()[0]
    start = (f"going on from: {config.adapter}, with its settings",) if config.adapter else ()
    return (
        *start,
        f"model: {loaded.checkpoint.name} from {loaded.checkpoint.origin}{fresh}",
        f"data: {config.data.source}, {n_train} training and {n_eval} evaluation sentences",
        f"batches: {shapes}; the step is compiled {len(lengths)} times",
        f"device: {jax.device_count()} x {device.device_kind} ({device.platform})",
    )


def check(config: ConfigDict) -> None:
    """Finds mistakes in a config before anything is loaded or written.

    Raises:
      ValueError: the first that it finds.
    """
    lora_config(config)
    dtype(config.model.dtype)
    optimisers.check(config.optimizer)
    least = {
        "batch_size": 1,
        "eval_batch_size": 1,
        "epochs": 1,
        "log_every": 1,
        "checkpoint_every": 0,
    }
    least |= {"data.train_examples": 0, "data.holdout": 0, "data.max_length": 1, "data.seed": 0}
    least |= {"data.alike": 0}
    values = config.to_dict() | {f"data.{name}": value for name, value in config.data.items()}
    for field, low in least.items():
        if values[field] < low:
            raise ValueError(f"{field} must be at least {low}, got {values[field]}.")
    _check_buckets(config)
    labels = tuple(config.model.labels)
    if len(labels) != config.model.num_labels or len(set(labels)) < max(len(labels), 2):
        raise ValueError(
            f"model.labels names {len(labels)} classes {labels}, and model.num_labels is "
            f"{config.model.num_labels}: there must be one name, each another, for each of at "
            "least two classes."
        )


def _check_buckets(config: ConfigDict) -> None:
    buckets = tuple(config.data.buckets)
    if not buckets or any(low >= high for low, high in zip((0, *buckets), buckets, strict=False)):
        raise ValueError(f"data.buckets must be positive lengths that ascend, got {buckets}.")
    if buckets[-1] < config.data.max_length:
        raise ValueError(
            f"data.buckets {buckets} end below data.max_length {config.data.max_length}: lower the "
            "one, or add the other to the buckets."
        )
