"""What a task of classification is: what is asked of texts, and the examples of a run."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_jax.data.examples import Examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTask:
    """What is asked of texts, or pairs of them, and how answers are scored.

    Attributes:
      name: name of the task, with which a text-to-text model is asked.
      labels: names of the predictions; a single one for a regression.
      texts: names of the one or two texts of an example, as a text-to-text model sees them.
      is_regression: whether labels are real numbers.
      score: name of the score that selects the best adapter; more is better.
      scores: names of what is reported beside the loss and, of a classifier, the accuracy.
      validation: splits to evaluate on; if there are several, each has an accuracy of its own as
        well.
    """

    name: str
    labels: tuple[str, ...]
    texts: tuple[str, ...] = ("sentence",)
    is_regression: bool = False
    score: str = "accuracy"
    scores: tuple[str, ...] = ()
    validation: tuple[str, ...] = ("validation",)

    @property
    def has_pairs(self) -> bool:
        """Whether each of its examples is two texts."""
        return len(self.texts) == 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """The examples of a run.

    Attributes:
      task: what is asked of them.
      training: examples to train on.
      evaluations: examples of each split to evaluate on.
      metadata: JSON about the task, which an adapter is saved with.
      notes: lines of the report at the start on where the examples come from.
    """

    task: TextTask
    training: Examples
    evaluations: Sequence[Examples]
    metadata: dict[str, Any]
    notes: tuple[str, ...] = ()
