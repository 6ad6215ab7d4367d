"""What llama.cpp's words for a model mean: its config and its tensors, in Hugging Face's words.

Only what is understood is let through: a key about the architecture that is not known here is
refused by name, as is another architecture, since a model without it would be another model.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.models import gguf, rope
from lora_jax.models.gguf import GGUF, GGUFTensor
from lora_jax.models.llama_config import FULL, SLIDING, VARIANTS

_MODEL_TYPES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}  # fmt: skip
_NEEDED = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_WORDS = _NEEDED | {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_GEMMA = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base_swa": "rope_local_base_freq",
}
# Understood below, in other ways than by another word.
_OTHERS = {"attention.value_length", "rope.dimension_count", "rope.scaling.type"}
_OTHERS |= {"rope.scaling.factor", "rope.scaling.original_context_length"}
_OF_GEMMA = {"attention.scale", "attention.sliding_window_pattern"}
# What does not matter where it has this value (None for any).
_NEUTRAL = {
    "expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0, "rope.scaling.finetuned": None, "tensor_data_layout": None,
}  # fmt: skip
_MOST = {"num_hidden_layers": 10_000}  # lists of this length are made before it is checked
_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the models that scale queries in another way
_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}

_ROPE_FREQS = "rope_freqs.weight"
_TENSORS = {"token_embd": "embed_tokens", "output_norm": "norm"}
_PARTS = {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}
_PARTS |= {f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
_PARTS |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
_PARTS |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"}
_NORMS = {"ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def open_tensors(path: str | Path) -> dict[str, GGUFTensor]:
    """Lists the tensors of a GGUF file by transformers' names, without reading them.

    A tensor whose name is not known here keeps it.

    Raises:
      ValueError: it can't be read, or is of another architecture.
    """
    header = gguf.read_header(path)
    config = read_config(header)
    arch = _architecture(header)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    found = {}
    for name, tensor in header.tensors.items():
        if name == _ROPE_FREQS:
            continue  # read_config has understood it
        if arch == "llama" and (part := re.fullmatch(r"blk\.\d+\.attn_([qk])\.\w+", name)):
            tensor = _permute(tensor, name, heads[part[1]])
        if _is_gemma(arch) and name.endswith("norm.weight"):
            tensor = tensor._replace(shift=1.0)
        found[_standard(name, arch)] = tensor
    if len(found) < len(header.tensors) - (_ROPE_FREQS in header.tensors):
        raise ValueError(f"{path} has tensors that stand for the same weight")
    return found


def _permute(tensor: GGUFTensor, name: str, heads: int) -> GGUFTensor:
    if tensor.shape[0] % (2 * heads):
        raise ValueError(
            f"{tensor.path}: {name} has {tensor.shape[0]} rows, which are no {heads} heads."
        )
    return tensor._replace(heads=heads)


def _standard(name: str, arch: str) -> str:
    """The name in Hugging Face's files.

    >>> _standard("blk.3.attn_output.weight", "llama")
    'model.layers.3.self_attn.o_proj.weight'
    """
    stem, _, kind = name.rpartition(".")
    if stem == "output":
        return f"lm_head.{kind}"
    if stem in _TENSORS:
        return f"model.{_TENSORS[stem]}.{kind}"
    part = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    parts = _PARTS | (_GEMMA_NORMS if _is_gemma(arch) else _NORMS)
    if part is None or part[2] not in parts:
        return name
    return f"model.layers.{part[1]}.{parts[part[2]]}.{kind}"


def _is_gemma(arch: str) -> bool:
    return arch.startswith("gemma")


def read_config(header: GGUF) -> dict[str, Any]:
    """Converts the model's config to the words of a ``config.json``.

    Raises:
      ValueError: another architecture, or a variant of one that is not built here.
    """
    try:
        return _config(header)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"{header.path}: {error}") from error


def _architecture(header: GGUF) -> str:
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in _MODEL_TYPES:
        raise ValueError(
            f"general.architecture is {arch!r:.80}; of GGUF files, models of "
            f"{', '.join(_MODEL_TYPES)} are read here."
        )
    kind = header.metadata.get("general.type", "model")
    if kind != "model" or header.metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(
            "it is no whole model: general.type and split.count must be 'model' and 1. Merge the "
            "parts of a split file with llama-gguf-split --merge first."
        )
    return arch


def _config(header: GGUF) -> dict[str, Any]:
    arch = _architecture(header)
    said = {
        key.removeprefix(f"{arch}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{arch}.")
    }
    _check_words(said, arch)
    words = _WORDS | (_GEMMA if _is_gemma(arch) else {})
    config = {words[key]: _same(value, key) for key, value in said.items() if key in words}
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        _check_number(config[name], name)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    _check_number(config["num_key_value_heads"], "num_key_value_heads")
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    _check_head_dim(said, config["head_dim"])
    config["model_type"] = _MODEL_TYPES[arch]
    config["architectures"] = [VARIANTS[config["model_type"]].architecture]
    if _is_gemma(arch):
        config |= _gemma(said, config, arch)
    return config | _from_tensors(header, config) | _ropes(said, header, config) | _ids(header)


def _check_words(said: Mapping[str, Any], arch: str) -> None:
    if missing := [f"{arch}.{key}" for key in _NEEDED if key not in said]:
        raise ValueError(f"it lacks {', '.join(missing)}.")
    known = {*_WORDS, *_OTHERS, *((*_GEMMA, *_OF_GEMMA) if _is_gemma(arch) else ())}
    foreign = []
    for key, value in said.items():
        usual = _NEUTRAL.get(key, value)
        neutral = key in _NEUTRAL and (usual is None or np.array_equal(value, usual))
        if key not in known and not neutral:
            foreign.append(f"{arch}.{key} = {value!r:.40}")
    if foreign:
        raise ValueError(f"it says {', '.join(foreign[:10])}, which is not built here.")


def _same(value: Any, key: str) -> Any:
    """A value, or that of all layers where there is one for each."""
    if not isinstance(value, np.ndarray):
        return value
    if len(value) == 0 or (value != value[0]).any():
        raise ValueError(f"{key} differs from layer to layer, which is not built here.")
    return value[0].item()


def _check_number(value: Any, name: str) -> None:
    if type(value) is not int or not 1 <= value <= _MOST.get(name, 2**31):
        raise ValueError(f"{name} must be a whole number of a sensible size, got {value!r:.60}.")


def _check_head_dim(said: Mapping[str, Any], head_dim: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        if _same(said.get(key, head_dim), key) != head_dim:
            raise ValueError(
                f"{key} is {said[key]} where a head has {head_dim} features: only heads that are "
                "rotated as a whole, with values of the same size, are built here."
            )


def _gemma(said: Mapping[str, Any], config: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """Which layers have a window, and the scale of the queries."""
    layers, pattern = config["num_hidden_layers"], said.get("attention.sliding_window_pattern")
    if "sliding_window" not in config:
        raise ValueError(f"it lacks {arch}.attention.sliding_window.")
    found: dict[str, Any] = {"query_pre_attn_scalar": config["head_dim"]}
    if layers == _LARGEST[arch]:
        found["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]
    if "attention.scale" in said:
        found["query_pre_attn_scalar"] = said["attention.scale"] ** -2
    if isinstance(pattern, np.ndarray):
        found["layer_types"] = [SLIDING if slides else FULL for slides in pattern]
    elif pattern is not None:
        _check_number(pattern, "attention.sliding_window_pattern")
        kinds = [FULL if (k + 1) % pattern == 0 else SLIDING for k in range(layers)]
        found["layer_types"] = kinds
    return found


def _from_tensors(header: GGUF, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says by having a tensor."""
    there, words = header.tensors, VARIANTS[config["model_type"]].fields
    found: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in there}
    for word, name in {"attention_bias": "attn_output", "mlp_bias": "ffn_up"}.items():
        if word in words:
            found[word] = f"blk.0.{name}.bias" in there
    if "token_embd.weight" in there:
        shape = there["token_embd.weight"].shape
        found["vocab_size"] = config.get("vocab_size", shape[0])
        tokens = header.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list) and len(tokens) > shape[0]:
            raise ValueError(f"it has {len(tokens)} tokens, and embeddings of shape {shape}.")
    return found


