"""attnax: transformers in Flax NNX."""

from attnax.config import TransformerConfig, VisionTransformerConfig
from attnax.transformer import TransformerEncoder
from attnax.vision import VisionTransformer
from flax import nnx

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("attnax")
SIZES = {"d_model": 32, "num_heads": 2, "num_layers": 2, "d_ff": 48, "dropout_rate": 0.0}


@LIBRARY.model("TransformerEncoder", tables=("token_embed", "pos_encoding"))
def encoder(batch: int) -> Model:
    """Fixed positions."""
    config = TransformerConfig(vocab_size=60, max_len=64, **SIZES)
    return bridges.nnx(TransformerEncoder(nnx.Rngs(0), config), bridges.ids(batch, 32, 60))


@LIBRARY.model("VisionTransformer", tables=("cls_token", "pos_emb", "position"))
def vision(batch: int) -> Model:
    """A class token and trained positions."""
    config = VisionTransformerConfig(image_size=16, patch_size=4, num_classes=10, **SIZES)
    model = VisionTransformer(nnx.Rngs(0), config)
    return bridges.nnx(model, bridges.normal(batch, 16, 16, 3))
