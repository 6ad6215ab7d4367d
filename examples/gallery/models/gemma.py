"""gemma: Google DeepMind's Gemma in Flax Linen."""

from gemma.gm import nn as gm
from gemma.gm.nn import _config, _modules

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("gemma")


class Small(gm.Gemma3_270M):
    """Gemma 3 with other sizes."""

    config = _config.TransformerConfig(
        num_embed=60,
        embed_dim=32,
        hidden_dim=48,
        num_heads=2,
        head_dim=16,
        num_kv_heads=1,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=True,
        attention_types=(_modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL),
        sliding_window_size=8,
        transpose_gating_einsum=True,
    )


@LIBRARY.model("gm.nn.Transformer (Gemma 3)")
def gemma3(batch: int) -> Model:
    """Kernels of attention of rank three and four, and a tied head."""
    return bridges.linen(Small(dtype="float32"), bridges.ids(batch, 32, 60))
