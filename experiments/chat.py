"""Talks to a language model with a trained adapter.

python -m experiments.chat --adapter=runs/instruct/adapter "Who are you?"
python -m experiments.chat --adapter=runs/instruct/adapter

Without a message, each line of stdin is one turn of the user's, and the conversation goes on until
its end. The adapter may be one that training has left, or a directory in PEFT's format; with
--model alone, a model speaks as it is, such as one that experiments.export has merged.
"""

import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from experiments import cli
from lora_jax.data.chat_template import Message
from lora_jax.tasks import chat

_ADAPTER = flags.DEFINE_string("adapter", None, "Directory of the adapter.")
_MODEL = flags.DEFINE_string("model", None, "The base, if it moved; or a model without adapter.")
_SYSTEM = flags.DEFINE_string("system", None, "A first message, of the role system.")
_NEW = flags.DEFINE_integer("max_new_tokens", 256, "How long a reply is at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of sampling; 0 for the likeliest token.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample the likeliest tokens of this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")


def main(argv: list[str]) -> None:
    """Prints a reply to the message, or to each line of stdin."""
    options: dict[str, Any] = {"max_new_tokens": _NEW.value}
    if _TEMPERATURE.value:
        options |= {"sample": True, "temperature": _TEMPERATURE.value, "top_p": _TOP_P.value}
    elif _TOP_P.value != 1:
        raise ValueError(f"--top_p={_TOP_P.value} is for sampling, and --temperature is 0: set it.")
    speaker = chat.load(_ADAPTER.value, model=_MODEL.value, **options)
    messages: list[Message] = []
    if _SYSTEM.value:
        messages.append({"role": "system", "content": _SYSTEM.value})
    for turn, said in enumerate([" ".join(argv)] if argv else _lines()):
        messages.append({"role": "user", "content": said})
        answer = chat.reply(speaker, messages, seed=_SEED.value + turn)
        messages.append({"role": "assistant", "content": answer})
        print(answer, flush=True)


def _lines() -> Iterator[str]:
    """Lines of stdin that are not blank, with a prompt for a person."""
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
