"""Reads conversations from JSON lines, and tokenizes them so that the assistant's tokens count."""

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from lora_jax.data import chat_template, tutor
from lora_jax.data.chat_template import ChatTemplate
from lora_jax.data.texts import Texts

_EMBEDDED = {f"tutor:{split}": path for split, path in tutor.SPLITS.items()}
_MAX_PROBLEMS = 20  # number of problems in one message


class Conversation(NamedTuple):
    """One line of a file.

    Attributes:
      messages: messages, each with "role" and "content".
      place: "file:line", for errors.
    """

    messages: list[dict[str, Any]]
    place: str


class Fit(NamedTuple):
    """Numbers of conversations that were too long.

    Attributes:
      cut: number of those whose end was cut off.
      left_out: number of those that were left out, as nothing to learn remained.
    """

    cut: int
    left_out: int


def read(source: str | Path) -> list[Conversation]:
    """Reads a file with one JSON object a line: ``{"messages": [{"role": ..., "content": ...}]}``.

    Args:
      source: path of the file; or "tutor:train" or "tutor:validation", which come with the package.

    Raises:
      ValueError: lines are not in this form; all are in one message, by file and line. Or an
        embedded file of this name does not exist.
      OSError: the file can't be read.
    """
    path = _find(source)
    conversations, problems = [], []
    for number, line in enumerate(_read_lines(path), 1):
        place = f"{path}:{number}"
        messages, problem = _parse(line)
        if problem:
            problems.append(f"{place}: {problem}")
        conversations.append(Conversation(messages, place))
    _raise_problems(problems)
    return conversations


def _find(source: str | Path) -> Path:
    """Finds the file of a source."""
    if str(source).startswith("tutor:") and source not in _EMBEDDED:
        raise ValueError(f"There is no {source!r}; the embedded files are {', '.join(_EMBEDDED)}.")
    return Path(_EMBEDDED.get(str(source), source))


def _read_lines(path: Path) -> list[str]:
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


def _raise_problems(problems: Sequence[str]) -> None:
    lines = list(problems[:_MAX_PROBLEMS])
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"and {len(problems) - _MAX_PROBLEMS} more")
    if lines:
        raise ValueError("\n".join(lines))


def _parse(line: str) -> tuple[list[dict[str, Any]], str]:
    """Returns the messages of a line, and the problem with it, "" for none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return [], f"no JSON object ({error})"
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        keys = f"; it has {', '.join(sorted(row))}" if isinstance(row, dict) else ""
        return [], f'there must be a list "messages" that is not empty{keys}'
    for k, message in enumerate(messages):
        if problem := _find_problem(k, message):
            return messages, problem
    if not any(message["role"] == "assistant" for message in messages):
        return messages, "no message is of the role 'assistant', so there is nothing to learn"
    return messages, ""


def _find_problem(k: int, message: Any) -> str:
    """Returns the problem with the message number ``k``, "" for none."""
    if not isinstance(message, dict):
        return f"message {k} is no object with a role and a content"
    for name in ("role", "content"):
        if not isinstance(message.get(name), str):
            state = f"is {message[name]!r}" if name in message else "is missing"
            return f"message {k}: {name} {state}, and must be a string"
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
    """Tokenizes conversations, and counts the tokens that the assistant says.

    The end of a conversation longer than ``max_length`` tokens is cut off; the conversation is left
    out if no token of the assistant remains.

    Args:
      conversations: the conversations.
      template: the model's template.
      tokenizer: the model's tokenizer.
      max_length: largest number of tokens of a conversation.
      now: time that the template takes for the present.

    Returns:
      The tokens, and the numbers of conversations that were too long.

    Raises:
      ValueError: the template refuses conversations, which the message lists by file and line; or
        all conversations are left out.
    """
    rows, problems = [], []
    special = list_special_tokens(tokenizer)
    for conversation in conversations:
        try:
            text, spans = find_assistant_spans(template, conversation.messages, special, now=now)
        except ValueError as error:
            problems.append(f"{conversation.place}: {error}")
        else:
            rows.append(_encode(tokenizer, text, spans))
    _raise_problems(problems)
    short_rows = [(ids[:max_length], counts[:max_length]) for ids, counts in rows]
    texts = [(ids, counts) for ids, counts in short_rows if counts.any()]
    if not texts:
        raise ValueError(
            f"data.max_length {max_length} leaves no token of the assistant in any conversation."
        )
    fit = Fit(sum(len(ids) > max_length for ids, _ in rows), len(rows) - len(texts))
    all_ids, all_counts = (
        np.concatenate(part, dtype=np.int32) for part in zip(*texts, strict=True)
    )
    offsets = np.cumsum([0, *(len(ids) for ids, _ in texts)], dtype=np.int64)
    return Texts(all_ids, offsets, all_counts), fit


def find_assistant_spans(
    template: ChatTemplate,
    messages: Sequence[dict[str, Any]],
    special: Sequence[str] = (),
    *,
    now: datetime.datetime | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """Writes a conversation as one text, and finds the turns of the assistant in it.

    A turn is what the model must generate after the prompt for it: the content, and the special
    token that ends it. If the template marks what is generated, its marks are the turns; otherwise
    a turn begins where the prompt for it ends.

    Args:
      template: the model's template.
      messages: messages of the conversation.
      special: the special tokens.
      now: time that the template takes for the present; None for the clock.

    Returns:
      The text, and begin and end of each turn in characters.

    Raises:
      ValueError: the template fails, or writes a text in which turns can't be found.
    """
    text, spans = chat_template.render(template, messages, now=now)
    if spans is not None:
        return text, spans
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    spans = []
    for k in turns:
        before = chat_template.render(template, messages[:k], prompt=True, now=now).text
        if not text.startswith(before):
            raise ValueError(_explain(template, k, "the prompt for it is written differently"))
        after = chat_template.render(template, messages[: k + 1], now=now).text
        # A turn without a special token ends where its message does.
        bound = len(after) if text.startswith(after) else None
        content = messages[k]["content"]
        end = _find_content_end(text[:bound], len(before), content, special) or bound
        if end is None:
            raise ValueError(_explain(template, k, "it is written differently"))
        spans.append((len(before), end))
    return text, spans


def _find_content_end(text: str, begin: int, content: str, special: Sequence[str]) -> int | None:
    """Finds the end of the special token after the content."""
    if not special:
        return None
    ends = "|".join(map(re.escape, special))
    match = re.compile(rf"{re.escape(content.strip())}\s*(?:{ends})").search(text, begin)
    return match and match.end()


def _explain(template: ChatTemplate, turn: int, reason: str) -> str:
    return (
        f"message {turn}: {reason} where more of the conversation follows, so that it can't be "
        f"told what the assistant says; mark that in the chat template {template.origin} with "
        "{% generation %} and {% endgeneration %}, or give one conversation for each turn"
    )


def list_special_tokens(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """Lists the special tokens as text, the longest first, as one may begin with another."""
    tokens = tokenizer.get_added_tokens_decoder().values()
    return sorted((t.content for t in tokens if t.special), key=len, reverse=True)


def _encode(
    tokenizer: tokenizers.Tokenizer, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens, int32 ``(n,)``, and int32 1 for each that has a character in a span."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    counts = np.zeros(len(encoding.ids), np.int32)
    for begin, end in spans:
        counts[(ends > begin) & (begins < end)] = 1
    counts[:1] = 0  # the first token can't be predicted, as nothing is before it
    return np.array(encoding.ids, np.int32), counts
