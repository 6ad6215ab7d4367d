"""Makes tests/goldens/t5: tiny T5 models by transformers, with their logits and what they generate.

    python scripts/make_t5_goldens.py

Needs the extra `parity`. Each case is a directory as transformers writes it, plus golden.npz with
inputs and outputs; buckets.npz holds the numbers of the buckets of relative positions. The weights
are drawn wide (transformers' own initial values give logits so near zero that a wrong model would
pass).
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

TINY = {
    "vocab_size": 30,
    "d_model": 12,
    "d_kv": 5,
    "d_ff": 14,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 7,
    "decoder_start_token_id": 0,
}
V1_1 = {
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "layer_norm_epsilon": 1e-3,
}
CASES = {"v1_0": (1, {}), "v1_1": (0, V1_1)}
# Standard deviations; with wider ones float32 itself is off by more than 1e-5.
WIDE = {"relative_attention_bias": 1.0, "norm": 0.3, "shared": 0.5, ".q.": 0.2}
BUCKETS = [(32, 128), (8, 7), (6, 20), (12, 27), (10, 9), (64, 500)]
OUT = Path(__file__).parent.parent / "tests" / "goldens" / "t5"


def untie(model):
    """Gives the head a kernel of its own, as T5 1.1 has: transformers 5 makes them tied."""
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))


def draw(model, generator):
    with torch.no_grad():
        for name, p in model.named_parameters():
            wide = next((x for word, x in WIDE.items() if word in name), 0.3)
            one = 1.0 if name.endswith("layer_norm.weight") else 0.0
            p.copy_(wide * torch.randn(p.shape, generator=generator) + one)


def inputs(config, seed):
    """Input and output tokens; inputs are padded on either side, and long for the buckets."""
    rng = np.random.default_rng(seed)
    lengths = np.array([12, 5, 1, 9])
    mask = (np.arange(12)[None, :] < lengths[:, None]).astype(np.int64)
    mask[1] = mask[1, ::-1]
    ids = rng.integers(2, config.vocab_size, (4, 12))
    decoder_ids = rng.integers(2, config.vocab_size, (4, 10))
    decoder_ids[:, 0] = config.decoder_start_token_id
    decoder_mask = np.ones((4, 10), np.int64)
    decoder_mask[2, :3] = 0
    return {
        "input_ids": np.where(mask, ids, config.pad_token_id),
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }


def make(name, changes, seed):
    """Writes one case."""
    config = transformers.T5Config(**(TINY | changes))
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not config.scale_decoder_outputs:
        untie(model)
    draw(model, torch.Generator().manual_seed(seed))
    values = inputs(config, seed)
    tensors = {k: torch.from_numpy(v) for k, v in values.items()}
    source = {k: tensors[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        values["logits"] = model(**tensors).logits.numpy()
        for beams in (1, 3):
            tokens = model.generate(**source, max_new_tokens=9, num_beams=beams, do_sample=False)
            values[f"beams_{beams}"] = tokens.numpy()
    model.save_pretrained(OUT / name)
    (OUT / name / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(OUT / name / "golden.npz", **values)


def buckets():
    """Numbers of buckets for distances from -600 to 600."""
    relative = torch.arange(-600, 601)
    bucket = T5Attention._relative_position_bucket
    values = {
        f"{n}_{furthest}_{both:d}": bucket(relative, both, n, furthest).numpy().astype(np.int8)
        for n, furthest in BUCKETS
        for both in (False, True)
    }
    np.savez_compressed(OUT / "buckets.npz", **values)


if __name__ == "__main__":
    for name, (seed, changes) in CASES.items():
        make(name, changes, seed)
    buckets()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (OUT / "made_by.json").write_text(
        json.dumps({"script": "scripts/make_t5_goldens.py", **versions}, indent=2) + "\n"
    )
