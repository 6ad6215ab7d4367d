"""Describes a model of the Llama family on disk: its config, and the table of its names."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from lora_jax.models import config_checks, rope, tables
from lora_jax.models.attention import Heads
from lora_jax.models.families import CAUSAL_LM
from lora_jax.models.layers import ACTIVATIONS
from lora_jax.models.rope import Rope
from lora_jax.names import Name

SLIDING, FULL = "sliding_attention", "full_attention"

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_COMMON_FIELDS = (
    *_SIZES,
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
)
_C = TypeVar("_C", bound="LlamaConfig")
BUILT = {"partial_rotary_factor": 1.0, "use_bidirectional_attention": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """The properties of a model type that its ``config.json`` does not tell.

    Attributes:
      architecture: its class in transformers.
      fields: keys of its ``config.json`` besides those that all types have.
      defaults: values of absent keys, where they differ from Llama's.
      is_sliding: function of ``(layer, config)`` that tells whether the layer attends to a window
        only, where the config has a window and does not list the layers.
      qkv_bias: whether queries, keys and values have biases, regardless of ``attention_bias``.
      qk_norm: whether each head's query and key are normalized before they are rotated.
      norm_offset: number that is added to the scale of every norm.
      scaled_embedding: whether embeddings are multiplied by the root of their size.
      post_norms: whether attention and feed-forward are also normalized before they are added.
      activation: key of the activation in ``config.json``.
      local_theta: base of the rotation in layers with a window; None for that of the others.
    """

    architecture: str
    fields: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_sliding: Callable[[int, Mapping[str, Any]], bool] = lambda layer, config: False
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    post_norms: bool = False
    activation: str = "hidden_act"
    local_theta: float | None = None


_QWEN = {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
    "use_sliding_window": False,
}  # fmt: skip
_GEMMA = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip
_SCALED: dict[str, Any] = {"norm_offset": 1.0, "scaled_embedding": True, "post_norms": True}
_DERIVED: Any = None  # the default of fields that follow from others in a config without them
_WINDOW = ("sliding_window", "layer_types")

VARIANTS: dict[str, Variant] = {
    "llama": Variant(architecture="LlamaForCausalLM", fields=("attention_bias", "mlp_bias")),
    "mistral": Variant(
        architecture="MistralForCausalLM",
        fields=("sliding_window",),
        defaults={
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        is_sliding=lambda layer, config: True,
    ),
    "qwen2": Variant(
        architecture="Qwen2ForCausalLM",
        fields=_WINDOW,
        defaults=_QWEN,
        is_sliding=lambda layer, config: layer >= config["max_window_layers"],
        qkv_bias=True,
    ),
    "qwen3": Variant(
        architecture="Qwen3ForCausalLM",
        fields=("attention_bias", *_WINDOW),
        defaults=_QWEN | {"head_dim": 128},
        is_sliding=lambda layer, config: layer >= config["max_window_layers"],
        qk_norm=True,
    ),
    "gemma2": Variant(
        architecture="Gemma2ForCausalLM",
        fields=("attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping")
        + ("final_logit_softcapping", *_WINDOW),
        defaults=_GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        is_sliding=lambda layer, config: layer % 2 == 0,
        activation="hidden_activation",
        **_SCALED,
    ),
    "gemma3_text": Variant(
        architecture="Gemma3ForCausalLM",
        fields=("attention_bias", "query_pre_attn_scalar", "final_logit_softcapping", *_WINDOW),
        defaults=_GEMMA | {"vocab_size": 262208, "max_position_embeddings": 131072}
        | {"sliding_window_pattern": 6, "rope_theta": 1e6},
        is_sliding=lambda layer, config: (layer + 1) % config["sliding_window_pattern"] != 0,
        qk_norm=True,
        activation="hidden_activation",
        local_theta=1e4,
        **_SCALED,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a model; field names as in Hugging Face's ``config.json`` where it has them.

    The defaults are Llama's; :meth:`from_hf` knows those of the other model types.

    Attributes:
      model_type: one of :data:`VARIANTS`.
      num_key_value_heads: number of heads of keys; None for that of queries.
      head_dim: width of a head; None for ``hidden_size / num_attention_heads``.
      hidden_act: activation of the feed-forward layer's gate.
      rope: rotation in the layers without a window.
      sliding_rope: rotation in the layers with a window; None for the same.
      sliding_window: number of tokens, itself included, that a token sees in a layer with a window.
      layer_types: "sliding_attention" or "full_attention" for each layer; None for the former in
        all layers if there is a window, and otherwise for the latter.
      query_pre_attn_scalar: number by whose root scores are divided; None for ``head_dim``.
      attn_logit_softcapping: bound of the scores; None for none.
      final_logit_softcapping: bound of the logits; None for none.

    Raises:
      ValueError: a value is out of its range, or the model type does not have the field; the
        message names it.
    """

    variants: ClassVar[Mapping[str, Variant]] = VARIANTS
    built: ClassVar[Mapping[str, Any]] = BUILT
    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = _DERIVED
    head_dim: int = _DERIVED
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    rope: Rope = Rope()
    sliding_rope: Rope | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = _DERIVED
    query_pre_attn_scalar: float = _DERIVED
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self) -> None:
        config_checks.check_one_of(self, "model_type", self.variants)
        config_checks.check_sizes(self, ("hidden_size", "num_attention_heads", "num_hidden_layers"))
        config_checks.check_at_most(self, "num_hidden_layers", 10_000)
        kind = SLIDING if self.sliding_window else FULL
        for name, value in {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
            "layer_types": (kind,) * self.num_hidden_layers,
        }.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.query_pre_attn_scalar is None:
            object.__setattr__(self, "query_pre_attn_scalar", self.head_dim)
        _check(self)

    @property
    def heads(self) -> Heads:
        """The attention of a layer."""
        return Heads(
            count=self.num_attention_heads,
            groups=self.num_key_value_heads,
            size=self.head_dim,
            softcap=self.attn_logit_softcapping,
            dropout=self.attention_dropout,
        )

    @property
    def variant(self) -> Variant:
        """The properties of the model type."""
        return self.variants[self.model_type]

    @classmethod
    def from_hf(cls: type[_C], config: Mapping[str, Any]) -> _C:
        """Reads a parsed ``config.json`` of transformers 4 or 5, and leaves out other keys.

        Raises:
          ValueError: it describes another architecture, or a variant that is not built here.

        >>> c = LlamaConfig.from_hf({"model_type": "gemma2", "num_hidden_layers": 2})
        >>> c.layer_types, c.head_dim
        (('sliding_attention', 'full_attention'), 256)
        """
        read = functools.partial(config_checks.read, cls, model_type=cls.variants, built=cls.built)
        model_type: Any = config.get("model_type")
        if model_type not in cls.variants:
            return read(config)  # which raises
        variant = cls.variants[model_type]
        values = {**variant.defaults, **config}
        names = ("model_type", *_COMMON_FIELDS, *variant.fields)
        fields = {name: values[name] for name in names if name in values}
        if variant.activation in values:
            fields["hidden_act"] = values[variant.activation]
        if "sliding_window" in variant.fields:
            fields |= _read_windows(values, variant, fields)
        fields |= _read_ropes(values, variant)
        return read(fields | {name: config.get(name) for name in cls.built})

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a ``config.json``, with the keys of transformers 4 and of 5.

        >>> config = LlamaConfig(hidden_size=64, rope=Rope(5e5, "linear", 2.0))
        >>> LlamaConfig.from_hf(config.to_hf()) == config
        True
        """
        fields = ("model_type", *_COMMON_FIELDS, *self.variant.fields)
        about = {name: getattr(self, name) for name in fields}
        about[self.variant.activation] = self.hidden_act
        if "layer_types" in about:
            about["layer_types"] = list(self.layer_types)
            about["use_sliding_window"] = self.sliding_window is not None
        about["rope_parameters"] = rope.to_hf(self.rope)
        about["rope_theta"] = self.rope.rope_theta
        if self.variant.local_theta:
            ropes = {FULL: self.rope, SLIDING: self.sliding_rope or self.rope}
            about["rope_parameters"] = {kind: rope.to_hf(x) for kind, x in ropes.items()}
            about["rope_local_base_freq"] = ropes[SLIDING].rope_theta
        if self.rope.rope_type != "default":  # the older key, which wins over the newer one
            about["rope_scaling"] = rope.to_hf(self.rope)
        return about


def _check(config: LlamaConfig) -> None:
    config_checks.check_sizes(config, _SIZES)
    config_checks.check_rates(config, ("attention_dropout",))
    config_checks.check_positive(
        config, ("initializer_range", "rms_norm_eps", "query_pre_attn_scalar")
    )
    config_checks.check_one_of(config, "hidden_act", ACTIVATIONS)
    config_checks.check_divides(config, "num_attention_heads", "num_key_value_heads")
    if config.head_dim % 2:
        raise ValueError(f"head_dim must be even, since pairs are rotated; got {config.head_dim}.")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window"):
        if getattr(config, name) is not None:
            config_checks.check_positive(config, (name,))
    defaults = {
        "attention_bias": False,
        "mlp_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": None,
        "query_pre_attn_scalar": config.head_dim,
    }
    foreign = [
        name
        for name, default in defaults.items()
        if getattr(config, name) != default and name not in config.variant.fields
    ]
    if foreign:
        raise ValueError(f"A model of type {config.model_type!r} has no {', '.join(foreign)}.")
    _check_layers(config)


def _check_layers(config: LlamaConfig) -> None:
    layer_types = config.layer_types
    if len(layer_types) != config.num_hidden_layers or not set(layer_types) <= {SLIDING, FULL}:
        raise ValueError(
            f"layer_types must be {SLIDING!r} or {FULL!r} for each of the "
            f"{config.num_hidden_layers} layers, got {layer_types}."
        )
    if SLIDING in layer_types and config.sliding_window is None:
        raise ValueError(f"layer_types has {SLIDING!r}, and there is no sliding_window.")


def _read_windows(
    values: Mapping[str, Any], variant: Variant, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Reads window and layer types; the model type has the types of layers that are not listed."""
    window = values["sliding_window"] if values.get("use_sliding_window", True) else None
    layer_types = fields.get("layer_types")
    if layer_types is None:
        count = values.get("num_hidden_layers", LlamaConfig.num_hidden_layers)
        layer_types = [
            SLIDING if window is not None and variant.is_sliding(k, values) else FULL
            for k in range(count)
        ]
    return {"sliding_window": window, "layer_types": tuple(layer_types)}


