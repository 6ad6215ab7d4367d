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
import jax.numpy as jnp

from lora_jax.models import config_checks, encoder, tables
from lora_jax.models.encoder import Embeddings, Encoder, EncoderConfig, Part, Pooler
from lora_jax.models.families import CLASSIFIER, ENCODER, Family
from lora_jax.models.layers import Dropout, check_inputs
from lora_jax.names import Name

Array = jax.Array

_KINDS = ("roberta", "xlm-roberta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(EncoderConfig):
    """The shape of a RoBERTa model; field names as in ``config.json``, defaults of roberta-base.

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
        """The longest input: positions up to that of padding are never a token's."""
        return self.max_position_embeddings - self.pad_token_id - 1

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "RobertaConfig":
        """Reads a parsed ``config.json``; keys that do not shape the model are left out.

        Raises:
          ValueError: it describes another architecture, or a variant that is not built here.

        >>> RobertaConfig.from_hf({"model_type": "xlm-roberta", "vocab_size": 250002}).positions
        512
        """
        return config_checks.read(cls, config, model_type=_KINDS, built=encoder.BUILT)

    def to_hf(self) -> dict[str, Any]:
        """The same as the content of a ``config.json``.

        >>> RobertaConfig().to_hf()["model_type"]
        'roberta'
        """
        return dataclasses.asdict(self)


def position_ids(input_ids: Array, pad: int) -> Array:
    """The number of each token among those that are no padding, from ``pad + 1``; padding has pad.

    >>> position_ids(jnp.array([[5, 6, 1, 1]]), 1).tolist()
    [[2, 3, 1, 1]]
    """
    real = (input_ids != pad).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + pad


class RobertaModel(Part):
    """Encoder, and pooler if asked for.

    Attributes:
      config: the shape.
      dtype: of the activations, float32 or bfloat16; parameters are float32.
      pooler: whether there is a pooler; a classifier has none.
      scan_layers: whether the layers are stacked, and one is compiled for all.
      remat: what the backward pass computes again; see :func:`layers.rematted`.
    """

    pooler: bool = True
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
    ) -> tuple[Array, Array | None]:
        """Computes hidden states ``(batch, length, hidden)`` and pooled ``(batch, hidden)``.

        Args:
          input_ids: integers ``(batch, length)``; what is no token must be ``pad_token_id``.
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
        positions = position_ids(input_ids, self.config.pad_token_id)
        embeddings = self._part(Embeddings, "embeddings")
        x = embeddings(input_ids, token_type_ids, positions, deterministic=deterministic)
        stack = {"scan_layers": self.scan_layers, "remat": self.remat}
        layers = Encoder(self.config, self.dtype, **stack, name="encoder")
        x = layers(x, attention_mask, deterministic=deterministic)
        return x, self._part(Pooler, "pooler")(x) if self.pooler else None


class RobertaClassificationHead(Part):
    """Two dense layers on the first token, with tanh between them."""

    num_labels: int = 2

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        """``(batch, length, hidden)`` to ``(batch, num_labels)``."""
        drop = Dropout(self.config.head_dropout, deterministic=deterministic)
        x = nn.tanh(self._dense(self.config.hidden_size)(drop(x[:, 0])))
        return self._dense(self.num_labels, "out_proj")(drop(x))


class RobertaForSequenceClassification(nn.Module):
    """RoBERTa with its classification head.

    Attributes:
      config: the encoder's shape.
      num_labels: outputs of the classifier.
      dtype: of the activations, float32 or bfloat16; parameters are float32.
      scan_layers, remat: as in :class:`RobertaModel`.
    """

    config: RobertaConfig
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
        """Logits ``(batch, num_labels)``, at least float32; arguments as :class:`RobertaModel`."""
        stack = {"scan_layers": self.scan_layers, "remat": self.remat}
        model = RobertaModel(self.config, self.dtype, pooler=False, **stack, name="roberta")
        x, _ = model(input_ids, attention_mask, token_type_ids, deterministic=deterministic)
        head = RobertaClassificationHead(
            self.config, self.dtype, num_labels=self.num_labels, name="classifier"
        )
        logits = head(x, deterministic=deterministic)
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))


def names(
    config: RobertaConfig, *, head: str = CLASSIFIER, scan_layers: bool = False
) -> list[Name]:
    """The table between Flax paths and Hugging Face names, one row a leaf.

    Args:
      config: gives the number of layers.
      head: "classifier", or "encoder" for the leaves of a bare ``RobertaModel``.
      scan_layers: with the layers stacked.

    >>> names(RobertaConfig())[-2][:2]
    ('classifier/out_proj/kernel', 'classifier.out_proj.weight')
    """
    rows = encoder.names(config, pooler=head == ENCODER, scan_layers=scan_layers)
    if head == ENCODER:
        return rows
    rows = tables.below("roberta/", "roberta.", rows)
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
    # Buffers, and other heads; a classifier has no pooler, which pretrained files carry.
    ignored=(
        "embeddings.position_ids", "embeddings.token_type_ids",
        "pooler.*", "lm_head.*", "classifier.*", "qa_outputs.*",
    ),
    optional=("classifier", "pooler"),
    labelled="classifier/out_proj",
    targets=("query", "value"),
    trained=("classifier",),
    sharding=encoder.SHARDING,
)  # fmt: skip
XLM = dataclasses.replace(
    FAMILY,
    model_type=("xlm-roberta",),
    architectures={CLASSIFIER: "XLMRobertaForSequenceClassification", ENCODER: "XLMRobertaModel"},
)
