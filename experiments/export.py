"""Writes a trained adapter in a form that other tools read.

python -m experiments.export --adapter=runs/quickstart/adapter --out=runs/merged --merged
python -m experiments.export --adapter=runs/chat/adapter --out=runs/merged --merged --dtype=bfloat16
python -m experiments.export --adapter=runs/quickstart/adapter --out=runs/peft --peft

python -m experiments.export --adapter=runs/pissa/adapter --out=runs/peft --peft --init=pissa

Factors that started from the weights of the base (PiSSA, OLoRA) become plain LoRA of twice the
rank, which opens anywhere; with --init they keep their rank, and PEFT computes the start again.
The adapter may be in this library's format or in PEFT's.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments import cli, lazy

with lazy.imports():
    from lora_jax.models import checkpoints, families, hub, shards
    from lora_jax.tasks import (
        adapter_files,
        classifier,
        language_model,
        loading_code,
        task_file,
        templates,
        text_files,
    )

if TYPE_CHECKING:
    from lora_jax.tasks.classifier import Classifier
    from lora_jax.tasks.language_model import LanguageModel

# As the library has them; a test compares them.
INITS = ("pissa", "olora")
DTYPES = ("bfloat16", "float16", "float32")

_ADAPTER = flags.DEFINE_string("adapter", None, "Directory of the adapter.", required=True)
_MODEL = flags.DEFINE_string("model", None, "The base model, if it moved since training.")
_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True)
_MERGED = flags.DEFINE_bool("merged", False, "Write a Hugging Face directory of merged weights.")
_PEFT = flags.DEFINE_bool("peft", False, "Write the adapter in PEFT's format.")
_INIT = flags.DEFINE_enum(
    "init",
    None,
    INITS,
    "With --peft: write the trained factors alone, for PEFT to compute from the original base what "
    "they started from. By default they become plain LoRA of twice the rank.",
)

_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    DTYPES,
    "Dtype of the merged weights, to which the sum in float32 is rounded once. By default the one "
    "that the config of the base states (of a quantized base, that of its numbers); float32 if it "
    "states none, as a GGUF file.",
)
_SHARD_SIZE = flags.DEFINE_string(
    "shard_size", None, "Largest size of a file of merged weights; 5GB by default."
)


def main(argv: list[str]) -> None:
    """Writes the adapter merged into its base, or in another format."""
    if argv:
        raise ValueError(f"Unexpected arguments {argv}; options start with --.")
    if _MERGED.value == _PEFT.value:
        raise ValueError(
            "Say what to write: either --merged for the merged weights in Hugging Face's layout, "
            "or --peft for the adapter in PEFT's format."
        )
    if _PEFT.value and (_DTYPE.value or _SHARD_SIZE.value):
        raise ValueError("--dtype and --shard_size are for --merged; an adapter keeps its dtype.")
    if _INIT.value and not _PEFT.value:
        raise ValueError("--init is for --peft; merged weights do not say where they started.")
    shard_size = shards.parse_size(_SHARD_SIZE.value or shards.SHARD_SIZE)
    out = Path(_OUT.value)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory; choose another --out.")
    is_language = language_model.is_language(_ADAPTER.value, model=_MODEL.value)
    load = (
        language_model.load
        if is_language
        else functools.partial(classifier.load, with_tokenizer=False)
    )
    model = load(_ADAPTER.value, model=_MODEL.value, wide=_PEFT.value)
    for note in model.notes:
        print(f"assumed: {note}", file=sys.stderr)
    if _PEFT.value:
        _export_peft(out, model)
        return
    head = model.loaded.head
    checkpoints.save_hf(
        out,
        model.loaded.params,
        model.loaded.checkpoint,
        head=head,
        labels=model.labels if head == families.CLASSIFIER else (),
        adapter=model.adapter,
        dtype=_DTYPE.value or "",
        shard_size=shard_size,
        tokenizer=model.tokenizer if is_language else "",
    )
    files = text_files.find(_ADAPTER.value, model.loaded.checkpoint)
    text_files.replace(out, files, model.loaded.checkpoint)
    templates.copy(_ADAPTER.value, out)
    if not any((out / name).is_file() for name in hub.TOKENIZER_FILES):
        print("note: the base has no tokenizer, so that none was written", file=sys.stderr)
    print(f"Wrote {out}: open it with transformers, AutoModelFor{loading_code.AUTO[head]}.")


def _export_peft(out: Path, model: Classifier | LanguageModel) -> None:
    """Writes the adapter in PEFT's format, with the files that stood beside it."""
    base = model.loaded.checkpoint.name
    adapter_files.save_peft(
        out, model.loaded, model.adapter, model.config, base=base, init=_INIT.value or ""
    )
    if isinstance(model, classifier.Classifier):
        task_file.write(out, classifier.describe_task(model))
    text_files.copy(_ADAPTER.value, out)
    text_files.write_tokenizer(out, text_files.find(_ADAPTER.value, model.loaded.checkpoint))
    templates.copy(_ADAPTER.value, out)
    lines = loading_code.write_peft_lines(out, model.loaded)
    print(f"Wrote {out}. Open it with PEFT, in Python:\n\n{lines}\n")


if __name__ == "__main__":
    cli.run(main)
