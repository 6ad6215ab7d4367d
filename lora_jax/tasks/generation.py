"""New texts from a language model: prompts in, tokens out."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tokenizers
from ml_collections import ConfigDict

from lora_jax.models import checkpoints, generate
from lora_jax.models.decoding import Decoding

_ENDS = ("<|endoftext|>", "</s>")


def stop_tokens(loaded: checkpoints.Loaded, tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text: those of the model's config, or else the tokeniser's.

    Raises:
      ValueError: neither says.
    """
    said = loaded.checkpoint.config.get("eos_token_id")
    if said is not None:
        return tuple(said) if isinstance(said, list) else (said,)
    found = [tokenizer.token_to_id(token) for token in _ENDS]
    if found := [token for token in found if token is not None]:
        return (found[0],)
    raise ValueError(
        f"{loaded.checkpoint.name} does not say which token ends a text: put eos_token_id into its "
        "config.json."
    )


def decoding(config: ConfigDict, stop: tuple[int, ...]) -> Decoding:
    """The settings in the part ``decode`` of a config.

    Raises:
      ValueError: as :class:`Decoding`.
    """
    fields = config.decode.to_dict()
    names = ("batch_size", "buckets", "seed", "unadapted")  # of the programs
    return Decoding(
        stop=stop, pad_id=stop[0], **{k: x for k, x in fields.items() if k not in names}
    )


def write(
    loaded: checkpoints.Loaded,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    decoding: Decoding,
    batch_size: int,
    buckets: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """The new tokens for each prompt, without those that end a text.

    Args:
      loaded: a causal language model.
      params: its parameters; an adapter is merged into them.
      prompts: rows of tokens.
      decoding: how tokens are chosen.
      batch_size: prompts at a time.
      buckets: ascending lengths that prompts are padded to; by default the longest prompt's. There
        is one compilation for each.
      seed: of sampling.

    Raises:
      ValueError: prompts and new tokens need more positions than there are; no prompts; or an
        empty one.
    """
    longest = max(map(len, prompts), default=0)
    buckets = [*(b for b in buckets if b < longest), longest]
    run = generate.generator(*generate.causal_lm(loaded.model, loaded.family.init_cache), decoding)
    order = sorted(range(len(prompts)), key=lambda k: (len(prompts[k]), k))
    found: dict[int, list[int]] = {}
    for number, at in enumerate(range(0, max(len(order), 1), batch_size)):
        rows = order[at : at + batch_size]
        filled = [prompts[k] for k in [*rows, *rows[:1] * (batch_size - len(rows))]]
        length = next(b for b in buckets if b >= max(map(len, filled), default=0))
        batch = generate.pad_left(filled, pad_id=decoding.pad_id, length=length)
        key = jax.random.fold_in(jax.random.key(seed), number)
        made = run(params, batch, key)
        tokens, lengths = np.asarray(made.tokens), np.asarray(made.lengths)
        found |= {k: tokens[i, : lengths[i]].tolist() for i, k in enumerate(rows)}
    ends = set(decoding.stop)
    return [[t for t in found[k] if t not in ends] for k in range(len(prompts))]
