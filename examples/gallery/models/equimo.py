"""equimo: models of vision in Equinox."""

import jax
from equimo.models.convnext import ConvNeXt
from equimo.models.mlla import Mlla
from equimo.models.vit import VisionTransformer

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("equimo")
TABLES = ("cls_token", "reg_tokens", "pos_embed", "mask_token", "gamma", "layer_scale", "rotations")


def _images(model: jax.tree_util.Partial, batch: int) -> Model:
    call = lambda model, x: jax.vmap(lambda row: model(row, key=jax.random.key(1), inference=True))(
        x
    )
    return bridges.equinox(model, bridges.normal(batch, 3, 32, 32), call=call)


@LIBRARY.model("VisionTransformer", tables=TABLES)
def vit(batch: int) -> Model:
    """A class token, registers and trained positions."""
    model = VisionTransformer(
        img_size=32,
        in_channels=3,
        dim=32,
        patch_size=8,
        num_heads=[2],
        depths=[2],
        num_classes=10,
        key=jax.random.key(0),
    )
    return _images(model, batch)


@LIBRARY.model("ConvNeXt", tables=TABLES)
def convnext(batch: int) -> Model:
    """Depthwise convolutions, and a scale of each layer."""
    model = ConvNeXt(
        in_channels=3, depths=[1, 1], dims=[16, 32], num_classes=10, key=jax.random.key(0)
    )
    return _images(model, batch)


@LIBRARY.model("Mlla", tables=TABLES)
def mlla(batch: int) -> Model:
    """Linear attention."""
    model = Mlla(
        img_size=32,
        in_channels=3,
        dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        num_classes=10,
        key=jax.random.key(0),
    )
    return _images(model, batch)
