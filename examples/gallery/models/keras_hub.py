"""KerasHub's models, with Keras on the JAX backend."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported

from typing import Any

import jax
import jax.numpy as jnp
import keras_hub

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("keras-hub")
TEXT = {"vocabulary_size": 60, "num_layers": 2, "hidden_dim": 32, "intermediate_dim": 48}
TABLES = ("position_embedding", "segment_embedding")


def _backbone(name: str, *args: Any, **sizes: Any) -> Model:
    bridges.start_keras()
    return bridges.keras(getattr(keras_hub.models, name)(**sizes), *args)


def _tokens(batch: int, mask: str = "padding_mask") -> dict[str, jax.Array]:
    return {"token_ids": bridges.ids(batch, 32, 60), mask: jnp.ones((batch, 32), jnp.int32)}


@LIBRARY.model("GemmaBackbone", tables=("token_embedding",))
def gemma(batch: int) -> Model:
    """Grouped queries; the backbone has no head."""
    heads = {"num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return _backbone("GemmaBackbone", _tokens(batch), **TEXT, **heads)


@LIBRARY.model("MixtralBackbone", tables=("token_embedding",))
def mixtral(batch: int) -> Model:
    """Experts."""
    heads = {"num_query_heads": 2, "num_key_value_heads": 1, "num_experts": 4}
    return _backbone("MixtralBackbone", _tokens(batch), **TEXT, **heads)


@LIBRARY.model("DebertaV3Backbone", tables=("token_embedding", "rel_embedding", *TABLES))
def deberta(batch: int) -> Model:
    """A table of relative positions that goes through the attention's kernels."""
    sizes = {"num_heads": 2, "dropout": 0.0, "max_sequence_length": 32, "bucket_size": 8}
    return _backbone("DebertaV3Backbone", _tokens(batch), **TEXT, **sizes)


@LIBRARY.model("XLNetBackbone", tables=("word_embed", "mask_emb", "embedding"))
def xlnet(batch: int) -> Model:
    """Relative positions, and a table of two segments that is multiplied."""
    inputs = _tokens(batch) | {"segment_ids": jnp.zeros((batch, 32), jnp.int32)}
    return _backbone("XLNetBackbone", inputs, **TEXT, num_heads=2)


@LIBRARY.model("RWKV7Backbone", tables=("token_embedding", r"[./]x_[a-z]+(#\d+)?$"))
def rwkv7(batch: int) -> Model:
    """A recurrent network with small factors of its own."""
    sizes = {"hidden_size": 32, "head_size": 16, "num_layers": 2, "vocabulary_size": 60}
    ranks = {"gate_lora": 16, "mv_lora": 16, "aaa_lora": 16, "decay_lora": 16}
    return _backbone("RWKV7Backbone", _tokens(batch), **sizes, **ranks, intermediate_dim=48)


@LIBRARY.model("ViTBackbone", tables=("class_token", "position"))
def vit(batch: int) -> Model:
    """A class token and trained positions."""
    sizes = {"image_shape": (16, 16, 3), "patch_size": 4, "num_layers": 2, "num_heads": 2}
    return _backbone(
        "ViTBackbone", bridges.normal(batch, 16, 16, 3), **sizes, hidden_dim=32, mlp_dim=48
    )


@LIBRARY.model("WhisperBackbone", tables=TABLES)
def whisper(batch: int) -> Model:
    """An encoder of sounds and a decoder of texts."""
    inputs = {
        "encoder_features": bridges.normal(batch, 32, 16),
        "decoder_token_ids": bridges.ids(batch, 16, 60),
        "decoder_padding_mask": jnp.ones((batch, 16), jnp.int32),
    }
    lengths = {"max_encoder_sequence_length": 32, "max_decoder_sequence_length": 16}
    return _backbone("WhisperBackbone", inputs, **TEXT, **lengths, num_heads=2, num_mels=16)
