"""Makes tests/goldens/initial_values: adapters by PEFT whose factors start from the base.

    python scripts/make_initial_value_goldens.py

Needs the extra `parity`. A folder for each model holds `base/`, the checkpoint that no adapter has
touched, and one directory per case as PEFT saves it (without the model card), after every trained
tensor was moved, with io.npz beside it: `input_ids`; `logits` of the base with the adapter;
`probe`, and `grad/NAME`, the derivative of `sum(probe * logits)` by each tensor of the file;
`merged/NAME`, what `merge_and_unload` makes of each weight of the base that changes. `converted/`
is the same adapter as PEFT writes it for any program, as plain LoRA of twice the rank. Cases whose
name begins with "dora_" have magnitudes, too.
"""

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

OUT = Path(__file__).parent.parent / "tests" / "goldens" / "initial_values"
IDS = torch.tensor([[5, 17, 33, 2, 9, 60, 71, 8], [1, 98, 4, 44, 2, 9, 7, 3]])
PREFIX = "base_model.model."
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {"intermediate_size": 37, "max_position_embeddings": 40, "initializer_range": 0.2}
MODELS = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(
            **SIZES, **COMMON, num_labels=3, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_inner=37, n_positions=40,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
            bos_token_id=0, eos_token_id=0,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, **COMMON, num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=None
        )
    ),
}  # fmt: skip
QV = {"target_modules": ["q_proj", "v_proj"]}
CASES = {
    ("bert", "pissa"): {"target_modules": ["query", "value"]},
    ("bert", "olora"): {"target_modules": ["query", "value"]},
    ("gpt2", "pissa"): {"target_modules": ["c_attn", "mlp.c_proj"]},
    ("llama", "pissa"): {**QV, "use_rslora": True},
    ("llama", "olora"): {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    ("llama", "orthogonal"): QV,
    ("llama", "dora_pissa"): {**QV, "use_dora": True},
}
CONVERTED = (("gpt2", "pissa"), ("llama", "pissa"), ("llama", "olora"))


def make_base(model_name):
    """The torch model, with biases and norms away from zero and one."""
    torch.manual_seed(0)
    model = MODELS[model_name]()
    generator = torch.Generator().manual_seed(100)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
            elif "norm" in name.lower() or "ln_" in name:
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def make_adapter(model_name, init):
    """The model with a fresh adapter."""
    task_type = "SEQ_CLS" if model_name == "bert" else "CAUSAL_LM"
    words = CASES[model_name, init] | {"r": 4, "lora_alpha": 8, "task_type": task_type}
    base = make_base(model_name)
    torch.manual_seed(11)
    word = init.removeprefix("dora_")
    return get_peft_model(base, LoraConfig(init_lora_weights=word, **words)).eval()


def move_all(model):
    """Moves all that training would change."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.15 * torch.randn(p.shape, generator=generator))


def save(model, directory, **settings):
    """Saves an adapter without its model card."""
    model.save_pretrained(directory, **settings)
    (directory / "README.md").unlink(missing_ok=True)


def find_gradients(model, names):
    """The gradients of the trained tensors by their names in the file."""
    inner = {n: p for n, p in model.named_parameters() if p.grad is not None}
    shorten = lambda n: n.replace(".modules_to_save", "").replace(".default", "")
    in_file = lambda n: re.sub("(magnitude_vector).weight", r"\1", shorten(n))
    return {f"grad/{in_file(n)}": p.grad.numpy() for n, p in inner.items() if in_file(n) in names}


def make_case(model_name, init):
    """Writes one adapter with what PEFT computes with it."""
    directory = OUT / model_name / init
    model = make_adapter(model_name, init)
    initial = directory / "converted" / "initial"
    if (model_name, init) in CONVERTED:
        save(model, initial)
    move_all(model)
    logits = model(IDS).logits
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits * probe).sum().backward()
    save(model, directory)
    names = load_file(directory / "adapter_model.safetensors")
    content = find_gradients(model, names)
    if (model_name, init) in CONVERTED:  # last, since it changes the config in place
        save(model, initial.parent, path_initial_model_for_weight_conversion=str(initial))
        shutil.rmtree(initial)
    before = make_base(model_name).state_dict()
    merged = PeftModel.from_pretrained(make_base(model_name), directory).merge_and_unload()
    for name, value in merged.state_dict().items():
        if not torch.equal(value, before[name]):
            content[f"merged/{name}"] = value.numpy()
    content |= {"input_ids": IDS.numpy(), "logits": logits.detach().numpy(), "probe": probe.numpy()}
    np.savez_compressed(directory / "io.npz", **content)


def main():
    """Writes all cases."""
    warnings.simplefilter("ignore")
    shutil.rmtree(OUT, ignore_errors=True)
    for model_name in MODELS:
        folder = OUT / model_name / "base"
        make_base(model_name).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
    for model_name, init in CASES:
        make_case(model_name, init)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    about = {"script": "scripts/make_initial_value_goldens.py", **versions}
    (OUT / "made_by.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
