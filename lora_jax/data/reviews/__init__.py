"""Embedded reviews: short sentences about films, meals, gadgets and more, written for this project.

They make a sentiment data set that is always available, small enough to train on in minutes. See
README.md in this folder.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imports tensorflow_datasets, which is slow
    from lora_jax.data.reviews.dataset import LoraReviews

DIRECTORY = Path(__file__).parent


def builder(data_dir: str | Path | None = None) -> "LoraReviews":
    """Makes the TFDS builder of the data set, in array_record, which needs no TensorFlow to read.

    Args:
      data_dir: directory of the prepared data; None for a folder among the user's caches.
    """
    from lora_jax.data.reviews import dataset  # imports tensorflow_datasets, which is slow

    return dataset.LoraReviews(data_dir=str(data_dir or _find_cache()), file_format="array_record")


def _find_cache() -> Path:
    """Finds the library's folder in the user's caches, by the XDG base directory specification."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "lora_jax" / "tensorflow_datasets"
