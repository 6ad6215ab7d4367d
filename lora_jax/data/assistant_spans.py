"""Finds what the assistant says in a conversation that a chat template has written as one text.

A turn is what the model must generate after the prompt for it. A template with ``{% generation %}``
says itself which parts these are. Of any other template, three texts show it:

- the whole conversation, of which the template's own loop says which part it wrote for which
  message: a turn neither begins before the part of its message nor ends after it;
- the conversation before the turn, with the prompt for the assistant: where the whole begins with
  this text, the turn begins at its end. Where earlier turns are rewritten, as by templates that
  leave the thoughts of earlier turns out, the part must begin with the prompt alone;
- the conversation with another content in the turn: it shows what is written before any content.
  Where the prompt goes on otherwise, such as with thoughts that the turn does not have, the turn
  begins where the two part, after the special token that names the assistant.

The turn ends with the special token at the end of its part. Where the three do not agree, the
conversation is refused.
"""

import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.data import chat_template
from lora_jax.data.chat_template import ChatTemplate
from lora_jax.data.template_program import PROBE, Message, Span, Traced, marks_generation

_ASSISTANT = "assistant"
_QUESTION: Message = {"role": "user", "content": "a"}


class Turn(NamedTuple):
    """A turn of the assistant.

    Attributes:
      message: number of the message.
      begin: place of its first character in the text.
      end: place after its last character.
    """

    message: int
    begin: int
    end: int


class _Case(NamedTuple):
    """A conversation, and what it was written as.

    Attributes:
      template: the template.
      messages: messages of the conversation.
      options: options of :func:`chat_template.trace`.
      whole: the whole conversation as text.
      special: the special tokens.
    """

    template: ChatTemplate
    messages: Sequence[Message]
    options: Mapping[str, Any]
    whole: Traced
    special: Sequence[str]


def find_turns(
    template: ChatTemplate,
    messages: Sequence[Message],
    special: Sequence[str] = (),
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    values: Mapping[str, Any] | None = None,
    now: datetime.datetime | None = None,
) -> tuple[Traced, list[Turn]]:
    """Writes a conversation as one text, and finds the turns of the assistant in it.

    Args:
      template: the model's template.
      messages: messages of the conversation.
      special: the special tokens, of which one ends a turn.
      tools: JSON schemas of the tools that the assistant may call.
      values: further values for the template.
      now: time that the template takes for the present; None for the clock.

    Returns:
      The text, with the part of each message, and the turns in their order. A template with
      ``{% generation %}`` may mark several parts of one turn, or none.

    Raises:
      ValueError: the template fails, or writes a text in which turns can't be bounded.
    """
    now = now or datetime.datetime.now()
    options: dict[str, Any] = {"tools": tools, "values": values, "now": now}
    plain = chat_template.render(template, messages, **options)
    whole = chat_template.trace(template, messages, **options)
    if whole.text != plain.text:  # the template has looked at the marks
        whole = plain
    case = _Case(template, messages, options, whole, _list_ends(template, special))
    if marks_generation(chat_template.choose(template, tools)):
        return whole, _find_marked(case, plain.generated or [])
    numbers = [k for k, message in enumerate(messages) if message["role"] == _ASSISTANT]
    turns = [_find_turn(case, k) for k in numbers]
    for one, other in zip(turns, turns[1:], strict=False):
        if one.end > other.begin:
            raise ValueError(_explain(case, other.message, "it is written into another turn"))
    _check_others(case)
    return whole, turns


def _check_others(case: _Case) -> None:
    """Refuses messages of others that are written into the part of a turn, as results of tools.

    A message after the first turn that has no part of its own is written with another content, to
    see where that stands.
    """
    roles = [message["role"] for message in case.messages]
    parts = case.whole.parts
    for k in range(roles.index(_ASSISTANT) if _ASSISTANT in roles else len(roles), len(roles)):
        if not parts or k in parts or roles[k] == _ASSISTANT:
            continue
        other = _replace_content(case, k)
        place = other.text.find(PROBE) if other else -1
        if (
            other
            and place >= 0
            and any(
                begin <= place < end
                for n, (begin, end) in other.parts.items()
                if roles[n] == _ASSISTANT
            )
        ):
            raise ValueError(_explain(case, k, "it is written into a turn of the assistant's"))


def _replace_content(case: _Case, k: int) -> Traced | None:
    """Writes the conversation with another content in a message; None if it can't be written."""
    messages = [*case.messages]
    messages[k] = {**messages[k], "content": PROBE}
    try:
        return chat_template.trace(case.template, messages, **case.options)
    except ValueError:
        return None


def _list_ends(template: ChatTemplate, special: Sequence[str]) -> list[str]:
    return [x for x in dict.fromkeys([*special, template.tokens.get("eos_token", "")]) if x]


