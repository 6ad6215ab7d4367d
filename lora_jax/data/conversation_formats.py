"""The formats that conversations have in files, each with its keys.

========================  ======================================================================
``messages``              ``messages``: list of ``{"role": ..., "content": ...}``
``sharegpt``              ``conversations``: list of ``{"from": "human", "value": ...}``
``alpaca``                ``instruction``, ``output``; ``input``, ``history``
``prompt_completion``     ``prompt``, ``completion``: texts, or lists of messages
========================  ======================================================================

Rows of each format may also have ``system``, ``tools`` and ``chat_template_kwargs``.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from lora_jax.data import messages, strict_json
from lora_jax.data.messages import ASSISTANT, Messages
from lora_jax.data.template_program import RESERVED, Message

AUTO = "auto"
_COMMON = ("system", "tools", "chat_template_kwargs")
_ROLES = {
    "human": "user", "user": "user", "system": "system", "gpt": ASSISTANT, "assistant": ASSISTANT,
    "chatgpt": ASSISTANT, "bard": ASSISTANT, "bing": ASSISTANT, "model": ASSISTANT,
    "tool": "tool", "observation": "tool", "function_call": ASSISTANT,
}  # fmt: skip
# Values that the program itself gives to every template.
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now")
_NO_CHARACTER = re.compile(f"[\ud800-\udfff{''.join(RESERVED)}]")


class Parsed(NamedTuple):
    """A row as a conversation.

    Attributes:
      messages: its messages, and which of them are learned.
      tools: JSON schemas of the tools that the assistant may call; None for none.
      values: further values for the template.
    """

    messages: Messages
    tools: list[dict[str, Any]] | None
    values: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A format of rows.

    Attributes:
      required: keys by which the format is found.
      optional: further keys.
      parse: makes messages of a row.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    parse: Callable[[Mapping[str, Any]], Messages]


def parse(row: object, format: str = AUTO, ignore: Collection[str] = ()) -> Parsed:
    """Makes a conversation of a row.

    Args:
      row: a row of a file.
      format: name of its format; "auto" to find it by its keys.
      ignore: keys that are left out.

    Raises:
      ValueError: the row has no such format, or a key that is not read.
    """
    if not isinstance(row, dict):
        raise ValueError(f"no object with keys and values, but {row!r:.60}")
    row = {key: x for key, x in row.items() if x is not None and key not in ignore}
    found = FORMATS[_find(row) if format == AUTO else format]
    keys = (*found.required, *found.optional, *_COMMON)
    messages.refuse_keys(row, keys, "; name what is to be left out in data.ignore")
    if missing := [key for key in found.required if key not in row]:
        raise ValueError(
            f"{' and '.join(missing)} is missing; it has {', '.join(map(repr, row)) or 'no key'}"
        )
    parsed = _add_system(found.parse(row), row.get("system"))
    if not any(message["role"] == ASSISTANT for message in parsed.messages):
        roles = ", ".join(dict.fromkeys(repr(message["role"]) for message in parsed.messages))
        raise ValueError(
            f"no message is of the role 'assistant', so there is nothing to learn; it has {roles}"
        )
    if not any(parsed.is_learned):
        raise ValueError("no message of the assistant is to be learned, as their weights say")
    conversation = Parsed(parsed, _read_tools(row.get("tools")), _read_values(row))
    _check_characters([parsed.messages, conversation.tools, conversation.values])
    return conversation


def _check_characters(value: object) -> None:
    """Refuses what is no character, and those that this program marks texts with."""
    try:
        match = _NO_CHARACTER.search(json.dumps(value, ensure_ascii=False))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if match is None:
        return
    code = f"U+{ord(match[0]):04X}"
    if match[0] in RESERVED:
        raise ValueError(f"it holds the noncharacter {code}; remove it")
    raise ValueError(
        f"it holds {code}, half of a character that takes two units in UTF-16; write it whole"
    )


def _find(row: Mapping[str, Any]) -> str:
    """Finds the format of a row by its keys."""
    names = [name for name, x in FORMATS.items() if all(key in row for key in x.required)]
    if len(names) == 1:
        return names[0]
    formats = "; ".join(f"{name}: {', '.join(x.required)}" for name, x in FORMATS.items())
    state = f"it has {', '.join(map(repr, row))}" if row else "it has no keys with values"
    if names:
        raise ValueError(f"it fits {' and '.join(names)}; set data.format to one of them; {state}")
    raise ValueError(f"a conversation has the keys of one of these formats ({formats}); {state}")


def _add_system(parsed: Messages, system: object) -> Messages:
    """Puts the system message of a row before its messages."""
    if system is None or system == "":
        return parsed
    if not isinstance(system, str):
        raise ValueError(f"system is {system!r:.60}, and must be a text")
    if parsed.messages[0]["role"] == "system":
        raise ValueError("system is a second system message beside that of message 0")
    first = {"role": "system", "content": system}
    return Messages([first, *parsed.messages], (False, *parsed.is_learned))


def _read_tools(tools: object) -> list[dict[str, Any]] | None:
    tools = _read_json("tools", tools)
    if not tools and (tools is None or isinstance(tools, list)):
        return None
    if not isinstance(tools, list) or not all(isinstance(x, dict) and x for x in tools):
        raise ValueError(f"tools must be a list of objects, JSON schemas, got {tools!r:.60}")
    return tools


def _read_values(row: Mapping[str, Any]) -> dict[str, Any]:
    values = _read_json("chat_template_kwargs", row.get("chat_template_kwargs")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"chat_template_kwargs must be an object, got {values!r:.60}")
    names = [name for name in values if name in _GIVEN or not name.isidentifier()]
    if names:
        raise ValueError(f"chat_template_kwargs can't set {', '.join(map(repr, names))}")
    return values


def _read_json(name: str, value: object) -> Any:
    """Reads a value that tables hold as a text with JSON in it."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return strict_json.loads(value)
    except ValueError as error:
        raise ValueError(f"{name} is a text that is no JSON ({error})") from error


