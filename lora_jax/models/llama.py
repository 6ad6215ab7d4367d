"""The Llama family (Touvron et al. 2023): Llama 2 and 3, Mistral, Qwen 2 and 3, Gemma 2 and 3.

The modules and their numbers are those of Hugging Face's ``LlamaForCausalLM`` and its relatives;
each kernel is stored as Flax does, ``(d_in, d_out)``. The ways in which the relatives differ from
Llama are in :data:`lora_jax.models.llama_config.VARIANTS`, beside the table of names.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import kv_cache, rope
from lora_jax.models.attention import AUTO, Case, Plan, attention, make_plan
from lora_jax.models.attention_mask import make_causal_mask
from lora_jax.models.families import CAUSAL_LM, OTHER_HEADS, Family, column, embedding, row
from lora_jax.models.kv_cache import Cache
from lora_jax.models.layers import (
    ACTIVATIONS,
    Dropout,
    Embed,
    Layers,
    RMSNorm,
    apply_layers,
    dense,
    make_layers,
)
from lora_jax.models.llama_config import FULL, SLIDING, VARIANTS, LlamaConfig, names
from lora_jax.sharding import split_lookup, split_rows

Array = jax.Array
PyTree = Any


def init_cache(
    config: LlamaConfig,
    batch: int,
    length: int,
    dtype: DTypeLike = jnp.float32,
    *,
    scan_layers: bool = False,
) -> Cache:
    """Makes an empty cache with ``length`` slots.

    >>> config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    >>> init_cache(config, 3, 5).layers[0]["k"].shape
    (3, 5, 2, 8)
    """
    shape = (batch, length, config.num_key_value_heads, config.head_dim)
    return kv_cache.init(shape, dtype, num_layers=config.num_hidden_layers, scan_layers=scan_layers)


class _View(NamedTuple):
    """Mask and rotation of the attention in one kind of layer.

    Attributes:
      plan: what the queries may see, and how attention is computed.
      cos: cosine of the rotation, float32 ``(batch, n, head_dim / 2)``.
      sin: its sine.
    """

    plan: Plan
    cos: Array
    sin: Array


class LlamaPart(nn.Module):
    """A module of the model, which computes in ``dtype`` with float32 parameters."""

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32

    def _dense(self, features: int, name: str, *, bias: bool = False) -> nn.Dense:
        init = nn.initializers.normal(self.config.initializer_range)
        return dense(features, use_bias=bias, kernel_init=init, dtype=self.dtype, name=name)

    def _norm(self, name: str | None = None) -> RMSNorm:
        offset = self.config.variant.norm_offset
        return RMSNorm(self.config.rms_norm_eps, dtype=self.dtype, offset=offset, name=name)


class LlamaAttention(LlamaPart):
    """Rotary self-attention with grouped queries."""

    @nn.compact
    def __call__(
        self, x: Array, cache: PyTree, view: _View, index: Array | None, deterministic: bool
    ) -> tuple[Array, PyTree]:
        """Maps ``(batch, n, hidden)`` to the same, and writes the cache from slot ``index`` on."""
        c = self.config
        query, key, value = self._heads(x)
        query, key = (rope.rotate(y, view.cos, view.sin) for y in (query, key))
        keys = {"k": key, "v": value}
        if cache is not None:
            cache = keys = kv_cache.write(cache, keys, index)
        y = attention(
            query,
            keys["k"].astype(query.dtype),
            keys["v"].astype(query.dtype),
            view.plan,
            scale=c.query_pre_attn_scalar**-0.5,
            softcap=c.attn_logit_softcapping,
            drop=Dropout(c.attention_dropout).of_weights(deterministic),
        )
        y = y.reshape(*x.shape[:2], -1)
        return self._dense(c.hidden_size, "o_proj", bias=c.attention_bias)(y), cache

    def _heads(self, x: Array) -> list[Array]:
        """Computes queries, keys and values ``(batch, n, heads, head_dim)`` before the rotation."""
        c, variant = self.config, self.config.variant
        heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
        projections = []
        for name, count in heads.items():
            bias = c.attention_bias or variant.qkv_bias
            y = self._dense(count * c.head_dim, f"{name}_proj", bias=bias)(x)
            y = y.reshape(*x.shape[:2], count, c.head_dim)
            if variant.qk_norm and name != "v":
                y = self._norm(f"{name}_norm")(y)
            projections.append(y)
        return projections


class LlamaMLP(LlamaPart):
    """The gated feed-forward block (Shazeer 2020, eq. 5)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``(..., hidden)`` to the same."""
        c = self.config
        project = lambda name: self._dense(c.intermediate_size, name, bias=c.mlp_bias)(x)
        y = ACTIVATIONS[c.hidden_act](project("gate_proj")) * project("up_proj")
        return self._dense(c.hidden_size, "down_proj", bias=c.mlp_bias)(y)


class LlamaLayer(LlamaPart):
    """One layer: attention, then feed-forward, each with its norms and residual connection."""

    mlp_class: ClassVar[type[LlamaPart]] = LlamaMLP

    @nn.compact
    def __call__(
        self,
        x: Array,
        layer_inputs: tuple[PyTree, Array | bool],
        shared_inputs: tuple[tuple[_View, ...], Array | None],
        deterministic: bool,
    ) -> tuple[Array, PyTree]:
        """Computes new states and the layer's cache.

        Args:
          x: ``(batch, n, hidden)``.
          layer_inputs: the layer's cache or None, and whether the layer has a window.
          shared_inputs: the view of each kind of layer, and the slot of the cache that takes the
            first token of ``x``.
          deterministic: whether nothing is dropped.
        """
        (cache, is_sliding), (views, index) = layer_inputs, shared_inputs
        view = views[is_sliding if isinstance(is_sliding, bool) and len(views) > 1 else 0]
        if len(views) > 1 and not isinstance(is_sliding, bool):
            view = jax.tree.map(functools.partial(jnp.where, is_sliding), views[1], views[0])
        self_attention = LlamaAttention(self.config, dtype=self.dtype, name="self_attn")
        mlp = self.mlp_class(self.config, dtype=self.dtype, name="mlp")
        y = self._norm("input_layernorm")(x)
        y, cache = self_attention(y, cache, view, index, deterministic)
        if not self.config.variant.post_norms:
            x = split_rows(x + y)
            return split_rows(x + mlp(self._norm("post_attention_layernorm")(x))), cache
        x = split_rows(x + self._norm("post_attention_layernorm")(y))
        y = mlp(self._norm("pre_feedforward_layernorm")(x))
        return split_rows(x + self._norm("post_feedforward_layernorm")(y)), cache


class LlamaModel(LlamaPart):
    """Embeddings and layers."""

    layer_class: ClassVar[type[LlamaPart]] = LlamaLayer
    scan_layers: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """Makes the submodules."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.embed_tokens = Embed(
            c.vocab_size, c.hidden_size, embedding_init=init, dtype=self.dtype
        )
        layers = Layers(c.num_hidden_layers, self.scan_layers, self.remat)
        self.layers = make_layers(self.layer_class, layers, config=c, dtype=self.dtype)
        self.norm = self._norm()

    def __call__(
        self, input_ids: Array, views: Sequence[_View], cache: Cache | None, deterministic: bool
    ) -> tuple[Array, Cache | None]:
        """Computes states ``(batch, n, hidden)`` of tokens ``(batch, n)``, and the new cache."""
        c = self.config
        x = split_lookup(self.embed_tokens(input_ids))
        if c.variant.scaled_embedding:
            x = x * jnp.asarray(c.hidden_size**0.5, x.dtype)
        is_sliding: Any = [kind == SLIDING for kind in c.layer_types]
        if self.scan_layers:
            is_sliding = jnp.array(is_sliding)
        old, index = (None, None) if cache is None else cache
        x, layers = apply_layers(
            self.layers, x, (old, is_sliding), (tuple(views), index), deterministic=deterministic
        )
        if cache is not None:
            cache = Cache(layers, index + jnp.int32(input_ids.shape[1]))
        return self.norm(x), cache


