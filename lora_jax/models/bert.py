"""BERT (Devlin et al. 2018): encoder, pooler and a head for the classification of sequences.

The modules and their numbers are those of Hugging Face's ``BertForSequenceClassification``; each
kernel is stored as Flax does, ``(d_in, d_out)``. :func:`names` is the table between the two.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from lora_jax.models import config_checks, encoder, tables
from lora_jax.models.encoder import (
    EncoderConfig,
    EncoderForSequenceClassification,
    EncoderModel,
)
from lora_jax.models.families import CLASSIFIER, ENCODER, Family
from lora_jax.models.layers import Dropout, dense
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
        """Reads a parsed ``config.json``; it leaves out keys that do not shape the model.

        Raises:
          ValueError: it describes another architecture, or a variant that is not built here.

        >>> BertConfig.from_hf({"model_type": "bert", "hidden_size": 384}).hidden_size
        384
        """
        return config_checks.read(cls, config, model_type=["bert"], built=encoder.BUILT)

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a ``config.json``.

        >>> BertConfig.from_hf(BertConfig(hidden_size=384).to_hf()).hidden_size
        384
        """
        return {"model_type": "bert"} | dataclasses.asdict(self)


class BertModel(EncoderModel):
    """BERT without a head: encoder and pooler. Its attributes are those of its base class."""


class BertForSequenceClassification(EncoderForSequenceClassification):
    """BERT with a linear classifier on the pooled first token."""

    encoder_name = "bert"
    encoder_pooler = True

    def _classify(self, x: Array, *, deterministic: bool) -> Array:
        c = self.config
        x = Dropout(c.head_dropout)(x, deterministic=deterministic)
        init = nn.initializers.normal(c.initializer_range)
        return dense(self.num_labels, kernel_init=init, dtype=self.dtype, name="classifier")(x)


def names(config: BertConfig, *, head: str = CLASSIFIER, scan_layers: bool = False) -> list[Name]:
    """Makes the table between Flax paths and Hugging Face names, with one row for each leaf.

    Args:
      config: config of the model, which gives the number of layers.
      head: "classifier", with the prefix ``bert`` as in ``BertForSequenceClassification``, or
        "encoder", the leaves of a bare ``BertModel``.
      scan_layers: whether the layers are stacked.

    >>> row = names(BertConfig())[5]
    >>> row.flax
    'bert/encoder/layer_0/attention/query/kernel'
    >>> row.hf, row.transpose
    ('bert.encoder.layer.0.attention.self.query.weight', True)
    """
    rows = encoder.names(config, pooler=True, scan_layers=scan_layers)
    if head == ENCODER:
        return rows
    return tables.add_prefix("bert/", "bert.", rows) + tables.linear("classifier", "classifier")


FAMILY = Family(
    model_type=("bert",),
    config=BertConfig,
    names=names,
    models={CLASSIFIER: BertForSequenceClassification, ENCODER: BertModel},
    architectures={CLASSIFIER: "BertForSequenceClassification", ENCODER: "BertModel"},
    prefix="bert.",
    # A buffer of positions, and the heads for pretraining.
    ignored=("embeddings.position_ids", "cls.*", "classifier.*", "qa_outputs.*"),
    optional=("classifier", "bert/pooler", "pooler"),
    label_module="classifier",
    targets=("query", "value"),
    trained=("classifier",),
    sharding=encoder.SHARDING,
)
