"""The encoder that BERT and RoBERTa share: its config, modules and table of names.

Each layer normalises after its residual connections. What differs between the two families,
positions and heads, is in their own files.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.models import config_checks, tables
from lora_jax.models.attention import attention
from lora_jax.models.families import column, embedding, row
from lora_jax.models.layers import ACTIVATIONS, Dropout, Layers, layer_norm, mask_bias, repeat
from lora_jax.names import Name
from lora_jax.sharding import split_lookup, split_rows

Array = jax.Array

_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip
# What a config may say of the variants that Hugging Face has and this file has not.
BUILT = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The shape of an encoder; field names as in Hugging Face's ``config.json``.

    Raises:
      ValueError: a value is out of its range; the message names the field.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        config_checks.check_sizes(self, _SIZES)
        config_checks.check_rates(self, rates, optional=("classifier_dropout",))
        config_checks.check_positive(self, ("layer_norm_eps", "initializer_range"))
        config_checks.check_one_of(self, "hidden_act", ACTIVATIONS)
        config_checks.check_divides(self, "hidden_size", "num_attention_heads")

    @property
    def positions(self) -> int:
        """The longest input."""
        return self.max_position_embeddings

    @property
    def head_dropout(self) -> float:
        """The dropout rate before a classifier."""
        own = self.classifier_dropout
        return self.hidden_dropout_prob if own is None else own


class Part(nn.Module):
    """A module of the model: computes in ``dtype`` with float32 parameters."""

    config: EncoderConfig
    dtype: Any = jnp.float32

    def _dense(self, features: int, name: str = "dense") -> nn.Dense:
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(features, kernel_init=init, dtype=self.dtype, name=name)

    def _norm(self) -> nn.LayerNorm:
        return layer_norm(self.config.layer_norm_eps, self.dtype, "LayerNorm")

    def _part(self, kind: type["Part"], name: str) -> "Part":
        return kind(self.config, dtype=self.dtype, name=name)


class Embeddings(Part):
    """Sum of word, position and token-type embeddings, normalised."""

    @nn.compact
    def __call__(
        self, input_ids: Array, token_type_ids: Array, positions: Array, *, deterministic: bool
    ) -> Array:
        """Token ids ``(batch, length)`` to vectors ``(batch, length, hidden)``.

        ``positions`` is ``(batch, length)`` or ``(1, length)``.
        """
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        embed = functools.partial(
            nn.Embed, features=c.hidden_size, embedding_init=init, dtype=self.dtype
        )
        x = split_lookup(embed(c.vocab_size, name="word_embeddings")(input_ids))
        kinds = embed(c.type_vocab_size, name="token_type_embeddings")(token_type_ids)
        places = embed(c.max_position_embeddings, name="position_embeddings")(positions)
        x = x + split_lookup(kinds) + split_lookup(places)
        x = Dropout(c.hidden_dropout_prob)(self._norm()(x), deterministic=deterministic)
        return split_rows(x)


class Output(Part):
    """A projection back to the residual stream, added to it and normalised."""

    @nn.compact
    def __call__(self, x: Array, residual: Array, *, deterministic: bool) -> Array:
        """``LayerNorm(residual + dropout(dense(x)))``."""
        x = self._dense(self.config.hidden_size)(x)
        x = Dropout(self.config.hidden_dropout_prob)(x, deterministic=deterministic)
        return split_rows(self._norm()(x + residual))


class Attention(Part):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) with its residual connection."""

    @nn.compact
    def __call__(self, x: Array, bias: Array, *, deterministic: bool) -> Array:
        """``x`` is ``(batch, length, hidden)``; ``bias`` is added to the scores."""
        c = self.config
        size = c.hidden_size // c.num_attention_heads
        split = lambda y: y.reshape(*y.shape[:-1], c.num_attention_heads, size)
        query, key, value = (
            split(self._dense(c.hidden_size, name)(x)) for name in ("query", "key", "value")
        )
        drop = Dropout(c.attention_probs_dropout_prob, deterministic=deterministic)
        y = attention(query, key, value, bias, drop=drop).reshape(x.shape)
        return self._part(Output, "output")(y, x, deterministic=deterministic)


class Intermediate(Part):
    """The wide layer of the feed-forward block, with its activation."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """``(..., hidden)`` to ``(..., intermediate)``."""
        activation = ACTIVATIONS[self.config.hidden_act]
        return activation(self._dense(self.config.intermediate_size)(x))


class Layer(Part):
    """One encoder layer: attention, then feed-forward."""

    @nn.compact
    def __call__(self, x: Array, bias: Array, *, deterministic: bool) -> Array:
        """Shapes as :class:`Attention`."""
        x = self._part(Attention, "attention")(x, bias, deterministic=deterministic)
        y = self._part(Intermediate, "intermediate")(x)
        return self._part(Output, "output")(y, x, deterministic=deterministic)


class Encoder(Part):
    """The stack of layers."""

    scan_layers: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, x: Array, attention_mask: Array, *, deterministic: bool) -> Array:
        """``x`` is ``(batch, length, hidden)``, the mask ``(batch, length)``."""
        return repeat(
            functools.partial(self._part, Layer),
            Layers(self.config.num_hidden_layers, self.scan_layers, self.remat),
            x,
            mask_bias(attention_mask),
            deterministic=deterministic,
        )


class Pooler(Part):
    """A dense layer with tanh on the first token."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """``(batch, length, hidden)`` to ``(batch, hidden)``."""
        return nn.tanh(self._dense(self.config.hidden_size)(x[:, 0]))


# How a mesh splits the kernels of BERT and RoBERTa, heads included.
SHARDING = (
    *column("query", "key", "value", "intermediate/dense", "pooler/dense"),
    *row("output/dense"),
    *embedding("word_embeddings", "position_embeddings", "token_type_embeddings"),
    *column("classifier", "classifier/dense"),
    *row("classifier/out_proj"),
)

# Flax module -> Hugging Face module, inside a layer.
_DENSE = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output/dense": "attention.output.dense",
    "intermediate/dense": "intermediate.dense",
    "output/dense": "output.dense",
}
_NORMS = {
    "attention/output/LayerNorm": "attention.output.LayerNorm",
    "output/LayerNorm": "output.LayerNorm",
}


def names(config: EncoderConfig, *, pooler: bool, scan_layers: bool) -> list[Name]:
    """The rows of embeddings, layers and, perhaps, pooler."""
    rows = [
        row
        for kind in ("word", "position", "token_type")
        for row in tables.embedding(
            f"embeddings/{kind}_embeddings", f"embeddings.{kind}_embeddings"
        )
    ]
    rows += tables.norm("embeddings/LayerNorm", "embeddings.LayerNorm")
    layer = [row for flax, hf in _DENSE.items() for row in tables.linear(flax, hf)]
    layer += [row for flax, hf in _NORMS.items() for row in tables.norm(flax, hf)]
    count = config.num_hidden_layers
    rows += tables.layers("encoder/layer", "encoder.layer", layer, count=count, scan=scan_layers)
    return rows + (tables.linear("pooler/dense", "pooler.dense") if pooler else [])
