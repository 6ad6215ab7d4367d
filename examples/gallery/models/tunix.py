"""google-tunix: language models in Flax NNX."""

from types import ModuleType

import jax.numpy as jnp
from flax import nnx
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen3 import model as qwen3

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("google-tunix")
SIZES = {
    "num_layers": 2,
    "embed_dim": 32,
    "hidden_dim": 48,
    "num_heads": 2,
    "head_dim": 16,
    "num_kv_heads": 1,
}


def _model(family: ModuleType, kind: str, batch: int, **sizes: object) -> Model:
    module = getattr(family, kind)(family.ModelConfig(**SIZES, **sizes), rngs=nnx.Rngs(0))
    positions = jnp.broadcast_to(jnp.arange(16), (batch, 16))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((16, 16), bool)), (batch, 16, 16))
    call = lambda module, ids, positions, mask: module(ids, positions, None, mask)[0]
    return bridges.nnx(module, bridges.ids(batch, 16, 60), positions, mask, call=call)


@LIBRARY.model("Gemma3")
def gemma(batch: int) -> Model:
    """A tied head."""
    sizes = {"num_embed": 60, "sliding_window_size": 8, "param_dtype": jnp.float32}
    return _model(gemma3, "Gemma3", batch, **sizes)


@LIBRARY.model("Llama3", tables=("embedder",))
def llama(batch: int) -> Model:
    """Grouped queries."""
    sizes = {"vocab_size": 60, "rope_theta": 10000, "norm_eps": 1e-5}
    return _model(llama3, "Llama3", batch, **sizes)


@LIBRARY.model("Qwen3, mixture of experts", tables=("embedder",))
def qwen(batch: int) -> Model:
    """Experts, each with its use of the kernels."""
    sizes = {"vocab_size": 60, "rope_theta": 10000, "norm_eps": 1e-6}
    return _model(qwen3, "Qwen3", batch, num_experts=4, num_experts_per_tok=2, **sizes)
