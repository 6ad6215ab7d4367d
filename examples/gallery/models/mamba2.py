"""mamba2-jax: Mamba 2 in Flax NNX."""

from flax import nnx
from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("mamba2-jax")


@LIBRARY.model("Mamba2ForCausalLM")
def causal(batch: int) -> Model:
    """State-space duality, a depthwise convolution, and a tied head."""
    config = Mamba2Config(
        vocab_size=60, hidden_size=32, state_size=16, head_dim=16, chunk_size=8, num_hidden_layers=2
    )
    model = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    call = lambda model, ids: model(ids)["logits"]
    return bridges.nnx(model, bridges.ids(batch, 32, 60), call=call)
