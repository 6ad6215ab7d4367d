"""Conversations: read from JSON lines, and turned into tokens of which the assistant's count."""

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from lora_jax.data import chat_template
from lora_jax.data.chat_template import ChatTemplate
from lora_jax.data.texts import Texts

_MOST = 20  # problems shown in one message


class Conversation(NamedTuple):
    """One line of a file.

    Attributes:
      messages: each with "role" and "content".
      place: "file:line", for messages about it.
    """

    messages: list[dict[str, Any]]
    place: str


class Fit(NamedTuple):
    """How many conversations were too long: those cut, and those with nothing left to learn."""

    cut: int
    left_out: int


def read(path: str | Path) -> list[Conversation]:
    """Reads a file with one JSON object a line: ``{"messages": [{"role": ..., "content": ...}]}``.

    Raises:
      ValueError: lines that are not as they should be, all in one message, by file and line.
      OSError: the file can't be read.
    """
    found, problems = [], []
    for number, line in enumerate(_lines(Path(path)), 1):
        place = f"{path}:{number}"
        messages, problem = _parsed(line)
        if problem:
            problems.append(f"{place}: {problem}")
        found.append(Conversation(messages, place))
    _raise(problems)
    return found


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8 at byte {error.start} of the file; convert it to UTF-8."
        ) from error
    if not text.strip():
        raise ValueError(f"{path}: empty file, where conversations were expected, one a line.")
    return text.removesuffix("\n").split("\n")


def _raise(problems: Sequence[str]) -> None:
    more = f"\nand {len(problems) - _MOST} more" if len(problems) > _MOST else ""
    if problems:
        raise ValueError("\n".join(problems[:_MOST]) + more)


def _parsed(line: str) -> tuple[list[dict[str, Any]], str]:
    """The messages of a line, and what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return [], f"no JSON object ({error})"
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        keys = f"; it has {', '.join(sorted(row))}" if isinstance(row, dict) else ""
        return [], f'there must be a list "messages" that is not empty{keys}'
    problem = next((x for k, m in enumerate(messages) if (x := _wrong(k, m))), "")
    if not problem and not any(m["role"] == "assistant" for m in messages):
        problem = "no message is of the role 'assistant', so there is nothing to learn"
    return messages, problem


def _wrong(k: int, message: Any) -> str:
    """What is wrong with the message number ``k``."""
    if not isinstance(message, dict):
        return f"message {k} is no object with a role and a content"
    for name in ("role", "content"):
        if not isinstance(message.get(name), str):
            has = f"is {message[name]!r}" if name in message else "is missing"
            return f"message {k}: {name} {has}, and must be a string"
    if any(mark in message["content"] for mark in (chat_template.OPEN, chat_template.CLOSE)):
        return f"message {k} holds the noncharacter U+FDD0 or U+FDD1; remove it"
    return ""


def tokenize(
    conversations: Sequence[Conversation],
    template: ChatTemplate,
    tokenizer: tokenizers.Tokenizer,
    *,
    max_length: int,
    now: datetime.datetime,
) -> tuple[Texts, Fit]:
    """Tokens of the conversations, of which those that the assistant says count.

    A conversation longer than ``max_length`` tokens is cut at the end; it is left out if nothing of
    the assistant's remains.

    Raises:
      ValueError: the template refuses conversations, by file and line; or nothing is left at all.
    """
    rows, problems = [], []
    special = special_tokens(tokenizer)
    for conversation in conversations:
        try:
            text, spans = assistant_spans(template, conversation.messages, special, now=now)
        except ValueError as error:
            problems.append(f"{conversation.place}: {error}")
        else:
            rows.append(_encoded(tokenizer, text, spans))
    _raise(problems)
    short = [(ids[:max_length], counts[:max_length]) for ids, counts in rows]
    kept = [(ids, counts) for ids, counts in short if counts.any()]
    if not kept:
        raise ValueError(
            f"data.max_length {max_length} leaves no token of the assistant in any conversation."
        )
    fit = Fit(sum(len(ids) > max_length for ids, _ in rows), len(rows) - len(kept))
    join = lambda k: np.concatenate([row[k] for row in kept], dtype=np.int32)
    offsets = np.cumsum([0, *(len(ids) for ids, _ in kept)], dtype=np.int64)
    return Texts(join(0), offsets, join(1)), fit


def assistant_spans(
    template: ChatTemplate,
    messages: Sequence[dict[str, Any]],
    special: Sequence[str] = (),
    *,
    now: datetime.datetime | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as one text, and where in it the assistant speaks.

    A turn is what the model has to generate after the prompt for it: the content, and the special
    token that ends it. Where the template marks what is generated, its marks are taken; otherwise a
    turn begins where the prompt for it ends.

    Args:
      template: of the model.
      messages: the conversation.
      special: the special tokens.
      now: as of :func:`chat_template.render`.

    Returns:
      The text, and (begin, end) of each turn in characters.

    Raises:
      ValueError: the template fails, or writes the text such that turns can't be told.
    """
    text, spans = chat_template.render(template, messages, now=now)
    if spans is not None:
        return text, spans
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    found: list[tuple[int, int]] = []
    for k in turns:
        before = chat_template.render(template, messages[:k], prompt=True, now=now).text
        if not text.startswith(before):
            raise ValueError(_unclear(template, k, "the prompt for it is written differently"))
        after = chat_template.render(template, messages[: k + 1], now=now).text
        # Without a special token, a turn ends where its message does.
        bound = len(after) if text.startswith(after) else None
        end = _content_end(text[:bound], len(before), messages[k]["content"], special) or bound
        if end is None:
            raise ValueError(_unclear(template, k, "it is written differently"))
        found.append((len(before), end))
    return text, found


def _content_end(text: str, begin: int, content: str, special: Sequence[str]) -> int | None:
    """Where the special token after the content ends."""
    if not special:
        return None
    ends = "|".join(map(re.escape, special))
    match = re.compile(rf"{re.escape(content.strip())}\s*(?:{ends})").search(text, begin)
    return match and match.end()


def _unclear(template: ChatTemplate, turn: int, how: str) -> str:
    return (
        f"message {turn}: {how} where more of the conversation follows, so that it can't be told "
        f"what the assistant says; mark that in the chat template {template.origin} with "
        "{% generation %} and {% endgeneration %}, or give one conversation for each turn"
    )


def special_tokens(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """The special tokens as text, the longest first."""
    added = tokenizer.get_added_tokens_decoder().values()
    # In this order, as one may begin with another.
    return sorted((t.content for t in added if t.special), key=len, reverse=True)


def _encoded(
    tokenizer: tokenizers.Tokenizer, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and 1 for each that has a character in a span."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    counts = np.zeros(len(encoding.ids), np.int32)
    for begin, end in spans:
        counts[(ends > begin) & (begins < end)] = 1
    counts[:1] = 0  # there is nothing to guess the first one from
    return np.array(encoding.ids, np.int32), counts
