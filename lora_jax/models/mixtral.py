"""Mixtral (Jiang et al. 2024): a Llama whose feed-forward block is a mixture of experts.

Modules and numbers are those of Hugging Face's ``MixtralForCausalLM``. The kernels of all experts
of a layer are one leaf, ``(experts, d_in, d_out)``, as transformers 5 has them in memory;
checkpoints have a tensor for each, see :mod:`lora_jax.models.split_tensors`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax

from lora_jax import products
from lora_jax.models import config_checks, llama_config, tables
from lora_jax.models.families import CAUSAL_LM, column, embedding, row
from lora_jax.models.layers import ACTIVATIONS
from lora_jax.models.llama import (
    LlamaForCausalLM,
    LlamaLayer,
    LlamaModel,
    LlamaPart,
    make_family,
)
from lora_jax.models.llama_config import LlamaConfig, Variant
from lora_jax.names import Name
from lora_jax.sharding import FSDP, split_rows

Array = jax.Array
_BLOCKS = 8, 512  # smallest and largest number of rows that are multiplied by one expert at a time

VARIANTS: dict[str, Variant] = {
    "mixtral": Variant(
        architecture="MixtralForCausalLM",
        fields=("sliding_window", "num_local_experts", "num_experts_per_tok"),
        defaults={
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
        },
        is_sliding=lambda layer, config: True,
    )
}
# The auxiliary loss of the router, which its coefficient alone does not ask for, and its noise.
BUILT = {**llama_config.BUILT, "output_router_logits": False, "router_jitter_noise": 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(LlamaConfig):
    """The shape of a model; field names as in Hugging Face's ``config.json``.

    Attributes:
      num_local_experts: number of experts of each layer.
      num_experts_per_tok: number of experts that each token is sent to.

    Raises:
      ValueError: a value is out of its range; the message names it.

    >>> MixtralConfig.from_hf({"model_type": "mixtral"}).intermediate_size
    14336
    """

    variants: ClassVar[Mapping[str, Variant]] = VARIANTS
    built: ClassVar[Mapping[str, Any]] = BUILT
    model_type: str = "mixtral"
    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        config_checks.check_sizes(self, ("num_local_experts", "num_experts_per_tok"))
        config_checks.check_at_most(self, "num_experts_per_tok", self.num_local_experts)


class Routes(NamedTuple):
    """Places of rows in blocks, of which each has one expert.

    Attributes:
      sources: number of the row in each place ``(blocks, size)``; past the last where it is empty.
      experts: expert of each block ``(blocks,)``.
      places: place of each row's part ``(rows, experts per row)``, counted through all blocks.
    """

    sources: Array
    experts: Array
    places: Array


def make_routes(chosen: Array, num_experts: int) -> Routes:
    """Sorts rows into blocks by expert, the last block of each expert with empty places.

    The number of blocks is that of the worst case, and does not depend on the choice.

    Args:
      chosen: experts of each row, integers ``(rows, experts per row)``.
      num_experts: number of experts.

    >>> routes = make_routes(jnp.array([[2], [0], [2]]), 3)
    >>> routes.experts, routes.sources[0, :2]
    (Array([0, 2, 2], dtype=int32), Array([1, 3], dtype=int32))
    """
    rows, count = chosen.shape
    size = _choose_size(rows * count, num_experts)
    limit = (rows * count + min(num_experts, rows * count) * (size - 1)) // size
    is_of = (chosen.reshape(-1, 1) == jnp.arange(num_experts)[None]).astype(jnp.int32)
    before = jnp.cumsum(is_of, axis=0) - is_of  # of the same expert
    blocks = -(-jnp.sum(is_of, axis=0) // size)
    ends = jnp.cumsum(blocks)
    first = size * (ends - blocks)  # place of each expert
    places = jnp.sum(is_of * (before + first[None]), axis=1)
    numbers = jnp.arange(rows * count, dtype=jnp.int32) // count
    sources = jnp.full(limit * size, rows, jnp.int32).at[places].set(numbers, unique_indices=True)
    # Blocks that are left over multiply nothing, by the last expert.
    experts = jnp.sum(jnp.arange(limit)[:, None] >= ends[None], axis=1, dtype=jnp.int32)
    return Routes(
        sources.reshape(limit, size),
        jnp.minimum(experts, num_experts - 1),
        places.reshape(rows, count),
    )


def _choose_size(parts: int, num_experts: int) -> int:
    """Chooses a power of two such that about two blocks come to each expert."""
    low, high = _BLOCKS
    wanted = parts / (2 * num_experts)
    return min(high, max(low, 2 ** math.floor(math.log2(wanted)) if wanted >= 1 else low))


class Expert(NamedTuple):
    """Kernels of the experts of a layer, or of one of them."""

    gate_up: Array
    down: Array

    def pick(self, number: Array) -> "Expert":
        """Picks one of the experts."""
        take = lambda x: lax.dynamic_index_in_dim(x, number, keepdims=False)
        return Expert(take(self.gate_up), take(self.down))


class _Kernels(nn.Module):
    """The kernels of one projection of all experts, ``(experts, d_in, d_out)``."""

    kernel_init: Callable[..., Array]

    @nn.compact
    def __call__(self, *shape: int) -> Array:
        return self.param("kernel", self.kernel_init, shape, jnp.float32)


class MixtralExperts(LlamaPart):
    """Gated feed-forward blocks (Shazeer 2020, eq. 5), of which each row goes through some."""

    @nn.compact
    def __call__(self, x: Array, weights: Array, chosen: Array) -> Array:
        """Computes the weighted sum of what the chosen experts make of each row.

        Rows are multiplied in blocks, each by one expert, so that the cost is that of the chosen
        experts and not of all, on every device and under ``vmap``.

        Args:
          x: ``(rows, hidden)``.
          weights: ``(rows, experts per row)``, float32 or wider.
          chosen: integers of the same shape.
        """
        c = cast(MixtralConfig, self.config)
        init = nn.initializers.normal(c.initializer_range)
        kernels = lambda name, *sizes: _Kernels(init, name=name)(c.num_local_experts, *sizes)
        experts = Expert(
            kernels("gate_up_proj", c.hidden_size, 2 * c.intermediate_size),
            kernels("down_proj", c.intermediate_size, c.hidden_size),
        )
        routes = make_routes(chosen, c.num_local_experts)
        blocks = x.at[routes.sources].get(mode="fill", fill_value=0)
        # On a mesh each device has its part of the rows of every block.
        run = lambda block: self._run(split_rows(block[0]), experts.pick(block[1]))
        # The backward pass picks each kernel anew: kept, they would be one for every block.
        run = jax.checkpoint(run, prevent_cse=False, policy=jax.checkpoint_policies.checkpoint_dots)
        y = lax.map(run, (blocks, routes.experts))
        parts = split_rows(y.reshape(-1, c.hidden_size)[routes.places])
        return jnp.sum(parts * weights[..., None], axis=1).astype(self.dtype)

    def _run(self, x: Array, expert: Expert) -> Array:
        gate, up = jnp.split(self._multiply(x, expert.gate_up), 2, axis=-1)
        return self._multiply(ACTIVATIONS[self.config.hidden_act](gate) * up, expert.down)

    def _multiply(self, x: Array, kernel: Array) -> Array:
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        return products.dot_general(x, kernel, (((1,), (0,)), ((), ())))


class MixtralMoE(LlamaPart):
    """A router, and the experts that it sends each token to."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``(..., hidden)`` to the same.

        The weights are the softmax over all experts in float32 or wider, those of the chosen ones
        divided by their sum.
        """
        c = cast(MixtralConfig, self.config)
        rows = x.reshape(-1, x.shape[-1])
        logits = self._dense(c.num_local_experts, "gate")(rows)
        shares = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        weights, chosen = lax.top_k(shares, c.num_experts_per_tok)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        experts = MixtralExperts(c, dtype=self.dtype, name="experts")
        return experts(rows, weights, chosen).reshape(x.shape)


class MixtralLayer(LlamaLayer):
    """One layer: attention, then experts."""

    mlp_class: ClassVar[type[LlamaPart]] = MixtralMoE


class MixtralModel(LlamaModel):
    """Embeddings and layers."""

    layer_class: ClassVar[type[LlamaPart]] = MixtralLayer


class MixtralForCausalLM(LlamaForCausalLM):
    """A language model; fields and calls are those of the Llama family's."""

    backbone_class: ClassVar[type[LlamaModel]] = MixtralModel


