"""Adds tokens to a tokenizer, and rows for them to a model's embedding and head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import NamedSharding

from lora_jax import names as tables
from lora_jax import paths
from lora_jax.models import checkpoints
from lora_jax.models.checkpoints import Loaded
from lora_jax.names import Weight
from lora_jax.quantized import as_array

Array = jax.Array
# Last names of the modules in torch that have an entry for each token.
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "shared")
_HEADS = ("lm_head",)


def add(tokenizer: tokenizers.Tokenizer, tokens: Mapping[str, bool]) -> tuple[int, ...]:
    """Adds tokens to a tokenizer, and returns the ids of all: also of those it had.

    Args:
      tokenizer: tokenizer, which is changed.
      tokens: texts that are to be one token each, with whether they are special: such tokens are
        left out of decoded texts.

    >>> tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}))
    >>> add(tokenizer, {"<tool>": False, "b": False})
    (2, 1)
    """
    for text, is_special in tokens.items():
        if tokenizer.token_to_id(text) is None:
            token = tokenizers.AddedToken(text, normalized=False, special=is_special)
            tokenizer.add_tokens([token])
    ids = (tokenizer.token_to_id(token) for token in tokens)
    return tuple(k for k in ids if k is not None)  # each of them is there now


def find_leaves(loaded: Loaded) -> dict[str, int]:
    """Finds the leaves with an entry for each token, and the axis that has them.

    They are the embedding, and the head if it has a leaf of its own.
    """
    leaves = paths.named_leaves(loaded.params)
    weights = tables.weights(checkpoints.names(loaded), leaves)
    return {w.leaf: _find_axis(w) for w in weights if _has_tokens(w, loaded)}


def _has_tokens(weight: Weight, loaded: Loaded) -> bool:
    module = tables.module(weight.hf).rpartition(".")[2]
    if module not in (*_EMBEDDINGS, *_HEADS) or not weight.shape:
        return False
    return weight.shape[_find_axis(weight)] == loaded.model.config.vocab_size


def _find_axis(weight: Weight) -> int:
    return 0 if tables.kind(weight) == tables.EMBEDDING else len(weight.shape) - 1


def resize(loaded: Loaded, rows: int) -> Loaded:
    """Gives a model embeddings for more tokens: the mean of those that it has.

    With the mean a new token takes no more of the probability than the others do, whatever the text
    is (Hewitt 2021). An untied head gets the mean of its outputs.

    Args:
      loaded: the model.
      rows: number of tokens that it is to have, no fewer than it has.

    Raises:
      ValueError: there would be fewer rows, or they can't be split over the devices as before.
    """
    size = loaded.model.config.vocab_size
    if rows < size:
        raise ValueError(f"{loaded.checkpoint.name} has {size} tokens, and can't be cut to {rows}.")
    if rows == size:
        return loaded
    axes, leaves = find_leaves(loaded), paths.named_leaves(loaded.params)
    new = {n: _append_means(n, x, axes[n], rows) if n in axes else x for n, x in leaves.items()}
    checkpoint = loaded.checkpoint
    return dataclasses.replace(
        loaded,
        model=loaded.model.clone(config=dataclasses.replace(loaded.model.config, vocab_size=rows)),
        params=paths.nest(new),
        checkpoint=checkpoint._replace(config={**checkpoint.config, "vocab_size": rows}),
        is_resized=True,
    )


def _append_means(name: str, leaf: Any, axis: int, rows: int) -> Array:
    table = jnp.asarray(as_array(leaf))
    wide = jnp.promote_types(table.dtype, jnp.float32)
    mean = jnp.mean(table, axis=axis, keepdims=True, dtype=wide).astype(table.dtype)
    shape = np.array(table.shape)
    shape[axis] = rows - shape[axis]
    new = jnp.concatenate([table, jnp.broadcast_to(mean, shape)], axis=axis)
    place = getattr(leaf, "sharding", None)
    if not isinstance(place, NamedSharding):
        return new
    try:
        return jax.device_put(new, place)
    except ValueError as error:
        raise ValueError(
            f"{name} with {rows} tokens can't be split over the devices as {place.spec}: {error}. "
            "Add tokens up to a number that the mesh divides, or lower mesh.tensor."
        ) from error
