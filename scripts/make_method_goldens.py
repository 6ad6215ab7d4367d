"""Makes tests/goldens/methods: tiny directories by PEFT, with what they compute.

Those of VeRA, of AdaLoRA, and of bare parameters (`target_parameters`).

    python scripts/make_method_goldens.py [CASE ...]

Needs the extra `parity`. `base/` holds a checkpoint for each torch model; a directory for each case
is as PEFT saves it (without the model card), with io.npz: inputs, logits, and by the names of the
file's tensors the gradients of the sum of `probe` times the logits.
"""

import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, VeraConfig
from safetensors.torch import load_file

OUT = Path(__file__).parent.parent / "tests" / "goldens" / "methods"
IDS = torch.tensor([[5, 17, 33, 2, 9, 60, 71, 8], [1, 98, 4, 44, 2, 9, 7, 3]])
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 37, "max_position_embeddings": 40, "initializer_range": 0.2,
}  # fmt: skip


def add_noise(model):
    """Biases and scales that are no zeros and ones, so that one in a wrong place shows."""
    generator = torch.Generator().manual_seed(100)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
            elif "norm" in name.lower() or "ln_" in name:
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def bert():
    sizes = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(num_labels=3, **sizes)
    return add_noise(transformers.BertForSequenceClassification(config))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_inner=37, n_positions=40,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return add_noise(transformers.GPT2LMHeadModel(config))


def llama():
    config = transformers.LlamaConfig(
        num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=None, **SIZES
    )
    return add_noise(transformers.LlamaForCausalLM(config))


def mixtral():
    config = transformers.MixtralConfig(
        num_key_value_heads=2, num_local_experts=3, **SIZES | {"intermediate_size": 40}
    )
    return add_noise(transformers.MixtralForCausalLM(config))


BUDGET = {"init_r": 4, "lora_alpha": 8, "total_step": 12, "tinit": 2, "tfinal": 3}
CASES = {
    "vera_bert": (
        bert,
        VeraConfig(r=5, target_modules=["query", "intermediate.dense"], task_type="SEQ_CLS"),
    ),
    "vera_gpt2": (
        gpt2,
        VeraConfig(r=5, target_modules=["c_attn", "mlp.c_proj"], task_type="CAUSAL_LM"),
    ),
    "vera_llama_no_projection": (
        llama,
        VeraConfig(
            r=5, projection_prng_key=42, save_projection=False, task_type="CAUSAL_LM",
            target_modules=["q_proj", "down_proj"],
        ),
    ),
    "adalora_bert": (
        bert,
        AdaLoraConfig(
            target_r=2, target_modules=["query", "value"], task_type="SEQ_CLS", **BUDGET
        ),
    ),
    "adalora_gpt2": (
        gpt2,
        AdaLoraConfig(target_r=1, target_modules=["c_attn"], task_type="CAUSAL_LM", **BUDGET),
    ),
    "parameters_llama": (
        llama,
        LoraConfig(
            r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=[],
            target_parameters=["q_proj.weight", "embed_tokens.weight"],
        ),
    ),
    "experts_mixtral": (
        mixtral,
        LoraConfig(
            r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={"experts.down_proj": 3},
        ),
    ),
    "router_mixtral": (  # one parameter of the experts: no name of a tensor says which
        mixtral,
        LoraConfig(
            r=4, lora_alpha=8, use_rslora=True, task_type="CAUSAL_LM", target_modules=[],
            target_parameters=["experts.down_proj", "mlp.gate.weight"],
        ),
    ),
}  # fmt: skip


def prune(model):
    """Trains for the twelve steps of the budget, so that triplets are gone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rule = torch.optim.Adam(trained, lr=0.05)
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(model(IDS).logits.shape, generator=generator)
    for step in range(BUDGET["total_step"]):
        rule.zero_grad()
        ((model(IDS).logits - target) ** 2).mean().backward()
        rule.step()
        model.base_model.update_and_allocate(step)
    rule.zero_grad()


def randomize(model):
    """Moves all that is trained, but for triplets that are gone."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(p * (1 + 0.2 * noise) if "lora_E" in name else p + 0.15 * noise)


def make_case(name):
    make_base, config = CASES[name]
    torch.manual_seed(0)
    base = make_base()
    folder = OUT / "base" / make_base.__name__
    base.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    torch.manual_seed(11)
    model = peft.get_peft_model(base, config).eval()
    if isinstance(config, AdaLoraConfig):
        prune(model)
    randomize(model)
    logits = model(IDS).logits
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits * probe).sum().backward()
    grads = {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}
    directory = OUT / name
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    arrays = {"input_ids": IDS.numpy(), "logits": logits.detach().numpy(), "probe": probe.numpy()}
    names = load_file(directory / "adapter_model.safetensors")
    kept = getattr(model.peft_config["default"], "rank_pattern", None) or {}
    for key, grad in grads.items():
        plain = key.replace(".modules_to_save", "").replace(".default", "")
        module, _, field = plain.removeprefix("base_model.model.").rpartition(".")
        if f"{module}.lora_E" in kept:
            axis = 1 if field == "lora_B" else 0
            grad = np.compress(kept[f"{module}.lora_E"], grad, axis)
        assert names[plain].shape == grad.shape
        arrays[f"grad/{plain}"] = grad
    np.savez(directory / "io.npz", **arrays)


def main():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CASES:
        make_case(name)


if __name__ == "__main__":
    main()
