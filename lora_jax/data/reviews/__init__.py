"""Embedded reviews: short sentences about films, meals, gadgets and more, written for this project.

They make a sentiment data set that is always at hand, small enough to train on in minutes. See
README.md in this folder.
"""

import os
from pathlib import Path
from typing import Any


def builder(data_dir: str | Path | None = None) -> Any:
    """The TFDS builder of the data set, stored as array_record, which is read without TensorFlow.

    Args:
      data_dir: where the prepared data are kept; by default in the user's folder of caches.
    """
    from lora_jax.data.reviews import dataset  # imports tensorflow_datasets, which is slow

    return dataset.LoraReviews(data_dir=str(data_dir or _cache()), file_format="array_record")


def _cache() -> Path:
    """The library's folder among the user's caches, by the XDG base directory specification."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "lora_jax" / "tensorflow_datasets"
