"""Describes a T5 model on disk: its config, and the table of its tensors' names."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.models import config_checks, tables
from lora_jax.models.attention import Heads
from lora_jax.models.families import SEQ2SEQ_LM
from lora_jax.models.layers import ACTIVATIONS
from lora_jax.names import Name

_DERIVED: Any = None  # the default of a field that follows from another
_SIZES = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
    "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """The shape of a T5 model; field names as in Hugging Face's ``config.json``.

    Attributes:
      num_decoder_layers: number of decoder layers; None for that of the encoder.
      decoder_start_token_id: token that every output starts with; None for the padding token.
      feed_forward_proj: an activation; "gated-" before it for a product of two projections.
      tie_word_embeddings: whether the head is the embedding, and the decoder's states are scaled by
        ``d_model**-0.5`` before it; otherwise the head has its own kernel, and nothing is scaled.

    Raises:
      ValueError: a value is out of its range; the message names the field.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = _DERIVED
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int | None = None

    def __post_init__(self) -> None:
        defaults = {"num_decoder_layers": "num_layers", "decoder_start_token_id": "pad_token_id"}
        for name, other in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self, other))
        config_checks.check_sizes(self, _SIZES)
        config_checks.check_at_most(self, "relative_attention_max_distance", 2**20)
        config_checks.check_rates(self, ("dropout_rate",))
        config_checks.check_positive(self, ("layer_norm_epsilon", "initializer_factor"))
        projections = [f"{gate}{name}" for gate in ("", "gated-") for name in ACTIVATIONS]
        config_checks.check_one_of(self, "feed_forward_proj", projections)
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < self.vocab_size:
                raise ValueError(f"{name} must be a token of the vocabulary, got {value!r}.")
        num_buckets = self.relative_attention_num_buckets
        max_distance = self.relative_attention_max_distance
        if num_buckets < 4 or max_distance <= num_buckets // 2:
            raise ValueError(
                "relative_attention_num_buckets must be at least 4 and less than twice "
                f"relative_attention_max_distance, got {num_buckets} and {max_distance}."
            )

    @property
    def heads(self) -> Heads:
        """The attention of a layer."""
        return Heads(
            count=self.num_heads,
            groups=self.num_heads,
            size=self.d_kv,
            dropout=self.dropout_rate,
            is_relative=True,
        )

    @property
    def positions(self) -> None:
        """The length of the longest input: there is no limit, since positions are relative."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "T5Config":
        """Reads a parsed ``config.json``; it leaves out keys that do not shape the model.

        Raises:
          ValueError: it describes another architecture.

        >>> T5Config.from_hf({"model_type": "t5", "d_model": 256}).d_model
        256
        """
        # transformers 5 calls every T5 tied; scale_decoder_outputs tells version 1.1 from 1.0.
        is_tied = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
        config = {**config, "tie_word_embeddings": is_tied is not False}
        return config_checks.read(
            cls, config, model_type=["t5"], built={"is_encoder_decoder": True}
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a ``config.json``.

        >>> T5Config.from_hf(T5Config(d_ff=7).to_hf()).d_ff
        7
        """
        return {"model_type": "t5", "is_encoder_decoder": True} | dataclasses.asdict(self)


# The submodules of a block, each with its norm, in the order of their numbers in a checkpoint.
_NORMS = {
    "SelfAttention": "self_norm",
    "EncDecAttention": "cross_norm",
    "DenseReluDense": "dense_norm",
}


def names(config: T5Config, *, head: str = SEQ2SEQ_LM, scan_layers: bool = False) -> list[Name]:
    """Makes the table between Flax paths and Hugging Face names, with one row for each leaf.

    >>> row = names(T5Config())[4]
    >>> row.flax
    'encoder/block_0/SelfAttention/q/kernel'
    >>> row.hf, row.transpose
    ('encoder.block.0.layer.0.SelfAttention.q.weight', True)
    """
    tied = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    if config.tie_word_embeddings:
        tied.append("lm_head.weight")
    rows = [Name("shared/embedding", "shared.weight", tied=tuple(tied))]
    if not config.tie_word_embeddings:
        # A checkpoint does not store a head that happens to equal the embedding.
        (row,) = tables.linear("lm_head", "lm_head", bias=False)
        rows.append(row._replace(otherwise="shared.weight"))
    dense = ("wi_0", "wi_1", "wo") if "gated-" in config.feed_forward_proj else ("wi", "wo")
    parts = {"SelfAttention": "qkvo", "DenseReluDense": dense}
    rows += _name_stack("encoder", config.num_layers, parts, scan_layers)
    parts = {"SelfAttention": "qkvo", "EncDecAttention": "qkvo", "DenseReluDense": dense}
    return rows + _name_stack("decoder", config.num_decoder_layers, parts, scan_layers)


def _name_stack(
    stack: str, count: int, parts: Mapping[str, Iterable[str]], scan_layers: bool
) -> list[Name]:
    bias = "relative_attention_bias"
    rows = tables.embedding(f"{stack}/{bias}", f"{stack}.block.0.layer.0.SelfAttention.{bias}")
    rows += tables.norm(f"{stack}/final_layer_norm", f"{stack}.final_layer_norm", bias=False)
    block = []
    for k, (part, kernels) in enumerate(parts.items()):
        block += tables.norm(_NORMS[part], f"layer.{k}.layer_norm", bias=False)
        for kernel in kernels:
            block += tables.linear(f"{part}/{kernel}", f"layer.{k}.{part}.{kernel}", bias=False)
    return rows + tables.repeat_layers(
        f"{stack}/block", f"{stack}.block", block, count=count, scan=scan_layers
    )