def _find_marked(case: _Case, spans: Sequence[Span]) -> list[Turn]:
    """Returns the parts that the template marks, each with the number of its message."""
    numbers = [k for k, message in enumerate(case.messages) if message["role"] == _ASSISTANT]
    turns = []
    for place, (begin, end) in enumerate(spans):
        owner = _find_owner(case, begin)
        if owner is None and len(spans) == len(numbers):
            owner = numbers[place]
        if owner not in numbers:
            words = case.whole.text[begin:end]
            raise ValueError(
                f"the chat template {case.template.origin} marks {words!r:.80} as generated, which "
                "is written for no message of the assistant's"
            )
        turns.append(Turn(owner, begin, end))
    return turns


def _find_owner(case: _Case, place: int) -> int | None:
    """Finds the message whose part a place is in, or behind; None if the parts are not known."""
    begun = {k: begin for k, (begin, _) in case.whole.parts.items() if begin <= place}
    return max(begun, key=begun.__getitem__, default=None)


def _find_turn(case: _Case, k: int) -> Turn:
    """Finds the turn of the message number ``k``."""
    part = case.whole.parts.get(k)
    begin = _find_begin(case, k, part)
    end = part[1] if part else _find_end(case, k)
    if begin >= end:
        raise ValueError(_explain(case, k, "nothing of it is written after the prompt for it"))
    return Turn(k, begin, _find_special_end(case, k, begin, end))


def _find_begin(case: _Case, k: int, part: Span | None) -> int:
    """Finds where the prompt for a turn ends."""
    before = _write_prompt(case, case.messages[:k])
    text = case.whole.text
    first, last = part or (0, len(text))
    if before and text.startswith(before.text) and first <= len(before.text) <= last:
        return len(before.text)
    if part is None:
        raise ValueError(_explain(case, k, "the prompt for it is written differently"))
    if not k:  # nothing is before it, so that the prompt is that of any question
        before = _write_prompt(case, [_QUESTION])
    prompt = before and _cut_prompt(before)
    if prompt is None:
        raise ValueError(_explain(case, k, "the prompt for it can't be told from the rest"))
    written = text[first:last]
    if written.startswith(prompt):
        return first + len(prompt)
    head = _find_head(case, k, written)
    if prompt and head.endswith(prompt):  # the first message's part has the beginning of the text
        return first + len(head)
    shared = os.path.commonprefix([head, prompt])
    if shared and (shared == head or any(token in shared for token in case.special)):
        return first + len(shared)
    raise ValueError(_explain(case, k, "the prompt for it is written differently"))


def _write_prompt(case: _Case, messages: Sequence[Message]) -> Traced | None:
    """Writes messages and the prompt after them; None if the conversation can't begin otherwise.

    Raises:
      ValueError: the template refuses messages that it writes as part of the conversation.
    """
    write = chat_template.trace if case.whole.parts else chat_template.render
    try:
        return write(case.template, messages, prompt=True, **case.options)
    except ValueError as error:
        if not messages:  # many templates look at the first message, and here there is none
            return None
        raise ValueError(
            _explain(case, len(messages), f"the prompt for it can't be written ({error})")
        ) from error


def _cut_prompt(before: Traced) -> str | None:
    """Returns what is written after the last message, or None if that is not known."""
    ends = [end for _, end in before.parts.values()]
    return before.text[max(ends) :] if ends else None


def _find_head(case: _Case, k: int, written: str) -> str:
    """Finds what is written before a turn whatever its content is."""
    other = _replace_content(case, k)
    part = other.parts.get(k) if other else None
    return os.path.commonprefix([written, other.text[slice(*part)]]) if other and part else ""


def _find_end(case: _Case, k: int) -> int:
    """Finds where the conversation ends that is cut after a turn."""
    after = chat_template.render(case.template, case.messages[: k + 1], **case.options).text
    if not case.whole.text.startswith(after):
        raise ValueError(_explain(case, k, "it is written differently"))
    return len(after)


def _find_special_end(case: _Case, k: int, begin: int, end: int) -> int:
    """Finds the end of the special token at the end of a turn; its end, if there is none."""
    text = case.whole.text
    words = text[begin:end].rstrip()
    if any(words.endswith(token) for token in case.special):
        return begin + len(words)
    # Some templates write the token after the loop, or at the beginning of what follows.
    rest = text[end:].lstrip()
    is_last = k == len(case.messages) - 1
    ends = case.special if is_last else [case.template.tokens.get("eos_token", "")]
    token = next((x for x in ends if x and rest.startswith(x)), "")
    return len(text) - len(rest) + len(token) if token else end


def _explain(case: _Case, turn: int, reason: str) -> str:
    return (
        f"message {turn}: {reason}, so that it can't be told what the assistant says; mark that in "
        f"the chat template {case.template.origin} with {{% generation %}} and {{% endgeneration "
        "%}, or give one conversation for each turn"
    )