def _read_ropes(values: Mapping[str, Any], variant: Variant) -> dict[str, Rope | None]:
    parameters = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    theta = values.get("rope_theta") or 10_000.0
    positions = values.get("max_position_embeddings") or LlamaConfig.max_position_embeddings
    if variant.local_theta is None:
        return {"rope": rope.from_hf(scaling or parameters, theta=theta, positions=positions)}
    if parameters and not parameters.keys() & {FULL, SLIDING}:
        raise ValueError(f"rope_parameters must have {FULL!r} and {SLIDING!r}, got {parameters}.")
    full = {**(parameters.get(FULL) or {}), **scaling}
    local_theta = values.get("rope_local_base_freq") or variant.local_theta
    return {
        "rope": rope.from_hf(full, theta=theta, positions=positions),
        "sliding_rope": rope.from_hf(
            parameters.get(SLIDING) or {}, theta=local_theta, positions=positions
        ),
    }


def names(
    config: LlamaConfig,
    *,
    head: str = CAUSAL_LM,
    scan_layers: bool = False,
    layer: Sequence[Name] | None = None,
) -> list[Name]:
    """Makes the table between Flax paths and Hugging Face names, with one row for each leaf.

    Args:
      config: the model's shape.
      head: the one head that there is.
      scan_layers: whether the layers are stacked.
      layer: rows of one layer; None for those of :func:`name_layer`.

    >>> row = names(LlamaConfig())[1]
    >>> row.flax
    'model/layers_0/self_attn/q_proj/kernel'
    >>> row.hf, row.transpose
    ('model.layers.0.self_attn.q_proj.weight', True)
    """
    rows = tables.embedding("model/embed_tokens", "model.embed_tokens")
    if config.tie_word_embeddings:
        rows = [row._replace(tied=("lm_head.weight",)) for row in rows]
    rows += tables.repeat_layers(
        "model/layers",
        "model.layers",
        name_layer(config) if layer is None else layer,
        count=config.num_hidden_layers,
        scan=scan_layers,
    )
    rows += tables.norm("model/norm", "model.norm", bias=False)
    if not config.tie_word_embeddings:
        rows += tables.linear("lm_head", "lm_head", bias=False)
    return rows


def name_layer(config: LlamaConfig, mlp: Sequence[Name] = ()) -> list[Name]:
    """Makes the rows of one layer, with those given for its feed-forward block if there are any."""
    variant, rows = config.variant, []
    for name in "qkvo":
        bias = config.attention_bias or (variant.qkv_bias and name != "o")
        rows += tables.linear(f"self_attn/{name}_proj", f"self_attn.{name}_proj", bias=bias)
    rows += mlp
    for name in () if mlp else ("gate", "up", "down"):
        rows += tables.linear(f"mlp/{name}_proj", f"mlp.{name}_proj", bias=config.mlp_bias)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if variant.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if variant.qk_norm:
        norms += ["self_attn/q_norm", "self_attn/k_norm"]
    for name in norms:
        rows += tables.norm(name, name.replace("/", "."), bias=False)
    return rows