class LlamaForCausalLM(nn.Module):
    """A language model of the family.

    Attributes:
      config: the model's shape and its type.
      dtype: dtype of the activations, float32 or bfloat16; parameters are float32.
      scan_layers: whether the layers are stacked, and one is compiled for all.
      remat: what the backward pass computes again; see :func:`lora_jax.models.layers.remat_layer`.
      attention: how attention is computed; see :func:`lora_jax.models.attention.choose`.
    """

    backbone_class: ClassVar[type[LlamaModel]] = LlamaModel
    config: LlamaConfig
    dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    remat: str = "none"
    attention: str = AUTO

    def setup(self) -> None:
        """Makes the submodules."""
        c = self.config
        stack: dict[str, Any] = {"scan_layers": self.scan_layers, "remat": self.remat}
        self.model = self.backbone_class(c, dtype=self.dtype, **stack)
        if not c.tie_word_embeddings:
            init = nn.initializers.normal(c.initializer_range)
            self.lm_head = dense(c.vocab_size, use_bias=False, kernel_init=init, dtype=self.dtype)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        cache: Cache | None = None,
        *,
        segment_ids: Array | None = None,
        deterministic: bool = True,
    ) -> Array | tuple[Array, Cache]:
        """Computes logits ``(batch, n, vocab_size)``, at least float32, and the new cache, if any.

        Args:
          input_ids: integers ``(batch, n)``.
          attention_mask: ``(batch, n)``, or ``(batch, slots)`` with a cache; positive where there
            is a token, 0 at padding. None if there is no padding.
          positions: ``(batch, n)``; None to count the tokens before, by the mask.
          cache: the cache of :func:`init_cache`, or of the call for the tokens before.
          segment_ids: integers ``(batch, n)``, without a cache: a token sees only those with the
            same number, so that one row can hold several texts. None for one text.
          deterministic: whether nothing is dropped; otherwise ``rngs={"dropout": key}`` is needed.

        Raises:
          ValueError: the shapes do not fit.
        """
        x, cache = self.compute_hidden(
            input_ids,
            attention_mask,
            positions,
            cache,
            segment_ids=segment_ids,
            deterministic=deterministic,
        )
        logits = self.compute_logits(x)
        return logits if cache is None else (logits, cache)

    def compute_hidden(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        cache: Cache | None = None,
        *,
        segment_ids: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Cache | None]:
        """Computes what the head takes, ``(batch, n, hidden_size)``, and the new cache, if any.

        Arguments and errors are those of a call.
        """
        c = self.config
        slots = input_ids.shape[-1] if cache is None else kv_cache.count_slots(cache)
        if attention_mask is None:
            attention_mask = jnp.ones((input_ids.shape[0], slots), jnp.int32)
        kv_cache.check_inputs(input_ids, attention_mask, positions, slots)
        _check_segments(input_ids, segment_ids, cache)
        start, n = 0 if cache is None else cache.index, input_ids.shape[1]
        if positions is None:
            positions = kv_cache.compute_positions(attention_mask, start, n)
        case = Case(
            heads=c.heads,
            batch=input_ids.shape[0],
            queries=n,
            keys=slots,
            dtype=self.dtype,
            deterministic=deterministic,
            has_segments=segment_ids is not None,
            has_cache=cache is not None,
        )
        mask = functools.partial(
            make_causal_mask, attention_mask, start + jnp.arange(n), segments=segment_ids
        )
        plan = lambda **window: make_plan(mask(**window), case, self.attention)
        views = _make_views(c, positions, plan)
        return self.model(input_ids, views, cache, deterministic)

    def compute_logits(self, hidden: Array) -> Array:
        """Applies the head to ``(..., hidden_size)``; the logits are at least float32."""
        c = self.config
        head = self.model.embed_tokens.attend if c.tie_word_embeddings else self.lm_head
        logits = head(hidden).astype(jnp.promote_types(self.dtype, jnp.float32))
        if c.final_logit_softcapping is not None:
            bound = c.final_logit_softcapping
            logits = bound * jnp.tanh(logits / bound)
        return logits


