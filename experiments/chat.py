"""Talks to a language model with a trained adapter.

python -m experiments.chat --adapter=runs/instruct/adapter "Who are you?"
python -m experiments.chat --adapter=runs/instruct/adapter

Without a message, each line of stdin is a message of the user's, and the conversation goes on until
its end. The adapter may be in this library's format or in PEFT's. With --model alone, the model
replies as it is; it may be one that experiments.export has merged.
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
_NEW = flags.DEFINE_integer("max_new_tokens", 256, "Largest number of tokens of a reply.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Temperature of sampling; 0 for the most likely token."
)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample the most likely tokens that together have this probability."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling.")


def main(argv: list[str]) -> None:
    """Prints a reply to the message, or to each line of stdin."""
    options: dict[str, Any] = {"max_new_tokens": _NEW.value}
    if _TEMPERATURE.value:
        options |= {"sample": True, "temperature": _TEMPERATURE.value, "top_p": _TOP_P.value}
    elif _TOP_P.value != 1:
        raise ValueError(f"--top_p={_TOP_P.value} is for sampling, and --temperature is 0: set it.")
    model = chat.load(_ADAPTER.value, model=_MODEL.value, **options)
    messages: list[Message] = []
    if _SYSTEM.value:
        messages.append({"role": "system", "content": _SYSTEM.value})
    for turn, text in enumerate([" ".join(argv)] if argv else _lines()):
        messages.append({"role": "user", "content": text})
        answer = chat.reply(model, messages, seed=_SEED.value + turn)
        messages.append({"role": "assistant", "content": answer})
        print(answer, flush=True)


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
