"""GPT-2 (Radford et al. 2019): a decoder with learned positions and a head tied to the embedding.

The modules and their numbers are those of Hugging Face's ``GPT2LMHeadModel``; each kernel is stored
as Flax does, ``(d_in, d_out)``, as GPT-2's Conv1D is there. :func:`names` is the table between the
two.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import kv_cache, tables
from lora_jax.models.attention import AUTO, Case, Plan, attention, make_plan
from lora_jax.models.attention_mask import make_causal_mask
from lora_jax.models.families import CAUSAL_LM, OTHER_HEADS, Family, column, embedding, row
from lora_jax.models.gpt2_config import GPT2Config
from lora_jax.models.kv_cache import Cache
from lora_jax.models.layers import (
    ACTIVATIONS,
    Dropout,
    Embed,
    Layers,
    apply_layers,
    dense,
    layer_norm,
    make_layers,
)
from lora_jax.names import Name
from lora_jax.sharding import split_lookup, split_rows

Array = jax.Array
PyTree = Any


def init_cache(
    config: GPT2Config,
    batch: int,
    length: int,
    dtype: DTypeLike = jnp.float32,
    *,
    scan_layers: bool = False,
) -> Cache:
    """Makes an empty cache with ``length`` slots.

    >>> init_cache(GPT2Config(n_layer=2), 3, 5).layers[1]["k"].shape
    (3, 5, 12, 64)
    """
    shape = (batch, length, config.n_head, config.head_dim)
    return kv_cache.init(shape, dtype, num_layers=config.n_layer, scan_layers=scan_layers)


class _Part(nn.Module):
    """A module of the model, which computes in ``dtype`` with float32 parameters."""

    config: GPT2Config
    dtype: DTypeLike = jnp.float32

    def _dense(self, features: int, name: str) -> nn.Dense:
        c = self.config
        # Projections into the residual stream start smaller, by the root of their number.
        scale = (2 * c.n_layer) ** -0.5 if name == "c_proj" else 1.0
        init = nn.initializers.normal(scale * c.initializer_range)
        return dense(features, kernel_init=init, dtype=self.dtype, name=name)

    def _norm(self, name: str | None = None) -> nn.LayerNorm:
        return layer_norm(self.config.layer_norm_epsilon, self.dtype, name)


class GPT2Attention(_Part):
    """Masked multi-head self-attention; one kernel makes queries, keys and values."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        layer_inputs: tuple[PyTree, Array | int],
        shared_inputs: tuple[Plan, Array | int],
        deterministic: bool,
    ) -> tuple[Array, PyTree]:
        """Maps ``(batch, n, n_embd)`` to the same, and returns the layer's cache with ``x`` in it.

        The other arguments are those of :class:`GPT2Block`.
        """
        c, (cache, number), (plan, index) = self.config, layer_inputs, shared_inputs
        qkv = self._dense(3 * c.n_embd, "c_attn")(x)
        split = lambda y: y.reshape(*y.shape[:2], c.n_head, c.head_dim)
        query, key, value = map(split, jnp.split(qkv, 3, axis=-1))
        if c.scale_attn_by_inverse_layer_idx:
            query = query / jnp.asarray(number + 1, query.dtype)
        keys = {"k": key, "v": value}
        if cache is not None:
            cache = keys = kv_cache.write(cache, keys, index)
        y = attention(
            query,
            keys["k"].astype(query.dtype),
            keys["v"].astype(query.dtype),
            plan,
            scale=None if c.scale_attn_weights else 1.0,
            drop=Dropout(c.attn_pdrop).of_weights(deterministic),
        )
        y = self._dense(c.n_embd, "c_proj")(y.reshape(x.shape))
        return Dropout(c.resid_pdrop)(y, deterministic=deterministic), cache


