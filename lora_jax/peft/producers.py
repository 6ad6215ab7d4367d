"""Recognizes adapters that other programs than PEFT write, so that they are refused by name.

None of these formats is read here. Each is told by the names of its files, by the keys of its
``adapter_config.json``, or by the names of its tensors.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Producer(NamedTuple):
    """A program that writes adapters in a format of its own.

    Attributes:
      name: the program, and what its adapters are for where they are for something else.
      advice: what to do with such an adapter.
      files: shell patterns of the files by which its directories are known.
      keys: keys of ``adapter_config.json`` by which it is known; one of them is enough.
      tensors: regular expression that finds the name of one of its tensors; "" for none.
    """

    name: str
    advice: str
    files: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    tensors: str = ""


_MERGE = "merge it into its base there, and use the merged model"
# The first that fits counts, so that a narrow pattern stands before a wide one.
PRODUCERS = (
    Producer(
        name="Kohya's sd-scripts (an adapter of an image model)",
        advice="image models are not built here",
        tensors=r"^lora_(unet|te\d?|transformer|prior_te)_",
    ),
    Producer(
        name="diffusers (an adapter of an image model)",
        advice="image models are not built here",
        files=("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
        tensors=r"^((unet|text_encoder(_\d)?|diffusion_model)\.|transformer\.(single_)?transformer_bl)",
    ),
    Producer(
        name="LyCORIS (LoHa, LoKr and others)",
        advice="these methods are not built here",
        tensors=r"(^lycoris_|\.(hada_w[12](_[ab])?|hada_t[12]|lokr_(w[12](_[ab])?|t2))$)",
    ),
    Producer(
        name="llama.cpp (a LoRA in GGUF)",
        advice="export the adapter in PEFT's format, which convert_lora_to_gguf.py was given",
        files=("*.gguf",),
        tensors=r"^blk\.\d+\..*\.lora_[ab]$",
    ),
    Producer(
        name="torchtune",
        advice="save it with save_adapter_weights_only and PEFT's format (adapter_model."
        "safetensors beside adapter_config.json), as its Hugging Face checkpointer does",
        files=("adapter_*.pt",),
        tensors=r"\.lora_[ab]\.weight$",
    ),
    Producer(
        name="MLX (mlx-lm)",
        advice=f"{_MERGE} (mlx_lm.fuse --dequantize)",
        files=("adapters.safetensors", "adapters.npz"),
        keys=("lora_parameters", "fine_tune_type", "lora_layers"),
        tensors=r"\.lora_[ab]$",
    ),
    Producer(
        name="NeMo or Megatron",
        advice="export it in PEFT's format there (nemo llm export, or its script for PEFT)",
        files=("*.nemo", "*.distcp", "mp_rank_*", "iter_[0-9]*", "model_weights.ckpt"),
        tensors=r"\.(adapter|adapter_layer|lora_\w*adapter)\..*(linear_in|linear_out|lora)",
    ),
    Producer(
        name="AdapterHub's adapters",
        advice="save it with its save_adapter and convert it there, or train it here",
        files=("pytorch_adapter.bin", "pytorch_model_head.bin"),
        keys=("config_id", "hidden_size"),
        tensors=r"\.loras\.",
    ),
    Producer(
        name="LitGPT",
        advice=f"{_MERGE} (litgpt merge_lora, then convert_from_litgpt)",
        files=("lit_model.pth.lora", "lit_model.pth"),
        tensors=r"^transformer\.h\.\d+\.attn\.(attn|qkv|proj)\.lora_[AB]$",
    ),
    Producer(
        name="mistral-finetune",
        advice=_MERGE,
        files=("lora.safetensors",),
        tensors=r"^layers\.\d+\.(attention|feed_forward)\.\w+\.lora_[AB]\.weight$",
    ),
    Producer(
        name="loralib",
        advice="rename its tensors as PEFT does (docs/formats.md)",
        tensors=r"^(?!base_model\.).*\.lora_[AB]$",
    ),
    Producer(
        name="KerasHub", advice=_MERGE, files=("*.lora.h5", "*.weights.h5"), tensors=r"lora_kernel_"
    ),
)


def describe_files(directory: str | Path) -> str:
    """Says which other program's adapter a directory, or a file, is likely to be; "" if unknown.

    >>> describe_files("adapters.safetensors")
    ''
    """
    path = Path(directory)
    names = [path.name] if path.is_file() else []
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir())
    for producer in PRODUCERS:
        hit = next((n for n in names for p in producer.files if fnmatch.fnmatchcase(n, p)), None)
        if hit is not None:
            return f"{hit} is of {producer.name}, whose format is not read here: {producer.advice}."
    return ""


def describe_keys(words: Mapping[str, Any]) -> str:
    """Says which other program wrote an ``adapter_config.json``; "" if PEFT did, or it is unknown.

    >>> describe_keys({"fine_tune_type": "lora", "num_layers": 16})[:42]
    'it is of MLX (mlx-lm), whose format is not'
    """
    if "peft_type" in words:
        return ""
    for producer in PRODUCERS:
        if any(key in words for key in producer.keys):
            return f"it is of {producer.name}, whose format is not read here: {producer.advice}"
    return ""


def describe_tensors(names: Iterable[str]) -> str:
    """Says which other program's names these are; "" if none's.

    >>> describe_tensors(["lora_unet_down_blocks_0.lora_down.weight"])[:44]
    "its tensors have the names of Kohya's sd-scr"
    """
    names = list(names)
    for producer in PRODUCERS:
        hit = next((n for n in names if producer.tensors and re.search(producer.tensors, n)), None)
        if hit is not None:
            return (
                f"its tensors have the names of {producer.name}, as {hit}, and that format is not "
                f"read here: {producer.advice}"
            )
    return ""
