"""eqx-zoo: language models in Equinox."""

import jax
from eqx_zoo.models.causal_lm import CausalLM, Config

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("eqx-zoo")
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "qk_norm": True,
    "rope_scaling": None,
}


def _model(config: Config, batch: int) -> Model:
    module = CausalLM(config, key=jax.random.key(0))
    # A ragged product can't be mapped over any axis, so the rows go one after another.
    call = lambda module, ids: jax.lax.map(lambda row: module(row)[0], ids)
    return bridges.equinox(module, bridges.ids(batch, 32, 60), call=call)


@LIBRARY.model("Qwen3 CausalLM, tied head")
def qwen3(batch: int) -> Model:
    """A kernel that is looked up and multiplied."""
    return _model(Config(architecture="Qwen3ForCausalLM", tie_word_embeddings=True, **SIZES), batch)


@LIBRARY.model("Qwen3-MoE CausalLM", tables=("embed",))
def moe(batch: int) -> Model:
    """Experts by ragged products."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Config(
        architecture="Qwen3MoeForCausalLM",
        tie_word_embeddings=False,
        norm_topk_prob=True,
        moe_layers=(0, 1),
        **experts,
        **SIZES,
    )
    return _model(config, batch)
