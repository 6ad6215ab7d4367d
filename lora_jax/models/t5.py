"""T5 (Raffel et al. 2020), versions 1.0 and 1.1: encoder-decoder with relative positions.

The modules and their numbers are those of Hugging Face's ``T5ForConditionalGeneration``; each
kernel is stored as Flax does, ``(d_in, d_out)``. :func:`names` is the table between the two. The
two versions differ in the feed-forward layer (ReLU, or a gated GELU) and in the head: that of 1.0
is the embedding, on scaled states; that of 1.1 has its own kernel.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import kv_cache
from lora_jax.models.attention import AUTO, Case, Plan, attention, make_plan
from lora_jax.models.attention_mask import Mask, Slots, make_padding_mask
from lora_jax.models.families import OTHER_HEADS, SEQ2SEQ_LM, TOKENS, Family, column, embedding, row
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
from lora_jax.models.relative_positions import RelativeBias, relative_buckets
from lora_jax.models.t5_config import T5Config, names
from lora_jax.sharding import split_lookup, split_rows

Array = jax.Array
PyTree = Any


class Memory(NamedTuple):
    """What the decoder reads of the input; it is computed once, and used at every step.

    Attributes:
      layers: keys ``k`` and values ``v`` of the cross-attention in each decoder layer, each
        ``(batch, length, heads, d_kv)``; one stacked entry for scanned layers.
      mask: ``(batch, length)``, positive where there is a token.
    """

    layers: PyTree
    mask: Array


def init_cache(
    config: T5Config,
    batch: int,
    length: int,
    dtype: DTypeLike = jnp.float32,
    *,
    scan_layers: bool = False,
) -> kv_cache.Cache:
    """Makes an empty cache with ``length`` slots.

    >>> init_cache(T5Config(num_heads=2, d_kv=8), 3, 5).layers[0]["k"].shape
    (3, 5, 2, 8)
    """
    shape = (batch, length, config.num_heads, config.d_kv)
    return kv_cache.init(
        shape, dtype, num_layers=config.num_decoder_layers, scan_layers=scan_layers
    )


class _Part(nn.Module):
    """A module of the model, which computes in ``dtype`` with float32 parameters."""

    config: T5Config
    dtype: DTypeLike = jnp.float32

    def _dense(self, features: int, stddev: float, name: str | None = None) -> nn.Dense:
        init = nn.initializers.normal(self.config.initializer_factor * stddev)
        return dense(features, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)

    def _norm(self) -> RMSNorm:
        return RMSNorm(self.config.layer_norm_epsilon, self.dtype)

    def _dropout(self) -> Dropout:
        return Dropout(self.config.dropout_rate)


class T5Attention(_Part):
    """Multi-head attention whose scores are not divided by the root of ``d_kv``."""

    def setup(self) -> None:
        """Makes the four projections."""
        c = self.config
        inner = c.num_heads * c.d_kv
        self.q = self._dense(inner, (c.d_model * c.d_kv) ** -0.5)
        self.k = self._dense(inner, c.d_model**-0.5)
        self.v = self._dense(inner, c.d_model**-0.5)
        self.o = self._dense(c.d_model, inner**-0.5)
        self.dropout = self._dropout()

    def keys(self, states: Array) -> dict[str, Array]:
        """Computes keys ``k`` and values ``v`` of states ``(batch, length, d_model)``."""
        return {"k": self._split(self.k(states)), "v": self._split(self.v(states))}

    def __call__(
        self, x: Array, keys: Mapping[str, Array], plan: Plan, deterministic: bool
    ) -> Array:
        """Maps ``(batch, queries, d_model)`` to the same, with attention as planned."""
        drop = self.dropout.of_weights(deterministic)
        query = self._split(self.q(x))
        key, value = (keys[name].astype(query.dtype) for name in "kv")
        y = attention(query, key, value, plan, scale=1.0, drop=drop)
        return self.o(y.reshape(*y.shape[:2], -1))

    def _split(self, y: Array) -> Array:
        return y.reshape(*y.shape[:-1], self.config.num_heads, self.config.d_kv)


class T5Dense(_Part):
    """The feed-forward block, gated or not (Shazeer 2020, eq. 5)."""

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Maps ``(..., d_model)`` to the same."""
        c = self.config
        gated, _, activation = c.feed_forward_proj.rpartition("-")
        project = lambda name: self._dense(c.d_ff, c.d_model**-0.5, name)(x)
        # The name "gated-gelu" has always stood for the approximation by tanh.
        activate = ACTIVATIONS["gelu_new" if gated and activation == "gelu" else activation]
        if gated:
            y = activate(project("wi_0")) * project("wi_1")
        else:
            y = activate(project("wi"))
        y = self._dropout()(y, deterministic=deterministic)
        return self._dense(c.d_model, c.d_ff**-0.5, "wo")(y)


