"""BERT (Devlin et al. 2018): encoder, pooler and sequence-classification head.

The modules and their numbers are those of Hugging Face's ``BertForSequenceClassification``; each
kernel is stored as Flax does, ``(d_in, d_out)``. :func:`names` is the table between the two.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),  # with erf, as in the paper's code
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The shape of a BERT model; field names as in Hugging Face's ``config.json``."""

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
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not one of {sorted(ACTIVATIONS)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} attention heads."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "BertConfig":
        """Reads a parsed ``config.json``; keys that do not shape the model are left out.

        Raises:
          ValueError: it describes another architecture, or a variant that is not built here.

        >>> BertConfig.from_hf({"model_type": "bert", "hidden_size": 384}).hidden_size
        384
        """
        if config.get("model_type") != "bert":
            raise ValueError(f"A BERT config has model_type 'bert', not {config.get('model_type')!r}.")
        position = config.get("position_embedding_type") or "absolute"
        if position != "absolute" or config.get("is_decoder"):
            raise ValueError(
                "Only BERT encoders with absolute positions are built here; this config has "
                f"position_embedding_type={position!r}, is_decoder={config.get('is_decoder', False)}."
            )
        return cls(**{f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config})


class BertEmbeddings(nn.Module):
    """Sum of word, position and token-type embeddings, normalised."""

    config: BertConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids: Array, token_type_ids: Array, *, deterministic: bool) -> Array:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        embed = functools.partial(
            nn.Embed, features=c.hidden_size, embedding_init=init, dtype=self.dtype
        )
        positions = jnp.arange(input_ids.shape[-1])[None, :]
        x = embed(c.vocab_size, name="word_embeddings")(input_ids)
        x = x + embed(c.type_vocab_size, name="token_type_embeddings")(token_type_ids)
        x = x + embed(c.max_position_embeddings, name="position_embeddings")(positions)
        x = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="LayerNorm")(x)
        return nn.Dropout(c.hidden_dropout_prob)(x, deterministic=deterministic)


class BertAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) without its output projection."""

    config: BertConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, bias: Array, *, deterministic: bool) -> Array:
        c = self.config
        heads = c.num_attention_heads
        split = lambda y: y.reshape(*y.shape[:-1], heads, c.hidden_size // heads)
        dense = functools.partial(_dense, c, c.hidden_size, self.dtype)
        query, key, value = (split(dense(name)(x)) for name in ("query", "key", "value"))
        query = query / jnp.asarray(query.shape[-1] ** 0.5, self.dtype)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        weights = nn.softmax(scores + bias).astype(self.dtype)
        weights = nn.Dropout(c.attention_probs_dropout_prob)(weights, deterministic=deterministic)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)


class BertResidual(nn.Module):
    """A projection back to the residual stream, added to it and normalised."""

    config: BertConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, residual: Array, *, deterministic: bool) -> Array:
        c = self.config
        x = _dense(c, c.hidden_size, self.dtype, "dense")(x)
        x = nn.Dropout(c.hidden_dropout_prob)(x, deterministic=deterministic)
        norm = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="LayerNorm")
        return norm(x + residual)


class BertLayer(nn.Module):
    """One encoder layer: attention and feed-forward, each with a residual connection."""

    config: BertConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, bias: Array, *, deterministic: bool) -> Array:
        c, kind = self.config, {"config": self.config, "dtype": self.dtype}
        y = BertAttention(**kind, name="attention")(x, bias, deterministic=deterministic)
        x = BertResidual(**kind, name="attention_output")(y, x, deterministic=deterministic)
        y = _dense(c, c.intermediate_size, self.dtype, "intermediate")(x)
        y = ACTIVATIONS[c.hidden_act](y)
        return BertResidual(**kind, name="output")(y, x, deterministic=deterministic)


class BertModel(nn.Module):
    """Encoder and pooler.

    ``(input_ids (batch, length) int, attention_mask (batch, length) of 0 and 1, token_type_ids or
    None)`` to ``(hidden states (batch, length, hidden), pooled (batch, hidden))``, in ``dtype``;
    parameters are float32.
    """

    config: BertConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array,
        token_type_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Array, Array]:
        c, kind = self.config, {"config": self.config, "dtype": self.dtype}
        if input_ids.shape[-1] > c.max_position_embeddings:
            raise ValueError(
                f"{input_ids.shape[-1]} tokens, and the model has positions for "
                f"{c.max_position_embeddings}; truncate the input."
            )
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        embeddings = BertEmbeddings(**kind, name="embeddings")
        x = embeddings(input_ids, token_type_ids, deterministic=deterministic)
        # Added to the scores in float32 before the softmax: masked positions get weight zero.
        bias = jnp.where(attention_mask > 0, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]
        for k in range(c.num_hidden_layers):
            x = BertLayer(**kind, name=f"layer_{k}")(x, bias, deterministic=deterministic)
        pooled = nn.tanh(_dense(c, c.hidden_size, self.dtype, "pooler")(x[:, 0]))
        return x, pooled


class BertForSequenceClassification(nn.Module):
    """BERT with a linear classifier on the pooled first token; logits ``(batch, num_labels)`` f32."""

    config: BertConfig
    num_labels: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array,
        token_type_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        c = self.config
        encoder = BertModel(c, dtype=self.dtype, name="bert")
        _, pooled = encoder(input_ids, attention_mask, token_type_ids, deterministic=deterministic)
        rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
        pooled = nn.Dropout(rate)(pooled, deterministic=deterministic)
        logits = _dense(c, self.num_labels, self.dtype, "classifier")(pooled)
        return logits.astype(jnp.float32)


def _dense(config: BertConfig, features: int, dtype: Any, name: str) -> nn.Dense:
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, kernel_init=init, dtype=dtype, name=name)


class Name(NamedTuple):
    """One row of a table of names.

    Attributes:
      flax: path of the leaf, its components joined by "/".
      hf: name of the tensor in a Hugging Face checkpoint.
      transpose: whether the tensor is the leaf transposed (a torch Linear is ``(d_out, d_in)``).
    """

    flax: str
    hf: str
    transpose: bool = False


# Flax module -> Hugging Face module, inside a layer.
_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention_output/dense": "attention.output.dense",
    "attention_output/LayerNorm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output/dense": "output.dense",
    "output/LayerNorm": "output.LayerNorm",
}


def names(config: BertConfig, *, classifier: bool = True) -> list[Name]:
    """The table between Flax paths and Hugging Face names, one row a leaf.

    Args:
      config: gives the number of layers.
      classifier: with the head and the prefix ``bert``, as in ``BertForSequenceClassification``;
        otherwise the leaves of a bare ``BertModel``.

    >>> names(BertConfig())[5]
    Name(flax='bert/layer_0/attention/query/kernel', hf='bert.encoder.layer.0.attention.self.query.weight', transpose=True)
    """
    rows = [
        Name(f"embeddings/{kind}_embeddings/embedding", f"embeddings.{kind}_embeddings.weight")
        for kind in ("word", "position", "token_type")
    ]
    rows += _module("embeddings/LayerNorm", "embeddings.LayerNorm")
    for k in range(config.num_hidden_layers):
        for flax, hf in _LAYER.items():
            rows += _module(f"layer_{k}/{flax}", f"encoder.layer.{k}.{hf}")
    rows += _module("pooler", "pooler.dense")
    if not classifier:
        return rows
    rows = [Name(f"bert/{row.flax}", f"bert.{row.hf}", row.transpose) for row in rows]
    return rows + _module("classifier", "classifier")


def _module(flax: str, hf: str) -> list[Name]:
    bias = Name(f"{flax}/bias", f"{hf}.bias")
    if flax.endswith("LayerNorm"):
        return [Name(f"{flax}/scale", f"{hf}.weight"), bias]
    return [Name(f"{flax}/kernel", f"{hf}.weight", transpose=True), bias]
