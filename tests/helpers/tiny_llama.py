"""A tiny Llama checkpoint that can chat, and conversations, for tests of the programs."""

import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import models, pre_tokenizers

from configs import instruct_llama
from lora_jax import names, paths
from lora_jax.models import registry

QUESTIONS = dict(
    red="colour", green="colour", two="number", seven="number", dog="animal", horse="animal"
)
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
WORDS = [*SPECIAL, "user", "assistant", "system", "what", "is", "a", "?", *QUESTIONS]
WORDS += sorted(set(QUESTIONS.values()))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer():
    """Words, and special tokens."""
    made = tokenizers.Tokenizer(
        models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(SPECIAL)
    return made


def checkpoint(directory, template=CHATML, **changes):
    """A random two-layer model, by default a Llama, with its tokenizer and chat template."""
    about = {
        "model_type": "llama", "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 64, "eos_token_id": WORDS.index("</s>"),
        "architectures": ["LlamaForCausalLM"],
    } | changes  # fmt: skip
    family = registry.find(about)
    config = family.config.from_hf(about)
    ids = jax.ShapeDtypeStruct((1, 1), np.int32)
    init = family.models["causal-lm"](config).init
    shapes = paths.named_leaves(jax.eval_shape(init, jax.random.key(0), ids)["params"])
    rng, tensors = np.random.default_rng(0), {}
    for weight in names.weights(family.names(config, head="causal-lm"), shapes):
        center = 1.0 if weight.leaf.endswith("scale") else 0.0
        value = (center + 0.2 * rng.normal(size=weight.shape)).astype(np.float32)
        tensors[weight.hf] = np.ascontiguousarray(names.to_tensor(weight, value))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(about))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    tokenizer().save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def question(word):
    return {"role": "user", "content": f"what is {word}?"}


def answer(word):
    return {"role": "assistant", "content": f"a {QUESTIONS[word]}"}


def data(path, count=100):
    """Conversations of one and of two turns."""
    rng = np.random.default_rng(0)
    lines = []
    for k in range(count):
        asked = rng.choice(list(QUESTIONS), 1 + k % 2)
        messages = [m for word in asked for m in (question(word), answer(word))]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


def overrides(root):
    """Fields of a config that make a run of this model on these conversations, of a few seconds."""
    return {
        "model.name": root / "model", "model.dtype": "float32", "data.train": root / "data.jsonl",
        "data.holdout": 6, "data.max_length": 48, "batch_size": 4, "eval_batch_size": 2,
        "epochs": 8, "lora.rank": 8, "lora.alpha": 16.0, "optimizer.learning_rate": 0.01,
    }  # fmt: skip


def config(root, **changes):
    c = instruct_llama.get_config().copy_and_resolve_references()
    with c.unlocked():
        c.update_from_flattened_dict({k: str(v) if isinstance(v, Path) or k == "data.holdout" else v for k, v in
                                      (overrides(root) | changes).items()})  # fmt: skip
    return c
