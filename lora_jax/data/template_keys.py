"""Checks that a chat template writes all that a conversation holds.

A template passes over what it does not know: the tools of a row, say, or a message of a role that
it has no words for. The model would then learn other conversations than the file has.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.data import chat_template, tool_calls
from lora_jax.data.assistant_spans import Turn
from lora_jax.data.chat_template import REASONING, ChatTemplate
from lora_jax.data.messages import ASSISTANT
from lora_jax.data.template_program import PROBE, Message, Traced

_ROLES = ("system", "user", ASSISTANT, "tool")
_RESULTS = ("tool", "function", "ipython", "observation")
# The number and the name of a result say which call it belongs to; many templates go by the order.
_ALWAYS = ("role", "content", "tool_call_id")
_QUESTION = {"role": "user", "content": "a"}
_TOOL = {"type": "function", "function": {"name": PROBE, "description": PROBE, "parameters": {}}}


def check(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    values: Mapping[str, Any],
) -> list[Message]:
    """Checks that a template knows the keys of a conversation.

    Returns:
      The messages in the form that the template takes: parts of a content are joined where it takes
      texts alone, and tool calls are as :func:`tool_calls.convert` makes them.

    Raises:
      ValueError: names a key, or a role, that does not occur in the template.
    """
    source = chat_template.choose(template, tools)
    names = [name for name in values if not _occurs(name, source)]
    if tools and not _writes_tools(source):
        names.append("tools")
    if names:
        raise ValueError(_refuse(template, ", ".join(names)))
    for k, message in enumerate(messages):
        for key in message:
            if key not in _ALWAYS and not _knows(source, key, message):
                raise ValueError(f"message {k}: {_refuse(template, key)}")
        role = message["role"]
        if role not in _ROLES and not _occurs(role, source):
            raise ValueError(
                f"message {k}: the chat template {template.origin} has no word of the role {role!r}"
            )
    return [tool_calls.convert(source, _join(source, message)) for message in messages]


def _knows(source: str, key: str, message: Message) -> bool:
    """Returns whether a template has words for a key of a message."""
    if key == "name":  # most templates have a name of a function
        return message["role"] in _RESULTS or _writes_names(source)
    return any(_occurs(name, source) for name in (REASONING if key in REASONING else (key,)))


@functools.lru_cache(maxsize=256)
def _occurs(name: str, source: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def _refuse(template: ChatTemplate, what: str) -> str:
    return (
        f"the chat template {template.origin} does not write {what}; leave that out, or give a "
        "template that does with data.chat_template"
    )


@functools.lru_cache(maxsize=64)
def _writes_tools(source: str) -> bool:
    """Returns whether a template writes the tools of a conversation."""
    if not _occurs("tools", source):
        return False
    text = chat_template.try_render(source, [_QUESTION], tools=[_TOOL])
    return text is None or PROBE in text


@functools.lru_cache(maxsize=64)
def _writes_names(source: str) -> bool:
    """Returns whether a template writes the name of a person who speaks."""
    text = chat_template.try_render(source, [_QUESTION | {"name": PROBE}])
    return text is not None and PROBE in text


def _join(source: str, message: Message) -> Message:
    """Joins the parts of a content for a template that takes texts alone."""
    content = message.get("content")
    if not isinstance(content, list) or _takes_parts(source, message["role"]):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


@functools.lru_cache(maxsize=64)
def _takes_parts(source: str, role: str) -> bool:
    """Returns whether a template writes the text of a content that is a list of parts."""
    message: Message = {"role": role, "content": [{"type": "text", "text": PROBE}]}
    talk = [message] if role in ("user", "system") else [_QUESTION, message]
    text = chat_template.try_render(source, talk)
    return text is not None and PROBE in text and "'text'" not in text and '"text"' not in text


def check_written(
    template: ChatTemplate, messages: Sequence[Message], written: Traced, turns: Sequence[Turn]
) -> None:
    """Checks that each message is written, and outside the assistant's turns if it is another's.

    Raises:
      ValueError: names the message.
    """
    rest, begin = [], 0
    for turn in turns:
        rest.append(written.text[begin : turn.begin])
        begin = turn.end
    others = PROBE.join([*rest, written.text[begin:]])
    for k, message in enumerate(messages):
        content = _get_text(message)
        is_hidden = k not in written.parts and not _is_in(others, content)
        if message["role"] != ASSISTANT and is_hidden:
            what = f"this message, of the role {message['role']!r}"
            raise ValueError(f"message {k}: {_refuse(template, what)}")
        # Templates may leave out thoughts, which are at the beginning of a content.
        if message["role"] == ASSISTANT and not _is_in(written.text, content):
            what = "its content" + (" beside its tool_calls" if "tool_calls" in message else "")
            raise ValueError(f"message {k}: {_refuse(template, what)}")
        begin, end = written.parts.get(k, (0, len(written.text)))
        if not tool_calls.has_all(written.text[begin:end], message):
            what = "all of its tool_calls" + (" beside its content" if content else "")
            raise ValueError(f"message {k}: {_refuse(template, what)}")


def _is_in(text: str, content: str) -> bool:
    """Returns whether the last line of a content is in a text, as it is or as JSON."""
    line = content.rsplit("</think>", 1)[-1].strip().rsplit("\n", 1)[-1].strip()
    return line in text or json.dumps(line, ensure_ascii=False)[1:-1] in text


def _get_text(message: Message) -> str:
    """Returns the content of a message, or its last part, without spaces around it."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = content[-1]["text"]
    return content.strip()
