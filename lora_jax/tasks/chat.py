"""Replies of a trained language model to messages."""

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

import lora_jax as lora
from lora_jax.data import characters, chat_template, conversations, template_keys
from lora_jax.data.chat_template import ChatTemplate, Message
from lora_jax.data.conversations import Conversation
from lora_jax.files import read_object
from lora_jax.models import checkpoints, generate, token_ids
from lora_jax.models.decoding import Decoding
from lora_jax.models.families import CAUSAL_LM
from lora_jax.models.read_leaves import DECODED
from lora_jax.models.token_ids import Table
from lora_jax.tasks import generation, language_model, templates, text_files
from lora_jax.tasks.text_files import TextFiles

PyTree = Any
_BUCKET = 64  # prompts are padded to a multiple of it; each length is compiled once


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatModel:
    """A language model that replies to messages.

    Attributes:
      generate: ``(params, inputs, key) -> Generated``.
      params: parameters, with the adapter merged into them, if there is one; none is quantized.
      template: chat template of the model.
      tokenizer: tokenizer of the model.
      decoding: settings by which tokens are chosen.
      table: embedding of the model.
      notes: lines on base and adapter that a reader has to know.
    """

    generate: Callable
    params: PyTree
    template: ChatTemplate
    tokenizer: tokenizers.Tokenizer
    decoding: Decoding
    table: Table
    notes: tuple[str, ...] = ()


def load(directory: str | Path | None, *, model: str | None = None, **options: Any) -> ChatModel:
    """Loads an adapter and its base, or a model alone.

    Args:
      directory: directory of the adapter, in either format; None for the model as it is.
      model: name or directory of the model; needed with an adapter only if the base is no longer
        found under its old name.
      **options: fields of :class:`~lora_jax.models.decoding.Decoding`.

    Raises:
      FileNotFoundError, ValueError: adapter, base or chat template is missing or damaged, or they
        do not belong together.
    """
    if directory is not None:
        trained = language_model.load(directory, model=model)
        files = text_files.find(directory, trained.loaded.checkpoint)
        template = templates.find(trained.loaded.checkpoint, adapter=directory)
        made = _make(trained.loaded, trained.adapter, files, template, options)
        return dataclasses.replace(made, notes=(*trained.notes, *made.notes))
    if model is None:
        raise ValueError("Say what is to reply: give an adapter or a model (--adapter, --model).")
    options_of_base = {"scan_layers": True, "quantize": DECODED}  # no lift is here
    loaded = checkpoints.load(model, head=CAUSAL_LM, **options_of_base)
    files, template = text_files.find(None, loaded.checkpoint), templates.find(loaded.checkpoint)
    return _make(loaded, {}, files, template, options)


def load_pair(
    directory: str | Path,
    *,
    model: str | None = None,
    template: str | Path = "",
    **options: Any,
) -> tuple[ChatModel, ChatModel]:
    """Loads a base, without and with an adapter; both have the template of the adapter.

    A prompt of a length is compiled once for both; the parameters of both are in memory.

    Args:
      directory: directory of the adapter, in either format.
      model: name or directory of the base, if it is no longer found under its old name.
      template: file with another chat template; "" for that of the adapter, or of the base.
      **options: fields of :class:`~lora_jax.models.decoding.Decoding`.

    Raises:
      FileNotFoundError, ValueError: as :func:`load`.
    """
    trained = language_model.load(directory, model=model)
    checkpoint = trained.loaded.checkpoint
    files = text_files.find(directory, checkpoint)
    found = templates.find(checkpoint, file=template, adapter=directory)
    base = _make(trained.loaded, {}, files, found, options)
    base = dataclasses.replace(base, notes=(*trained.notes, *base.notes))
    merged = lora.merge(trained.loaded.params, trained.adapter)
    return base, dataclasses.replace(base, params=merged)


