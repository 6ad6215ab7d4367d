"""Makes tests/goldens/dora: tiny models, adapters with DoRA by PEFT, and what PEFT computes.

    python scripts/make_dora_goldens.py

Needs the extra `parity`. A folder for each model holds `base/`, the adapter as PEFT saves it
(without the model card) after all that is trained was drawn at random, and io.npz: the input,
`logits_base` of the base alone, `logits` with the adapter, a `probe` with the gradient of
`sum(probe * logits)` as `grad/<tensor of the file>`, and `merged/<weight of the base>` for each
weight that merging changed.
"""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

OUT = Path(__file__).parent.parent / "tests" / "goldens" / "dora"
IDS = torch.tensor([[5, 17, 33, 2, 9, 60, 71, 8], [1, 98, 4, 44, 2, 9, 7, 3]])
IMAGES = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(7))
SIZES = {"vocab_size": 99, "initializer_range": 0.2}
ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37,
    "max_position_embeddings": 40,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CAUSAL = "CAUSAL_LM"


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.point(torch.relu(self.conv(x))))
        return self.head(x.mean((2, 3)))


def bert():
    config = transformers.BertConfig(**SIZES, **ENCODER, **NO_DROPOUT, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 37, "n_positions": 40}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES, **sizes, **dropout, **ends)
    )


def llama():
    options = {"num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": None}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **ENCODER, **options))


CASES = {
    "bert": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "task_type": CAUSAL}),
    "llama": (
        llama,
        {
            "use_rslora": True, "rank_pattern": {"layers.1.self_attn.v_proj": 6},
            "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": CAUSAL,
        },
    ),
    "embedding_llama": (llama, {"target_modules": ["embed_tokens", "q_proj"], "task_type": CAUSAL}),
    "convnet": (ConvNet, {"target_modules": ["conv", "point"], "modules_to_save": ["head"]}),
}  # fmt: skip


def make_base(make):
    torch.manual_seed(0)
    model, generator = make(), torch.Generator().manual_seed(100)
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_norm = "norm" in name.lower() or "ln_" in name
            if name.endswith("bias") or is_norm:
                noise = 0.1 * torch.randn(p.shape, generator=generator)
                p.copy_(noise if name.endswith("bias") else 1 + noise)
    return model.eval()


def compute_logits(model, x):
    result = model(x)
    return result.logits if hasattr(result, "logits") else result


def randomize(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator)
                p.mul_(1 + 0.2 * noise) if "magnitude" in name else p.add_(0.15 * noise)


def save_base(model, folder):
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def find_key(name, tensors):
    """The name in the file of a parameter of PEFT's model."""
    plain = name.replace(".modules_to_save.default", "").replace(".default", "")
    return plain if plain in tensors else plain.removesuffix(".weight")


def make(name):
    make_model, settings = CASES[name]
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = make_base(make_model)
    save_base(base, folder / "base")
    is_text = name != "convnet"
    x, weights = (IDS if is_text else IMAGES), {k: v.clone() for k, v in base.state_dict().items()}
    io = {"input_ids" if is_text else "pixel_values": x.numpy()}
    io["logits_base"] = compute_logits(base, x).detach().numpy()
    torch.manual_seed(11)
    model = peft.get_peft_model(base, LoraConfig(use_dora=True, r=4, lora_alpha=8, **settings))
    randomize(model.eval())
    logits = compute_logits(model, x)
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits * probe).sum().backward()
    io |= {"logits": logits.detach().numpy(), "probe": probe.numpy()}
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    io |= {f"grad/{find_key(n, tensors)}": grad for n, grad in grads.items()}
    for key, value in model.merge_and_unload().state_dict().items():
        if not torch.equal(value, weights[key]):
            io[f"merged/{key}"] = value.numpy()
    np.savez_compressed(folder / "io.npz", **io)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for case in CASES:
        make(case)
    versions = {x.__name__: x.__version__ for x in (torch, transformers, peft)}
    about = {"script": "scripts/make_dora_goldens.py"} | versions
    (OUT / "made_by.json").write_text(json.dumps(about, indent=2) + "\n")
