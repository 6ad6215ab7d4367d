"""Talks to a language model with a trained adapter.

python -m experiments.chat --adapter=runs/instruct/adapter "Who are you?"
python -m experiments.chat --adapter=runs/instruct/adapter

Without a message, each line of stdin is one turn of the user's, and the conversation goes on until
its end. The adapter may be one that training has left, or a directory in PEFT's format.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
from absl import flags

import lora_jax as lora
from experiments import chat_template, cli, conversations, language
from experiments.chat_template import ChatTemplate, Message
from lora_jax.models import checkpoints, generate
from lora_jax.models.decoding import Decoding

_ADAPTER = flags.DEFINE_string("adapter", None, "Directory of the adapter.", required=True)
_MODEL = flags.DEFINE_string("model", None, "The base model, if it moved since training.")
_SYSTEM = flags.DEFINE_string("system", None, "A first message, of the role system.")
_NEW = flags.DEFINE_integer("max_new_tokens", 256, "How long a reply is at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of sampling; 0 for the likeliest token.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample the likeliest tokens of this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")

_STEP = 64  # prompts are padded to a multiple of it: one compilation for each length


class Speaker(NamedTuple):
    """What replies to messages.

    Attributes:
      run: ``(params, inputs, key) -> Generated``.
      params: with the adapter merged into them.
      template: of the model.
      tokenizer: of the model.
      decoding: how tokens are chosen.
    """

    run: Callable
    params: Any
    template: ChatTemplate
    tokenizer: tokenizers.Tokenizer
    decoding: Decoding


def load(directory: str, *, model: str | None = None, **options: Any) -> Speaker:
    """Loads an adapter and its base.

    Args:
      directory: of the adapter, of either format.
      model: name or directory of the base, where it is no longer found under its old name.
      **options: fields of :class:`Decoding`.

    Raises:
      FileNotFoundError, ValueError: adapter, base, or chat template are missing or damaged, or do
        not belong together.
    """
    found = language.load(directory, model=model)
    loaded = found.loaded
    tokenizer = checkpoints.load_tokenizer(loaded.checkpoint)
    template = chat_template.find(loaded.checkpoint)
    stop = stop_tokens(loaded.checkpoint, template, tokenizer)
    decoding = Decoding(stop=stop, pad_id=min(stop, default=0), **options)
    run = generate.generator(*generate.causal_lm(loaded.model, loaded.family.init_cache), decoding)
    params = lora.merge(loaded.params, found.adapter)
    return Speaker(run, params, template, tokenizer, decoding)


def stop_tokens(
    checkpoint: checkpoints.Checkpoint, template: ChatTemplate, tokenizer: tokenizers.Tokenizer
) -> tuple[int, ...]:
    """The tokens that end a reply: those the model's files name, and the template's own."""
    path = checkpoint.directory / "generation_config.json"
    about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    said = [words.get("eos_token_id") for words in (about, checkpoint.config)]
    found = {x for ids in said for x in (ids if isinstance(ids, list) else [ids]) if x is not None}
    found.add(tokenizer.token_to_id(template.tokens.get("eos_token", "")))
    found.add(tokenizer.token_to_id(_end_of_turn(template, tokenizer)))
    return tuple(sorted(found - {None}))


def _end_of_turn(template: ChatTemplate, tokenizer: tokenizers.Tokenizer) -> str:
    """The special token with which the template ends what the assistant says; "" for none."""
    special = conversations.special_tokens(tokenizer)
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text, spans = conversations.assistant_spans(template, probe, special)
    said = text[slice(*spans[-1])].rstrip()
    return next((token for token in special if said.endswith(token)), "")


def reply(speaker: Speaker, messages: Sequence[Message], *, seed: int = 0) -> str:
    """What the assistant says next.

    Raises:
      ValueError: the template refuses the messages.
    """
    text = chat_template.render(speaker.template, messages, prompt=True).text
    ids = speaker.tokenizer.encode(text, add_special_tokens=False).ids
    length = -(-len(ids) // _STEP) * _STEP
    batch = generate.left_padded([ids], pad_id=speaker.decoding.pad_id, length=length)
    made = speaker.run(speaker.params, batch, jax.random.key(seed))
    tokens = np.asarray(made.tokens)[0, : int(made.lengths[0])].tolist()
    return speaker.tokenizer.decode([t for t in tokens if t not in speaker.decoding.stop]).strip()


def main(argv: list[str]) -> None:
    """Prints a reply to the message, or to each line of stdin."""
    options: dict[str, Any] = {"max_new_tokens": _NEW.value}
    if _TEMPERATURE.value:
        options |= {"sample": True, "temperature": _TEMPERATURE.value, "top_p": _TOP_P.value}
    elif _TOP_P.value != 1:
        raise ValueError(f"--top_p={_TOP_P.value} is for sampling, and --temperature is 0: set it.")
    speaker = load(_ADAPTER.value, model=_MODEL.value, **options)
    messages: list[Message] = []
    if _SYSTEM.value:
        messages.append({"role": "system", "content": _SYSTEM.value})
    for turn, said in enumerate([" ".join(argv)] if argv else _lines()):
        messages.append({"role": "user", "content": said})
        answer = reply(speaker, messages, seed=_SEED.value + turn)
        messages.append({"role": "assistant", "content": answer})
        print(answer, flush=True)


def _lines() -> Any:
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
