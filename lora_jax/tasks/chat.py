"""What a trained language model replies to messages."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers

import lora_jax as lora
from lora_jax.data import chat_template, conversations
from lora_jax.data.chat_template import ChatTemplate, Message
from lora_jax.models import checkpoints, generate
from lora_jax.models.decoding import Decoding
from lora_jax.models.families import CAUSAL_LM
from lora_jax.tasks import language_model

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


def load(directory: str | None, *, model: str | None = None, **options: Any) -> Speaker:
    """Loads an adapter and its base, or a model alone.

    Args:
      directory: of the adapter, of either format; None for the model as it is.
      model: name or directory of the model; with an adapter only where it is no longer found under
        its old name.
      **options: fields of :class:`Decoding`.

    Raises:
      FileNotFoundError, ValueError: adapter, base, or chat template are missing or damaged, or do
        not belong together.
    """
    loaded, params = _model(directory, model)
    tokenizer = checkpoints.load_tokenizer(loaded.checkpoint)
    template = chat_template.find(loaded.checkpoint)
    stop = stop_tokens(loaded.checkpoint, template, tokenizer)
    decoding = Decoding(stop=stop, pad_id=min(stop, default=0), **options)
    run = generate.generator(*generate.causal_lm(loaded.model, loaded.family.init_cache), decoding)
    return Speaker(run, params, template, tokenizer, decoding)


def _model(directory: str | None, model: str | None) -> tuple[checkpoints.Loaded, Any]:
    """The model, and its parameters with the adapter merged into them."""
    if directory is not None:
        found = language_model.load(directory, model=model)
        return found.loaded, lora.merge(found.loaded.params, found.adapter)
    if model is None:
        raise ValueError("Say what is to reply: give an adapter or a model (--adapter, --model).")
    loaded = checkpoints.load(model, head=CAUSAL_LM)
    return loaded, loaded.params


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
    special = conversations.list_special_tokens(tokenizer)
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text, spans = conversations.find_assistant_spans(template, probe, special)
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
    batch = generate.pad_left([ids], pad_id=speaker.decoding.pad_id, length=length)
    made = speaker.run(speaker.params, batch, jax.random.key(seed))
    tokens = np.asarray(made.tokens)[0, : int(made.lengths[0])].tolist()
    return speaker.tokenizer.decode([t for t in tokens if t not in speaker.decoding.stop]).strip()