def _parse_messages(row: Mapping[str, Any]) -> Messages:
    return messages.check(_read_json("messages", row["messages"]))


def _parse_sharegpt(row: Mapping[str, Any]) -> Messages:
    said = _read_json("conversations", row["conversations"])
    if not isinstance(said, list) or not said:
        raise ValueError(f"conversations must be a list that is not empty, got {said!r:.60}")
    return messages.check([_rename(k, x) for k, x in enumerate(said)])


def _rename(k: int, message: object) -> object:
    """Gives a message of ShareGPT the keys and roles that the others have."""
    if not isinstance(message, dict) or not {"from", "value"} & message.keys():
        return message  # it has "role" and "content"
    if both := {"role", "content"} & message.keys():
        raise ValueError(f"message {k} has from or value, and also {', '.join(sorted(both))}")
    rest = {name: x for name, x in message.items() if name not in ("from", "value")}
    speaker, value = message.get("from"), message.get("value")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise ValueError(f"message {k}: from is {speaker!r:.60}; there are {', '.join(_ROLES)}")
    if speaker != "function_call":
        return {"role": _ROLES[speaker], "content": value, **rest}
    call = _read_json(f"message {k}: the value of a function_call", value)
    calls = call if isinstance(call, list) else [call]
    calls = [{"type": "function", "function": x} for x in calls]
    return {"role": ASSISTANT, "content": "", "tool_calls": calls, **rest}


def _parse_alpaca(row: Mapping[str, Any]) -> Messages:
    said: list[Message] = []
    history = _read_json("history", row.get("history")) or []
    if not isinstance(history, list) or any(
        not isinstance(pair, list) or len(pair) != 2 for pair in history
    ):
        raise ValueError(f"history must be a list of pairs of texts, got {history!r:.60}")
    for question, answer in history:
        said += [_say("user", question), _say(ASSISTANT, answer)]
    for key in ("instruction", "input"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f"{key} is {row[key]!r:.60}, and must be a text")
    question = "\n".join(x for x in (row["instruction"], row.get("input", "")) if x)
    return messages.check([*said, _say("user", question), _say(ASSISTANT, row["output"])])


def _parse_prompt(row: Mapping[str, Any]) -> Messages:
    """Makes messages of a prompt and its completion, of which only the second is learned."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return messages.check([_say("user", prompt), _say(ASSISTANT, completion)])
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise ValueError("prompt and completion must be two texts, or two lists of messages")
    parsed = messages.check([*prompt, *completion])
    is_learned = (False,) * len(prompt) + parsed.is_learned[len(prompt) :]
    return parsed._replace(is_learned=is_learned)


def _say(role: str, content: object) -> dict[str, Any]:
    return {"role": role, "content": content}


FORMATS = {
    "messages": Format(required=("messages",), parse=_parse_messages),
    "sharegpt": Format(required=("conversations",), parse=_parse_sharegpt),
    "alpaca": Format(
        required=("instruction", "output"), optional=("input", "history"), parse=_parse_alpaca
    ),
    "prompt_completion": Format(required=("prompt", "completion"), parse=_parse_prompt),
}
