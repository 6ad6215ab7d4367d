"""penzai: models as trees of layers with named axes."""

import dataclasses

import jax
from penzai import pz
from penzai.models.transformer.variants import llamalike_common as llamalike

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("penzai")
CONFIG = llamalike.LlamalikeTransformerConfig(
    num_kv_heads=1,
    query_head_multiplier=2,
    embedding_dim=32,
    projection_dim=16,
    mlp_hidden_dim=48,
    num_decoder_blocks=2,
    vocab_size=60,
    mlp_variant="swiglu",
    tie_embedder_and_logits=False,
)


def _llama(config: llamalike.LlamalikeTransformerConfig, batch: int) -> Model:
    model = llamalike.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))
    model, variables = pz.unbind_params(model, freeze=True)

    def fn(variables: tuple, ids: jax.Array) -> jax.Array:
        named = pz.nx.wrap(ids).tag("batch", "seq")
        positions = pz.nx.arange("seq", ids.shape[1])
        out = pz.bind_variables(model, variables)(named, token_positions=positions)
        return out.unwrap("batch", "seq", "vocabulary")

    return Model(fn=fn, params=variables, args=(bridges.ids(batch, 32, 60),), lines=6)


@LIBRARY.model("Llama-like transformer")
def llama(batch: int) -> Model:
    """Kernels are named arrays."""
    return _llama(CONFIG, batch)


@LIBRARY.model("Llama-like transformer, layer stack")
def stack(batch: int) -> Model:
    """All layers in one scan."""
    return _llama(dataclasses.replace(CONFIG, use_layer_stack=True), batch)
