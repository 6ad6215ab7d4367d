"""Hugging Face's Flax parts of Stable Diffusion, in diffusers 0.35.1."""

import jax
import jax.numpy as jnp
from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("diffusers")


@LIBRARY.model("FlaxUNet2DConditionModel")
def unet(batch: int) -> Model:
    """Convolutions and cross-attention."""
    model = FlaxUNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=24,
        dtype=None,  # that of the inputs, so that it can be computed in float64 too
    )
    params = model.init_weights(jax.random.key(0))
    fn = lambda params, *args: model.apply({"params": params}, *args).sample
    args = (
        bridges.normal(batch, 4, 8, 8),
        jnp.ones(batch, jnp.int32),
        bridges.normal(batch, 6, 24),
    )
    return Model(fn=fn, params=params, args=args, lines=2)


@LIBRARY.model("FlaxAutoencoderKL")
def autoencoder(batch: int) -> Model:
    """The mean of the latent picture, decoded."""
    model = FlaxAutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=16,
    )
    params = model.init_weights(jax.random.key(0))
    fn = lambda params, x: model.apply({"params": params}, x).sample
    return Model(fn=fn, params=params, args=(bridges.normal(batch, 3, 16, 16),), lines=2)
