"""Generation of new texts by a language model: prompts in, tokens out."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tokenizers
from ml_collections import ConfigDict

from lora_jax.models import checkpoints, generate
from lora_jax.models.decoding import Decoding

PyTree = Any
_log = logging.getLogger(__name__)
_ENDS = ("<|endoftext|>", "</s>")


def stop_tokens(loaded: checkpoints.Loaded, tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Returns the tokens that end a text: those of the model's config, or else the tokenizer's.

    Raises:
      ValueError: neither has any.
    """
    ids = loaded.checkpoint.config.get("eos_token_id")
    if ids is not None:
        return tuple(ids) if isinstance(ids, list) else (ids,)
    for text in _ENDS:
        if (token := tokenizer.token_to_id(text)) is not None:
            return (token,)
    raise ValueError(
        f"{loaded.checkpoint.name} does not say which token ends a text: put eos_token_id into its "
        "config.json."
    )


def make_decoding(config: ConfigDict, stop: tuple[int, ...]) -> Decoding:
    """Makes the settings of decoding from the section ``decode`` of a config.

    Args:
      config: config of a run.
      stop: tokens that end a text.

    Raises:
      ValueError: as :class:`Decoding`.
    """
    fields = config.decode.to_dict()
    for name in ("batch_size", "buckets", "seed", "unadapted"):  # fields of the programs
        fields.pop(name, None)
    return Decoding(stop=stop, pad_id=stop[0], **fields)


def write(
    loaded: checkpoints.Loaded,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    decoding: Decoding,
    batch_size: int,
    buckets: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Generates new tokens for each prompt, and returns them without those that end a text.

    Args:
      loaded: causal language model.
      params: parameters of the model, into which an adapter may be merged.
      prompts: rows of tokens.
      decoding: settings by which tokens are chosen.
      batch_size: number of prompts at a time.
      buckets: ascending lengths that prompts are padded to; by default the longest prompt's length.
        Each length is compiled once.
      seed: seed of sampling.

    Raises:
      ValueError: a prompt leaves no position for a new token (in beam search, for all of them), or
        has a token that the model does not have; or there are no prompts, or an empty one.
    """
    functions = generate.causal_lm(loaded.model, loaded.family.require_cache())
    run = generate.generator(*functions, decoding)
    return generate_rows(
        run,
        params,
        prompts,
        decoding=decoding,
        batch_size=batch_size,
        buckets=buckets,
        seed=seed,
    )


def describe_end(tokens: Sequence[int], decoding: Decoding) -> str:
    """Says that a text ends only because the model has no more positions; "" if it does not.

    >>> describe_end([5, 6], Decoding(max_new_tokens=3, stop=(2,)))
    'the text ends after 2 of 3 tokens, since the model has no more positions'
    >>> describe_end([5, 2], Decoding(max_new_tokens=3, stop=(2,)))
    ''
    """
    count = len(tokens)
    if count == decoding.max_new_tokens or (count and tokens[-1] in decoding.stop):
        return ""
    return (
        f"the text ends after {count} of {decoding.max_new_tokens} tokens, since the model has no "
        "more positions"
    )


def generate_rows(
    run: generate.Generate,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    decoding: Decoding,
    batch_size: int,
    buckets: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Does what :func:`write` does, by a function that :func:`generate.generator` has made.

    Args:
      run: the function, which is compiled once for all calls with prompts of one length.
      params: as for :func:`write`, as are the others.
      prompts: rows of tokens.
      decoding: settings that ``run`` was made with.
      batch_size: number of prompts at a time.
      buckets: ascending lengths that prompts are padded to.
      seed: seed of sampling.

    Raises:
      ValueError: as :func:`write`.
    """
    longest = max(map(len, prompts), default=0)
    buckets = [*(b for b in buckets if b < longest), longest]
    order = sorted(range(len(prompts)), key=lambda k: (len(prompts[k]), k))
    texts: dict[int, list[int]] = {}
    for number, start in enumerate(range(0, max(len(order), 1), batch_size)):
        rows = order[start : start + batch_size]
        filled = [prompts[k] for k in [*rows, *rows[:1] * (batch_size - len(rows))]]
        length = next(b for b in buckets if b >= max(map(len, filled), default=0))
        batch = generate.pad_left(filled, pad_id=decoding.pad_id, length=length)
        key = jax.random.fold_in(jax.random.key(seed), number)
        generated = run(params, batch, key)
        tokens, lengths = np.asarray(generated.tokens), np.asarray(generated.lengths)
        texts |= {k: tokens[i, : lengths[i]].tolist() for i, k in enumerate(rows)}
    ends = [describe_end(texts[k], decoding) for k in range(len(prompts))]
    if count := sum(map(bool, ends)):
        _log.warning("%d texts: %s", count, next(filter(None, ends)))
    stop = set(decoding.stop)
    return [[t for t in texts[k] if t not in stop] for k in range(len(prompts))]
