"""What a T5 model is on disk: its config, and the table of its tensors' names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from lora_jax.names import Name

ACTIVATIONS = {"relu": nn.relu, "gelu_new": nn.gelu, "gelu": nn.gelu, "silu": nn.silu}

_SIZES = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
    "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip
_TOKENS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """The shape of a T5 model; field names as in Hugging Face's ``config.json``.

    Attributes:
      num_decoder_layers: None for as many as the encoder has.
      feed_forward_proj: an activation; "gated-" before it for a product of two projections.
      tie_word_embeddings: the head is the embedding, and the decoder's states are scaled by
        ``d_model**-0.5`` before it; otherwise it has a kernel of its own, and nothing is scaled.

    Raises:
      ValueError: a value is out of its range; the message names the field.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
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
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name in _TOKENS:
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < self.vocab_size:
                raise ValueError(f"{name} must be a token of the vocabulary, got {value!r}.")
        if not (isinstance(self.dropout_rate, int | float) and 0 <= self.dropout_rate < 1):
            raise ValueError(f"dropout_rate must be a number in [0, 1), got {self.dropout_rate!r}.")
        for name in ("layer_norm_epsilon", "initializer_factor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
        if self.feed_forward_proj.removeprefix("gated-") not in ACTIVATIONS:
            raise ValueError(
                f"feed_forward_proj {self.feed_forward_proj!r} is not one of "
                f"{sorted(ACTIVATIONS)}, with or without 'gated-' before it."
            )
        buckets, furthest = (getattr(self, name) for name in _SIZES[-2:])
        if buckets < 4 or furthest <= buckets // 2:
            raise ValueError(
                "relative_attention_num_buckets must be at least 4 and less than twice "
                f"relative_attention_max_distance, got {buckets} and {furthest}."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "T5Config":
        """Reads a parsed ``config.json``; keys that do not shape the model are left out.

        Raises:
          ValueError: it describes another architecture.

        >>> T5Config.from_hf({"model_type": "t5", "d_model": 256}).d_model
        256
        """
        kind = config.get("model_type")
        if kind != "t5":
            raise ValueError(f"model_type is {kind!r} in this config; only 't5' is built here.")
        known = {f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config}
        # transformers 5 calls every T5 tied, and says here what version 1.1 is known by.
        tied = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
        return cls(**(known | {"tie_word_embeddings": tied is not False}))

    def to_hf(self) -> dict[str, Any]:
        """The same as the content of a ``config.json``.

        >>> T5Config.from_hf(T5Config(d_ff=7).to_hf()).d_ff
        7
        """
        return {"model_type": "t5", "is_encoder_decoder": True} | dataclasses.asdict(self)


# The norm of each part of a block here; its number there.
_NORMS = {
    "SelfAttention": "self_norm",
    "EncDecAttention": "cross_norm",
    "DenseReluDense": "dense_norm",
}


def names(config: T5Config, *, head: str = "seq2seq-lm", scan_layers: bool = False) -> list[Name]:
    """The table between Flax paths and Hugging Face names, one row a leaf.

    >>> row = names(T5Config())[4]
    >>> row.flax
    'encoder/block_0/SelfAttention/q/kernel'
    >>> row.hf, row.transpose
    ('encoder.block.0.layer.0.SelfAttention.q.weight', True)
    """
    uses = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    if config.tie_word_embeddings:
        uses.append("lm_head.weight")
    rows = [Name("shared/embedding", "shared.weight", tied=tuple(uses))]
    if not config.tie_word_embeddings:
        rows.append(Name("lm_head/kernel", "lm_head.weight", transpose=True))
    dense = ("wi_0", "wi_1", "wo") if "gated-" in config.feed_forward_proj else ("wi", "wo")
    parts = {"SelfAttention": "qkvo", "DenseReluDense": dense}
    rows += _stack("encoder", config.num_layers, parts, scan_layers)
    parts = {"SelfAttention": "qkvo", "EncDecAttention": "qkvo", "DenseReluDense": dense}
    return rows + _stack("decoder", config.num_decoder_layers, parts, scan_layers)


def _stack(stack: str, count: int, parts: Mapping, scan_layers: bool) -> list[Name]:
    bias = "relative_attention_bias"
    rows = [
        Name(f"{stack}/{bias}/embedding", f"{stack}.block.0.layer.0.SelfAttention.{bias}.weight"),
        Name(f"{stack}/final_layer_norm/scale", f"{stack}.final_layer_norm.weight"),
    ]
    numbers = [("block", "{}")] if scan_layers else [(f"block_{k}", k) for k in range(count)]
    for block, number in numbers:
        for k, (part, kernels) in enumerate(parts.items()):
            flax, hf = f"{stack}/{block}", f"{stack}.block.{number}.layer.{k}"
            rows.append(Name(f"{flax}/{_NORMS[part]}/scale", f"{hf}.layer_norm.weight"))
            for x in kernels:
                rows.append(Name(f"{flax}/{part}/{x}/kernel", f"{hf}.{part}.{x}.weight", True))
    return rows
