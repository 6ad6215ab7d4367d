"""Chat templates, with which a model's files write a conversation as one text.

A template is a program in Jinja that others wrote. It runs in Jinja's sandbox, with the functions
that transformers provides.
"""

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2 import ext, nodes, parser, sandbox

from lora_jax.models import gguf_tokenizer
from lora_jax.models.checkpoints import Checkpoint
from lora_jax.models.gguf import is_gguf

Message = Mapping[str, Any]

# Noncharacters of Unicode, which mark in the text what the assistant generates.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
_FILE = "chat_template.jinja"


class ChatTemplate(NamedTuple):
    """A template and the special tokens that it may use.

    Attributes:
      source: text of the template, in Jinja.
      tokens: special tokens by name, "bos_token" and so on.
      origin: file that the template is from.
    """

    source: str
    tokens: dict[str, str]
    origin: Path


class Rendered(NamedTuple):
    """A conversation as one text.

    Attributes:
      text: the text, with special tokens in it.
      spans: begin and end of each part that the assistant speaks, in characters; None if the
        template does not mark them.
    """

    text: str
    spans: list[tuple[int, int]] | None


def find(checkpoint: Checkpoint) -> ChatTemplate:
    """Finds the template among the files of a checkpoint, or in the GGUF file that it is.

    Raises:
      ValueError: there is none, or a file is damaged.
    """
    directory = checkpoint.directory
    if is_gguf(directory):
        return _read_gguf(directory)
    settings = _read_json(directory / "tokenizer_config.json")
    tokens = _find_tokens(_read_json(directory / "special_tokens_map.json"))
    tokens |= _find_tokens(settings)
    if (directory / _FILE).is_file():
        source = (directory / _FILE).read_text(encoding="utf-8")
        return ChatTemplate(source, tokens, directory / _FILE)
    source = settings.get("chat_template")
    if isinstance(source, list):  # several templates with names
        templates = {x.get("name"): x.get("template") for x in source if isinstance(x, dict)}
        source = templates.get("default")
    if not isinstance(source, str):
        raise ValueError(
            f"{checkpoint.name} has no chat template: {directory} holds no {_FILE}, and its "
            "tokenizer_config.json no chat_template. Copy the one of its chat version there."
        )
    return ChatTemplate(source, tokens, directory / "tokenizer_config.json")


def _read_gguf(path: Path) -> ChatTemplate:
    source, tokens = gguf_tokenizer.read_template(path)
    if source is None:
        raise ValueError(f"{path} has no chat template: its metadata lack tokenizer.chat_template.")
    return ChatTemplate(source, tokens, path)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    return content if isinstance(content, dict) else {}


def _find_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Finds the entries for one special token, which are text, or an object with its content."""
    contents = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token")
    }
    return {name: value for name, value in contents.items() if isinstance(value, str)}


def render(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    prompt: bool = False,
    now: datetime.datetime | None = None,
) -> Rendered:
    """Writes a conversation.

    Args:
      template: the template that :func:`find` returns.
      messages: messages, each with "role" and "content".
      prompt: whether the beginning of the assistant's next turn is written after the messages.
      now: time that the template takes for the present; None for the clock.

    Raises:
      ValueError: the template can't be used, or refuses the conversation.
    """
    now = now or datetime.datetime.now()
    try:
        text = _compile(template.source).render(
            messages=[{name: x for name, x in m.items() if x is not None} for m in messages],
            tools=None,
            documents=None,
            add_generation_prompt=prompt,
            strftime_now=now.strftime,
            **template.tokens,
        )
    except Exception as error:  # a template can raise anything
        raise ValueError(f"the chat template in {template.origin} fails: {error}") from error
    return _remove_marks(text)


def _remove_marks(marked: str) -> Rendered:
    """Removes the marks from a text, and returns their places."""
    text, *pieces = marked.split(OPEN)
    spans = []
    for piece in pieces:
        inside, _, after = piece.partition(CLOSE)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return Rendered(text, spans or None)


class _Generation(ext.Extension):
    """The block ``{% generation %}...{% endgeneration %}``, which the assistant generates."""

    tags = {"generation"}

    def parse(self, parser: parser.Parser) -> nodes.Node:
        """Parses the block into a call that marks it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, **options: Any) -> str:
    # The filter of Jinja escapes characters that mean something in HTML.
    return json.dumps(value, **{"ensure_ascii": False} | options)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)
