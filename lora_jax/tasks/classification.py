"""Tasks of GLUE from a config: model, data and scores."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import tokenizers
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.data import batches, sources, tokenization
from lora_jax.data.batches import Batch
from lora_jax.data.examples import Examples, concatenate, subset, take
from lora_jax.models import checkpoints, registry
from lora_jax.models.families import CLASSIFIER, SEQ2SEQ_LM
from lora_jax.tasks import adapter_bases, adapter_files, text_to_text
from lora_jax.tasks.from_config import describe_attention, load_options
from lora_jax.tasks.glue import GlueTask, find
from lora_jax.tasks.glue_metrics import SCORES
from lora_jax.training import durations
from lora_jax.training.mesh import Devices
from lora_jax.training.metrics import Errors, Sums, cross_entropy, squared_error
from lora_jax.training.task import Score, Task

PyTree = Any


def apply(model: nn.Module, params: PyTree, batch: Batch, key: jax.Array | None) -> jax.Array:
    """Computes the logits of a batch; with a key, with the model's own dropout."""
    rngs = None if key is None else {"dropout": key}
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    arrays = {name: batch[name] for name in inputs if name in batch}
    return model.apply(params, **arrays, deterministic=key is None, rngs=rngs)


def has_token_types(loaded: checkpoints.Loaded) -> bool:
    """Returns whether the model takes, for each token, which sentence of a pair it is in."""
    return getattr(loaded.model.config, "type_vocab_size", 1) > 1


class Scorer(NamedTuple):
    """The functions by which a model classifies.

    Attributes:
      to_prompts: converts examples to what the model reads.
      apply: ``(params, batch, key or None) -> scores (batch, classes)``; their softmax is the
        classes' probabilities. For a regression, the predicted number ``(batch, 1)``.
      metrics: ``(scores, batch) -> sums``.
    """

    to_prompts: Callable[[Examples], Examples]
    apply: Callable[[PyTree, Batch, jax.Array | None], jax.Array]
    metrics: Callable[[jax.Array, Batch], NamedTuple]


def load_model(name: str | Path, **options: Any) -> checkpoints.Loaded:
    """Loads a model that classifies: by a classifier, or, like T5, by writing the class.

    Raises:
      FileNotFoundError, ValueError: as :func:`checkpoints.load`, which takes the options.
    """
    try:
        models = registry.find(checkpoints.resolve(name).config).models
    except ValueError:  # loading it explains better what is wrong
        models = {}
    is_text_to_text = CLASSIFIER not in models and SEQ2SEQ_LM in models
    head = SEQ2SEQ_LM if is_text_to_text else CLASSIFIER
    return checkpoints.load(name, head=head, **options)


def make_scorer(
    loaded: checkpoints.Loaded,
    labels: Sequence[str],
    tokenizer: tokenizers.Tokenizer,
    *,
    task: GlueTask,
) -> Scorer:
    """Makes the functions by which a model tells the labels of a task apart.

    Args:
      loaded: the model.
      labels: names of the classes.
      tokenizer: the model's tokenizer.
      task: task of GLUE.

    Raises:
      ValueError: the model can't do it: it writes, and the task is a regression, or two labels have
        the same tokens.
    """
    if loaded.head != SEQ2SEQ_LM:
        metrics = _regression_metrics if task.is_regression else _class_metrics
        return Scorer(lambda examples: examples, functools.partial(apply, loaded.model), metrics)
    if task.is_regression:
        raise ValueError(
            f"The task {task.name!r} is a regression, and {loaded.checkpoint.name} writes classes; "
            "choose a model with a classifier for it."
        )
    label_tokens = text_to_text.encode_labels(labels, tokenizer, loaded.model.config)
    return Scorer(
        functools.partial(text_to_text.to_prompts, task=task),
        functools.partial(text_to_text.apply, loaded.model, label_tokens),
        lambda x, batch: text_to_text.likelihood(x, batch["labels"], batch["weights"]),
    )


