"""Makes tests/goldens/llama: tiny language models of the Llama family by transformers.

    python scripts/make_llama_goldens.py

Needs the extra `parity`. Each case is a directory as transformers writes it, plus golden.npz with
inputs and logits. The weights are drawn wide (transformers' own initial values give logits so near
zero that a wrong model would pass).
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
GLOBAL = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
CASES = {
    "llama3": ("llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "llama_biases_linear_tied": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": GLOBAL,
            "head_dim": None,
        },
    ),
    "mistral": ("mistral", {"sliding_window": 3}),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "head_dim": None},
    ),
    "qwen3": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 3,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 3,
            "query_pre_attn_scalar": 10,
            "rope_parameters": {"full_attention": GLOBAL, "sliding_attention": LOCAL},
        },
    ),
}
OUT = Path(__file__).parent.parent / "tests" / "goldens" / "llama"


def make(name, kind, changes, seed):
    """Writes one case."""
    said = {word: value for word, value in (TINY | changes).items() if value is not None}
    config = transformers.AutoConfig.for_model(kind, **said)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    draw = lambda p: torch.randn(p.shape, generator=generator) * 0.3
    one = 0.0 if kind.startswith("gemma") else 1.0  # Gemma stores a norm's scale minus one
    with torch.no_grad():
        for path, p in model.named_parameters():
            p.copy_(draw(p) + (one if path.endswith("norm.weight") else 0.0))
    model.tie_weights()
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab_size, (4, 9))
    real = np.array([9, 5, 1, 6])
    mask = (np.arange(9)[None, :] < real[:, None]).astype(np.int64)
    mask[3] = mask[3, ::-1]  # padded on the left
    with torch.no_grad():
        tensors = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        logits = model.eval()(**tensors).logits
    model.save_pretrained(OUT / name)
    (OUT / name / "generation_config.json").unlink(missing_ok=True)
    values = {"input_ids": ids, "attention_mask": mask, "logits": logits.numpy()}
    np.savez_compressed(OUT / name / "golden.npz", **values)


if __name__ == "__main__":
    for seed, (name, (kind, changes)) in enumerate(CASES.items()):
        make(name, kind, changes, seed)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (OUT / "made_by.json").write_text(
        json.dumps({"script": "scripts/make_llama_goldens.py", **versions}, indent=2) + "\n"
    )