class GPT2MLP(_Part):
    """The feed-forward block."""

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Maps ``(..., n_embd)`` to the same."""
        c = self.config
        y = ACTIVATIONS[c.activation_function](self._dense(c.n_inner or 4 * c.n_embd, "c_fc")(x))
        y = self._dense(c.n_embd, "c_proj")(y)
        return Dropout(c.resid_pdrop)(y, deterministic=deterministic)


class GPT2Block(_Part):
    """One layer: attention, then feed-forward, each after a norm and added to its input."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        layer_inputs: tuple[PyTree, Array | int],
        shared_inputs: tuple[Plan, Array | int],
        deterministic: bool,
    ) -> tuple[Array, PyTree]:
        """Computes new states and the layer's cache.

        Args:
          x: ``(batch, n, n_embd)``.
          layer_inputs: the layer's cache or None, and its number.
          shared_inputs: how attention is computed, and the slot of the cache that takes the first
            token of ``x``.
          deterministic: whether nothing is dropped.
        """
        attention_layer = GPT2Attention(self.config, dtype=self.dtype, name="attn")
        y, cache = attention_layer(
            self._norm("ln_1")(x), layer_inputs, shared_inputs, deterministic
        )
        x = split_rows(x + y)
        mlp = GPT2MLP(self.config, dtype=self.dtype, name="mlp")
        return split_rows(x + mlp(self._norm("ln_2")(x), deterministic)), cache