class T5Block(_Part):
    """One layer of the encoder, or of the decoder, which has cross-attention in the middle."""

    decoder: bool = False

    def setup(self) -> None:
        """Makes the submodules; each has a norm before it and a residual connection around both."""
        self.SelfAttention, self.self_norm = T5Attention(self.config, self.dtype), self._norm()
        if self.decoder:
            self.EncDecAttention = T5Attention(self.config, self.dtype)
            self.cross_norm = self._norm()
        self.DenseReluDense, self.dense_norm = T5Dense(self.config, self.dtype), self._norm()
        self.dropout = self._dropout()

    def memory(self, states: Array, layer_inputs: None) -> tuple[Array, dict[str, Array]]:
        """Returns the encoder's states, unchanged, and the keys that cross-attention makes."""
        return states, self.EncDecAttention.keys(states)

    def __call__(
        self,
        x: Array,
        layer_inputs: tuple[PyTree, PyTree],
        shared_inputs: tuple[Plan, Any, Array | None],
        deterministic: bool,
    ) -> tuple[Array, PyTree]:
        """Computes new states and the layer's cache.

        Args:
          x: ``(batch, n, d_model)``.
          layer_inputs: the layer's cache or None, and its keys of the encoder's states or None.
          shared_inputs: how the two attentions are computed, and the slot of the cache that takes
            the first token of ``x``.
          deterministic: whether nothing is dropped.
        """
        (cache, memory), (plan, cross_plan, index) = layer_inputs, shared_inputs
        add = lambda x, y: split_rows(x + self.dropout(y, deterministic=deterministic))
        y = self.self_norm(x)
        keys = self.SelfAttention.keys(y)
        if cache is not None:
            cache = keys = kv_cache.write(cache, keys, index)
        x = add(x, self.SelfAttention(y, keys, plan, deterministic))
        if memory is not None:
            y = self.cross_norm(x)
            x = add(x, self.EncDecAttention(y, memory, cross_plan, deterministic))
        return add(x, self.DenseReluDense(self.dense_norm(x), deterministic)), cache


