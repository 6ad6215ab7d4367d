"""Writes small GGUF files, byte by byte, for tests."""

import json
import struct

import numpy as np
import safetensors.numpy

from lora_jax.models import ggml

NUMBERS = {layout.name: number for number, layout in ggml.LAYOUTS.items()}
_KINDS = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "u8": 10, "i8": 11, "f8": 12}  # fmt: skip


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(x):
    """With its type before it: an int becomes uint32, a float float32."""
    if isinstance(x, bool):
        return struct.pack("<IB", 7, x)
    if isinstance(x, str | bytes):
        return struct.pack("<I", 8) + string(x)
    if type(x) is int:
        return struct.pack("<II", 4, x)
    if type(x) is float:
        return struct.pack("<If", 6, x)
    if isinstance(x, list) and all(isinstance(y, str) for y in x):
        return struct.pack("<IIQ", 9, 8, len(x)) + b"".join(map(string, x))
    array = np.asarray(x)
    if array.ndim == 0:
        return struct.pack("<I", _KINDS[array.dtype.str[1:]]) + array.tobytes()
    return struct.pack("<IIQ", 9, _KINDS[array.dtype.str[1:]], len(array)) + array.tobytes()


def header(metadata, tensors, *, version=3, step=32, magic=b"GGUF"):
    """Tensors are triples: type's name, shape as in NumPy, bytes."""
    pieces = [magic, struct.pack("<IQQ", version, len(tensors), len(metadata))]
    pieces += [string(key) + value(x) for key, x in metadata.items()]
    at = 0
    for name, (kind, shape, data) in tensors.items():
        number = NUMBERS[kind] if isinstance(kind, str) else kind
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        pieces.append(string(name) + sizes + struct.pack("<IQ", number, at))
        at += -(-len(data) // step) * step
    return b"".join(pieces)


def content(metadata, tensors, *, step=32, **options):
    data = header(metadata, tensors, step=step, **options)
    for _, _, body in tensors.values():
        data += b"\0" * (-len(data) % step) + body
    return data + b"\0" * (-len(data) % step)


def plain(array, kind="F32"):
    """A tensor of plain numbers."""
    bits = {"F32": lambda x: x.astype("<f4"), "F16": lambda x: x.astype("<f2")}
    bits["BF16"] = lambda x: (x.astype("<f4").view("<u4") >> 16).astype("<u2")
    array = np.asarray(array)
    return kind, array.shape, bits[kind](array).tobytes()


def packed(array, kind):
    """A matrix as codes, by the plainest way of choosing a block's scale."""
    if kind in ("F32", "F16", "BF16"):
        return plain(array, kind)
    blocks = np.asarray(array, np.float32).reshape(-1, 32)
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    size = np.abs(blocks).max(1, keepdims=True)
    bits = int(kind[1])
    # Scales below zero are usual in such files: codes of zero then stand for -0.0.
    scale = (high - low) / (2**bits - 1) if kind.endswith("_1") else -size / (2 ** (bits - 1) - 1)
    scale = scale.astype("<f2")
    least = low.astype("<f2") if kind.endswith("_1") else None
    codes = np.rint((blocks - (0 if least is None else least)) / scale.astype(np.float32))
    halves = [x.view(np.uint8) for x in (scale, least) if x is not None]
    if bits == 8:
        body = [codes.astype(np.int8).view(np.uint8)]
    else:
        middle = 0 if kind.endswith("_1") else 2 ** (bits - 1)
        few = np.clip(codes + middle, 0, 2**bits - 1).astype(np.uint8)
        fifth = [np.packbits(few >> 4, axis=1, bitorder="little")] if bits == 5 else []
        body = [*fifth, few[:, :16] & 15 | few[:, 16:] << 4]
    return kind, np.shape(array), np.concatenate([*halves, *body], axis=1).tobytes()


# Models of the Llama family, from Hugging Face's files to GGUF, as convert_hf_to_gguf.py does it.

ARCHITECTURES = {"gemma3_text": "gemma3"}  # otherwise model_type
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}  # fmt: skip
_AFTER = {"post_attention_layernorm": "ffn_norm"}
_GEMMA_AFTER = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def name_there(name, arch):
    stem, _, kind = name.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    names = _NAMES | (_GEMMA_AFTER if arch.startswith("gemma") else _AFTER)
    return f"blk.{layer}.{names[part]}.{kind}"


def metadata(config):
    """Of a parsed config.json."""
    arch = ARCHITECTURES.get(config["model_type"], config["model_type"])
    about = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(config["rope_theta"]),
    }
    if "head_dim" in config:
        about |= {"attention.key_length": config["head_dim"]}
        about |= {"attention.value_length": config["head_dim"]}
    for word in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(word) is not None:
            about["attention." * (word == "sliding_window") + word] = config[word]
    if config.get("rope_scaling", {}).get("rope_type") == "linear":
        about |= {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": config["rope_scaling"]["factor"],
        }
    return {"general.architecture": arch} | {f"{arch}.{k}": x for k, x in about.items()}


def tensors(config, arrays, kind="F32"):
    """Of Hugging Face's, with all matrices of one type, or each of that which its name gives."""
    arch, found = ARCHITECTURES.get(config["model_type"], config["model_type"]), {}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, array in arrays.items():
        there = name_there(name, arch)
        part = there.split(".")[-2]
        if arch == "llama" and part in heads:
            pairs = array.reshape(heads[part], 2, -1, *array.shape[1:]).swapaxes(1, 2)
            array = pairs.reshape(array.shape)
        if arch.startswith("gemma") and there.endswith("norm.weight"):
            array = array + np.float32(1)
        own = kind(there) if callable(kind) else kind
        found[there] = packed(array, own) if array.ndim == 2 else plain(array)
    if config.get("rope_scaling", {}).get("rope_type") == "llama3":
        found["rope_freqs.weight"] = plain(llama3_factors(config))
    return found


def llama3_factors(config):
    """As llama.cpp's converter computes them."""
    about, dim, factors = config["rope_scaling"], config["head_dim"], []
    old = about["original_max_position_embeddings"]
    for k in range(0, dim, 2):
        wave = 2 * np.pi * config["rope_theta"] ** (k / dim)
        smooth = (old / wave - about["low_freq_factor"]) / (
            about["high_freq_factor"] - about["low_freq_factor"]
        )
        if wave < old / about["high_freq_factor"]:
            factors.append(1.0)
        elif wave > old / about["low_freq_factor"]:
            factors.append(about["factor"])
        else:
            factors.append(1 / ((1 - smooth) / about["factor"] + smooth))
    return np.array(factors, np.float32)


def convert(directory, path, kind="F32", *, words=None, **options):
    """A checkpoint in Hugging Face's files as one in GGUF; ``words`` are added to its metadata."""
    config = json.loads((directory / "config.json").read_text())
    arrays = safetensors.numpy.load_file(directory / "model.safetensors")
    about = {k: x for k, x in (metadata(config) | (words or {})).items() if x is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(about, tensors(config, arrays, kind), **options))
    return path
