"""Tokens that a run adds to a model's, and that its adapter brings along."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from ml_collections import ConfigDict

from lora_jax import manifest, peft, serialize
from lora_jax.config import LoRAConfig
from lora_jax.data.chat_template import ChatTemplate
from lora_jax.models import added_tokens
from lora_jax.models.checkpoints import Loaded
from lora_jax.tasks import adapter_bases

METADATA = "added_tokens"  # key in an adapter's metadata


class Extended(NamedTuple):
    """A model with rows for added tokens.

    Attributes:
      loaded: the model.
      ids: ids of the added tokens, by the leaves that have an entry for each token.
      notes: lines for the report at the start.
    """

    loaded: Loaded
    ids: dict[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()


def check(tokens: Any) -> list[str]:
    """Says what is wrong with the field ``data.add_tokens``."""
    texts = [x for x in tokens if isinstance(x, str) and x.strip()]
    if isinstance(tokens, str) or len(texts) < len(tokens) or len(set(texts)) < len(texts):
        return [f"data.add_tokens must hold different texts, one for each token, got {tokens!r}"]
    return []


def choose(config: ConfigDict, template: ChatTemplate) -> dict[str, bool]:
    """Returns the tokens that a run adds: its own, or those of the adapter that it starts from.

    Those that the chat template writes itself are special.

    Raises:
      ValueError: the adapter that it starts from has others.
    """
    wanted = {text: text in template.source for text in config.data.add_tokens}
    if not config.adapter:
        return wanted
    brought = read(config.adapter)
    if wanted and [*wanted] != [*brought]:
        raise ValueError(
            f"data.add_tokens is {[*wanted]}, and the adapter {config.adapter} has "
            f"{[*brought] or 'none'}: an adapter keeps the tokens that it was made with."
        )
    return brought


def read(directory: str | Path) -> dict[str, bool]:
    """Returns the tokens that an adapter was made with, with whether they are special.

    A directory in PEFT's format has them in its tokenizer.

    Raises:
      FileNotFoundError, ValueError: the adapter is missing or damaged.
    """
    if adapter_bases.is_peft(directory):
        return {}
    tokens = serialize.read_metadata(directory).get(METADATA, {})
    is_map = isinstance(tokens, dict) and all(isinstance(x, bool) for x in tokens.values())
    if not is_map or check([*tokens]):
        raise ValueError(f"The adapter in {directory} is damaged: {METADATA} is {tokens!r:.60}.")
    return tokens


def extend(loaded: Loaded, tokenizer: tokenizers.Tokenizer, tokens: Mapping[str, bool]) -> Extended:
    """Adds tokens to a tokenizer, and rows for them to the model.

    Args:
      loaded: the model.
      tokenizer: its tokenizer, which is changed.
      tokens: texts of the tokens, with whether they are special.

    Raises:
      ValueError: as :func:`lora_jax.models.added_tokens.resize`.
    """
    if not tokens:
        return Extended(loaded, {})
    ids, size = added_tokens.add(tokenizer, tokens), loaded.model.config.vocab_size
    loaded = added_tokens.resize(loaded, max(size, max(ids) + 1))
    new = sum(k >= size for k in ids)
    rows = f"{new} rows added to the embedding, which has {loaded.model.config.vocab_size:,}"
    note = f"added tokens: {' '.join(tokens)} (ids {', '.join(map(str, ids))}; {rows})"
    return Extended(loaded, dict.fromkeys(added_tokens.find_leaves(loaded), ids), (note,))


def train(config: LoRAConfig, extended: Extended) -> LoRAConfig:
    """Returns the settings of an adapter that trains the added tokens, too.

    Raises:
      ValueError: they have trained tokens already.
    """
    if not extended.ids:
        return config
    if config.train_tokens:
        raise ValueError(
            f"lora.train_tokens is {config.train_tokens}, and data.add_tokens sets it: leave one "
            "of them out."
        )
    return dataclasses.replace(config, train_tokens=extended.ids)


def fit(loaded: Loaded, directory: str | Path) -> Loaded:
    """Gives a model the rows that an adapter was made with, if the adapter brings all of them.

    Args:
      loaded: base of the adapter.
      directory: directory of the adapter, in either format.

    Raises:
      FileNotFoundError, ValueError: the adapter is missing or damaged; or it has some of the rows
        that the base lacks, and not others.
    """
    entries, size = _read_ids(directory), loaded.model.config.vocab_size
    rows = 1 + max((k for ids in entries for k in ids), default=-1)
    if rows <= size:
        return loaded
    new = set(range(size, rows))
    tables = added_tokens.find_leaves(loaded)
    complete = [ids for ids in entries if new <= set(ids)]
    if len(complete) < len(tables) or len(complete) < len(entries):
        raise ValueError(
            f"The adapter in {directory} trains tokens up to {rows - 1}, beyond the {size} of "
            f"{loaded.checkpoint.name}, and does not bring all that they need in "
            f"{', '.join(tables)}: it was trained over a base that was resized. Give that base, "
            f"with --model, as transformers' model.resize_token_embeddings({rows}) makes it."
        )
    return added_tokens.resize(loaded, rows)


def _read_ids(directory: str | Path) -> list[Sequence[int]]:
    """Reads the ids of trained tokens, a row for each table."""
    if adapter_bases.is_peft(directory):
        value = peft.read_words(directory)["trainable_token_indices"] or {}
        return [*value.values()] if isinstance(value, dict) else [value]
    config = manifest.read(Path(directory))["config"]
    tokens = config.get("train_tokens", {})
    return [*tokens.values()] if isinstance(tokens, dict) else []
