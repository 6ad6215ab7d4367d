"""The encoder of BERT and RoBERTa: its config, modules and table of names.

Each layer normalizes after its residual connections. The two families differ in values, which their
own files give: where positions start, whether there is a pooler, and the classifier's head.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import config_checks, tables
from lora_jax.models.attention import AUTO, Case, Heads, Plan, attention, make_plan
from lora_jax.models.attention_mask import make_padding_mask
from lora_jax.models.families import column, embedding, row
from lora_jax.models.layers import (
    ACTIVATIONS,
    Dropout,
    Layers,
    apply_layers,
    check_inputs,
    dense,
    layer_norm,
    make_layers,
)
from lora_jax.names import Name
from lora_jax.sharding import split_lookup, split_rows

Array = jax.Array

_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip
# Keys of variants that Hugging Face has and this file has not, with the one value that is built.
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
        """The length of the longest input, in tokens."""
        return self.max_position_embeddings

    @property
    def padding_idx(self) -> int | None:
        """The token of padding if positions skip it; None if they count every token from 0."""
        return None

    @property
    def heads(self) -> Heads:
        """The attention of a layer."""
        count = self.num_attention_heads
        return Heads(
            count=count,
            groups=count,
            size=self.hidden_size // count,
            dropout=self.attention_probs_dropout_prob,
        )

    @property
    def head_dropout(self) -> float:
        """The dropout rate before a classifier."""
        if self.classifier_dropout is None:
            return self.hidden_dropout_prob
        return self.classifier_dropout


def compute_position_ids(input_ids: Array, padding_idx: int | None) -> Array:
    """Computes the position of each token.

    Args:
      input_ids: integers ``(batch, length)``.
      padding_idx: None to count all tokens from 0; otherwise tokens that are not padding are
        counted from ``padding_idx + 1``, and padding is at ``padding_idx``.

    Returns:
      Integers ``(1, length)``, or ``(batch, length)`` with a ``padding_idx``.

    >>> compute_position_ids(jnp.array([[5, 6, 1, 1]]), 1).tolist()
    [[2, 3, 1, 1]]
    """
    if padding_idx is None:
        return jnp.arange(input_ids.shape[-1])[None, :]
    is_token = (input_ids != padding_idx).astype(jnp.int32)
    return jnp.cumsum(is_token, axis=1) * is_token + padding_idx


class Part(nn.Module):
    """A module of the model, which computes in ``dtype`` with float32 parameters."""

    config: EncoderConfig
    dtype: DTypeLike = jnp.float32

    def _dense(self, features: int, name: str = "dense") -> nn.Dense:
        init = nn.initializers.normal(self.config.initializer_range)
        return dense(features, kernel_init=init, dtype=self.dtype, name=name)

    def _norm(self) -> nn.LayerNorm:
        return layer_norm(self.config.layer_norm_eps, self.dtype, "LayerNorm")

    def _part(self, kind: type["Part"], name: str) -> "Part":
        return kind(self.config, dtype=self.dtype, name=name)


class Embeddings(Part):
    """Sum of word, position and token-type embeddings, normalized."""

    @nn.compact
    def __call__(
        self, input_ids: Array, token_type_ids: Array, positions: Array, *, deterministic: bool
    ) -> Array:
        """Embeds tokens in vectors ``(batch, length, hidden)``.

        Args:
          input_ids: integers ``(batch, length)``.
          token_type_ids: the same shape.
          positions: integers ``(batch, length)`` or ``(1, length)``.
          deterministic: whether nothing is dropped.
        """
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        embed = functools.partial(
            nn.Embed, features=c.hidden_size, embedding_init=init, dtype=self.dtype
        )
        x = split_lookup(embed(c.vocab_size, name="word_embeddings")(input_ids))
        types = embed(c.type_vocab_size, name="token_type_embeddings")(token_type_ids)
        positions = embed(c.max_position_embeddings, name="position_embeddings")(positions)
        x = x + split_lookup(types) + split_lookup(positions)
        x = Dropout(c.hidden_dropout_prob)(self._norm()(x), deterministic=deterministic)
        return split_rows(x)


class Output(Part):
    """A projection back to the residual stream, added to it and normalized."""

    @nn.compact
    def __call__(self, x: Array, residual: Array, *, deterministic: bool) -> Array:
        """Computes ``LayerNorm(residual + dropout(dense(x)))``, all ``(..., hidden)``."""
        x = self._dense(self.config.hidden_size)(x)
        x = Dropout(self.config.hidden_dropout_prob)(x, deterministic=deterministic)
        return split_rows(self._norm()(x + residual))


class Attention(Part):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) with its residual connection."""

    @nn.compact
    def __call__(self, x: Array, plan: Plan, *, deterministic: bool) -> Array:
        """Maps ``(batch, length, hidden)`` to the same, with attention as planned."""
        c = self.config
        size = c.hidden_size // c.num_attention_heads
        split = lambda y: y.reshape(*y.shape[:-1], c.num_attention_heads, size)
        query, key, value = (
            split(self._dense(c.hidden_size, name)(x)) for name in ("query", "key", "value")
        )
        drop = Dropout(c.attention_probs_dropout_prob).of_weights(deterministic)
        y = attention(query, key, value, plan, drop=drop).reshape(x.shape)
        return self._part(Output, "output")(y, x, deterministic=deterministic)


class Intermediate(Part):
    """The wide layer of the feed-forward block, with its activation."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``(..., hidden)`` to ``(..., intermediate)``."""
        activation = ACTIVATIONS[self.config.hidden_act]
        return activation(self._dense(self.config.intermediate_size)(x))