class T5Stack(_Part):
    """The encoder or the decoder: all its layers have one table of position biases."""

    decoder: bool = False
    scan_layers: bool = False
    remat: str = "none"
    attention: str = AUTO

    def setup(self) -> None:
        """Makes the submodules."""
        c = self.config
        self.relative_attention_bias = Embed(
            c.relative_attention_num_buckets,
            c.num_heads,
            embedding_init=nn.initializers.normal(c.initializer_factor * c.d_model**-0.5),
            dtype=jnp.promote_types(self.dtype, jnp.float32),  # that of the scores
        )
        count = c.num_decoder_layers if self.decoder else c.num_layers
        layers = Layers(count, self.scan_layers, self.remat)
        fields = {"config": c, "dtype": self.dtype, "decoder": self.decoder}
        self.block: Any = make_layers(T5Block, layers, methods={"memory": 0}, **fields)
        self.final_layer_norm = self._norm()
        self.dropout = self._dropout()

    def memory(self, states: Array) -> PyTree:
        """Computes the keys and values of every layer's cross-attention."""
        if self.scan_layers:
            return self.block.memory(states, None)[1]
        return tuple(block.memory(states, None)[1] for block in self.block)

    def __call__(
        self,
        x: Array,
        mask: Array,
        *,
        memory: Memory | None = None,
        cache: kv_cache.Cache | None = None,
        deterministic: bool,
    ) -> tuple[Array, kv_cache.Cache | None]:
        """Computes states ``(batch, n, d_model)``, and the new cache if there is one.

        Args:
          x: embeddings ``(batch, n, d_model)``.
          mask: ``(batch, n)``, or ``(batch, slots)`` with a cache.
          memory: the encoder's, for a decoder.
          cache: the decoder's, for generation.
          deterministic: whether nothing is dropped.
        """
        index = None if cache is None else cache.index
        n, cross_plan = x.shape[1], None
        plan = self._plan(n, mask, index, deterministic)
        if memory is not None:
            case = self._make_case(n, memory.mask, deterministic=deterministic, is_cross=True)
            cross_plan = make_plan(make_padding_mask(memory.mask), case, self.attention)
        layer_inputs = tuple(None if part is None else part.layers for part in (cache, memory))
        x = split_rows(self.dropout(x, deterministic=deterministic))
        shared_inputs = (plan, cross_plan, index)
        x, layers = apply_layers(
            self.block, x, layer_inputs, shared_inputs, deterministic=deterministic
        )
        x = self.dropout(self.final_layer_norm(x), deterministic=deterministic)
        if cache is not None:
            cache = kv_cache.Cache(layers, index + jnp.int32(n))
        return x, cache

    def _plan(self, n: int, mask: Array, index: Array | None, deterministic: bool) -> Plan:
        """Plans self-attention of ``n`` queries, in the slots from ``index`` on."""
        start, num_keys = 0 if index is None else index, mask.shape[1]
        queries, keys = Slots(start + jnp.arange(n)), Slots(jnp.arange(num_keys), mask)
        seen = Mask(queries=queries, keys=keys, causal=self.decoder)
        case = self._make_case(n, mask, deterministic=deterministic, has_cache=index is not None)
        return make_plan(seen, case, self.attention, bias=self._make_bias(n, num_keys, start))

    def _make_case(self, n: int, mask: Array, **options: bool) -> Case:
        heads, (batch, keys) = self.config.heads, mask.shape
        return Case(heads=heads, batch=batch, queries=n, keys=keys, dtype=self.dtype, **options)

    def _make_bias(self, n: int, keys: int, start: Array | int) -> RelativeBias:
        """Looks up the terms of all distances, from the first key to the last query on."""
        first = 1 - n - start
        buckets = relative_buckets(
            first + jnp.arange(n + keys - 1),
            bidirectional=not self.decoder,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        return RelativeBias(self.relative_attention_bias(buckets).T, first)


class T5ForConditionalGeneration(nn.Module):
    """T5 with its language-modeling head.

    Attributes:
      config: the model's shape.
      dtype: dtype of the activations, float32 or bfloat16; parameters are float32.
      scan_layers: whether the layers of each stack are stacked, and one is compiled for all.
      remat: what the backward pass computes again; see :func:`lora_jax.models.layers.remat_layer`.
      attention: how attention is computed; see :func:`lora_jax.models.attention.choose`.
    """

    config: T5Config
    dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    remat: str = "none"
    attention: str = AUTO

    def setup(self) -> None:
        """Makes the submodules."""
        c = self.config
        init = nn.initializers.normal(c.initializer_factor)
        fields = {n: getattr(self, n) for n in ("dtype", "scan_layers", "remat", "attention")}
        stack = functools.partial(T5Stack, c, **fields)
        self.shared = Embed(c.vocab_size, c.d_model, embedding_init=init, dtype=self.dtype)
        self.encoder, self.decoder = stack(decoder=False), stack(decoder=True)
        if not c.tie_word_embeddings:
            self.lm_head = dense(c.vocab_size, use_bias=False, kernel_init=init, dtype=self.dtype)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array,
        decoder_input_ids: Array,
        decoder_attention_mask: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Any:
        """Computes logits ``(batch, decoder length, vocab_size)``, at least float32.

        Args:
          input_ids: integers ``(batch, length)``.
          attention_mask: the same shape; positive where there is a token, 0 at padding.
          decoder_input_ids: ``(batch, decoder length)``, the output so far, shifted to the right.
          decoder_attention_mask: the same shape; None if there is no padding.
          deterministic: whether nothing is dropped; otherwise ``rngs={"dropout": key}`` is needed.

        Raises:
          ValueError: the shapes do not fit.
        """
        memory = self.encode(input_ids, attention_mask, deterministic=deterministic)
        return self.decode(
            decoder_input_ids, decoder_attention_mask, memory=memory, deterministic=deterministic
        )

    def encode(
        self, input_ids: Array, attention_mask: Array, *, deterministic: bool = True
    ) -> Memory:
        """Computes what the decoder reads of the input; arguments as of a call."""
        kv_cache.check_mask(input_ids, attention_mask, input_ids.shape[1:])
        x = split_lookup(self.shared(input_ids))
        states, _ = self.encoder(x, attention_mask, deterministic=deterministic)
        return Memory(self.decoder.memory(states), attention_mask)

    def decode(
        self,
        decoder_input_ids: Array,
        decoder_attention_mask: Array | None = None,
        *,
        memory: Memory,
        cache: kv_cache.Cache | None = None,
        deterministic: bool = True,
    ) -> Array | tuple[Array, kv_cache.Cache]:
        """Computes logits ``(batch, n, vocab_size)``; with a cache, also the new cache.

        A position is a slot, and only differences of positions matter, so that padding on the left
        changes nothing.

        Args:
          decoder_input_ids: ``(batch, n)``.
          decoder_attention_mask: ``(batch, n)``, or ``(batch, slots)`` with a cache; 0 in the slots
            of padding. None if there is no padding.
          memory: the result of :meth:`encode`.
          cache: the cache of :func:`init_cache`, or of the call for the tokens before.
          deterministic: whether nothing is dropped.

        Raises:
          ValueError: the shapes do not fit.
        """
        slots = decoder_input_ids.shape[1:] if cache is None else (kv_cache.count_slots(cache),)
        if decoder_attention_mask is None:
            decoder_attention_mask = jnp.ones((decoder_input_ids.shape[0], *slots), jnp.int32)
        kv_cache.check_mask(decoder_input_ids, decoder_attention_mask, slots)
        x, cache = self.decoder(
            split_lookup(self.shared(decoder_input_ids)),
            decoder_attention_mask,
            memory=memory,
            cache=cache,
            deterministic=deterministic,
        )
        logits = self._head(x).astype(jnp.promote_types(self.dtype, jnp.float32))
        return logits if cache is None else (logits, cache)

    def _head(self, x: Array) -> Array:
        if not self.config.tie_word_embeddings:
            return self.lm_head(x)
        return self.shared.attend(x * self.config.d_model**-0.5)


FAMILY = Family(
    model_type=("t5",),
    config=T5Config,
    names=names,
    models={SEQ2SEQ_LM: T5ForConditionalGeneration},
    architectures={SEQ2SEQ_LM: "T5ForConditionalGeneration"},
    prefix="",
    # A table that the oldest checkpoints hold, and that no version has used.
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.*", *OTHER_HEADS),
    targets=("q", "v"),
    inputs=lambda head: (TOKENS, TOKENS, TOKENS),
    init_cache=init_cache,
    sharding=(
        *column("q", "k", "v", "wi", "wi_0", "wi_1", "lm_head"),
        *row("o", "wo"),
        *embedding("shared"),
    ),
)
