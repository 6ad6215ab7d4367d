"""nano-moe-jax: a mixture of experts in Flax Linen."""

from nano_moe.config import NanoMoEConfig
from nano_moe.model import NanoMoE

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("nano-moe-jax")


@LIBRARY.model("NanoMoE", tables=("Embed_0", "pos_emb"))
def moe(batch: int) -> Model:
    """Two of four experts for each token."""
    config = NanoMoEConfig(vocab_size=60, n_layers=2, n_heads=2, d_model=32, d_ff=48, block_size=32)
    return bridges.linen(NanoMoE(config), bridges.ids(batch, 32, 60))
