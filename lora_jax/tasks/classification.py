"""Tasks of GLUE: model, data and scores, from a config."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.data import batches, sources, tokenization
from lora_jax.data.examples import Examples, concatenate, subset, take
from lora_jax.models import checkpoints, registry
from lora_jax.models.families import CLASSIFIER, SEQ2SEQ_LM
from lora_jax.tasks import adapter_files, text_to_text
from lora_jax.tasks.from_config import load_options, lora_config
from lora_jax.tasks.glue import GlueTask, find
from lora_jax.tasks.glue_metrics import SCORES
from lora_jax.training import durations
from lora_jax.training.metrics import Errors, Sums, cross_entropy, squared_error
from lora_jax.training.task import Score, Task


def apply(model: Any, params: Any, batch: dict, key: jax.Array | None) -> jax.Array:
    """Logits of a batch; with a key, the model's own dropout is on."""
    rngs = None if key is None else {"dropout": key}
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    given = {name: batch[name] for name in inputs if name in batch}
    return model.apply(params, **given, deterministic=key is None, rngs=rngs)


def has_types(loaded: checkpoints.Loaded) -> bool:
    """Whether the model is told which sentence of a pair each token is of."""
    return getattr(loaded.model.config, "type_vocab_size", 1) > 1


class Scoring(NamedTuple):
    """How a model classifies.

    Attributes:
      prompts: what it reads for the examples.
      apply: ``(params, batch, key or None) -> scores (batch, classes)``; their softmax is the
        classes' probabilities. Of a regression, the number ``(batch, 1)``.
      metrics: ``(scores, batch) -> sums``.
    """

    prompts: Callable[[Examples], Examples]
    apply: Callable
    metrics: Callable


def load_model(name: str | Path, **options: Any) -> checkpoints.Loaded:
    """Loads a model that classifies: with a classifier, or, as T5, by writing the class.

    Raises:
      FileNotFoundError, ValueError: as :func:`checkpoints.load`, which takes the options.
    """
    try:
        models = registry.find(checkpoints.resolve(name).config).models
    except ValueError:  # which loading explains better
        models = {}
    text = CLASSIFIER not in models and SEQ2SEQ_LM in models
    return checkpoints.load(name, head=SEQ2SEQ_LM if text else CLASSIFIER, **options)


def scoring(
    loaded: checkpoints.Loaded,
    labels: Sequence[str],
    tokenizer: tokenizers.Tokenizer,
    *,
    task: str,
) -> Scoring:
    """How a model, whose tokeniser this is, tells the labels of a task of GLUE apart.

    Raises:
      ValueError: it can't: a regression by writing, or labels that have the same tokens.
    """
    glue = find(task)
    if loaded.head != SEQ2SEQ_LM:
        measure = _regression if glue.regression else _classes
        return Scoring(lambda examples: examples, functools.partial(apply, loaded.model), measure)
    if glue.regression:
        raise ValueError(
            f"The task {task!r} is a regression, and {loaded.checkpoint.name} writes classes; "
            "choose a model with a classifier for it."
        )
    words = text_to_text.words(labels, tokenizer, loaded.model.config)
    return Scoring(
        functools.partial(text_to_text.prompts, task=task),
        functools.partial(text_to_text.apply, loaded.model, words),
        lambda x, batch: text_to_text.likelihood(x, batch["labels"], batch["weights"]),
    )


def make_task(config: ConfigDict) -> tuple[Task, lora.LoRAConfig]:
    """Loads model and data, and an adapter to go on from, whose settings then hold."""
    c, glue = config.data, find(config.task)
    loaded = load_model(
        config.model.name,
        num_labels=config.model.num_labels,
        key=head_key(config.seed),
        **load_options(config),
    )
    _check_positions(config, loaded)
    training, evaluations = load_examples(config)
    evaluation = concatenate(evaluations)
    tokenizer = checkpoints.load_tokenizer(loaded.checkpoint)
    ways = scoring(loaded, config.model.labels, tokenizer, task=config.task)
    tokenize = functools.partial(
        tokenization.tokenize, tokenizer=tokenizer, max_length=c.max_length, types=has_types(loaded)
    )
    train_set, eval_set = (tokenize(ways.prompts(x)) for x in (training, evaluation))
    buckets = tuple(c.buckets)
    start, lora_settings, note = None, lora_config(config), ""
    if config.adapter:
        start, theirs, note = adapter_files.start(config.adapter, loaded)
        lora_settings = dataclasses.replace(theirs, dropout=config.lora.dropout)
    task = Task(
        apply=ways.apply,
        metrics=ways.metrics,
        train_batch=lambda step, **rows: batches.train_batch(
            train_set,
            step,
            **rows,
            seed=c.seed,
            batch_size=config.batch_size,
            buckets=buckets,
            alike=c.alike,
        ),
        eval_batches=lambda **rows: batches.eval_batches(
            eval_set, batch_size=config.eval_batch_size, buckets=buckets, **rows
        ),
        steps_per_epoch=batches.steps_per_epoch(len(training.labels), config.batch_size),
        base=loaded.params,
        base_id=loaded.base_id,
        metadata=metadata(config),
        notes=(
            *_notes(config, loaded, train_set, len(evaluation.labels)),
            *training.notes,
            *evaluation.notes,
            *([note] if note else []),
        ),
        adapter=start,
        base_of=lambda seed: checkpoints.redraw(loaded, head_key(seed)),
        score=Score(glue.score),
        scores=_scores(glue, [part.labels for part in evaluations]),
    )
    return task, lora_settings


