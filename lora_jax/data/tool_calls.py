"""Gives tool calls the form that a chat template takes, and checks that it writes all of them.

Rows have the arguments of a call as an object or, as OpenAI writes them, as a text with JSON; and
beside calls a content that is empty, ``null`` or missing. Most templates write JSON of an object.
Others, such as DeepSeek's, join texts, or write calls only where the content is none.
"""

import collections
import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_jax.data import chat_template, strict_json
from lora_jax.data.messages import ASSISTANT
from lora_jax.data.template_program import Message

_QUESTION = {"role": "user", "content": "a"}
_NAME, _ARGUMENTS = "probe_call", {"probe": 1}
_ID = "123456789"  # Mistral's templates take nine letters or digits, and nothing else


class _Form(NamedTuple):
    """The form in which a template takes calls.

    Attributes:
      content: what a message without a content has in place of it: None, "", or nothing at all.
      as_text: whether arguments are texts with JSON.
    """

    content: Mapping[str, str | None]
    as_text: bool


def convert(source: str, message: Message) -> Message:
    """Returns a message with its calls in the form that a template takes.

    Args:
      source: text of the template.
      message: a message, with calls or without.

    >>> call = {"name": "f", "arguments": '{"x": 1}'}
    >>> message = {"role": "assistant", "tool_calls": [call]}
    >>> convert("{{ messages[1].tool_calls | tojson }}", message)["tool_calls"]
    [{'name': 'f', 'arguments': {'x': 1}}]
    >>> source = "{% for c in messages[1].tool_calls %}{{ c.name + c.arguments }}{% endfor %}"
    >>> convert(source, message)["tool_calls"]
    [{'name': 'f', 'arguments': '{"x": 1}'}]
    """
    calls = message.get("tool_calls")
    if not calls:
        return message
    content = message.get("content")
    given = "a" if content else content
    form = _find_form(source, given, is_nested="function" in calls[0])
    made = {name: x for name, x in message.items() if name != "content" or x}
    return {**({} if content else form.content), **made} | {
        "tool_calls": [_convert_call(call, form.as_text) for call in calls]
    }


@functools.lru_cache(maxsize=64)
def _find_form(source: str, content: str | None, *, is_nested: bool) -> _Form:
    """Finds the first form in which a template writes a call; the usual one if there is none."""
    contents: list[Mapping[str, str | None]] = [{"content": content}]
    contents += [] if content else [{"content": None}, {}, {"content": ""}]
    forms = [_Form(x, as_text) for as_text in (False, True) for x in contents]
    return next((form for form in forms if _writes_call(source, form, is_nested)), _Form({}, False))


def _writes_call(source: str, form: _Form, is_nested: bool) -> bool:
    """Returns whether a template writes a call of a form, and nothing in the syntax of Python."""
    arguments = json.dumps(_ARGUMENTS) if form.as_text else _ARGUMENTS
    call: dict[str, Any] = {"name": _NAME, "arguments": arguments}
    if is_nested:
        call = {"id": _ID, "type": "function", "function": call}
    message = {"role": ASSISTANT, **form.content, "tool_calls": [call]}
    text = chat_template.try_render(source, [_QUESTION, message])
    if text is None or _NAME not in text:
        return False
    return str(_ARGUMENTS) not in text and str(None) not in text


def _convert_call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    if "function" in call:
        return call | {"function": _convert_call(call["function"], as_text)}
    arguments = call.get("arguments")
    if as_text and isinstance(arguments, dict):
        return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}
    if not as_text and isinstance(arguments, str):
        return call | {"arguments": strict_json.loads(arguments)}
    return call


def has_all(text: str, message: Message) -> bool:
    """Returns whether a text names the function of each call, as often as it is called."""
    calls = [call.get("function", call) for call in message.get("tool_calls", ())]
    counts = collections.Counter(call["name"] for call in calls)
    return all(text.count(name) >= count for name, count in counts.items())