def _make_views(
    config: LlamaConfig, positions: Array, make_plan: Callable[..., Plan]
) -> list[_View]:
    """Makes the view of each kind of layer there is: without a window, and with one.

    The window is counted in slots, as in transformers, where padding is never in between.

    Args:
      config: the model's shape.
      positions: ``(batch, n)``.
      make_plan: function of the window of :class:`lora_jax.models.attention_mask.Mask`.
    """
    kinds = [kind for kind in (FULL, SLIDING) if kind in config.layer_types]
    window: dict[str, Any] = {"window": config.sliding_window} if SLIDING in kinds else {}
    views = []
    for kind in kinds:
        if len(kinds) > 1:  # they differ in a number, so that a program for both can choose
            window["is_windowed"] = kind == SLIDING
        rotation = (config.sliding_rope if kind == SLIDING else None) or config.rope
        angles = rope.compute_angles(rotation, positions, config.head_dim)
        views.append(_View(make_plan(**window), *angles))
    return views


def _check_segments(input_ids: Array, segment_ids: Array | None, cache: Cache | None) -> None:
    if segment_ids is None:
        return
    if segment_ids.shape != input_ids.shape:
        raise ValueError(
            f"segment_ids must have the shape {input_ids.shape} of input_ids: {segment_ids.shape}."
        )
    if cache is not None:
        raise ValueError("segment_ids are for whole rows, and there is a cache: leave one out.")


def make_family(model_type: str, architecture: str, **fields: Any) -> Family:
    """Makes the family of a model type of this file; ``fields`` are what another has otherwise."""
    family = Family(
        model_type=(model_type,),
        config=LlamaConfig,
        names=names,
        models={CAUSAL_LM: LlamaForCausalLM},
        architectures={CAUSAL_LM: architecture},
        prefix="model.",
        ignored=("layers.*.self_attn.rotary_emb.inv_freq", "rotary_emb.*", *OTHER_HEADS),
        targets=("q_proj", "v_proj"),
        init_cache=init_cache,
        sharding=(
            *column("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"),
            *row("o_proj", "down_proj"),
            *embedding("embed_tokens"),
        ),
    )
    return dataclasses.replace(family, **fields)


FAMILIES = tuple(make_family(name, variant.architecture) for name, variant in VARIANTS.items())
