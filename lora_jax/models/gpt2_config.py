"""Describes a GPT-2 model on disk: its config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.models import config_checks
from lora_jax.models.attention import Heads
from lora_jax.models.layers import ACTIVATIONS

# Keys of variants that Hugging Face has and this file has not, with the one value that is built.
_BUILT = {"add_cross_attention": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The shape of a GPT-2 model; field names as in Hugging Face's ``config.json``.

    The defaults are those of the smallest model; medium has ``n_embd=1024, n_layer=24, n_head=16``,
    large 1280, 36 and 20, XL 1600, 48 and 25.

    Raises:
      ValueError: a value is out of its range; the message names the field.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        config_checks.check_sizes(
            self, ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        )
        if self.n_inner is not None:
            config_checks.check_sizes(self, ("n_inner",))
        config_checks.check_rates(self, ("resid_pdrop", "embd_pdrop", "attn_pdrop"))
        config_checks.check_positive(self, ("layer_norm_epsilon", "initializer_range"))
        config_checks.check_one_of(self, "activation_function", ACTIVATIONS)
        config_checks.check_divides(self, "n_embd", "n_head")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.n_embd // self.n_head

    @property
    def heads(self) -> Heads:
        """The attention of a layer."""
        count = self.n_head
        return Heads(count=count, groups=count, size=self.head_dim, dropout=self.attn_pdrop)

    @property
    def positions(self) -> int:
        """The length of the longest text, in tokens."""
        return self.n_positions

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GPT2Config":
        """Reads a parsed ``config.json``; it leaves out keys that do not shape the model.

        Raises:
          ValueError: it describes another architecture, or a variant that is not built here.

        >>> GPT2Config.from_hf({"model_type": "gpt2", "n_embd": 1024, "n_head": 16}).head_dim
        64
        """
        return config_checks.read(cls, config, model_type=["gpt2"], built=_BUILT)

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a ``config.json``.

        >>> GPT2Config.from_hf(GPT2Config(n_layer=24).to_hf()).n_layer
        24
        """
        return {"model_type": "gpt2"} | dataclasses.asdict(self)