def _ropes(said: Mapping[str, Any], header: GGUF, config: Mapping[str, Any]) -> dict[str, Any]:
    kind, factor = said.get("rope.scaling.type", "none"), said.get("rope.scaling.factor", 1.0)
    if kind not in ("none", "linear"):
        raise ValueError(f"rope.scaling.type is {kind!r:.40}; linear scaling is built here.")
    is_scaled = kind == "linear" and factor not in (0.0, 1.0)
    if is_scaled and _ROPE_FREQS in header.tensors:
        raise ValueError(
            f"it has both rope.scaling.type {kind!r} and the tensor {_ROPE_FREQS}, which scale "
            "frequencies in two ways; one of them is built here."
        )
    if is_scaled:
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if _ROPE_FREQS in header.tensors:
        return _llama3(gguf.read_tensor(header.tensors[_ROPE_FREQS]), config)
    return {}


def _llama3(factors: np.ndarray, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, of which the file holds only what each frequency is divided by."""
    head_dim, theta = config["head_dim"], config.get("rope_theta", 10_000.0)
    if factors.shape != (head_dim // 2,):
        raise ValueError(f"{_ROPE_FREQS} has shape {factors.shape}, and heads {head_dim} features.")
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    turns = [rope.from_hf(x, theta=theta, positions=1) for x in ({}, scaling)]
    plain, scaled = (rope.compute_frequencies(x, head_dim) for x in turns)
    if not np.allclose(factors, plain / scaled, rtol=1e-4):
        raise ValueError(
            f"{_ROPE_FREQS} scales frequencies in another way than Llama 3, which is not built."
        )
    return {"rope_scaling": scaling}


def _ids(header: GGUF) -> dict[str, Any]:
    """Special tokens that generation needs; the end of a turn ends a text, too."""
    about = header.metadata
    id_of = lambda word: about.get(f"tokenizer.ggml.{word}_token_id")
    found = {name: id_of(word) for name, word in _IDS.items() if id_of(word) is not None}
    ends = [id_of(word) for word in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(x for x in ends if x is not None))
    for value in (*found.values(), *ends):
        if type(value) is not int:
            raise ValueError(f"the id of a special token is {value!r:.60}.")
    return found | ({"eos_token_id": ends} if len(ends) > 1 else {})
