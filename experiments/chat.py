"""Talks to a language model, with a trained adapter or without.

python -m experiments.chat --adapter=runs/instruct/adapter "Who are you?"
python -m experiments.chat --adapter=runs/instruct/adapter
python -m experiments.chat --adapter=runs/instruct/adapter --compare --ask="Who are you?"

Without a message, each line of stdin is a message of the user's, and the conversation goes on until
its end. Each --ask is a conversation of its own. With --compare the reply of the model without the
adapter stands beside that with it. The adapter may be in this library's format or in PEFT's. With
--model alone, the model replies as it is; it may be one that experiments.export has merged.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import cli, lazy

with lazy.imports():
    from lora_jax.tasks import chat

if TYPE_CHECKING:
    from lora_jax.data.chat_template import Message
    from lora_jax.tasks.chat import ChatModel

_ADAPTER = flags.DEFINE_string("adapter", None, "Directory of the adapter.")
_MODEL = flags.DEFINE_string("model", None, "The base, if it moved; or a model without adapter.")
_ASK = flags.DEFINE_multi_string("ask", [], "A question, each in a conversation of its own.")
_COMPARE = flags.DEFINE_bool("compare", False, "Also reply without the adapter, for --ask.")
_SYSTEM = flags.DEFINE_string("system", None, "A first message, of the role system.")
_NEW = flags.DEFINE_integer("max_new_tokens", 256, "Largest number of tokens of a reply.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Temperature of sampling; 0 for the most likely token."
)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample the most likely tokens that together have this probability."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling.")
_COLUMNS = ("without the adapter", "with the adapter")


def main(argv: list[str]) -> None:
    """Prints a reply to the message, to each question, or to each line of stdin."""
    _check(argv)
    options = _read_options()
    if _COMPARE.value and _ADAPTER.value is not None:  # `_check` asks for both
        pair = chat.load_pair(_ADAPTER.value, model=_MODEL.value, **options)
        _print_notes(pair[0])
        _ask(pair, _COLUMNS)
        return
    model = chat.load(_ADAPTER.value, model=_MODEL.value, **options)
    _print_notes(model)
    if _ASK.value:
        _ask([model])
        return
    _talk(model, [" ".join(argv)] if argv else _lines())


def _print_notes(model: ChatModel) -> None:
    for note in model.notes:
        print(f"assumed: {note}", file=sys.stderr)


def _check(argv: list[str]) -> None:
    """Raises ValueError where flags and arguments do not go together."""
    if argv and _ASK.value:
        raise ValueError(f"--ask has the questions, and {' '.join(argv)!r} is another: add --ask.")
    if _COMPARE.value and not (_ASK.value and _ADAPTER.value):
        raise ValueError(
            "--compare is for questions and an adapter: give --ask=QUESTION and --adapter."
        )


def _read_options() -> dict[str, Any]:
    """Returns the settings by which tokens are chosen."""
    options: dict[str, Any] = {"max_new_tokens": _NEW.value}
    if _TEMPERATURE.value:
        return options | {"sample": True, "temperature": _TEMPERATURE.value, "top_p": _TOP_P.value}
    if _TOP_P.value != 1:
        raise ValueError(f"--top_p={_TOP_P.value} is for sampling, and --temperature is 0: set it.")
    return options


def _talk(model: ChatModel, texts: Sequence[str] | Iterator[str]) -> None:
    """Replies to the user's messages, which are one conversation."""
    messages = _begin()
    for turn, text in enumerate(texts):
        messages.append({"role": "user", "content": text})
        answer = chat.reply(model, messages, seed=_SEED.value + turn, say=_tell)
        messages.append({"role": "assistant", "content": answer})
        print(answer, flush=True)


def _ask(models: Sequence[ChatModel], heads: Sequence[str] = ()) -> None:
    """Prints each question, and below it the reply; of several models, side by side with heads."""
    for question in _ASK.value:
        messages = [*_begin(), {"role": "user", "content": question}]
        answers = [chat.reply(m, messages, seed=_SEED.value, say=_tell) for m in models]
        text = _set_in_columns(heads, answers) if heads else answers[0]
        print(f"> {question}\n{text}\n", flush=True)


def _tell(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)


def _begin() -> list[Message]:
    return [{"role": "system", "content": _SYSTEM.value}] if _SYSTEM.value else []


def _set_in_columns(heads: Sequence[str], texts: Sequence[str]) -> str:
    """Sets texts under their heads, side by side, as wide as the terminal."""
    width = max(20, (shutil.get_terminal_size((100, 24)).columns + 3) // len(texts) - 3)
    wrap = lambda line: textwrap.wrap(line, width) or [""]
    columns = [
        [head, "-" * width, *(part for line in text.splitlines() for part in wrap(line))]
        for head, text in zip(heads, texts, strict=True)
    ]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(part.ljust(width) for part in row).rstrip() for row in rows)


def _lines() -> Iterator[str]:
    """Yields lines of stdin that are not blank, with a prompt for a person."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


if __name__ == "__main__":
    cli.run(main)
