"""Writes a trained adapter in a form that other tools read.

python -m experiments.export --adapter=runs/quickstart/adapter --out=runs/merged --merged
python -m experiments.export --adapter=runs/chat/adapter --out=runs/merged --merged --dtype=bfloat16
python -m experiments.export --adapter=runs/quickstart/adapter --out=runs/peft --peft

python -m experiments.export --adapter=runs/pissa/adapter --out=runs/peft --peft --init=pissa
python -m experiments.export --adapter=runs/chat/adapter --out=runs/peft --peft --push=USER/NAME

Factors that started from the weights of the base (PiSSA, OLoRA) become those of twice the rank,
of plain LoRA or of DoRA, which open anywhere; with --init they keep their rank, and PEFT computes
the start again. The adapter may be in this library's format or in PEFT's. A model card is written
with either form, README.md. With --push what was written goes to the Hugging Face Hub as well.
"""

from __future__ import annotations

import functools
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from experiments import base_configs, cli, lazy

with lazy.imports():
    import huggingface_hub

    from lora_jax.models import checkpoints, families, hub, hub_upload, shards
    from lora_jax.tasks import (
        adapter_files,
        classifier,
        language_model,
        loading_code,
        model_card,
        task_file,
        templates,
        text_files,
    )
    from lora_jax.training import config_fields

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
    "they started from. By default they become factors of twice the rank.",
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
_PUSH = flags.DEFINE_string("push", None, "USER/NAME of a repository of the Hub to upload to.")
_PRIVATE = flags.DEFINE_bool("private", False, "With --push: the repository is to be private.")
_REVISION = flags.DEFINE_string("revision", None, "With --push: a branch other than the main one.")
_LICENSE = flags.DEFINE_string(
    "license", None, "License for the model card, by the Hub's name, such as apache-2.0."
)


def main(argv: list[str]) -> None:
    """Writes the adapter merged into its base, or in another format; pushes it, if asked to."""
    _check(argv)
    out = Path(_OUT.value)
    export = _write(out)
    model_card.write(export)
    if _PUSH.value:
        _push(out, export, _PUSH.value)


def _check(argv: list[str]) -> None:
    """Raises ValueError where flags and arguments do not go together."""
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
    if not _PUSH.value and (_PRIVATE.value or _REVISION.value):
        raise ValueError("--private and --revision are for --push=USER/NAME.")
    if _LICENSE.value and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", _LICENSE.value):
        raise ValueError(
            f"--license={_LICENSE.value}: give the Hub's name of a license, such as apache-2.0 or "
            "llama3.1."
        )
    if _PUSH.value:
        hub_upload.check(_PUSH.value)


def _write(out: Path) -> model_card.Export:
    """Writes the files, and returns what the model card says of them."""
    shard_size = shards.parse_size(_SHARD_SIZE.value or shards.SHARD_SIZE)
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
    export = _describe(out, model)
    if _PEFT.value:
        _export_peft(out, model)
        return export
    head = model.loaded.head
    checkpoints.save_hf(
        out,
        model.loaded.params,
        model.loaded.checkpoint,
        head=head,
        labels=getattr(model, "labels", ()) if head == families.CLASSIFIER else (),
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
    return export


def _describe(out: Path, model: Classifier | LanguageModel) -> model_card.Export:
    return model_card.Export(
        directory=out,
        adapter_directory=Path(_ADAPTER.value),
        loaded=model.loaded,
        adapter=model.adapter,
        config=model.config,
        labels=getattr(model, "labels", ()),
        is_merged=_MERGED.value,
        repo=_PUSH.value or "",
        license=_LICENSE.value or "",
        program=_find_program(model_card.read_run(Path(_ADAPTER.value))),
    )


def _find_program(config: dict[str, Any]) -> str:
    """Finds the program whose config this is, by its fields; "" if there is none."""
    known = set(config_fields.field_names(ConfigDict(config))) if config else set()
    for name, make_config in base_configs.BY_PROGRAM.items():
        fields = set(config_fields.field_names(make_config()))
        if known - set(config_fields.OPTIONAL) == fields - set(config_fields.OPTIONAL):
            return "sst2" if config.get("task") == "sst2" else name
    return ""


def _push(out: Path, export: model_card.Export, repo: str) -> None:
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    if not model_card.find_hub_base(export.loaded) and _PEFT.value:
        print("note: adapter_config.json names the base by its path here", file=sys.stderr)
    message = "Upload a model" if _MERGED.value else "Upload an adapter"
    try:
        url = hub_upload.push(
            out, repo, private=_PRIVATE.value, revision=_REVISION.value or "",
            message=f"{message}, made with lora_jax",
        )  # fmt: skip
    except (ValueError, OSError) as error:
        again = f"hf upload {repo} {shlex.quote(str(out))} ."
        raise ValueError(f"{error} What was to be uploaded is in {out}: {again}") from error
    print(f"Pushed to {url}")


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
