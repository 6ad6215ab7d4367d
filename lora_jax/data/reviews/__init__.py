"""Embedded reviews: short sentences about films, meals, gadgets and more, written for this project.

They make a sentiment data set that is always at hand, small enough to train on in minutes. See
README.md in this folder.
"""

from pathlib import Path
from typing import Any


def builder(data_dir: str | Path | None = None) -> Any:
    """The TFDS builder of the data set, stored as array_record, which is read without TensorFlow.

    Args:
      data_dir: where TFDS keeps prepared data; its own default if None.
    """
    from lora_jax.data.reviews import dataset  # imports tensorflow_datasets, which is slow

    return dataset.LoraReviews(
        data_dir=None if data_dir is None else str(data_dir), file_format="array_record"
    )
