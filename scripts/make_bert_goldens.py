"""Makes tests/goldens/bert: tiny BERT classifiers by transformers, with their logits.

    python scripts/make_bert_goldens.py

Needs the extra `parity`. Each case is a directory as transformers writes it, plus golden.npz with
inputs and outputs. The weights are drawn wide (transformers' own initial values give logits so near
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
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
CASES = {
    "gelu": {"num_labels": 2},
    "tanh_gelu_eps": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "num_labels": 2},
    "relu_three_labels": {
        "hidden_act": "relu",
        "num_labels": 3,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "three_layers_one_type": {"num_hidden_layers": 3, "type_vocab_size": 1, "num_labels": 2},
}
OUT = Path(__file__).parent.parent / "tests" / "goldens" / "bert"


def make(name, changes, seed):
    """Writes one case."""
    config = transformers.BertConfig(**(TINY | changes))
    model = transformers.BertForSequenceClassification(config).eval()
    generator = torch.Generator().manual_seed(seed)
    draw = lambda p: torch.randn(p.shape, generator=generator) * 0.3
    with torch.no_grad():
        for path, p in model.named_parameters():
            p.copy_(draw(p) + (1.0 if path.endswith("LayerNorm.weight") else 0.0))
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab_size, (4, 9))
    lengths = np.array([9, 5, 1, 8])
    mask = (np.arange(9)[None, :] < lengths[:, None]).astype(np.int64)
    types = rng.integers(0, config.type_vocab_size, ids.shape)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with torch.no_grad():
        tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
        logits = model(**tensors).logits
        encoded = model.bert(**tensors)
    model.save_pretrained(OUT / name)
    (OUT / name / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(
        OUT / name / "golden.npz",
        **inputs,
        logits=logits.numpy(),
        hidden=encoded.last_hidden_state.numpy(),
        pooled=encoded.pooler_output.numpy(),
    )


if __name__ == "__main__":
    for seed, (name, changes) in enumerate(CASES.items()):
        make(name, changes, seed)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (OUT / "made_by.json").write_text(
        json.dumps({"script": "scripts/make_bert_goldens.py", **versions}, indent=2) + "\n"
    )
