"""The embedded reviews as a TFDS data set."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lora_jax.data.examples import read_tsv, require_labels

FOLDER = Path(__file__).parent
_DESCRIPTION = (
    "Short review sentences of many kinds of things, positive or negative, written for lora_jax."
)


class LoraReviews(tfds.core.GeneratorBasedBuilder):
    """Sentences with their sentiment, in a balanced training and validation split."""

    name = "lora_reviews"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}
    # TFDS would otherwise look for a folder of metadata beside this file.
    pkg_dir_path = FOLDER

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "sentence": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["negative", "positive"]),
                "idx": np.int32,
            }
        )
        return tfds.core.DatasetInfo(builder=self, description=_DESCRIPTION, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # the data come with the package
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        examples = read_tsv(FOLDER / f"{split}.tsv", require_labels=True)
        rows = zip(examples.sentences, require_labels(examples), strict=True)
        for number, (sentence, label) in enumerate(rows):
            yield number, {"sentence": sentence, "label": int(label), "idx": number}
