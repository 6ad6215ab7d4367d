"""Checks the messages of a conversation, and tells which of the assistant's are to be learned.

Every key of a message is used, or the message is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.data import strict_json
from lora_jax.data.chat_template import REASONING

ASSISTANT = "assistant"
# Keys that say whether a message is learned, and are not handed to the template.
_SWITCHES = ("weight", "train", "loss")
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", *REASONING, *_SWITCHES)
_CALL_KEYS = ("id", "type", "index", "function", "name", "arguments")


class Messages(NamedTuple):
    """Messages of a conversation.

    Attributes:
      messages: messages, without what is None and without the keys that say what is learned.
      is_learned: for each message, whether it is to be learned.
    """

    messages: list[dict[str, Any]]
    is_learned: tuple[bool, ...]


def check(messages: object) -> Messages:
    """Checks the messages of a conversation.

    Args:
      messages: what a file has in place of them.

    Raises:
      ValueError: a message is not as it must be; the text begins with its number.

    >>> check([{"role": "assistant", "content": "Hello!", "weight": 0}])
    Messages(messages=[{'role': 'assistant', 'content': 'Hello!'}], is_learned=(False,))
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list that is not empty, got {messages!r:.60}")
    checked = []
    for k, message in enumerate(messages):
        try:
            checked.append(_check_message(message))
        except ValueError as error:
            raise ValueError(f"message {k}: {error}") from error
    return Messages([message for message, _ in checked], tuple(learned for _, learned in checked))


def _check_message(message: object) -> tuple[dict[str, Any], bool]:
    if not isinstance(message, dict):
        raise ValueError("no object with a role and a content")
    message = {name: x for name, x in message.items() if x is not None}
    refuse_keys(message, _KEYS)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"role {_describe(message, 'role')}, and must be a text")
    _check_calls(message)
    _check_content(message)
    _check_texts(message)
    is_learned = _read_switches(message) and role == ASSISTANT
    return {name: x for name, x in message.items() if name not in _SWITCHES}, is_learned


def refuse_keys(value: Mapping[str, Any], known: Sequence[str], hint: str = "") -> None:
    """Refuses an object with other keys than those that are known.

    Raises:
      ValueError: names the keys.
    """
    if unknown := [name for name in value if name not in known]:
        raise ValueError(
            f"{', '.join(map(repr, unknown))} is not read; the keys are {', '.join(known)}{hint}"
        )


def _describe(value: Mapping[str, Any], name: str) -> str:
    return f"is {value[name]!r:.60}" if name in value else "is missing"


def _check_content(message: dict[str, Any]) -> None:
    content = message.get("content")
    if content is None and "tool_calls" in message:
        return
    if isinstance(content, list) and content:
        for k, part in enumerate(content):
            _check_part(k, part)
    elif not isinstance(content, str):
        raise ValueError(
            f"content {_describe(message, 'content')}, and must be a text, or a list of texts "
            'like {"type": "text", "text": ...}'
        )


def _check_part(k: int, part: object) -> None:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise ValueError(f"part {k} of the content is {kind!r:.60}; only texts can be learned")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"part {k} of the content: text {_describe(part, 'text')}")
    refuse_keys(part, ("type", "text"))


def _check_texts(message: Mapping[str, Any]) -> None:
    for name in ("name", "tool_call_id", *REASONING):
        if name in message and not isinstance(message[name], str):
            raise ValueError(f"{name} {_describe(message, name)}, and must be a text")
    thoughts = [name for name in REASONING if name in message]
    if len(thoughts) > 1:
        raise ValueError(f"{' and '.join(thoughts)} are one thing; give one of them")
    if thoughts and message["role"] != ASSISTANT:
        raise ValueError(f"{thoughts[0]} is for messages of the role 'assistant'")


def _check_calls(message: dict[str, Any]) -> None:
    calls = message.get("tool_calls")
    if calls == []:
        del message["tool_calls"]
    elif calls is not None:
        if message["role"] != ASSISTANT:
            raise ValueError("tool_calls are for messages of the role 'assistant'")
        if not isinstance(calls, list):
            raise ValueError(f"tool_calls must be a list of objects, got {calls!r:.60}")
        for call in calls:
            _check_call(call)


def _check_call(call: object) -> None:
    """Checks a call, whose arguments are an object, or a text with the JSON of one."""
    if not isinstance(call, dict):
        raise ValueError(f"a call in tool_calls must be an object, got {call!r:.60}")
    refuse_keys(call, _CALL_KEYS)
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise ValueError(f"the function of a call is {function!r:.60}, and no object")
    if not isinstance(function.get("name"), str):
        raise ValueError(f"the name of a call {_describe(function, 'name')}, and must be a text")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = strict_json.loads(arguments)
        except ValueError:
            arguments = None
    if "arguments" in function and not isinstance(arguments, dict):
        raise ValueError(f"arguments of a call {_describe(function, 'arguments')}, and no object")


def _read_switches(message: Mapping[str, Any]) -> bool:
    """Returns whether a message may be learned, as far as its keys say."""
    values = {}
    for name in _SWITCHES:
        if name not in message:
            continue
        value = message[name]
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"{name} is {value!r:.60}, and must be 0 or 1, or false or true")
        values[name] = bool(value)
    if len(set(values.values())) > 1:
        raise ValueError(f"{' and '.join(values)} contradict each other")
    wants = any(values.values())
    if wants and message["role"] != ASSISTANT:
        raise ValueError(
            f"{next(iter(values))} asks to learn what the role {message['role']!r} says, and only "
            "that of the role 'assistant' is learned"
        )
    return wants or not values
