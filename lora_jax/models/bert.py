"""BERT (Devlin et al. 2018): encoder, pooler and sequence-classification head.

The modules and their numbers are those of Hugging Face's ``BertForSequenceClassification``; each
kernel is stored as Flax does, ``(d_in, d_out)``. :func:`names` is the table between the two.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.models import config_checks, encoder, tables
from lora_jax.models.encoder import Embeddings, Encoder, EncoderConfig, Part, Pooler
from lora_jax.models.families import CLASSIFIER, ENCODER, Family
from lora_jax.models.layers import Dropout, check_inputs
from lora_jax.names import Name

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """The shape of a BERT model; field names as in Hugging Face's ``config.json``.

    Raises:
      ValueError: a value is out of its range; the message names the field.
    """

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "BertConfig":
        """Reads a parsed ``config.json``; keys that do not shape the model are left out.

        Raises:
          ValueError: it describes another architecture, or a variant that is not built here.

        >>> BertConfig.from_hf({"model_type": "bert", "hidden_size": 384}).hidden_size
        384
        """
        return config_checks.read(cls, config, model_type=["bert"], built=encoder.BUILT)

    def to_hf(self) -> dict[str, Any]:
        """The same as the content of a ``config.json``.

        >>> BertConfig.from_hf(BertConfig(hidden_size=384).to_hf()).hidden_size
        384
        """
        return {"model_type": "bert"} | dataclasses.asdict(self)


class BertModel(Part):
    """Encoder and pooler.

    Attributes:
      config: the shape.
      dtype: of the activations, float32 or bfloat16; parameters are float32.
      scan_layers: whether the layers are stacked, and one is compiled for all.
      remat: what the backward pass computes again; see :func:`layers.rematted`.
    """

    scan_layers: bool = False
    remat: str = "none"

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
        check_inputs(
            self.config.positions,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
        )
        positions = jnp.arange(input_ids.shape[-1])[None, :]
        embeddings = self._part(Embeddings, "embeddings")
        x = embeddings(input_ids, token_type_ids, positions, deterministic=deterministic)
        stack = {"scan_layers": self.scan_layers, "remat": self.remat}
        layers = Encoder(self.config, self.dtype, **stack, name="encoder")
        x = layers(x, attention_mask, deterministic=deterministic)
        return x, self._part(Pooler, "pooler")(x)


class BertForSequenceClassification(nn.Module):
    """BERT with a linear classifier on the pooled first token.

    Attributes:
      config: the encoder's shape.
      num_labels: outputs of the classifier.
      dtype: of the activations, float32 or bfloat16; parameters are float32.
      scan_layers, remat: as in :class:`BertModel`.
    """

    config: BertConfig
    num_labels: int = 2
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: str = "none"

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
        stack = {"scan_layers": self.scan_layers, "remat": self.remat}
        model = BertModel(c, self.dtype, **stack, name="bert")
        _, pooled = model(input_ids, attention_mask, token_type_ids, deterministic=deterministic)
        pooled = Dropout(c.head_dropout)(pooled, deterministic=deterministic)
        init = nn.initializers.normal(c.initializer_range)
        head = nn.Dense(self.num_labels, kernel_init=init, dtype=self.dtype, name="classifier")
        return head(pooled).astype(jnp.promote_types(self.dtype, jnp.float32))


def names(config: BertConfig, *, head: str = CLASSIFIER, scan_layers: bool = False) -> list[Name]:
    """The table between Flax paths and Hugging Face names, one row a leaf.

    Args:
      config: gives the number of layers.
      head: "classifier", with the prefix ``bert`` as in ``BertForSequenceClassification``, or
        "encoder", the leaves of a bare ``BertModel``.
      scan_layers: with the layers stacked.

    >>> row = names(BertConfig())[5]
    >>> row.flax
    'bert/encoder/layer_0/attention/query/kernel'
    >>> row.hf, row.transpose
    ('bert.encoder.layer.0.attention.self.query.weight', True)
    """
    rows = encoder.names(config, pooler=True, scan_layers=scan_layers)
    if head == ENCODER:
        return rows
    return tables.below("bert/", "bert.", rows) + tables.linear("classifier", "classifier")


FAMILY = Family(
    model_type=("bert",),
    config=BertConfig,
    names=names,
    models={CLASSIFIER: BertForSequenceClassification, ENCODER: BertModel},
    architectures={CLASSIFIER: "BertForSequenceClassification", ENCODER: "BertModel"},
    prefix="bert.",
    # A buffer of positions, and the heads of pretraining.
    ignored=("embeddings.position_ids", "cls.*", "classifier.*", "qa_outputs.*"),
    optional=("classifier", "bert/pooler", "pooler"),
    labelled="classifier",
    targets=("query", "value"),
    trained=("classifier",),
    sharding=encoder.SHARDING,
)