def make_task(config: ConfigDict, devices: Devices | None = None) -> tuple[Task, lora.LoRAConfig]:
    """Loads model, data and, if the config names one, the adapter to start from.

    Args:
      config: config of the run.
      devices: devices of the run; by default those that the config describes.

    Returns:
      The task, and the settings of the adapter.

    Raises:
      FileNotFoundError, ValueError: something is missing or damaged, or does not fit the rest.
    """
    c, glue = config.data, find(config.task)
    loaded = load_model(
        config.model.name,
        num_labels=config.model.num_labels,
        key=head_key(config.seed),
        **load_options(config, devices),
    )
    _check_positions(config, loaded)
    training, evaluations = load_examples(config, glue)
    evaluation = concatenate(evaluations)
    tokenizer = checkpoints.load_tokenizer(loaded.checkpoint)
    scorer = make_scorer(loaded, config.model.labels, tokenizer, task=glue)
    tokenize = functools.partial(
        tokenization.tokenize,
        tokenizer=tokenizer,
        max_length=c.max_length,
        types=has_token_types(loaded),
    )
    train_set, eval_set = (tokenize(scorer.to_prompts(x)) for x in (training, evaluation))
    buckets = tuple(c.buckets)
    initial = adapter_files.load_initial(config, loaded)
    notes = _notes(config, loaded, train_set, eval_set, glue)
    task = Task(
        apply=scorer.apply,
        metrics=scorer.metrics,
        train_batch=functools.partial(
            batches.train_batch,
            train_set,
            seed=c.seed,
            batch_size=config.batch_size,
            buckets=buckets,
            alike=c.alike,
        ),
        eval_batches=functools.partial(
            batches.eval_batches, eval_set, batch_size=config.eval_batch_size, buckets=buckets
        ),
        steps_per_epoch=batches.steps_per_epoch(len(training.labels), config.batch_size),
        base=loaded.params,
        base_id=loaded.base_id,
        metadata=metadata(config, glue),
        notes=adapter_files.add_notes(initial, (*notes, *training.notes, *evaluation.notes)),
        adapter=initial.adapter,
        fresh_head=initial.fresh_head,
        redraw_base=lambda seed: checkpoints.redraw(loaded, head_key(seed)),
        score=Score(glue.score),
        scores=_make_scores(glue, [part.labels for part in evaluations]),
    )
    return task, initial.config


def head_key(seed: int) -> jax.Array:
    """Returns the key of the leaves that the checkpoint lacks; a run's seed draws its head, too."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def _class_metrics(logits: jax.Array, batch: Batch) -> Sums:
    return cross_entropy(logits, batch["labels"], batch["weights"])


def _regression_metrics(logits: jax.Array, batch: Batch) -> Errors:
    return squared_error(logits[:, 0], batch["labels"], batch["weights"])


def _make_scores(
    task: GlueTask, labels: list[np.ndarray]
) -> Callable[[np.ndarray], dict[str, float]] | None:
    """Makes the function from the logits of all evaluation sets to the task's scores, if any."""
    if not task.scores and len(labels) == 1:
        return None

    def scores(logits: np.ndarray) -> dict[str, float]:
        predictions = logits[:, 0] if task.is_regression else logits.argmax(-1)
        values = {name: SCORES[name](predictions, np.concatenate(labels)) for name in task.scores}
        if len(labels) > 1:
            parts = np.split(predictions, np.cumsum([len(x) for x in labels])[:-1])
            for split, part, right in zip(task.validation, parts, labels, strict=True):
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


def load_examples(config: ConfigDict, task: GlueTask) -> tuple[Examples, list[Examples]]:
    """Loads the training examples, and those of each evaluation set.

    With ``data.holdout`` the evaluation examples come from the training split, after those to train
    on. So hyperparameters can be chosen without a look at the validation set.
    """
    c = config.data
    load = functools.partial(
        sources.load,
        c.source,
        data_dir=c.data_dir or None,
        num_labels=config.model.num_labels,
        layout=task.layout,
    )
    train_split = load("train")
    if not c.holdout:
        evaluations = [load(split) for split in task.validation]
        return subset(train_split, c.train_examples, c.seed), evaluations
    total = len(train_split.labels)
    count = c.train_examples or total - c.holdout
    if count < 1 or count + c.holdout > total:
        raise ValueError(
            f"data.train_examples {c.train_examples} and data.holdout {c.holdout} do not fit into "
            f"the {total} training examples of {c.source}."
        )
    both = subset(train_split, count + c.holdout, c.seed)
    return take(both, range(count)), [take(both, range(count, count + c.holdout))]


def metadata(config: ConfigDict, task: GlueTask) -> dict[str, Any]:
    """Returns what is needed, besides the adapter, to use it."""
    return {
        "task": "text-classification",
        "model": {
            **config.model.to_dict(),
            "name": adapter_bases.make_absolute(config.model.name),
            "labels": list(config.model.labels),
        },
        "max_length": config.data.max_length,
        "buckets": list(config.data.buckets),
        "seed": config.seed,
        "glue": task.name,
        "pairs": task.has_pairs,
    }


def _notes(
    config: ConfigDict,
    loaded: checkpoints.Loaded,
    train_set: tokenization.Tokenized,
    eval_set: tokenization.Tokenized,
    task: GlueTask,
) -> tuple[str, ...]:
    """Returns the report at the start: the origin of model and data, and what is compiled."""
    fresh = f"; fresh: {', '.join(loaded.fresh)}" if loaded.fresh else ""
    n_train, n_eval = (len(x.offsets) - 1 for x in (train_set, eval_set))
    kind = "sentence pairs" if task.has_pairs else "sentences"
    per_epoch = batches.steps_per_epoch(n_train, config.batch_size)
    steps = durations.make_plan(config, per_epoch).total
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
    return (
        f"model: {loaded.checkpoint.name} from {loaded.checkpoint.origin}{fresh}",
        f"data: {config.data.source}, {n_train} training and {n_eval} evaluation {kind}",
        f"batches: {shapes}; the step is compiled {len(lengths)} times",
        describe_attention(config, loaded.model, config.data.buckets[-1]),
        f"device: {jax.device_count()} x {device.device_kind} ({device.platform})",
    )
