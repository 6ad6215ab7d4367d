"""Reads conversations from files, and tokenizes them so that the assistant's tokens count."""

import datetime
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from lora_jax.data import (
    assistant_spans,
    conversation_files,
    conversation_formats,
    template_keys,
    tutor,
)
from lora_jax.data.chat_template import ChatTemplate
from lora_jax.data.template_program import Message, Span
from lora_jax.data.texts import Texts

_EMBEDDED = {f"tutor:{split}": path for split, path in tutor.SPLITS.items()}
_MAX_PROBLEMS = 20  # number of problems in one message


class Conversation(NamedTuple):
    """One row of a file.

    Attributes:
      messages: messages, each with "role" and "content".
      place: "file:line", for errors.
      is_learned: for each message, whether it is learned; () if all of the assistant's are.
      tools: JSON schemas of the tools that the assistant may call; None for none.
      values: further values for the chat template.
    """

    messages: Sequence[Mapping[str, Any]]
    place: str
    is_learned: tuple[bool, ...] = ()
    tools: list[dict[str, Any]] | None = None
    values: Mapping[str, Any] = {}


class Fit(NamedTuple):
    """Numbers of conversations that were too long.

    Attributes:
      cut: number of those whose end was cut off.
      left_out: number of those that were left out, as nothing to learn remained.
    """

    cut: int
    left_out: int


def read(
    source: str | Path,
    *,
    format: str = conversation_formats.AUTO,
    ignore: Collection[str] = (),
) -> list[Conversation]:
    """Reads the conversations of a file, of a folder, or of a data set.

    Args:
      source: as for :func:`conversation_files.read`; or "tutor:train" or "tutor:validation", which
        come with the package.
      format: name of the format of its rows, one of :data:`conversation_formats.FORMATS`; "auto"
        to find it by their keys.
      ignore: keys of rows that are left out.

    Raises:
      ValueError: rows are not in the format; all are in one message, by file and line. Or an
        embedded file of this name does not exist.
      OSError: the file can't be read.
    """
    conversations, problems = [], []
    for row in conversation_files.read(_find(source)):
        try:
            if row.problem:
                raise ValueError(row.problem)
            parsed = conversation_formats.parse(row.value, format, ignore)
        except ValueError as error:
            problems.append((row.place, error))
        else:
            messages, is_learned = parsed.messages
            conversations.append(
                Conversation(messages, row.place, is_learned, parsed.tools, parsed.values)
            )
    _raise_problems(problems)
    return conversations


def _find(source: str | Path) -> str | Path:
    """Finds the file of a source."""
    if str(source).startswith("tutor:") and source not in _EMBEDDED:
        raise ValueError(f"There is no {source!r}; the embedded files are {', '.join(_EMBEDDED)}.")
    return _EMBEDDED.get(str(source), source)


def _raise_problems(problems: Sequence[tuple[str, ValueError]]) -> None:
    """Raises problems with their places: one line for all rows that have the same one."""
    places: dict[str, list[str]] = {}
    for place, error in problems:
        places.setdefault(" ".join(str(error).splitlines()), []).append(place)
    lines = [_describe_problem(problem, found) for problem, found in places.items()]
    if len(lines) > _MAX_PROBLEMS:
        lines[_MAX_PROBLEMS:] = [f"and {len(lines) - _MAX_PROBLEMS} more"]
    if lines:
        raise ValueError("\n".join(lines))


def _describe_problem(problem: str, places: Sequence[str]) -> str:
    first, *others = places
    if not others:
        return f"{first}: {problem}"
    rows = "row" if len(others) == 1 else "rows"
    return f"{first}: {problem} (the same in {len(others)} more {rows}, the next: {others[0]})"


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
      ValueError: the template refuses conversations, or leaves out something of them, which the
        message lists by file and line; or all conversations are left out.
    """
    rows, problems = [], []
    special = list_special_tokens(tokenizer)
    for conversation in conversations:
        try:
            text, spans = _write(conversation, template, special, now)
        except ValueError as error:
            problems.append((conversation.place, error))
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


def _write(
    conversation: Conversation,
    template: ChatTemplate,
    special: Sequence[str],
    now: datetime.datetime,
) -> tuple[str, list[Span]]:
    """Writes a conversation as one text, all of which is used, and finds what is learned of it."""
    messages, tools, values = conversation.messages, conversation.tools, conversation.values
    messages = template_keys.check(template, messages, tools, values)
    options: dict[str, Any] = {"tools": tools, "values": values, "now": now}
    written, turns = assistant_spans.find_turns(template, messages, special, **options)
    template_keys.check_written(template, messages, written, turns)
    is_learned = conversation.is_learned or (True,) * len(messages)
    spans = [(turn.begin, turn.end) for turn in turns if is_learned[turn.message]]
    if not spans:
        raise ValueError(f"the chat template {template.origin} marks nothing of it as generated")
    return written.text, spans


def find_assistant_spans(
    template: ChatTemplate,
    messages: Sequence[Message],
    special: Sequence[str] = (),
    *,
    now: datetime.datetime | None = None,
) -> tuple[str, list[Span]]:
    """Writes a conversation as one text, and finds the turns of the assistant in it.

    See :func:`assistant_spans.find_turns`.

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
    written, turns = assistant_spans.find_turns(template, messages, special, now=now)
    return written.text, [(turn.begin, turn.end) for turn in turns]


def list_special_tokens(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """Lists the special tokens as text, the longest first, as one may begin with another."""
    tokens = tokenizer.get_added_tokens_decoder().values()
    return sorted((t.content for t in tokens if t.special), key=len, reverse=True)


def _encode(
    tokenizer: tokenizers.Tokenizer, text: str, spans: Sequence[Span]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens, int32 ``(n,)``, and int32 1 for each that has a character in a span."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    counts = np.zeros(len(encoding.ids), np.int32)
    for begin, end in spans:
        counts[(ends > begin) & (begins < end)] = 1
    counts[:1] = 0  # the first token can't be predicted, as nothing is before it
    return np.array(encoding.ids, np.int32), counts
