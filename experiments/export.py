"""Writes a trained adapter in a form that other tools read.

python -m experiments.export --adapter=runs/quickstart/adapter --out=runs/merged --merged
"""

from pathlib import Path

from absl import flags

import lora_jax as lora
from experiments import classifier, cli
from lora_jax.models import checkpoints

_ADAPTER = flags.DEFINE_string("adapter", None, "Directory of the adapter.", required=True)
_MODEL = flags.DEFINE_string("model", None, "The base model, if it moved since training.")
_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True)
_MERGED = flags.DEFINE_bool("merged", False, "Write a Hugging Face directory of merged weights.")


def main(argv: list[str]) -> None:
    """Merges the adapter into its base and writes the result."""
    if argv:
        raise ValueError(f"Unexpected arguments {argv}; options start with --.")
    if not _MERGED.value:
        raise ValueError(
            "Say what to write: --merged for the merged weights in Hugging Face's layout."
        )
    out = Path(_OUT.value)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory; choose another --out.")
    model = classifier.load(_ADAPTER.value, model=_MODEL.value)
    merged = lora.merge(model.loaded.params, model.adapter)
    checkpoints.save_hf(out, merged, model.loaded.checkpoint, labels=model.labels)
    print(f"Wrote {out}: open it with transformers, AutoModelForSequenceClassification.")


if __name__ == "__main__":
    cli.run(main)
