"""flaxdiff: diffusion models in Flax Linen."""

import jax.numpy as jnp
from flaxdiff.models.simple_unet import Unet

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("flaxdiff")


@LIBRARY.model("Unet, conditioned on text")
def unet(batch: int) -> Model:
    """Convolutions and cross-attention."""
    model = Unet(
        emb_features=32,
        feature_depths=(16, 32),
        attention_configs=({"heads": 2}, {"heads": 2}),
        num_res_blocks=1,
    )
    args = bridges.normal(batch, 8, 8, 3), jnp.linspace(0.1, 0.9, batch)
    return bridges.linen(model, *args, bridges.normal(batch, 6, 24))
