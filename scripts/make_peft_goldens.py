"""Makes tests/goldens/peft: tiny adapter directories by PEFT, with the logits of each.

    python scripts/make_peft_goldens.py

Needs the extra `parity`. A folder for each torch model holds `base/` and one directory per case as
PEFT saves it (without the model card), and golden.npz with inputs and logits. All that training
would change is drawn wide, so that a tensor in the wrong place shows.
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
from safetensors.torch import save_file
from torch import nn

OUT = Path(__file__).parent.parent / "tests" / "goldens" / "peft"
QV = ["query", "value"]
SIZES = {
    "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 9, "num_labels": 3,
}  # fmt: skip
CASES = {
    "bert": {
        "qv": LoraConfig(
            target_modules=QV, task_type="SEQ_CLS", r=2, lora_alpha=3, lora_dropout=0.1
        ),
        "all_linear": LoraConfig(target_modules="all-linear", task_type="SEQ_CLS", r=2),
        "rslora_patterns": LoraConfig(
            target_modules=r".*layer\.\d\.attention\.self\.(query|key)", use_rslora=True, r=2,
            rank_pattern={"layer.1.attention.self.query": 3, "key": 1}, alpha_pattern={"key": 5},
        ),
        "bias_all": LoraConfig(target_modules=QV, bias="all", modules_to_save=["classifier"], r=2),
        "bias_lora_only": LoraConfig(target_modules=QV, bias="lora_only", task_type="SEQ_CLS", r=2),
        "layers": LoraConfig(
            target_modules=QV, layers_to_transform=[1], layers_pattern="layer", r=2
        ),
        "exclude": LoraConfig(
            target_modules=["dense", "key"], exclude_modules=["pooler.dense", "0.output.dense"], r=2
        ),
        "embeddings": LoraConfig(target_modules=["word_embeddings", "query"], r=2),
        "pooler": LoraConfig(
            target_modules=QV, modules_to_save=["pooler"], task_type="SEQ_CLS", r=2
        ),
        "large_rank": LoraConfig(target_modules=["classifier", "query"], r=5),
        "bfloat16": LoraConfig(target_modules=QV, task_type="SEQ_CLS", r=2),
        "float16": LoraConfig(target_modules=QV, task_type="SEQ_CLS", r=2),
    },
    "gpt2": {
        "c_attn": LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM", r=2),
        "all_linear": LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=2),
        "tied_embedding": LoraConfig(target_modules=["wte", "c_attn"], r=2),
        "tied_head": LoraConfig(target_modules=["lm_head", "c_attn"], r=2),
    },
    "conv": {
        "everything": LoraConfig(
            target_modules=["conv", "pointwise", "line", "table", "linear"], r=2
        ),
        "saved": LoraConfig(
            target_modules=["conv", "table"], modules_to_save=["line", "linear"], r=2
        ),
    },
}  # fmt: skip


class Conv(nn.Module):
    """Convolutions over one and two axes, a look-up and a linear layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.conv = nn.Conv2d(1, 4, (3, 2), stride=2)
        self.pointwise = nn.Conv2d(4, 3, 1)
        self.linear = nn.Linear(3, 2)

    def forward(self, ids):
        """Ids ``(batch, 8)`` to logits ``(batch, 2)``."""
        x = torch.tanh(self.line(self.table(ids).mT))
        x = self.pointwise(torch.tanh(self.conv(x[:, None])))
        return self.linear(x.mean((2, 3)))


def base(name):
    """The torch model and its input."""
    if name == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    elif name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=11, n_positions=9, n_embd=8, n_layer=2, n_head=2
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = Conv()
    generator = torch.Generator().manual_seed(len(name))
    draw_all(model.named_parameters(), generator)
    rng = np.random.default_rng(len(name))
    ids = rng.integers(0, 11 if name != "conv" else 7, (3, 8))
    inputs = {"ids": ids}
    if name == "bert":
        lengths = np.array([8, 5, 2])
        inputs["mask"] = (np.arange(8)[None, :] < lengths[:, None]).astype(np.int64)
    return model.eval(), inputs


def draw_all(parameters, generator):
    """Draws parameters wide, in place; norms stay near one."""
    with torch.no_grad():
        for path, p in parameters:
            one = 1.0 if ("LayerNorm.weight" in path or "ln_" in path) and "weight" in path else 0.0
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float32) * 0.3 + one)


def logits(model, inputs):
    """The model's logits as float32."""
    tensors = [torch.from_numpy(v) for v in inputs.values()]
    with torch.no_grad():
        names = ("input_ids", "attention_mask")
        out = (
            model(*tensors)
            if len(tensors) == 1
            else model(**dict(zip(names, tensors, strict=True)))
        )
    return getattr(out, "logits", out).numpy()


def make_case(model_name, case, settings, seed):
    """Writes one adapter; returns its logits."""
    model, inputs = base(model_name)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(case, torch.float32)
    wrapped = peft.get_peft_model(model.to(dtype), settings, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    draw_all([(n, p) for n, p in wrapped.named_parameters() if p.requires_grad], generator)
    directory = OUT / model_name / case
    wrapped.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    # Through the file, in float32, as a user would.
    fresh, _ = base(model_name)
    return logits(peft.PeftModel.from_pretrained(fresh, directory).eval(), inputs)


def main():
    """Writes all cases."""
    warnings.simplefilter("ignore")
    for model_name, cases in CASES.items():
        shutil.rmtree(OUT / model_name, ignore_errors=True)
        folder = OUT / model_name / "base"
        folder.mkdir(parents=True)
        model, inputs = base(model_name)
        if model_name == "conv":
            save_file(model.state_dict(), folder / "model.safetensors")
        else:
            model.save_pretrained(folder)
            (folder / "generation_config.json").unlink(missing_ok=True)
        results = {"base": logits(model, inputs)}
        for seed, (case, settings) in enumerate(cases.items()):
            results[case] = make_case(model_name, case, settings, seed)
        inputs = {f"input_{k}": v for k, v in inputs.items()}
        np.savez_compressed(OUT / model_name / "golden.npz", **inputs, **results)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    about = {"script": "scripts/make_peft_goldens.py", **versions}
    (OUT / "made_by.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