class Layer(Part):
    """One encoder layer: attention, then feed-forward."""

    @nn.compact
    def __call__(
        self, x: Array, layer_inputs: tuple[()], plan: Plan, deterministic: bool
    ) -> tuple[Array, None]:
        """Maps ``(batch, length, hidden)`` to the same, with attention as planned."""
        x = self._part(Attention, "attention")(x, plan, deterministic=deterministic)
        y = self._part(Intermediate, "intermediate")(x)
        return self._part(Output, "output")(y, x, deterministic=deterministic), None


class Encoder(Part):
    """The stack of layers."""

    scan_layers: bool = False
    remat: str = "none"
    attention: str = AUTO

    def setup(self) -> None:
        """Makes the layers."""
        layers = Layers(self.config.num_hidden_layers, self.scan_layers, self.remat)
        self.layer = make_layers(Layer, layers, config=self.config, dtype=self.dtype)

    def __call__(self, x: Array, attention_mask: Array, *, deterministic: bool) -> Array:
        """Maps ``(batch, length, hidden)`` to the same; the mask is ``(batch, length)``."""
        batch, n = attention_mask.shape
        options: dict[str, Any] = {"dtype": self.dtype, "deterministic": deterministic}
        case = Case(heads=self.config.heads, batch=batch, queries=n, **options)
        plan = make_plan(make_padding_mask(attention_mask), case, self.attention)
        return apply_layers(self.layer, x, (), plan, deterministic=deterministic)[0]


class Pooler(Part):
    """A dense layer with tanh on the first token."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``(batch, length, hidden)`` to ``(batch, hidden)``."""
        return nn.tanh(self._dense(self.config.hidden_size)(x[:, 0]))


class EncoderModel(Part):
    """Embeddings, layers and, if there is one, the pooler.

    Attributes:
      config: the shape.
      dtype: dtype of the activations, float32 or bfloat16; parameters are float32.
      scan_layers: whether the layers are stacked, and one is compiled for all.
      remat: what the backward pass computes again; see :func:`lora_jax.models.layers.remat_layer`.
      attention: how attention is computed; see :func:`lora_jax.models.attention.choose`.
      pooler: whether there is a pooler.
    """

    scan_layers: bool = False
    remat: str = "none"
    attention: str = AUTO
    pooler: bool = True

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array,
        token_type_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Array, Array | None]:
        """Computes hidden states ``(batch, length, hidden)`` and pooled ``(batch, hidden)``.

        Args:
          input_ids: integers ``(batch, length)``. RoBERTa takes its positions from them, so that
            padding must be ``pad_token_id`` there.
          attention_mask: the same shape; positive where there is a token, 0 at padding.
          token_type_ids: the same shape; None stands for zeros.
          deterministic: whether nothing is dropped; otherwise ``rngs={"dropout": key}`` is needed.

        Raises:
          ValueError: there are too many tokens, or the shapes differ.
        """
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        check_inputs(
            self.config.positions,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
        )
        positions = compute_position_ids(input_ids, self.config.padding_idx)
        embeddings = self._part(Embeddings, "embeddings")
        x = embeddings(input_ids, token_type_ids, positions, deterministic=deterministic)
        stack: dict[str, Any] = {
            "scan_layers": self.scan_layers, "remat": self.remat, "attention": self.attention,
        }  # fmt: skip
        layers = Encoder(self.config, self.dtype, **stack, name="encoder")
        x = layers(x, attention_mask, deterministic=deterministic)
        return x, self._part(Pooler, "pooler")(x) if self.pooler else None


class EncoderForSequenceClassification(nn.Module):
    """The encoder with a classifier; each family says which, in :meth:`_classify`.

    Attributes:
      config: the encoder's shape.
      num_labels: number of outputs of the classifier.
      dtype: dtype of the activations, float32 or bfloat16; parameters are float32.
      scan_layers: as in :class:`EncoderModel`.
      remat: the same.
      attention: the same.
      encoder_name: name of the encoder among the parameters.
      encoder_pooler: whether the classifier takes what the pooler gives.
    """

    config: EncoderConfig
    num_labels: int = 2
    dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    remat: str = "none"
    attention: str = AUTO
    encoder_name: ClassVar[str]
    encoder_pooler: ClassVar[bool]

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array,
        token_type_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """Computes logits ``(batch, num_labels)``, at least float32.

        The arguments are those of :class:`EncoderModel`.
        """
        model = EncoderModel(
            self.config,
            self.dtype,
            scan_layers=self.scan_layers,
            remat=self.remat,
            attention=self.attention,
            pooler=self.encoder_pooler,
            name=self.encoder_name,
        )
        x, pooled = model(input_ids, attention_mask, token_type_ids, deterministic=deterministic)
        x = x if pooled is None else pooled
        logits = self._classify(x, deterministic=deterministic)
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))

    def _classify(self, x: Array, *, deterministic: bool) -> Array:
        """Maps the pooler's output, or the hidden states, to ``(batch, num_labels)``."""
        raise NotImplementedError


# How a mesh splits the kernels of BERT and RoBERTa, including those of their heads.
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
    """Returns the rows of the embeddings, the layers and, if there is one, the pooler."""
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
    n = config.num_hidden_layers
    rows += tables.repeat_layers("encoder/layer", "encoder.layer", layer, count=n, scan=scan_layers)
    if pooler:
        rows += tables.linear("pooler/dense", "pooler.dense")
    return rows
