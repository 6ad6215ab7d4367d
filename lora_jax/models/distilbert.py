"""DistilBERT (Sanh et al. 2019): BERT with half the layers, no token types and no pooler.

The modules and their numbers are those of Hugging Face's ``DistilBertForSequenceClassification``.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import config_checks, tables
from lora_jax.models.attention import AUTO, Case, Heads, Plan, attention, make_plan
from lora_jax.models.attention_mask import make_padding_mask
from lora_jax.models.families import CLASSIFIER, ENCODER, Family, column, embedding, row
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

_NORM_EPSILON = 1e-12  # no config says it


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBertConfig:
    """The shape of a DistilBERT model; field names as in Hugging Face's ``config.json``.

    Raises:
      ValueError: a value is out of its range; the message names the field.
    """

    vocab_size: int = 30522
    dim: int = 768
    n_layers: int = 6
    n_heads: int = 12
    hidden_dim: int = 3072
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    max_position_embeddings: int = 512
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim")
        config_checks.check_sizes(self, (*sizes, "max_position_embeddings"))
        config_checks.check_rates(self, ("dropout", "attention_dropout", "seq_classif_dropout"))
        config_checks.check_positive(self, ("initializer_range",))
        config_checks.check_one_of(self, "activation", ACTIVATIONS)
        config_checks.check_divides(self, "dim", "n_heads")

    @property
    def positions(self) -> int:
        """The length of the longest input, in tokens."""
        return self.max_position_embeddings

    @property
    def heads(self) -> Heads:
        """The attention of a layer."""
        size = self.dim // self.n_heads
        return Heads(
            count=self.n_heads, groups=self.n_heads, size=size, dropout=self.attention_dropout
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DistilBertConfig":
        """Reads a parsed ``config.json``; it leaves out keys that do not shape the model.

        Sinusoidal positions are stored as weights, like those that are learned.

        Raises:
          ValueError: it describes another architecture.

        >>> DistilBertConfig.from_hf({"model_type": "distilbert", "dim": 384}).dim
        384
        """
        return config_checks.read(cls, config, model_type=["distilbert"], built={})

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a ``config.json``.

        >>> DistilBertConfig.from_hf(DistilBertConfig(dim=384).to_hf()).dim
        384
        """
        return {"model_type": "distilbert"} | dataclasses.asdict(self)


class _Part(nn.Module):
    """A module of the model, which computes in ``dtype`` with float32 parameters."""

    config: DistilBertConfig
    dtype: DTypeLike = jnp.float32

    def _dense(self, features: int, name: str) -> nn.Dense:
        init = nn.initializers.normal(self.config.initializer_range)
        return dense(features, kernel_init=init, dtype=self.dtype, name=name)

    def _norm(self, name: str) -> nn.LayerNorm:
        return layer_norm(_NORM_EPSILON, self.dtype, name)

    def _part(self, kind: type["_Part"], name: str) -> "_Part":
        return kind(self.config, dtype=self.dtype, name=name)


