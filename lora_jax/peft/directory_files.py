"""The files that may stand in an adapter's directory: read, left out on purpose, or refused.

``docs/formats.md`` lists the table of this file for people, and a test holds the two together.
"""

import fnmatch
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

READ, IGNORED, REFUSED = "read", "ignored", "refused"


class Treatment(NamedTuple):
    """What becomes of the files of some names.

    Attributes:
      patterns: shell patterns of the names.
      treatment: ``READ``, ``IGNORED`` or ``REFUSED``.
      reason: what is read from them, or why they are not read.
    """

    patterns: tuple[str, ...]
    treatment: str
    reason: str


_RUN = "of the run that trained the adapter"
# The first that fits a name counts.
FILES = (
    Treatment(("adapter_config.json",), READ, "words for the adapter"),
    Treatment(("adapter_model.safetensors",), READ, "tensors"),
    Treatment(("adapter.json", "adapter-*.safetensors"), READ, "this library's format"),
    Treatment(("lora_jax.json",), READ, "labels and lengths, which `export --peft` writes"),
    Treatment(
        (
            "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
            "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model",
            "tokenizer.model", "sentencepiece.bpe.model",
        ),
        READ, "the adapter's own tokenizer, by the programs",
    ),
    Treatment(("chat_template.jinja",), READ, "its own chat template"),
    Treatment(("generation_config.json",), READ, "tokens that end a reply"),
    Treatment(("config.json",), READ, "names of the labels, if it has `id2label`"),
    Treatment(
        ("adapter_model.bin",), REFUSED,
        "a pickle, which can run code; ignored beside adapter_model.safetensors",
    ),
    Treatment(
        ("adapter_model-*.safetensors", "adapter_model.safetensors.index.json"), REFUSED,
        "shards of an adapter, which are not joined here",
    ),
    Treatment(
        ("new_embeddings.safetensors", "new_embeddings.bin"), REFUSED,
        "rows for new tokens, which would be left out",
    ),
    Treatment(
        ("non_lora_trainables.bin", "trainable_params.bin"), REFUSED,
        "weights that were trained beside the factors, in a pickle",
    ),
    Treatment(
        ("README.md", "LICENSE*", "NOTICE*", ".git*", ".cache", ".ipynb_checkpoints", ".DS_Store"),
        IGNORED, "for people, and of tools",
    ),
    Treatment(
        (
            "training_args.*", "trainer_state.json", "optimizer.*", "optimizer_*", "scheduler.pt",
            "scaler.pt", "rng_state*.pth", "latest", "global_step*", "checkpoint-*",
            "zero_to_fp32.py", "pytorch_model_fsdp*", "trainer_log.jsonl", "*_results.json",
            "training_*.png", "runs", "logs", "events.out.tfevents*", "wandb", "debug.log",
            "*.yaml", "*.yml", "completed", "eval_*",
        ),
        IGNORED, _RUN,
    ),
    Treatment(
        (
            "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
            "image_processor_config.json", "chat_template.json",
        ),
        IGNORED, "of images and sound; the models here read text",
    ),
    Treatment(
        ("additional_chat_templates", "chat_templates"), IGNORED,
        "templates for other purposes than a conversation",
    ),
    Treatment(
        ("value_head.safetensors", "value_head.bin", "v_head.*", "reward_head.*"), IGNORED,
        "the value head of reinforcement learning, which no reply needs",
    ),
    Treatment(
        ("modules.json", "1_Pooling", "2_Normalize", "config_sentence_transformers.json",
         "sentence_bert_config.json"),
        IGNORED, "how sentence-transformers pools; a classifier has its own pooling",
    ),
    Treatment(
        ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
         "pytorch_model*.bin", "pytorch_model.bin.index.json"),
        IGNORED, "weights of a whole model; the base is the one that the adapter names",
    ),
)  # fmt: skip


def find_treatment(name: str) -> Treatment | None:
    """Finds what becomes of a file of this name; None if the table does not know it.

    >>> find_treatment("optimizer.pt").treatment
    'ignored'
    """
    fits = lambda treatment: any(fnmatch.fnmatchcase(name, p) for p in treatment.patterns)
    return next((treatment for treatment in FILES if fits(treatment)), None)


def check(directory: str | Path) -> None:
    """Raises ValueError if a file beside the weights changes what the adapter computes."""
    names = _list_names(directory)
    found = {n: t for n in names if (t := find_treatment(n)) and t.treatment == REFUSED}
    if "adapter_model.safetensors" in names or "adapter_model.bin" in found:
        found.pop("adapter_model.bin", None)  # the reader of the weights tells of it
    if found:
        told = "; ".join(f"{name} ({treatment.reason})" for name, treatment in found.items())
        raise ValueError(f"The adapter in {directory} can't be used: beside it there is {told}.")


def find_unknown(directory: str | Path) -> list[str]:
    """Lists the files of a directory that no reader here knows, and folders of other adapters."""
    unknown = [name for name in _list_names(directory) if find_treatment(name) is None]
    inside = lambda name: (Path(directory) / name / "adapter_config.json").is_file()
    return [f"{name}/ (another adapter)" if inside(name) else name for name in unknown]


def _list_names(directory: str | Path) -> Iterable[str]:
    path = Path(directory)
    return sorted(p.name for p in path.iterdir()) if path.is_dir() else []