def names(config: MixtralConfig, *, head: str = CAUSAL_LM, scan_layers: bool = False) -> list[Name]:
    """Makes the table between Flax paths and Hugging Face names, with one row for each leaf.

    >>> [row.hf for row in names(MixtralConfig(num_hidden_layers=1)) if "experts" in row.hf]
    ['model.layers.0.mlp.experts.gate_up_proj', 'model.layers.0.mlp.experts.down_proj']
    """
    stored = "block_sparse_moe"
    gate = tables.linear("mlp/gate", "mlp.gate", bias=False)[0]
    gate = gate._replace(
        is_bare=True, older=f"{stored}.gate.weight", stored=(f"{stored}.gate.weight",)
    )
    rows = [gate]
    for name, parts in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
        rows.append(
            Name(
                f"mlp/experts/{name}/kernel",
                f"mlp.experts.{name}",
                transpose=True,
                axes="bio",
                stored=tuple(f"{stored}.experts.{{e}}.{x}.weight" for x in parts),
            )
        )
    layer = llama_config.name_layer(config, rows)
    return llama_config.names(config, head=head, scan_layers=scan_layers, layer=layer)


FAMILY = make_family(
    "mixtral",
    "MixtralForCausalLM",
    config=MixtralConfig,
    names=names,
    models={CAUSAL_LM: MixtralForCausalLM},
    sharding=(
        *column("q_proj", "k_proj", "v_proj", "gate_up_proj", "lm_head"),
        *row("o_proj", "down_proj"),
        ("gate/kernel", (FSDP, None)),  # an output for each expert, of which there are few
        *embedding("embed_tokens"),
    ),
)
