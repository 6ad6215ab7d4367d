"""Writes the lines of Python that open an exported adapter with PEFT."""

from pathlib import Path
from typing import Any

from lora_jax.models.checkpoints import Loaded
from lora_jax.models.families import CAUSAL_LM, CLASSIFIER, SEQ2SEQ_LM
from lora_jax.models.gguf import is_gguf
from lora_jax.models.hub import split_revision
from lora_jax.tasks import adapter_bases

# Class of transformers for a model with each head, after "AutoModelFor".
AUTO = {
    CLASSIFIER: "SequenceClassification",
    SEQ2SEQ_LM: "Seq2SeqLM",
    CAUSAL_LM: "CausalLM",
}


def write_peft_lines(directory: str | Path, loaded: Loaded, *, base: str = "") -> str:
    """Writes the lines that open an adapter in PEFT's format, over the base that it was made for.

    Args:
      directory: directory of the adapter.
      loaded: the base, with the adapter's number of labels.
      base: name or directory for the lines; by default that by which the base was found.
    """
    name = f"AutoModelFor{AUTO[loaded.head]}"
    place, options = _locate_base(loaded)
    place = base or place
    if loaded.head == CLASSIFIER:
        options["num_labels"] = loaded.model.num_labels
    if loaded.fresh:  # the base may have a head of another size, in whose place the adapter's comes
        options["ignore_mismatched_sizes"] = True
    arguments = ", ".join([repr(place), *(f"{key}={value!r}" for key, value in options.items())])
    return "\n".join(
        [
            "from peft import PeftModel",
            f"from transformers import {name}",
            f"base = {name}.from_pretrained({arguments})",
            *_resizing(loaded),
            f"model = PeftModel.from_pretrained(base, {str(directory)!r})",
        ]
    )


def _resizing(loaded: Loaded) -> list[str]:
    """Returns the line that gives the base rows for added tokens, which the adapter brings."""
    rows = loaded.checkpoint.config.get("vocab_size")
    return [f"base.resize_token_embeddings({rows})"] if loaded.is_resized else []


def _locate_base(loaded: Loaded) -> tuple[str, dict[str, Any]]:
    """Returns the name by which transformers finds the base, and options that go with it."""
    checkpoint = loaded.checkpoint
    if is_gguf(checkpoint.directory):
        path = checkpoint.directory.absolute()
        return str(path.parent), {"gguf_file": path.name}
    name, revision = split_revision(adapter_bases.make_absolute(checkpoint.name))
    return name, {"revision": revision} if revision else {}
