"""Classification of texts from a config: model, data and scores.

Where the examples come from is another function for each program; all else is here.
"""

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
from lora_jax.data.examples import Examples, concatenate, require_labels, subset, take
from lora_jax.models import checkpoints, registry, token_ids
from lora_jax.models.families import CLASSIFIER, SEQ2SEQ_LM
from lora_jax.tasks import adapter_bases, adapter_files, originals, text_to_text
from lora_jax.tasks.class_report import macro_f1
from lora_jax.tasks.from_config import describe_attention, load_options
from lora_jax.tasks.glue import GlueTask, find
from lora_jax.tasks.glue_metrics import SCORES
from lora_jax.tasks.text_task import LabelledTexts, TextTask
from lora_jax.training import durations
from lora_jax.training.mesh import Devices
from lora_jax.training.metrics import Errors, Sums, cross_entropy, squared_error
from lora_jax.training.task import Score, Task

PyTree = Any
_SCORES = SCORES | {"macro_f1": macro_f1}


def apply(model: nn.Module, params: PyTree, batch: Batch, key: jax.Array | None) -> jax.Array:
    """Computes the logits of a batch; with a key, with the model's own dropout."""
    rngs = None if key is None else {"dropout": key}
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    arrays: dict[str, Any] = {name: batch[name] for name in inputs if name in batch}
    run: Callable[..., Any] = model.apply
    return run(params, **arrays, deterministic=key is None, rngs=rngs)


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
    task: TextTask,
) -> Scorer:
    """Makes the functions by which a model tells the labels of a task apart.

    Args:
      loaded: the model.
      labels: names of the classes.
      tokenizer: the model's tokenizer.
      task: what is asked of the texts.

    Raises:
      ValueError: the model can't do it: it writes, and the task is a regression, or two labels have
        the same tokens, or such as it does not have.
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
    token_ids.check(label_tokens.tokens, checkpoints.find_table(loaded), tokenizer)
    return Scorer(
        functools.partial(text_to_text.to_prompts, task=task),
        functools.partial(text_to_text.apply, loaded.model, label_tokens),
        lambda x, batch: text_to_text.likelihood(x, batch["labels"], batch["weights"]),
    )


def load_glue(config: ConfigDict) -> LabelledTexts:
    """Loads the examples of a config's task of GLUE.

    Raises:
      FileNotFoundError, ValueError: as :func:`sources.load` and :func:`load_examples`.
    """
    task = find(config.task)
    training, evaluations = load_examples(config, task)
    about = {"glue": task.name, "pairs": task.has_pairs}
    return LabelledTexts(task=task, training=training, evaluations=evaluations, metadata=about)


def make_task(
    config: ConfigDict,
    devices: Devices | None = None,
    *,
    load_texts: Callable[[ConfigDict], LabelledTexts] = load_glue,
) -> tuple[Task, lora.LoRAConfig]:
    """Loads model, data and, if the config names one, the adapter to start from.

    Args:
      config: config of the run.
      devices: devices of the run; by default those that the config describes.
      load_texts: loads the examples of a config.

    Returns:
      The task, and the settings of the adapter.

    Raises:
      FileNotFoundError, ValueError: something is missing or damaged, or does not fit the rest.
    """
    c = config.data
    loaded = load_model(
        config.model.name,
        num_labels=config.model.num_labels,
        key=head_key(config.seed),
        **load_options(config, devices),
    )
    _check_positions(config, loaded)
    texts = load_texts(config)
    training, evaluation = texts.training, concatenate(texts.evaluations)
    tokenizer = checkpoints.load_tokenizer(loaded.checkpoint)
    scorer = make_scorer(loaded, config.model.labels, tokenizer, task=texts.task)
    tokenize = functools.partial(
        tokenization.tokenize,
        tokenizer=tokenizer,
        max_length=c.max_length,
        types=has_token_types(loaded),
        table=checkpoints.find_table(loaded),
    )
    train_set, eval_set = (tokenize(scorer.to_prompts(x)) for x in (training, evaluation))
    buckets = tuple(c.buckets)
    initial = adapter_files.load_initial(config, loaded)
    notes = _notes(config, loaded, train_set, eval_set, texts.task)
    notes += token_ids.describe(tokenizer, checkpoints.find_table(loaded))
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
        steps_per_epoch=batches.steps_per_epoch(len(training.sentences), config.batch_size),
        base=loaded.params,
        base_id=loaded.base_id,
        metadata=metadata(config, texts),
        notes=adapter_files.add_notes(
            initial, (*notes, *texts.notes, *training.notes, *evaluation.notes)
        ),
        adapter=initial.adapter,
        fresh_head=initial.fresh_head,
        load_original=originals.make_loader(config, loaded),
        redraw_base=lambda seed: checkpoints.redraw(loaded, head_key(seed)),
        score=Score(texts.task.score),
        scores=_make_scores(texts.task, [require_labels(part) for part in texts.evaluations]),
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
    task: TextTask, labels: list[np.ndarray]
) -> Callable[[np.ndarray], dict[str, float]] | None:
    """Makes the function from the logits of all evaluation sets to the task's scores, if any."""
    if not task.scores and len(labels) == 1:
        return None

    def scores(logits: np.ndarray) -> dict[str, float]:
        predictions = logits[:, 0] if task.is_regression else logits.argmax(-1)
        values = {name: _SCORES[name](predictions, np.concatenate(labels)) for name in task.scores}
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
    total = len(train_split.sentences)
    if not c.holdout:
        evaluations = [load(split) for split in task.validation]
        training = subset(train_split, c.train_examples, c.seed)
        return _note_selection(training, total, task), evaluations
    count = c.train_examples or total - c.holdout
    if count < 1 or count + c.holdout > total:
        raise ValueError(
            f"data.train_examples {c.train_examples} and data.holdout {c.holdout} do not fit into "
            f"the {total} training examples of {c.source}."
        )
    both = subset(train_split, count + c.holdout, c.seed)
    training, held_out = (
        take(both, rows) for rows in (range(count), range(count, count + c.holdout))
    )
    # What was left out of the whole file is said once.
    return _note_selection(training, total - c.holdout, task), [held_out._replace(notes=())]


