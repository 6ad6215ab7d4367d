"""Hugging Face's Flax models, in transformers 4.56.2, the last release that has them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import transformers

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("transformers")
VOCABULARY, LENGTH = 60, 32
# What most configurations call these sizes.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
# What encoder-decoders call them.
PAIR_SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
TABLES = ("position", "token_type_embeddings", "cls_token", "mask_token")
UNTIED = (*TABLES, "embed_tokens", "/wte/", "/wpe/")


def _model(model: Any, *args: Any, output: Callable | None = None, call: Any = None) -> Model:
    output, call = output or (lambda out: out.logits), call or model
    fn = lambda params, *args: output(call(*args, params=params))
    return Model(fn=fn, params=model.params, args=args, lines=1)


def _text(batch: int) -> jax.Array:
    return bridges.ids(batch, LENGTH, VOCABULARY)


def _encoder(name: str, tables: tuple[str, ...] = TABLES, **sizes: Any) -> None:
    """Registers a model of texts whose head is tied to its embedding or not."""

    @LIBRARY.model(f"Flax{name}", tables=tables)
    def build(batch: int) -> Model:
        config = getattr(transformers, _config_of(name))(**{**SIZES, **sizes})
        return _model(getattr(transformers, f"Flax{name}")(config, seed=0), _text(batch))


def _config_of(name: str) -> str:
    for head in ("ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForPreTraining"):
        name = name.removesuffix(head)
    return f"{name.removesuffix('MT')}Config"


def _pair(name: str, config: str, **sizes: Any) -> None:
    """Registers an encoder-decoder of texts."""

    @LIBRARY.model(f"Flax{name}", tables=("embed_positions", *TABLES))
    def build(batch: int) -> Model:
        settings = getattr(transformers, config)(**{**PAIR_SIZES, **sizes})
        model = getattr(transformers, f"Flax{name}")(settings, seed=0)
        call = lambda source, target, params: model(source, decoder_input_ids=target, params=params)
        return _model(model, _text(batch), _text(batch), call=call)


_encoder("BertForMaskedLM")
_encoder("RobertaForMaskedLM", max_position_embeddings=70, pad_token_id=0)
_encoder("AlbertForMaskedLM", embedding_size=16)
_encoder("ElectraForPreTraining", (*TABLES, "word_embeddings"), embedding_size=16)
_encoder("RoFormerForMaskedLM", embedding_size=64)
_encoder("BigBirdForMaskedLM", attention_type="original_full")
_encoder("DistilBertForMaskedLM", dim=64, n_layers=2, n_heads=2, hidden_dim=128)
_encoder("GPT2LMHeadModel", (*TABLES, "/wpe/"), n_positions=64, n_embd=64, n_layer=2, n_head=2)
_encoder(
    "GPTNeoForCausalLM",
    (*TABLES, "/wpe/"),
    num_layers=2,
    num_heads=2,
    attention_types=[[["global", "local"], 1]],
    window_size=8,
)
_encoder("GPTJForCausalLM", UNTIED, n_positions=64, n_embd=64, n_layer=2, n_head=2, rotary_dim=8)
_encoder("BloomForCausalLM", n_layer=2, n_head=2)
_encoder("LlamaForCausalLM", UNTIED, num_key_value_heads=1)
_encoder("MistralForCausalLM", UNTIED, num_key_value_heads=1, sliding_window=8)
_encoder("GemmaForCausalLM", num_key_value_heads=1, head_dim=32)
_encoder("OPTForCausalLM", ("embed_positions",), ffn_dim=128, word_embed_proj_dim=64)
_encoder(
    "XGLMForCausalLM",
    ("embed_positions",),
    d_model=64,
    num_layers=2,
    attention_heads=2,
    ffn_dim=128,
)
_pair("BartForConditionalGeneration", "BartConfig")
_pair("PegasusForConditionalGeneration", "PegasusConfig")
_pair("MarianMTModel", "MarianConfig")
_pair("BlenderbotForConditionalGeneration", "BlenderbotConfig")


@LIBRARY.model("FlaxWhisperForConditionalGeneration", tables=("embed_positions",))
def whisper(batch: int) -> Model:
    """Convolutions, an encoder of sounds, and a decoder with a tied head."""
    sizes = PAIR_SIZES | {"max_source_positions": 16, "max_target_positions": 32}
    config = transformers.WhisperConfig(**sizes, num_mel_bins=16)
    model = transformers.FlaxWhisperForConditionalGeneration(
        config, seed=0, input_shape=(1, 16, 32)
    )
    call = lambda sound, target, params: model(sound, decoder_input_ids=target, params=params)
    target = bridges.ids(batch, 16, VOCABULARY)
    return _model(model, bridges.normal(batch, 16, 32), target, call=call)


@LIBRARY.model("FlaxWav2Vec2ForCTC", tables=("masked_spec_embed",))
def wav2vec2(batch: int) -> Model:
    """Convolutions of a waveform, one of them normalised by its weights."""
    config = transformers.Wav2Vec2Config(
        **{k: v for k, v in SIZES.items() if k != "max_position_embeddings"},
        conv_dim=(16, 16),
        conv_kernel=(8, 4),
        conv_stride=(4, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    model = transformers.FlaxWav2Vec2ForCTC(config, seed=0, input_shape=(1, 320))
    return _model(model, bridges.normal(batch, 320))


IMAGES = {"image_size": 16, "patch_size": 4}
_IMAGE_SIZES = {
    k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")
}


def _vision(name: str, config: str, tables: tuple[str, ...] = TABLES, **sizes: Any) -> None:
    """Registers a classifier of images."""

    @LIBRARY.model(f"Flax{name}", tables=tables)
    def build(batch: int) -> Model:
        settings = getattr(transformers, config)(**sizes, num_labels=10)
        shape = {"input_shape": (1, sizes["image_size"], sizes["image_size"], 3)}
        shape = shape if "patch_size" in sizes else {}
        model = getattr(transformers, f"Flax{name}")(settings, seed=0, **shape)
        return _model(model, bridges.normal(batch, 3, sizes["image_size"], sizes["image_size"]))


_vision("ViTForImageClassification", "ViTConfig", **IMAGES, **_IMAGE_SIZES)
_vision(
    "BeitForImageClassification",
    "BeitConfig",
    (*TABLES, "lambda_", "relative_position_bias_table"),
    **IMAGES,
    **_IMAGE_SIZES,
    use_relative_position_bias=True,
    layer_scale_init_value=0.1,
)


def _convolutions(name: str, config: str, **sizes: Any) -> None:
    """Registers a convolutional classifier; its batch statistics are constants."""

    @LIBRARY.model(f"Flax{name}ForImageClassification")
    def build(batch: int) -> Model:
        settings = getattr(transformers, config)(
            embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=10, **sizes
        )
        kind = getattr(transformers, f"Flax{name}ForImageClassification")
        model = kind(settings, seed=0, input_shape=(1, 32, 32, 3))
        state = model.params["batch_stats"]
        fn = lambda params, x: model(x, params={"params": params, "batch_stats": state}).logits
        args = (bridges.normal(batch, 3, 32, 32),)
        return Model(fn=fn, params=model.params["params"], args=args, lines=2)


_convolutions("ResNet", "ResNetConfig", layer_type="basic")
_convolutions("RegNet", "RegNetConfig", groups_width=8)


@LIBRARY.model("FlaxCLIPModel", tables=("position_embedding", "class_embedding", "token_embedding"))
def clip(batch: int) -> Model:
    """Two towers whose outputs are compared."""
    text = {**SIZES, "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**_IMAGE_SIZES, **IMAGES, "projection_dim": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    shape = ((1, LENGTH), (1, 16, 16, 3))
    model = transformers.FlaxCLIPModel(config, seed=0, input_shape=shape)
    # The text's summary is at its largest id.
    words = _text(batch).at[:, -1].set(VOCABULARY - 1)
    call = lambda words, image, params: model(words, image, params=params)
    output = lambda out: (out.text_embeds, out.image_embeds)
    image = jnp.asarray(bridges.normal(batch, 3, 16, 16))
    return _model(model, words, image, call=call, output=output)
