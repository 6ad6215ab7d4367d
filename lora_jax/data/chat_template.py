"""Chat templates, with which a model's files write a conversation as one text."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.data import template_program
from lora_jax.data.template_program import Message, Traced
from lora_jax.files import read_object
from lora_jax.models import gguf_tokenizer, tokenizer
from lora_jax.models.checkpoints import Checkpoint
from lora_jax.models.gguf import is_gguf
from lora_jax.models.tokenizer_settings import CONFIG, NAMES

FILE = "chat_template.jinja"
_FOLDER = "additional_chat_templates"
_NOW = datetime.datetime(2000, 1, 1)
_TOOL_USE = "tool_use"  # name of the template for conversations with tools, where there are several
# Names of a message's thoughts; the first that a message has is written, as in transformers.
REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate(NamedTuple):
    """A template and the special tokens that it may use.

    Attributes:
      source: text of the template, in Jinja.
      tokens: special tokens by name, "bos_token" and so on.
      origin: file that the template is from.
      with_tools: text of the template for conversations with tools, if it is another.
    """

    source: str
    tokens: dict[str, str]
    origin: str | Path
    with_tools: str | None = None


def find(checkpoint: Checkpoint) -> ChatTemplate:
    """Finds the template among the files of a checkpoint, or in the GGUF file that it is.

    Raises:
      ValueError: there is none, or a file is damaged.
    """
    directory = checkpoint.directory
    if is_gguf(directory):
        return _read_gguf(directory)
    tokens = read_tokens(checkpoint)
    with_tools = _read_text(directory / _FOLDER / f"{_TOOL_USE}.jinja")
    if (source := _read_text(directory / FILE)) is not None:
        return ChatTemplate(source, tokens, directory / FILE, with_tools)
    source = read_object(directory / CONFIG).get("chat_template")
    if isinstance(source, list):  # several templates with names
        templates = {x.get("name"): x.get("template") for x in source if isinstance(x, dict)}
        source, with_tools = templates.get("default"), templates.get(_TOOL_USE)
    if not isinstance(source, str):
        raise ValueError(
            f"{checkpoint.name} has no chat template: {directory} holds no {FILE}, and its "
            "tokenizer_config.json no chat_template. Copy the one of its chat version there, or "
            "give a file with data.chat_template."
        )
    return ChatTemplate(source, tokens, directory / CONFIG, with_tools)


def read_file(path: str | Path, checkpoint: Checkpoint) -> ChatTemplate:
    """Reads a template of one's own, in Jinja, for a model.

    Args:
      path: path of the file.
      checkpoint: the model, of which the template may use the special tokens.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not UTF-8, or empty.
    """
    source = _read_text(Path(path).expanduser())
    if source is None:
        raise FileNotFoundError(f"data.chat_template names {path}, which is no file.")
    if not source.strip():
        raise ValueError(f"The chat template {path} is empty.")
    return ChatTemplate(source, read_tokens(checkpoint), path)


def read_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """Reads the special tokens of a model by name: "bos_token" and so on.

    Raises:
      ValueError: a file is damaged.
    """
    directory = checkpoint.directory
    if is_gguf(directory):
        return gguf_tokenizer.read_template(directory)[1]
    return tokenizer.read_special_tokens(directory)


def _read_gguf(path: Path) -> ChatTemplate:
    source, tokens = gguf_tokenizer.read_template(path)
    if source is None:
        raise ValueError(f"{path} has no chat template: its metadata lack tokenizer.chat_template.")
    return ChatTemplate(source, tokens, path)


def _read_text(path: Path) -> str | None:
    """Returns the text of a file, or None if there is none."""
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}.") from error


def render(template: ChatTemplate, messages: Sequence[Message], **options: Any) -> Traced:
    """Writes a conversation as one text, with special tokens in it.

    The result says what the template marks as generated, but not which part is of which message.

    Args:
      template: the template that :func:`find` returns.
      messages: messages, each with "role" and "content".
      **options: those of :func:`trace`.

    Raises:
      ValueError: the template can't be used, or refuses the conversation.
    """
    return _run(template_program.run, template, messages, **options)


def trace(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    values: Mapping[str, Any] | None = None,
    now: datetime.datetime | None = None,
) -> Traced:
    """Writes a conversation, and finds the part of the text that each message was written to.

    Args:
      template: the template that :func:`find` returns.
      messages: messages, each with "role" and "content".
      prompt: whether the beginning of the assistant's next turn is written after the messages.
      tools: JSON schemas of the tools that the assistant may call.
      values: further values for the template, such as ``{"enable_thinking": False}``.
      now: time that the template takes for the present; None for the clock.

    Raises:
      ValueError: the template can't be used, or refuses the conversation.
    """
    options: dict[str, Any] = {"prompt": prompt, "tools": tools, "values": values, "now": now}
    return _run(template_program.trace, template, messages, **options)


def try_render(source: str, messages: Sequence[Message], **options: Any) -> str | None:
    """Writes messages that stand for others, to see what a template does with them.

    Args:
      source: text of the template.
      messages: the messages.
      **options: those of :func:`trace`.

    Returns:
      The text; None if the template does not take the messages.
    """
    try:
        template = ChatTemplate(source, dict.fromkeys(NAMES, ""), "")
        return render(template, messages, now=_NOW, **options).text
    except ValueError:
        return None


def choose(template: ChatTemplate, tools: Sequence[Mapping[str, Any]] | None) -> str:
    """Returns the text of the template that writes conversations with these tools, or without."""
    return template.with_tools if tools and template.with_tools else template.source


def _run(
    run: Callable[..., Traced],
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    values: Mapping[str, Any] | None = None,
    now: datetime.datetime | None = None,
) -> Traced:
    given = template.tokens | dict(values or {})
    given |= {"tools": tools or None, "documents": None, "add_generation_prompt": prompt}
    plain = [_alias_reasoning(message) for message in messages]
    try:
        return run(choose(template, tools), plain, now or datetime.datetime.now(), **given)
    except Exception as error:  # a template can raise anything
        raise ValueError(f"the chat template in {template.origin} fails: {error}") from error


def _alias_reasoning(message: Message) -> dict[str, Any]:
    """Gives the thoughts of a message both names that templates read, and leaves out None.

    A content may be None, which templates write calls of tools beside.
    """
    message = {name: x for name, x in message.items() if x is not None or name == "content"}
    thoughts = next((message[name] for name in REASONING if name in message), None)
    if thoughts is None:
        return message
    return {"thinking": thoughts} | message | {"reasoning_content": thoughts}
