"""Makes tests/goldens/tokens and lora_bias: tiny models, PEFT's adapters, and what PEFT computes.

    python scripts/make_token_goldens.py [FOLDER]

Needs the extra `parity`. A folder for each case holds `base/`, the adapter as PEFT saves it
(without the model card) after all that is trained was drawn at random, and io.npz: the input,
`logits_base` of the base alone, `logits_init` of the fresh adapter, `logits` with the adapter, a
`probe` with the gradient of `sum(probe * logits)` as `grad/<tensor of the file>`, and
`merged/<weight of the base>` for each weight that merging changed.
"""

import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file

OUT = Path(__file__).parent.parent / "tests" / "goldens"
IDS = torch.tensor([[5, 17, 33, 2, 9, 60, 71, 8], [1, 98, 4, 44, 2, 9, 7, 3]])
SIZES = {"vocab_size": 99, "initializer_range": 0.2}
LAYERS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37,
    "max_position_embeddings": 40,
}  # fmt: skip


def bert():
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**SIZES, **LAYERS, **dropout, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 37, "n_positions": 40}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**SIZES, **sizes, **dropout, **ends)
    return transformers.GPT2LMHeadModel(config)


def llama(tied=False):
    options = {"num_key_value_heads": 2, "tie_word_embeddings": tied, "pad_token_id": None}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **LAYERS, **options))


def adapt(*targets, task="CAUSAL_LM", **options):
    return lambda: LoraConfig(
        r=4, lora_alpha=8, target_modules=[*targets], task_type=task, **options
    )


CASES = {
    "tokens/llama": (llama, adapt("q_proj", trainable_token_indices=[2, 17, 60])),
    "tokens/llama_tied": (
        lambda: llama(tied=True),
        adapt("q_proj", trainable_token_indices=[60, 2, 17]),
    ),
    "tokens/gpt2": (gpt2, adapt("c_attn", trainable_token_indices={"wte": [2, 17]})),
    "lora_bias/bert": (bert, adapt("query", "value", task="SEQ_CLS", lora_bias=True)),
    "lora_bias/gpt2": (gpt2, adapt("c_attn", lora_bias=True)),
}


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


def randomize(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.15 * torch.randn(p.shape, generator=generator))


def find_key(name, tensors):
    """The name in the file of a parameter of PEFT's model."""
    plain = name.replace(".modules_to_save.default", "").replace(".default", "")
    return plain if plain in tensors else plain.removesuffix(".weight")


def make(name, out):
    make_model, make_config = CASES[name]
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = make_base(make_model)
    base.save_pretrained(folder / "base")
    (folder / "base" / "generation_config.json").unlink(missing_ok=True)
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    io = {"input_ids": IDS.numpy(), "logits_base": base(IDS).logits.detach().numpy()}
    torch.manual_seed(11)
    model = peft.get_peft_model(base, make_config()).eval()
    io["logits_init"] = model(IDS).logits.detach().numpy()
    randomize(model)
    logits = model(IDS).logits
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits * probe).sum().backward()
    io |= {"logits": logits.detach().numpy(), "probe": probe.numpy()}
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    io |= {f"grad/{find_key(n, tensors)}": p.grad.numpy() for n, p in trained.items()}
    merged = model.merge_and_unload().state_dict()
    io |= {f"merged/{n}": x.numpy() for n, x in merged.items() if not torch.equal(x, weights[n])}
    np.savez_compressed(folder / "io.npz", **io)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for case in CASES:
        make(case, Path(sys.argv[1]) if sys.argv[1:] else OUT)
