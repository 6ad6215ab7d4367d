"""Tiny checkpoints of the Llama family in Hugging Face's files, and the same in GGUF."""

import safetensors.numpy

from lora_jax.models import checkpoints
from tests.helpers import gguf_files, tiny_llama

SIZES = {
    "rms_norm_eps": 1e-5, "head_dim": 16, "rope_theta": 500.0, "intermediate_size": 64,
    "num_hidden_layers": 3, "vocab_size": 64, "bos_token_id": 4, "eos_token_id": 5,
}  # fmt: skip

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

CASES = {
    "llama": {"rope_theta": 500000.0},
    "llama-tied-biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2", "sliding_window": 3, "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0,
    },
    "gemma3": {
        "model_type": "gemma3_text", "sliding_window": 3, "query_pre_attn_scalar": 16,
        "sliding_window_pattern": 6, "num_hidden_layers": 7, "rope_local_base_freq": 10_000.0,
    },
}  # fmt: skip

IDS = {"tokenizer.ggml.bos_token_id": 4, "tokenizer.ggml.eos_token_id": 5}


def make(tmp_path, case, kind="F32", *, changes=None, **options):
    """A checkpoint in Hugging Face's files, and the same in GGUF."""
    folder = tiny_llama.checkpoint(tmp_path / "hf", **SIZES | CASES[case] | (changes or {}))
    weights = folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(weights)
    if checkpoints.resolve(folder).config.get("tie_word_embeddings", "gemma" in case):
        arrays.pop("lm_head.weight", None)
        safetensors.numpy.save_file(arrays, weights)
    return folder, gguf_files.convert(folder, tmp_path / "gguf" / "m.gguf", kind, **options)