class Embeddings(_Part):
    """Sum of word and position embeddings, normalized."""

    @nn.compact
    def __call__(self, input_ids: Array, *, deterministic: bool) -> Array:
        """Embeds tokens, integers ``(batch, length)``, in vectors ``(batch, length, dim)``."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        embed = functools.partial(nn.Embed, features=c.dim, embedding_init=init, dtype=self.dtype)
        positions = jnp.arange(input_ids.shape[-1])[None, :]
        x = split_lookup(embed(c.vocab_size, name="word_embeddings")(input_ids))
        x = x + embed(c.max_position_embeddings, name="position_embeddings")(positions)
        x = Dropout(c.dropout)(self._norm("LayerNorm")(x), deterministic=deterministic)
        return split_rows(x)


class MultiHeadSelfAttention(_Part):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    @nn.compact
    def __call__(self, x: Array, plan: Plan, *, deterministic: bool) -> Array:
        """Maps ``(batch, length, dim)`` to the same, with attention as planned."""
        c = self.config
        split = lambda y: y.reshape(*y.shape[:-1], c.n_heads, c.dim // c.n_heads)
        query, key, value = (split(self._dense(c.dim, f"{n}_lin")(x)) for n in "qkv")
        drop = Dropout(c.attention_dropout).of_weights(deterministic)
        y = attention(query, key, value, plan, drop=drop).reshape(x.shape)
        return self._dense(c.dim, "out_lin")(y)


class FFN(_Part):
    """The feed-forward block."""

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        """Maps ``(..., dim)`` to the same."""
        c = self.config
        x = ACTIVATIONS[c.activation](self._dense(c.hidden_dim, "lin1")(x))
        return Dropout(c.dropout)(self._dense(c.dim, "lin2")(x), deterministic=deterministic)


class TransformerBlock(_Part):
    """One layer: attention, then feed-forward, each added to its input and normalized."""

    @nn.compact
    def __call__(
        self, x: Array, layer_inputs: tuple[()], plan: Plan, deterministic: bool
    ) -> tuple[Array, None]:
        """Maps ``(batch, length, dim)`` to the same, with attention as planned."""
        y = self._part(MultiHeadSelfAttention, "attention")(x, plan, deterministic=deterministic)
        x = split_rows(self._norm("sa_layer_norm")(x + y))
        y = self._part(FFN, "ffn")(x, deterministic=deterministic)
        return split_rows(self._norm("output_layer_norm")(x + y)), None


class Transformer(_Part):
    """The stack of layers."""

    scan_layers: bool = False
    remat: str = "none"
    attention: str = AUTO

    def setup(self) -> None:
        """Makes the layers."""
        layers = Layers(self.config.n_layers, self.scan_layers, self.remat)
        self.layer = make_layers(TransformerBlock, layers, config=self.config, dtype=self.dtype)

    def __call__(self, x: Array, attention_mask: Array, *, deterministic: bool) -> Array:
        """Maps ``(batch, length, dim)`` to the same; the mask is ``(batch, length)``."""
        batch, n = attention_mask.shape
        options: dict[str, Any] = {"dtype": self.dtype, "deterministic": deterministic}
        case = Case(heads=self.config.heads, batch=batch, queries=n, **options)
        plan = make_plan(make_padding_mask(attention_mask), case, self.attention)
        return apply_layers(self.layer, x, (), plan, deterministic=deterministic)[0]


class DistilBertModel(_Part):
    """The encoder.

    Attributes:
      config: the shape.
      dtype: dtype of the activations, float32 or bfloat16; parameters are float32.
      scan_layers: whether the layers are stacked, and one is compiled for all.
      remat: what the backward pass computes again; see :func:`lora_jax.models.layers.remat_layer`.
      attention: how attention is computed; see :func:`lora_jax.models.attention.choose`.
    """

    scan_layers: bool = False
    remat: str = "none"
    attention: str = AUTO

    @nn.compact
    def __call__(
        self, input_ids: Array, attention_mask: Array, *, deterministic: bool = True
    ) -> Array:
        """Computes hidden states ``(batch, length, dim)``.

        Args:
          input_ids: integers ``(batch, length)``.
          attention_mask: the same shape; positive where there is a token, 0 at padding.
          deterministic: whether nothing is dropped; otherwise ``rngs={"dropout": key}`` is needed.

        Raises:
          ValueError: there are too many tokens, or the shapes differ.
        """
        check_inputs(self.config.positions, input_ids=input_ids, attention_mask=attention_mask)
        x = self._part(Embeddings, "embeddings")(input_ids, deterministic=deterministic)
        stack: dict[str, Any] = {
            "scan_layers": self.scan_layers, "remat": self.remat, "attention": self.attention,
        }  # fmt: skip
        layers = Transformer(self.config, self.dtype, **stack, name="transformer")
        return layers(x, attention_mask, deterministic=deterministic)


class DistilBertForSequenceClassification(_Part):
    """DistilBERT with two dense layers on the first token, and ReLU between them.

    Attributes:
      config: the encoder's shape.
      dtype: dtype of the activations, float32 or bfloat16; parameters are float32.
      num_labels: number of outputs of the classifier.
      scan_layers: as in :class:`DistilBertModel`.
      remat: the same.
      attention: the same.
    """

    num_labels: int = 2
    scan_layers: bool = False
    remat: str = "none"
    attention: str = AUTO

    @nn.compact
    def __call__(
        self, input_ids: Array, attention_mask: Array, *, deterministic: bool = True
    ) -> Array:
        """Computes logits ``(batch, num_labels)``, at least float32; arguments as the encoder's."""
        c = self.config
        stack: dict[str, Any] = {
            "scan_layers": self.scan_layers, "remat": self.remat, "attention": self.attention,
        }  # fmt: skip
        model = DistilBertModel(c, self.dtype, **stack, name="distilbert")
        x = model(input_ids, attention_mask, deterministic=deterministic)
        x = nn.relu(self._dense(c.dim, "pre_classifier")(x[:, 0]))
        x = Dropout(c.seq_classif_dropout)(x, deterministic=deterministic)
        logits = self._dense(self.num_labels, "classifier")(x)
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))


