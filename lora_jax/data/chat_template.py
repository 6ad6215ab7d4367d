"""Chat templates: how a model's own files write a conversation as one text.

A template is a program of somebody else's, in Jinja; it runs in Jinja's sandbox, with the functions
that transformers gives it.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2 import ext, nodes, parser, sandbox

from lora_jax.models import gguf_tokenizer
from lora_jax.models.checkpoints import Checkpoint
from lora_jax.models.gguf import is_gguf

Message = Mapping[str, Any]

# Noncharacters of Unicode, which mark in the text what the template says the assistant generates.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
_FILE = "chat_template.jinja"


class ChatTemplate(NamedTuple):
    """A template with what it may use.

    Attributes:
      source: in Jinja.
      tokens: special tokens by name, "bos_token" and so on.
      origin: the file it is from.
    """

    source: str
    tokens: dict[str, str]
    origin: Path


class Rendered(NamedTuple):
    """A conversation as one text.

    Attributes:
      text: with special tokens in it.
      spans: where in it the assistant speaks, (begin, end) in characters; None if the template does
        not say.
    """

    text: str
    spans: list[tuple[int, int]] | None


def find(checkpoint: Checkpoint) -> ChatTemplate:
    """The template among the files beside a checkpoint's weights, or in the GGUF file that it is.

    Raises:
      ValueError: there is none, or a file is damaged.
    """
    directory = checkpoint.directory
    if is_gguf(directory):
        return _in_gguf(directory)
    settings = _json(directory / "tokenizer_config.json")
    tokens = _tokens(_json(directory / "special_tokens_map.json")) | _tokens(settings)
    if (directory / _FILE).is_file():
        source = (directory / _FILE).read_text(encoding="utf-8")
        return ChatTemplate(source, tokens, directory / _FILE)
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {x.get("name"): x.get("template") for x in source if isinstance(x, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise ValueError(
            f"{checkpoint.name} has no chat template: {directory} holds no {_FILE}, and its "
            "tokenizer_config.json no chat_template. Copy the one of its chat version there."
        )
    return ChatTemplate(source, tokens, directory / "tokenizer_config.json")


def _in_gguf(path: Path) -> ChatTemplate:
    source, tokens = gguf_tokenizer.read_template(path)
    if source is None:
        raise ValueError(f"{path} has no chat template: its metadata lack tokenizer.chat_template.")
    return ChatTemplate(source, tokens, path)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    return found if isinstance(found, dict) else {}


def _tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The entries that name one special token, as text or as an object with its content."""
    plain = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token")
    }
    return {name: value for name, value in plain.items() if isinstance(value, str)}


def render(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    prompt: bool = False,
    now: datetime.datetime | None = None,
) -> Rendered:
    """Writes a conversation.

    Args:
      template: from :func:`find`.
      messages: each with "role" and "content".
      prompt: whether the beginning of the assistant's next turn is written after them.
      now: what the template takes for the present; None for the clock.

    Raises:
      ValueError: the template can't be used, or refuses the conversation.
    """
    now = now or datetime.datetime.now()
    try:
        text = _compiled(template.source).render(
            messages=[{name: x for name, x in m.items() if x is not None} for m in messages],
            tools=None,
            documents=None,
            add_generation_prompt=prompt,
            strftime_now=now.strftime,
            **template.tokens,
        )
    except Exception as error:  # a program of others, which fails in its own way
        raise ValueError(f"the chat template in {template.origin} fails: {error}") from error
    return _unmarked(text)


def _unmarked(marked: str) -> Rendered:
    """The text without its marks, and where they were."""
    text, spans = "", []
    for k, piece in enumerate(marked.split(OPEN)):
        inside, _, after = piece.partition(CLOSE) if k else ("", "", piece)
        if k:
            spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return Rendered(text, spans or None)


class _Generation(ext.Extension):
    """``{% generation %}...{% endgeneration %}``: what stands between is the assistant's."""

    tags = {"generation"}

    def parse(self, parser: parser.Parser) -> nodes.Node:
        """Makes a call that marks the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, **options: Any) -> str:
    # Jinja's own escapes what means something in HTML.
    return json.dumps(value, **{"ensure_ascii": False} | options)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)
