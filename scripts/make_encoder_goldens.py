"""Makes tests/goldens/{roberta,distilbert}: tiny classifiers by transformers, with their logits.

    python scripts/make_encoder_goldens.py

Needs the extra `parity`. Each case is a directory as transformers writes it, plus golden.npz with
inputs and outputs. The weights are drawn wide (transformers' own initial values give logits so near
zero that a wrong model would pass).
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens"
ROBERTA = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 20, "max_position_embeddings": 14, "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": 30, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 20,
    "max_position_embeddings": 12,
}  # fmt: skip
CASES = {
    "roberta/base": (transformers.RobertaForSequenceClassification, ROBERTA, {}),
    "roberta/pad_3_types_2": (
        transformers.RobertaForSequenceClassification,
        ROBERTA,
        {"pad_token_id": 3, "type_vocab_size": 2, "num_labels": 3, "hidden_act": "relu"},
    ),
    "roberta/xlm": (transformers.XLMRobertaForSequenceClassification, ROBERTA, {"num_labels": 1}),
    "distilbert/base": (transformers.DistilBertForSequenceClassification, DISTILBERT, {}),
    "distilbert/three_labels": (
        transformers.DistilBertForSequenceClassification,
        DISTILBERT,
        {"num_labels": 3, "activation": "relu", "sinusoidal_pos_embds": True, "n_layers": 1},
    ),
}


def make(name, kind, settings, seed):
    """Writes one case."""
    config = kind.config_class(**settings)
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, p in model.named_parameters():
            norm = 1.0 if p.ndim == 1 and path.endswith("weight") else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + norm)
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, config.vocab_size, (4, 9))
    mask = (np.arange(9)[None, :] < np.array([9, 5, 1, 8])[:, None]).astype(np.int64)
    ids = np.where(mask > 0, ids, config.pad_token_id)
    ids[0, 4] = config.pad_token_id  # a padding token that the mask does not hide
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(config, "type_vocab_size", 1) > 1:
        inputs["token_type_ids"] = rng.integers(0, config.type_vocab_size, ids.shape)
    with torch.no_grad():
        tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
        logits = model(**tensors).logits
        hidden = model.base_model(**tensors).last_hidden_state
    model.save_pretrained(GOLDENS / name)
    np.savez_compressed(
        GOLDENS / name / "golden.npz", **inputs, logits=logits.numpy(), hidden=hidden.numpy()
    )


if __name__ == "__main__":
    for seed, (name, (kind, sizes, changes)) in enumerate(CASES.items()):
        make(name, kind, sizes | changes, seed)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for folder in ("roberta", "distilbert"):
        (GOLDENS / folder / "made_by.json").write_text(
            json.dumps({"script": "scripts/make_encoder_goldens.py", **versions}, indent=2) + "\n"
        )