def _make(
    loaded: checkpoints.Loaded,
    adapter: PyTree,
    files: TextFiles,
    template: ChatTemplate,
    options: dict[str, Any],
) -> ChatModel:
    """Makes the model that replies; an empty adapter leaves it as it is."""
    tokenizer, table = text_files.load_tokenizer(files), checkpoints.find_table(loaded)
    stop = stop_tokens(files.generation, template, tokenizer)
    decoding = Decoding(stop=stop, pad_id=min(stop, default=0), **options)
    functions = generate.causal_lm(loaded.model, loaded.family.require_cache())
    run = generate.generator(*functions, decoding)
    return ChatModel(
        generate=run,
        params=lora.merge(loaded.params, adapter),
        template=template,
        tokenizer=tokenizer,
        decoding=decoding,
        table=table,
        notes=token_ids.describe(tokenizer, table),
    )


def stop_tokens(
    checkpoint: checkpoints.Checkpoint, template: ChatTemplate, tokenizer: tokenizers.Tokenizer
) -> tuple[int, ...]:
    """Returns the tokens that end a reply: those the model's files name, and the template's own."""
    path = checkpoint.directory / "generation_config.json"
    about = read_object(path)
    tokens = {
        tokenizer.token_to_id(template.tokens.get("eos_token", "")),
        tokenizer.token_to_id(_end_of_turn(template, tokenizer)),
    }
    for config in (about, checkpoint.config):
        ids = config.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if not all(number is None or type(number) is int for number in ids):
            raise ValueError(
                f"{checkpoint.name}: eos_token_id in {path.name} or config.json is {ids!r:.60}, "
                "and must be a token's number, or a list of them."
            )
        tokens |= set(ids)
    return tuple(sorted(number for number in tokens if number is not None))


def _end_of_turn(template: ChatTemplate, tokenizer: tokenizers.Tokenizer) -> str:
    """Finds the special token with which the template ends a reply; "" for none."""
    special = conversations.list_special_tokens(tokenizer)
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text, spans = conversations.find_assistant_spans(template, probe, special)
    ending = text[slice(*spans[-1])].rstrip() if spans else ""
    return next((token for token in special if ending.endswith(token)), "")


def reply(
    model: ChatModel,
    messages: Sequence[Message],
    *,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Generates the assistant's next message.

    Args:
      model: the model.
      messages: messages of the conversation.
      seed: seed of sampling.
      say: function that is told if the model has no positions for all of the message.

    Raises:
      ValueError: the template refuses the messages, or they leave no position for a reply, or have
        a token that is no row of the model's embedding.
    """
    ids = _encode(model, Conversation([*messages], ""))
    length = -(-len(ids) // _BUCKET) * _BUCKET
    batch = generate.pad_left([ids], pad_id=model.decoding.pad_id, length=length)
    generated = model.generate(model.params, batch, jax.random.key(seed))
    tokens = np.asarray(generated.tokens)[0, : int(generated.lengths[0])].tolist()
    if end := generation.describe_end(tokens, model.decoding):
        say(end)
    return _decode(model, [t for t in tokens if t not in model.decoding.stop])


def reply_to_all(
    model: ChatModel,
    conversations: Sequence[Conversation],
    *,
    batch_size: int,
    now: datetime.datetime | None = None,
) -> list[str]:
    """Generates the assistant's next message in each of several conversations.

    Args:
      model: the model.
      conversations: what is said in each before the message, and its tools.
      batch_size: number of conversations at a time.
      now: time that the template takes for the present; None for the clock.

    Raises:
      ValueError: the template refuses messages; or there are no conversations.
    """
    rows = generation.generate_rows(
        model.generate,
        model.params,
        [_encode(model, conversation, now) for conversation in conversations],
        decoding=model.decoding,
        batch_size=batch_size,
    )
    return [_decode(model, row) for row in rows]


def _encode(
    model: ChatModel, conversation: Conversation, now: datetime.datetime | None = None
) -> list[int]:
    """Returns the tokens of the prompt for the assistant's next message."""
    messages, tools, values = conversation.messages, conversation.tools, conversation.values
    messages = template_keys.check(model.template, messages, tools, values)
    text = chat_template.render(
        model.template, messages, prompt=True, tools=tools, values=values, now=now
    ).text
    characters.check(text)
    ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    token_ids.check(ids, model.table, model.tokenizer)
    return ids


def _decode(model: ChatModel, tokens: Sequence[int]) -> str:
    return model.tokenizer.decode(tokens).strip()