_DENSE = (*(f"attention.{n}_lin" for n in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2")


def names(
    config: DistilBertConfig, *, head: str = CLASSIFIER, scan_layers: bool = False
) -> list[Name]:
    """Makes the table between Flax paths and Hugging Face names, with one row for each leaf.

    Args:
      config: config of the model, which gives the number of layers.
      head: "classifier", or "encoder" for the leaves of a bare ``DistilBertModel``.
      scan_layers: whether the layers are stacked.

    >>> names(DistilBertConfig(), head="encoder")[4][:2]
    ('transformer/layer_0/attention/q_lin/kernel', 'transformer.layer.0.attention.q_lin.weight')
    """
    rows = [
        row
        for kind in ("embeddings.word_embeddings", "embeddings.position_embeddings")
        for row in tables.embedding(kind.replace(".", "/"), kind)
    ]
    rows += tables.norm("embeddings/LayerNorm", "embeddings.LayerNorm")
    layer = [row for hf in _DENSE for row in tables.linear(hf.replace(".", "/"), hf)]
    for norm in ("sa_layer_norm", "output_layer_norm"):
        layer += tables.norm(norm, norm)
    rows += tables.repeat_layers(
        "transformer/layer", "transformer.layer", layer, count=config.n_layers, scan=scan_layers
    )
    if head == ENCODER:
        return rows
    rows = tables.add_prefix("distilbert/", "distilbert.", rows)
    rows += tables.linear("pre_classifier", "pre_classifier")
    return rows + tables.linear("classifier", "classifier")


FAMILY = Family(
    model_type=("distilbert",),
    config=DistilBertConfig,
    names=names,
    models={CLASSIFIER: DistilBertForSequenceClassification, ENCODER: DistilBertModel},
    architectures={
        CLASSIFIER: "DistilBertForSequenceClassification", ENCODER: "DistilBertModel",
    },
    prefix="distilbert.",
    ignored=(
        "embeddings.position_ids", "vocab_transform.*", "vocab_layer_norm.*",
        "vocab_projector.*", "pre_classifier.*", "classifier.*", "qa_outputs.*",
    ),
    optional=("pre_classifier", "classifier"),
    label_module="classifier",
    targets=("q_lin", "v_lin"),
    trained=("pre_classifier", "classifier"),
    sharding=(
        *column("q_lin", "k_lin", "v_lin", "lin1", "pre_classifier"),
        *row("out_lin", "lin2", "classifier"),
        *embedding("word_embeddings", "position_embeddings"),
    ),
)  # fmt: skip