class GPT2Model(_Part):
    """Embeddings and layers."""

    scan_layers: bool = False
    remat: str = "none"
    attention: str = AUTO

    def setup(self) -> None:
        """Makes the submodules."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        embed = lambda n: Embed(n, c.n_embd, embedding_init=init, dtype=self.dtype)
        self.wte, self.wpe = embed(c.vocab_size), embed(c.n_positions)
        layers = Layers(c.n_layer, self.scan_layers, self.remat)
        self.h = make_layers(GPT2Block, layers, config=c, dtype=self.dtype)
        self.ln_f = self._norm()
        self.drop = Dropout(c.embd_pdrop)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array,
        positions: Array | None,
        cache: Cache | None,
        deterministic: bool,
    ) -> tuple[Array, Cache | None]:
        """Computes states ``(batch, n, n_embd)`` of tokens ``(batch, n)``, and the new cache."""
        n, start = input_ids.shape[1], 0 if cache is None else cache.index
        if positions is None:
            positions = kv_cache.compute_positions(attention_mask, start, n)
        x = split_lookup(self.wte(input_ids)) + split_lookup(self.wpe(positions))
        x = self.drop(x, deterministic=deterministic)
        plan = self._plan(attention_mask, start + jnp.arange(n), cache, deterministic)
        count = self.config.n_layer
        numbers = jnp.arange(count) if self.scan_layers else range(count)
        layer_inputs = (None if cache is None else cache.layers, numbers)
        x, layers = apply_layers(
            self.h, x, layer_inputs, (plan, start), deterministic=deterministic
        )
        return self.ln_f(x), None if cache is None else Cache(layers, start + jnp.int32(n))

    def _plan(
        self, attention_mask: Array, queries: Array, cache: Cache | None, deterministic: bool
    ) -> Plan:
        batch, keys = attention_mask.shape
        options: dict[str, Any] = {"dtype": self.dtype, "deterministic": deterministic}
        options["has_cache"] = cache is not None
        n = queries.shape[0]
        case = Case(heads=self.config.heads, batch=batch, queries=n, keys=keys, **options)
        return make_plan(make_causal_mask(attention_mask, queries), case, self.attention)


class GPT2LMHeadModel(nn.Module):
    """GPT-2 with its language-modeling head.

    Attributes:
      config: the model's shape.
      dtype: dtype of the activations, float32 or bfloat16; parameters are float32.
      scan_layers: whether the layers are stacked, and one is compiled for all.
      remat: what the backward pass computes again; see :func:`lora_jax.models.layers.remat_layer`.
      attention: how attention is computed; see :func:`lora_jax.models.attention.choose`.
    """

    config: GPT2Config
    dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    remat: str = "none"
    attention: str = AUTO

    def setup(self) -> None:
        """Makes the submodules."""
        c = self.config
        stack: dict[str, Any] = {
            "scan_layers": self.scan_layers, "remat": self.remat, "attention": self.attention,
        }  # fmt: skip
        self.transformer = GPT2Model(c, dtype=self.dtype, **stack)
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
        deterministic: bool = True,
    ) -> Array | tuple[Array, Cache]:
        """Computes logits ``(batch, n, vocab_size)``, at least float32, and the new cache, if any.

        Args:
          input_ids: integers ``(batch, n)``.
          attention_mask: ``(batch, n)``, or ``(batch, slots)`` with a cache; positive where there
            is a token, 0 at padding. None if there is no padding.
          positions: ``(batch, n)``, below ``n_positions``; None to count the tokens before, by the
            mask.
          cache: the cache of :func:`init_cache`, or of the call for the tokens before.
          deterministic: whether nothing is dropped; otherwise ``rngs={"dropout": key}`` is needed.

        Raises:
          ValueError: the shapes do not fit, or positions are not given and there are more tokens
            than positions.
        """
        x, cache = self.compute_hidden(
            input_ids, attention_mask, positions, cache, deterministic=deterministic
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
        deterministic: bool = True,
    ) -> tuple[Array, Cache | None]:
        """Computes what the head takes, ``(batch, n, n_embd)``, and the new cache, if any.

        Arguments and errors are those of a call.
        """
        slots = input_ids.shape[-1] if cache is None else kv_cache.count_slots(cache)
        if attention_mask is None:
            attention_mask = jnp.ones((input_ids.shape[0], slots), jnp.int32)
        kv_cache.check_inputs(input_ids, attention_mask, positions, slots)
        # Slots of padding need no position; whoever gives positions counts without them.
        if positions is None and slots > self.config.n_positions:
            raise ValueError(
                f"{slots} tokens, and the model has positions for {self.config.n_positions}; "
                "truncate the input, or make fewer new tokens."
            )
        return self.transformer(input_ids, attention_mask, positions, cache, deterministic)

    def compute_logits(self, hidden: Array) -> Array:
        """Applies the head to ``(..., n_embd)``; the logits are at least float32."""
        head = self.transformer.wte.attend if self.config.tie_word_embeddings else self.lm_head
        return head(hidden).astype(jnp.promote_types(self.dtype, jnp.float32))


_LINEAR = ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")


def names(config: GPT2Config, *, head: str, scan_layers: bool = False) -> list[Name]:
    """Makes the table between Flax paths and Hugging Face names, with one row for each leaf.

    Args:
      config: config of the model, which gives the number of layers, and whether the head is tied.
      head: "causal-lm".
      scan_layers: whether the layers are stacked.

    >>> row = names(GPT2Config(), head="causal-lm")[6]
    >>> row.flax, row.hf, row.transpose
    ('transformer/h_0/attn/c_attn/kernel', 'transformer.h.0.attn.c_attn.weight', False)
    """
    layer = [row for n in ("ln_1", "ln_2") for row in tables.norm(n, n)]
    for name in _LINEAR:
        layer += tables.linear(name, name.replace("/", "."), transpose=False)
    rows = tables.embedding("wte", "wte") + tables.embedding("wpe", "wpe")
    rows += tables.repeat_layers("h", "h", layer, count=config.n_layer, scan=scan_layers)
    rows += tables.norm("ln_f", "ln_f")
    rows = tables.add_prefix("transformer/", "transformer.", rows)
    if config.tie_word_embeddings:
        return [rows[0]._replace(tied=("lm_head.weight",)), *rows[1:]]
    return rows + tables.linear("lm_head", "lm_head", bias=False)


FAMILY = Family(
    model_type=("gpt2",),
    config=GPT2Config,
    names=names,
    models={CAUSAL_LM: GPT2LMHeadModel},
    architectures={CAUSAL_LM: "GPT2LMHeadModel"},
    prefix="transformer.",
    # Buffers of the mask, which older checkpoints have.
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias", *OTHER_HEADS),
    targets=("c_attn",),
    init_cache=init_cache,
    sharding=(*column("c_attn", "c_fc", "lm_head"), *row("c_proj"), *embedding("wte", "wpe")),
)
