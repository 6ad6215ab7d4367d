"""Instruction tuning from a config: the task of learning the assistant's messages."""

import datetime
import functools
import inspect
import re
from typing import Any

import jax
import tokenizers
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.data import batches, conversation_formats, conversations, holdout, packing
from lora_jax.data.chat_template import ChatTemplate
from lora_jax.data.conversations import Conversation
from lora_jax.data.packing import Packed
from lora_jax.models import checkpoints, token_ids
from lora_jax.models.families import CAUSAL_LM
from lora_jax.tasks import (
    adapter_files,
    added_tokens,
    from_config,
    language_modeling,
    originals,
    templates,
)
from lora_jax.training import mesh, training_config
from lora_jax.training.task import Score, Task

_LEAST = {"data.max_length": 2, "replies.max_new_tokens": 1, "replies.batch_size": 1}


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a copy of the config, in which nothing is left open.

    Without a file for the evaluation, a part of the training file is held out for it.
    """
    resolved = config.copy_and_resolve_references()
    if resolved.data.holdout == "":
        with resolved.unlocked():
            del resolved.data.holdout  # and its type
            resolved.data.holdout = 0 if resolved.data.validation else holdout.DEFAULT
    return resolved


def check(config: ConfigDict) -> None:
    """Checks a config before anything is loaded or written.

    Raises:
      ValueError: names all fields that are wrong, but for those of ``lora`` and the dtypes, which
        are checked first.
    """
    from_config.check_adapter_and_dtypes(config)
    problems = training_config.list_problems(config, _LEAST)
    if not config.model.name:
        problems.append("model.name must name a model: a directory, or one of the Hub")
    if not config.data.train:
        problems.append("data.train must be a file of conversations, one a line")
    formats = (conversation_formats.AUTO, *conversation_formats.FORMATS)
    if config.data.format not in formats:
        problems.append(
            f"data.format must be one of {', '.join(formats)}, got {config.data.format!r}"
        )
    problems += training_config.validation_problems(config)
    problems += added_tokens.check(config.data.add_tokens)
    try:
        datetime.date.fromisoformat(config.data.date)
    except ValueError:
        problems.append(f"data.date must be a date like 2024-07-26, got {config.data.date!r}")
    try:
        re.compile(config.replies.pattern)
    except re.error as error:
        problems.append(f"replies.pattern must be a regular expression, and {error}")
    training_config.raise_problems(problems)


def make_task(
    config: ConfigDict, devices: mesh.Devices | None = None
) -> tuple[Task, lora.LoRAConfig]:
    """Loads model, conversations and, if the config names one, the adapter to start from.

    Args:
      config: config of the run.
      devices: devices of the run; by default those that the config describes.

    Returns:
      The task, and the settings of the adapter.

    Raises:
      FileNotFoundError, ValueError: something is missing or damaged, or does not fit the rest.
    """
    loaded = checkpoints.load(
        config.model.name,
        head=CAUSAL_LM,
        **from_config.load_options(config, devices),
    )
    _check_model(config, loaded)
    tokenizer = checkpoints.load_tokenizer(loaded.checkpoint)
    template = templates.find(
        loaded.checkpoint, file=config.data.chat_template, adapter=config.adapter
    )
    tokens = added_tokens.choose(config, template)
    extended = added_tokens.extend(loaded, tokenizer, tokens)
    loaded = extended.loaded
    training, evaluation = (
        pack(config, part, template, tokenizer) for part in load_conversations(config)
    )
    table = checkpoints.find_table(loaded)
    for rows, _ in (training, evaluation):
        token_ids.check(rows.texts.ids, table, tokenizer)
    initial = adapter_files.load_initial(config, loaded)
    if initial.adapter is None:
        initial = initial._replace(config=added_tokens.train(initial.config, extended))
    task = Task(
        apply=functools.partial(language_modeling.apply, loaded.model),
        metrics=language_modeling.token_loss,
        train_batch=functools.partial(
            packing.train_batch, training[0], seed=config.data.seed, batch_size=config.batch_size
        ),
        eval_batches=functools.partial(
            packing.eval_batches, evaluation[0], batch_size=config.eval_batch_size
        ),
        steps_per_epoch=batches.steps_per_epoch(len(training[0].rows), config.batch_size),
        base=loaded.params,
        base_id=loaded.base_id,
        metadata=_metadata(config, template, tokens),
        notes=adapter_files.add_notes(
            initial,
            (
                *_notes(config, loaded, template, training, evaluation),
                *extended.notes,
                *token_ids.describe(tokenizer, table),
            ),
        ),
        adapter=initial.adapter,
        fresh_head=initial.fresh_head,
        load_original=originals.make_loader(config, loaded),
        score=Score("loss", higher_is_better=False),
    )
    return task, initial.config


def _check_model(config: ConfigDict, loaded: checkpoints.Loaded) -> None:
    name, c = loaded.checkpoint.name, loaded.model.config
    positions = getattr(c, "positions", None) or getattr(c, "max_position_embeddings", None)
    if positions and config.data.max_length > positions:
        raise ValueError(
            f"data.max_length {config.data.max_length} goes beyond the {positions} positions that "
            f"{name} was made for; lower it."
        )
    inputs = inspect.signature(type(loaded.model).__call__).parameters
    if config.data.packing and "segment_ids" not in inputs:
        raise ValueError(
            f"{name} is a {type(loaded.model).__name__}, which can't keep several texts in a row "
            "apart: set data.packing to False."
        )


def _metadata(
    config: ConfigDict, template: ChatTemplate, tokens: dict[str, bool]
) -> dict[str, Any]:
    """Returns what is needed, besides the adapter, to use it: a template of its own, too."""
    has_own = config.data.chat_template or (config.adapter and templates.read(config.adapter))
    own: dict[str, Any] = {templates.METADATA: template.source} if has_own else {}
    own |= {added_tokens.METADATA: tokens} if tokens else {}
    return language_modeling.metadata(config) | own


def load_conversations(config: ConfigDict) -> tuple[list[Conversation], list[Conversation]]:
    """Loads the conversations to train on, and those to evaluate on.

    With ``data.holdout``, that many conversations of the training file, or that part of them,
    chosen by ``data.seed``, are those to evaluate on.

    Raises:
      FileNotFoundError, ValueError: a file is missing or damaged, or no conversation is left to
        train on.
    """
    c = config.data
    read = functools.partial(conversations.read, format=c.format, ignore=tuple(c.ignore))
    whole = read(c.train)
    if not holdout.is_wanted(c.holdout):
        return whole, read(c.validation)
    number = holdout.count(c.holdout, len(whole), examples=f"conversations in {c.train}")
    training, evaluation = holdout.split(len(whole), number, c.seed)
    return [whole[k] for k in training], [whole[k] for k in evaluation]


def pack(
    config: ConfigDict,
    part: list[Conversation],
    template: ChatTemplate,
    tokenizer: tokenizers.Tokenizer,
) -> tuple[Packed, conversations.Fit]:
    """Converts conversations to rows of tokens; also counts those that were too long."""
    c = config.data
    texts, fit = conversations.tokenize(
        part,
        template,
        tokenizer,
        max_length=c.max_length,
        # Templates may write the date into the text, which must not change when a run goes on.
        now=datetime.datetime.fromisoformat(c.date),
    )
    return packing.pack(texts, c.max_length) if c.packing else packing.pack_singly(texts), fit


def _notes(
    config: ConfigDict,
    loaded: checkpoints.Loaded,
    template: ChatTemplate,
    *parts: tuple[Packed, conversations.Fit],
) -> tuple[str, ...]:
    """Returns the report at the start: the origin of model and data, and how they are packed."""
    device = jax.devices()[0]
    return (
        f"model: {loaded.checkpoint.name} from {loaded.checkpoint.origin}",
        f"chat template: {template.origin}",
        f"evaluation on {_name_evaluation(config)}",
        *(_describe(name, *x) for name, x in zip(("training", "evaluation"), parts, strict=True)),
        from_config.describe_attention(
            config, loaded.model, parts[0][0].length, has_segments=config.data.packing
        ),
        f"device: {jax.device_count()} x {device.device_kind} ({device.platform})",
    )


def _name_evaluation(config: ConfigDict) -> str:
    c = config.data
    if not holdout.is_wanted(c.holdout):
        return str(c.validation)
    return f"{c.holdout} of {c.train}, held out"


def _describe(name: str, rows: Packed, fit: conversations.Fit) -> str:
    texts = rows.texts
    to_learn, total = int(texts.counts.sum()), len(texts.ids)
    fraction = total / (len(rows.rows) * rows.length)
    line = (
        f"{name}: {len(texts.offsets) - 1} conversations, {total:,} tokens ({to_learn:,} to learn) "
        f"in {len(rows.rows)} rows of {rows.length} ({fraction:.0%} full)"
    )
    too_long = []
    if fit.cut:
        too_long.append(f"{fit.cut} cut to {rows.length}")
    if fit.left_out:
        too_long.append(f"{fit.left_out} left out, as nothing to learn remained")
    return f"{line}; {', '.join(too_long)}" if too_long else line
