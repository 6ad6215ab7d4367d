"""RoBERTa (Liu et al. 2019) and XLM-R (Conneau et al. 2020): BERT's encoder with other positions.

The modules and their numbers are those of Hugging Face's ``RobertaForSequenceClassification``:
positions count the tokens that are not padding, from ``pad_token_id + 1`` on, and the head has two
layers on the first token.
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
    Part,
)
from lora_jax.models.families import CLASSIFIER, ENCODER, Family
from lora_jax.models.layers import Dropout
from lora_jax.names import Name

Array = jax.Array

_KINDS = ("roberta", "xlm-roberta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(EncoderConfig):
    """The shape of a RoBERTa model, by default that of roberta-base; field names as in BERT's.

    Raises:
      ValueError: a value is out of its range; the message names the field.
    """

    model_type: str = "roberta"
    vocab_size: int = 50265
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        config_checks.check_one_of(self, "model_type", _KINDS)
        pad = self.pad_token_id
        if not isinstance(pad, int) or not 0 <= pad < self.vocab_size or self.positions < 1:
            raise ValueError(
                f"pad_token_id must be a token of the {self.vocab_size}, below the "
                f"{self.max_position_embeddings - 1} that leave a position, got {pad!r}."
            )

    @property
    def positions(self) -> int:
        """The length of the longest input; no token has a position up to that of padding."""
        return self.max_position_embeddings - self.pad_token_id - 1

    @property
    def padding_idx(self) -> int:
        """The token of padding, which positions skip."""
        return self.pad_token_id

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "RobertaConfig":
        """Reads a parsed ``config.json``; it leaves out keys that do not shape the model.

        Raises:
          ValueError: it describes another architecture, or a variant that is not built here.

        >>> RobertaConfig.from_hf({"model_type": "xlm-roberta", "vocab_size": 250002}).positions
        512
        """
        return config_checks.read(cls, config, model_type=_KINDS, built=encoder.BUILT)

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a ``config.json``.

        >>> RobertaConfig().to_hf()["model_type"]
        'roberta'
        """
        return dataclasses.asdict(self)


class RobertaModel(EncoderModel):
    """RoBERTa without a head: encoder and pooler. Its attributes are those of its base class."""


class RobertaClassificationHead(Part):
    """Two dense layers on the first token, with tanh between them."""

    num_labels: int = 2

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        """Maps ``(batch, length, hidden)`` to ``(batch, num_labels)``."""
        drop = Dropout(self.config.head_dropout, deterministic=deterministic)
        x = nn.tanh(self._dense(self.config.hidden_size)(drop(x[:, 0])))
        return self._dense(self.num_labels, "out_proj")(drop(x))


class RobertaForSequenceClassification(EncoderForSequenceClassification):
    """RoBERTa with a classifier of two layers on the first token."""

    encoder_name = "roberta"
    encoder_pooler = False

    def _classify(self, x: Array, *, deterministic: bool) -> Array:
        head = RobertaClassificationHead(
            self.config, self.dtype, num_labels=self.num_labels, name="classifier"
        )
        return head(x, deterministic=deterministic)


def names(
    config: RobertaConfig, *, head: str = CLASSIFIER, scan_layers: bool = False
) -> list[Name]:
    """Makes the table between Flax paths and Hugging Face names, with one row for each leaf.

    Args:
      config: config of the model, which gives the number of layers.
      head: "classifier", or "encoder" for the leaves of a bare ``RobertaModel``.
      scan_layers: whether the layers are stacked.

    >>> names(RobertaConfig())[-2][:2]
    ('classifier/out_proj/kernel', 'classifier.out_proj.weight')
    """
    rows = encoder.names(config, pooler=head == ENCODER, scan_layers=scan_layers)
    if head == ENCODER:
        return rows
    rows = tables.add_prefix("roberta/", "roberta.", rows)
    for layer in ("dense", "out_proj"):
        rows += tables.linear(f"classifier/{layer}", f"classifier.{layer}")
    return rows


FAMILY = Family(
    model_type=("roberta",),
    config=RobertaConfig,
    names=names,
    models={CLASSIFIER: RobertaForSequenceClassification, ENCODER: RobertaModel},
    architectures={CLASSIFIER: "RobertaForSequenceClassification", ENCODER: "RobertaModel"},
    prefix="roberta.",
    # Buffers, and other heads; pretrained files carry a pooler, and a classifier has none.
    ignored=(
        "embeddings.position_ids", "embeddings.token_type_ids",
        "pooler.*", "lm_head.*", "classifier.*", "qa_outputs.*",
    ),
    optional=("classifier", "pooler"),
    label_module="classifier/out_proj",
    targets=("query", "value"),
    trained=("classifier",),
    sharding=encoder.SHARDING,
)  # fmt: skip
XLM = dataclasses.replace(
    FAMILY,
    model_type=("xlm-roberta",),
    architectures={CLASSIFIER: "XLMRobertaForSequenceClassification", ENCODER: "XLMRobertaModel"},
)