def _note_selection(training: Examples, total: int, task: GlueTask) -> Examples:
    """Adds a note if only some of the training examples are taken."""
    count = len(training.sentences)
    if count == total:
        return training
    note = f"training on {count:,} of {total:,} {_kind(task)} (data.train_examples)"
    return training._replace(notes=(*training.notes, note))


def _kind(task: TextTask) -> str:
    return "sentence pairs" if task.has_pairs else "sentences"


def _describe_cuts(
    train_set: tokenization.Tokenized,
    eval_set: tokenization.Tokenized,
    config: ConfigDict,
    kind: str,
) -> tuple[str, ...]:
    """Says how many examples were longer than the config allows, if any were."""
    cut = train_set.cut + eval_set.cut
    parts = f"{train_set.cut:,} of training, {eval_set.cut:,} of evaluation"
    limit = f"{config.data.max_length} tokens (data.max_length)"
    return (f"{cut:,} {kind} cut to {limit}: {parts}",) if cut else ()


def metadata(config: ConfigDict, texts: LabelledTexts) -> dict[str, Any]:
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
        **texts.metadata,
    }


def _notes(
    config: ConfigDict,
    loaded: checkpoints.Loaded,
    train_set: tokenization.Tokenized,
    eval_set: tokenization.Tokenized,
    task: TextTask,
) -> tuple[str, ...]:
    """Returns the report at the start: the origin of model and data, and what is compiled."""
    fresh = f"; fresh: {', '.join(loaded.fresh)}" if loaded.fresh else ""
    n_train, n_eval = (len(x.offsets) - 1 for x in (train_set, eval_set))
    kind = _kind(task)
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
        *_describe_cuts(train_set, eval_set, config, kind),
        f"batches: {shapes}; the step is compiled {len(lengths)} times",
        describe_attention(config, loaded.model, config.data.buckets[-1]),
        f"device: {jax.device_count()} x {device.device_kind} ({device.platform})",
    )