def head_key(seed: int) -> jax.Array:
    """The key of what the checkpoint lacks: a run's seed draws its head, too."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def _classes(logits: jax.Array, batch: dict) -> Sums:
    return cross_entropy(logits, batch["labels"], batch["weights"])


def _regression(logits: jax.Array, batch: dict) -> Errors:
    return squared_error(logits[:, 0], batch["labels"], batch["weights"])


def _scores(glue: GlueTask, labels: list[np.ndarray]) -> Callable | None:
    """The task's scores from the logits of its evaluation sets, one after the other."""
    if not glue.scores and len(labels) == 1:
        return None

    def scores(logits: np.ndarray) -> dict[str, float]:
        found = logits[:, 0] if glue.regression else logits.argmax(-1)
        values = {name: SCORES[name](found, np.concatenate(labels)) for name in glue.scores}
        if len(labels) > 1:
            parts = np.split(found, np.cumsum([len(x) for x in labels])[:-1])
            for split, part, right in zip(glue.validation, parts, labels, strict=True):
                values[f"accuracy_{split.partition('_')[2]}"] = float(np.mean(part == right))
        return values

    return scores


def _check_positions(config: ConfigDict, loaded: checkpoints.Loaded) -> None:
    positions = loaded.model.config.positions
    if positions is not None and config.data.buckets[-1] > positions:
        raise ValueError(
            f"data.buckets {tuple(config.data.buckets)} go beyond the {positions} positions that "
            f"{loaded.checkpoint.name} has; lower them, and data.max_length."
        )


def load_examples(config: ConfigDict) -> tuple[Examples, list[Examples]]:
    """Training examples, and those of each evaluation set.

    With ``data.holdout`` the evaluation examples come from the training split, after those that are
    trained on: for choosing hyperparameters without a look at the validation set.
    """
    c, glue = config.data, find(config.task)
    load = functools.partial(
        sources.load,
        c.source,
        data_dir=c.data_dir or None,
        num_labels=config.model.num_labels,
        layout=glue.layout,
    )
    everything = load("train")
    if not c.holdout:
        evaluations = [load(split) for split in glue.validation]
        return subset(everything, c.train_examples, c.seed), evaluations
    total = len(everything.labels)
    count = c.train_examples or total - c.holdout
    if count < 1 or count + c.holdout > total:
        raise ValueError(
            f"data.train_examples {c.train_examples} and data.holdout {c.holdout} do not fit into "
            f"the {total} training examples of {c.source}."
        )
    both = subset(everything, count + c.holdout, c.seed)
    return take(both, range(count)), [take(both, range(count, count + c.holdout))]


def metadata(config: ConfigDict) -> dict[str, Any]:
    """What using the adapter takes, besides the adapter."""
    return {
        "task": "text-classification",
        "model": config.model.to_dict() | {"labels": list(config.model.labels)},
        "max_length": config.data.max_length,
        "buckets": list(config.data.buckets),
        "seed": config.seed,
        "glue": config.task,
        "pairs": find(config.task).pairs,
    }


def _notes(
    config: ConfigDict, loaded: checkpoints.Loaded, train_set: tokenization.Tokenized, n_eval: int
) -> tuple[str, ...]:
    """The report at the start: where everything comes from, and what will be compiled."""
    fresh = f"; fresh: {', '.join(loaded.fresh)}" if loaded.fresh else ""
    n_train = len(train_set.offsets) - 1
    kind = "sentence pairs" if find(config.task).pairs else "sentences"
    per_epoch = batches.steps_per_epoch(n_train, config.batch_size)
    steps = durations.plan(config, per_epoch).total
    lengths = batches.count_bucket_lengths(
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
        f"data: {config.data.source}, {n_train} training and {n_eval} evaluation {kind}",
        f"batches: {shapes}; the step is compiled {len(lengths)} times",
        f"device: {jax.device_count()} x {device.device_kind} ({device.platform})",
    )
