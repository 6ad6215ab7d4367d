"""A trained language model, rebuilt from an adapter directory alone."""

from pathlib import Path
from typing import Any, NamedTuple

import lora_jax as lora
from lora_jax import peft, serialize
from lora_jax.models import checkpoints
from lora_jax.models.families import CAUSAL_LM
from lora_jax.tasks import (
    adapter_bases,
    adapter_files,
    added_tokens,
    from_config,
    text_files,
)

PyTree = Any
TASK = "language-modelling"


class LanguageModel(NamedTuple):
    """A base model with an adapter.

    Attributes:
      loaded: the base.
      adapter: the adapter.
      config: settings of the adapter.
      notes: assumptions about what a file does not say.
      tokenizer: directory of the tokenizer that it was trained with; "" for that of the base.
    """

    loaded: checkpoints.Loaded
    adapter: PyTree
    config: lora.LoRAConfig
    notes: tuple[str, ...] = ()
    tokenizer: str = ""


def is_language(directory: str | Path, *, model: str | None = None) -> bool:
    """Returns whether an adapter, of either format, is for a causal language model.

    Raises:
      FileNotFoundError, ValueError: the adapter is missing or damaged.
    """
    if not adapter_bases.is_peft(directory):
        return serialize.read_metadata(directory).get("task") == TASK
    words = peft.read_words(directory)
    if words["task_type"]:
        return words["task_type"] == "CAUSAL_LM"
    if not model and not words["base_model_name_or_path"]:
        return False
    base = checkpoints.resolve(adapter_bases.find_base(directory, model))
    heads = base.config.get("architectures")
    return any(str(head).endswith(("LMHeadModel", "ForCausalLM")) for head in heads or [])


def load(directory: str | Path, *, model: str | None = None, wide: bool = True) -> LanguageModel:
    """Loads an adapter and the base that it was made for.

    Args:
      directory: directory of the adapter, in this library's format or in PEFT's.
      model: name or directory of the base, if it is no longer found under its old name.
      wide: whether the base is to be float32, so that an adapter can be merged into all of it at
        once; without it, it has the narrowest dtype that changes nothing.

    Raises:
      FileNotFoundError, ValueError: adapter or base is missing, damaged, or they do not belong
        together.
    """
    options: dict[str, Any] = {}
    tokenizer = ""
    if adapter_bases.is_peft(directory):
        name = adapter_bases.find_base(directory, model)
    else:
        about = serialize.read_metadata(directory).get("model", {})
        name, tokenizer = model or about.get("name"), about.get("tokenizer") or ""
        options |= from_config.dtypes(about)
        options["scan_layers"] = about.get("scan_layers", False)
    if not name:
        raise ValueError(
            f"The adapter in {directory} does not name its base; give it with --model."
        )
    options = options if wide else adapter_files.narrow(name, options)
    loaded = checkpoints.load(name, head=CAUSAL_LM, **options)
    loaded = added_tokens.fit(loaded, directory)
    loaded = adapter_files.widen(loaded) if wide else loaded
    files = text_files.find(directory, loaded.checkpoint)
    notes = (*adapter_bases.describe(directory, loaded), *files.notes)
    return LanguageModel(loaded, *adapter_files.load(directory, loaded), notes, tokenizer)
