"""Makes tests/goldens/gpt2: tiny GPT-2 models by transformers, with their logits and their texts.

    python scripts/make_gpt2_goldens.py

Needs the extra `parity`. Each case is a directory as transformers writes it, plus golden.npz with
inputs and outputs. The weights are drawn wide (transformers' own initial values give logits so near
zero that a wrong model would pass).
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

TINY = {"vocab_size": 30, "n_positions": 24, "n_embd": 12, "n_layer": 2, "n_head": 3}
ODD = {
    "n_layer": 3,
    "n_inner": 20,
    "activation_function": "relu",
    "layer_norm_epsilon": 1e-3,
    "scale_attn_by_inverse_layer_idx": True,
    "scale_attn_weights": False,
    "tie_word_embeddings": False,
}
CASES = {"plain": {}, "odd": ODD}
ROOM = 10
PAD = 1
STOP = [3, 28]
# Named as the arguments of lora_jax.models.decoding.Decoding.
TEXTS = {
    "greedy": {},
    "stop": {"stop": STOP},
    "beams_3": {"beams": 3, "stop": STOP, "length_penalty": 0.8},
    "beams_4_early": {"beams": 4, "stop": STOP[:1], "early_stopping": True},
    "beams_2_never": {"beams": 2, "stop": STOP, "early_stopping": "never", "length_penalty": 2.0},
}
OUT = Path(__file__).parent.parent / "tests" / "goldens" / "gpt2"


def inputs(config, seed):
    """A batch padded on the left."""
    rng = np.random.default_rng(seed)
    lengths = np.array([9, 5, 1, 8])
    mask = (np.arange(9)[None, :] >= 9 - lengths[:, None]).astype(np.int64)
    return {"input_ids": rng.integers(0, config.vocab_size, mask.shape), "attention_mask": mask}


def text(model, prompt, settings):
    """New tokens, padded to their full number."""
    made = model.generate(
        **prompt,
        max_new_tokens=ROOM,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=settings.get("stop"),
        num_beams=settings.get("beams", 1),
        length_penalty=settings.get("length_penalty", 1.0),
        early_stopping=settings.get("early_stopping", False),
    )[:, prompt["input_ids"].shape[1] :].numpy()
    return np.pad(made, ((0, 0), (0, ROOM - made.shape[1])), constant_values=PAD)


def make(name, changes, seed):
    """Writes one case."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(TINY | changes))).eval()
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, p in model.named_parameters():
            one = 1.0 if "ln_" in path and path.endswith("weight") else 0.0
            p.copy_(0.4 * torch.randn(p.shape, generator=generator) + one)
    model.tie_weights()
    values = inputs(model.config, seed)
    prompt = {k: torch.from_numpy(v) for k, v in values.items()}
    positions = (prompt["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        values["logits"] = model(**prompt, position_ids=positions).logits.numpy()
        for kind, settings in TEXTS.items():
            values[kind] = text(model, prompt, settings)
    model.save_pretrained(OUT / name)
    (OUT / name / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(OUT / name / "golden.npz", **values)


if __name__ == "__main__":
    for seed, (name, changes) in enumerate(CASES.items()):
        make(name, changes, seed)
    (OUT / "texts.json").write_text(json.dumps(TEXTS, indent=2) + "\n")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (OUT / "made_by.json").write_text(
        json.dumps({"script": "scripts/make_gpt2_goldens.py", **versions}, indent=2) + "\n"
    )
