"""BERT (Devlin et al. 2018): encoder, pooler and sequence-classification head.

The modules and their numbers are those of Hugging Face's ``BertForSequenceClassification``; each
kernel is stored as Flax does, ``(d_in, d_out)``. :func:`names` is the table between the two.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models.attention import attention
from lora_jax.names import Name

Array = jax.Array

_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip
_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
# What a config may say of the variants that Hugging Face has and this file has not.
_BUILT = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


@jax.checkpoint
def _gelu(x: Array) -> Array:
    """``x·Φ(x)`` (Hendrycks & Gimpel 2016), with erf as in the paper's code.

    Its gradient starts again from ``x``: erf is cheaper than writing it for the widest activations
    of the model and reading it back. A bfloat16 ``1 + erf`` would have no digits left on the left.
    """
    high = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * high * (1 + lax.erf(high * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The shape of a BERT model; field names as in Hugging Face's ``config.json``.

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
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name in _RATES:
            value = getattr(self, name)
            optional = name == "classifier_dropout" and value is None
            if not optional and not (isinstance(value, int | float) and 0 <= value < 1):
                raise ValueError(f"{name} must be a number in [0, 1), got {value!r}.")
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not one of {sorted(ACTIVATIONS)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into "
                f"num_attention_heads {self.num_attention_heads}."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "BertConfig":
        """Reads a parsed ``config.json``; keys that do not shape the model are left out.

        Raises:
          ValueError: it describes another architecture, or a variant that is not built here.

        >>> BertConfig.from_hf({"model_type": "bert", "hidden_size": 384}).hidden_size
        384
        """
        kind = config.get("model_type")
        if kind != "bert":
            raise ValueError(f"model_type is {kind!r} in this config; only 'bert' is built here.")
        for name, built in _BUILT.items():
            if config.get(name, built) not in (built, None):
                raise ValueError(
                    f"{name} is {config[name]!r} in this config; only {built!r} is built."
                )
        return cls(**{f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config})

    def to_hf(self) -> dict[str, Any]:
        """The same as the content of a ``config.json``.

        >>> BertConfig.from_hf(BertConfig(hidden_size=384).to_hf()).hidden_size
        384
        """
        return {"model_type": "bert"} | dataclasses.asdict(self)


class _Part(nn.Module):
    """A module of the model: computes in ``dtype`` with float32 parameters."""

    config: BertConfig
    dtype: Any = jnp.float32

    def _dense(self, features: int, name: str = "dense") -> nn.Dense:
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(features, kernel_init=init, dtype=self.dtype, name=name)

    def _norm(self) -> nn.LayerNorm:
        # Two passes over the features, as torch does it: E[x²] - E[x]² loses digits in float32.
        return nn.LayerNorm(
            epsilon=self.config.layer_norm_eps,
            dtype=self.dtype,
            use_fast_variance=False,
            name="LayerNorm",
        )

    def _part(self, kind: type["_Part"], name: str) -> "_Part":
        return kind(self.config, dtype=self.dtype, name=name)


class BertEmbeddings(_Part):
    """Sum of word, position and token-type embeddings, normalised."""

    @nn.compact
    def __call__(self, input_ids: Array, token_type_ids: Array, *, deterministic: bool) -> Array:
        """Token ids ``(batch, length)`` to vectors ``(batch, length, hidden)``."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        embed = functools.partial(
            nn.Embed, features=c.hidden_size, embedding_init=init, dtype=self.dtype
        )
        positions = jnp.arange(input_ids.shape[-1])[None, :]
        x = embed(c.vocab_size, name="word_embeddings")(input_ids)
        x = x + embed(c.type_vocab_size, name="token_type_embeddings")(token_type_ids)
        x = x + embed(c.max_position_embeddings, name="position_embeddings")(positions)
        return nn.Dropout(c.hidden_dropout_prob)(self._norm()(x), deterministic=deterministic)


class BertOutput(_Part):
    """A projection back to the residual stream, added to it and normalised."""

    @nn.compact
    def __call__(self, x: Array, residual: Array, *, deterministic: bool) -> Array:
        """``LayerNorm(residual + dropout(dense(x)))``."""
        x = self._dense(self.config.hidden_size)(x)
        x = nn.Dropout(self.config.hidden_dropout_prob)(x, deterministic=deterministic)
        return self._norm()(x + residual)


class BertAttention(_Part):
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
        drop = nn.Dropout(c.attention_probs_dropout_prob, deterministic=deterministic)
        y = attention(query, key, value, bias, drop=drop).reshape(x.shape)
        return self._part(BertOutput, "output")(y, x, deterministic=deterministic)


class BertIntermediate(_Part):
    """The wide layer of the feed-forward block, with its activation."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """``(..., hidden)`` to ``(..., intermediate)``."""
        return ACTIVATIONS[self.config.hidden_act](self._dense(self.config.intermediate_size)(x))


class BertLayer(_Part):
    """One encoder layer: attention, then feed-forward."""

    @nn.compact
    def __call__(self, x: Array, bias: Array, *, deterministic: bool) -> Array:
        """Shapes as :class:`BertAttention`."""
        x = self._part(BertAttention, "attention")(x, bias, deterministic=deterministic)
        y = self._part(BertIntermediate, "intermediate")(x)
        return self._part(BertOutput, "output")(y, x, deterministic=deterministic)


class BertEncoder(_Part):
    """The stack of layers."""

    @nn.compact
    def __call__(self, x: Array, attention_mask: Array, *, deterministic: bool) -> Array:
        """``x`` is ``(batch, length, hidden)``, the mask ``(batch, length)``."""
        # Made once for all layers, and added in float32 before the softmax: a masked position has
        # weight exactly zero, and a row with none left has equal weights rather than NaN.
        bias = jnp.where(attention_mask > 0, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]
        for k in range(self.config.num_hidden_layers):
            x = self._part(BertLayer, f"layer_{k}")(x, bias, deterministic=deterministic)
        return x


class BertPooler(_Part):
    """A dense layer with tanh on the first token."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """``(batch, length, hidden)`` to ``(batch, hidden)``."""
        return nn.tanh(self._dense(self.config.hidden_size)(x[:, 0]))


class BertModel(_Part):
    """Encoder and pooler."""

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array,
        token_type_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Array, Array]:
        """Computes hidden states ``(batch, length, hidden)`` and pooled ``(batch, hidden)``.

        Args:
          input_ids: integers ``(batch, length)``.
          attention_mask: the same shape; positive where there is a token, 0 at padding.
          token_type_ids: the same shape; None stands for zeros.
          deterministic: without dropout; otherwise ``rngs={"dropout": key}`` is needed.

        Raises:
          ValueError: too many tokens, or shapes that differ.
        """
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        _check(self.config, input_ids, attention_mask, token_type_ids)
        embeddings = self._part(BertEmbeddings, "embeddings")
        x = embeddings(input_ids, token_type_ids, deterministic=deterministic)
        x = self._part(BertEncoder, "encoder")(x, attention_mask, deterministic=deterministic)
        return x, self._part(BertPooler, "pooler")(x)


class BertForSequenceClassification(nn.Module):
    """BERT with a linear classifier on the pooled first token.

    Attributes:
      config: the encoder's shape.
      num_labels: outputs of the classifier.
      dtype: of the activations, float32 or bfloat16; parameters are float32.
    """

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
        """Logits ``(batch, num_labels)``, at least float32; arguments as :class:`BertModel`."""
        c = self.config
        encoder = BertModel(c, dtype=self.dtype, name="bert")
        _, pooled = encoder(input_ids, attention_mask, token_type_ids, deterministic=deterministic)
        rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
        pooled = nn.Dropout(rate)(pooled, deterministic=deterministic)
        init = nn.initializers.normal(c.initializer_range)
        head = nn.Dense(self.num_labels, kernel_init=init, dtype=self.dtype, name="classifier")
        return head(pooled).astype(jnp.promote_types(self.dtype, jnp.float32))


def _check(
    config: BertConfig, input_ids: Array, attention_mask: Array, token_type_ids: Array
) -> None:
    shapes = {
        "input_ids": input_ids.shape,
        "attention_mask": attention_mask.shape,
        "token_type_ids": token_type_ids.shape,
    }
    if len(input_ids.shape) != 2 or len(set(shapes.values())) > 1:
        raise ValueError(f"The inputs must all have one shape (batch, length), got {shapes}.")
    if input_ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"{input_ids.shape[1]} tokens, and the model has positions for "
            f"{config.max_position_embeddings}; truncate the input."
        )


# Flax module -> Hugging Face module, inside a layer.
_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output/dense": "attention.output.dense",
    "attention/output/LayerNorm": "attention.output.LayerNorm",
    "intermediate/dense": "intermediate.dense",
    "output/dense": "output.dense",
    "output/LayerNorm": "output.LayerNorm",
}


def names(config: BertConfig, *, classifier: bool = True) -> list[Name]:
    """The table between Flax paths and Hugging Face names, one row a leaf.

    Args:
      config: gives the number of layers.
      classifier: with the head and the prefix ``bert``, as in ``BertForSequenceClassification``;
        otherwise the leaves of a bare ``BertModel``.

    >>> row = names(BertConfig())[5]
    >>> row.flax
    'bert/encoder/layer_0/attention/query/kernel'
    >>> row.hf, row.transpose
    ('bert.encoder.layer.0.attention.self.query.weight', True)
    """
    rows = [
        Name(f"embeddings/{kind}_embeddings/embedding", f"embeddings.{kind}_embeddings.weight")
        for kind in ("word", "position", "token_type")
    ]
    rows += _module("embeddings/LayerNorm", "embeddings.LayerNorm")
    for k in range(config.num_hidden_layers):
        for flax, hf in _LAYER.items():
            rows += _module(f"encoder/layer_{k}/{flax}", f"encoder.layer.{k}.{hf}")
    rows += _module("pooler/dense", "pooler.dense")
    if not classifier:
        return rows
    rows = [Name(f"bert/{row.flax}", f"bert.{row.hf}", row.transpose) for row in rows]
    return rows + _module("classifier", "classifier")


def _module(flax: str, hf: str) -> list[Name]:
    bias = Name(f"{flax}/bias", f"{hf}.bias")
    if flax.endswith("LayerNorm"):
        return [Name(f"{flax}/scale", f"{hf}.weight"), bias]
    return [Name(f"{flax}/kernel", f"{hf}.weight", transpose=True), bias]
