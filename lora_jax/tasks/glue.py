"""The tasks of GLUE (Wang et al. 2018): where their examples stand, and how they are scored."""

import difflib
from typing import NamedTuple

from lora_jax.data.tsv import SENTENCES, Layout


class GlueTask(NamedTuple):
    """One task.

    Attributes:
      layout: of its data.
      labels: what predictions are called; one name for a regression.
      score: what selects the best adapter; more is better.
      scores: what is reported beside the loss and, of a classifier, the accuracy.
      validation: the splits to evaluate on; where there are several, each has an accuracy of its
        own as well.
    """

    layout: Layout
    labels: tuple[str, ...]
    score: str = "accuracy"
    scores: tuple[str, ...] = ()
    validation: tuple[str, ...] = ("validation",)

    @property
    def regression(self) -> bool:
        """Whether labels are real numbers."""
        return self.layout.scale is not None

    @property
    def pairs(self) -> bool:
        """Whether an example is two sentences."""
        return len(self.layout.text) == 2


_PAIR = ("sentence1", "sentence2")
_QQP = ("question1", "question2")
_QNLI = ("question", "sentence")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("validation_matched", "validation_mismatched")

TASKS = {
    "cola": GlueTask(
        Layout(header=("source", "label", "star", "sentence"), folder="CoLA"),
        ("unacceptable", "acceptable"),
        "matthews",
        ("matthews",),
    ),
    "sst2": GlueTask(SENTENCES, ("negative", "positive")),
    "mrpc": GlueTask(
        Layout(text=_PAIR, columns=("#1 String", "#2 String"), label="Quality", folder="MRPC"),
        ("not_equivalent", "equivalent"),
        scores=("f1",),
    ),
    "qqp": GlueTask(
        Layout(text=_QQP, columns=_QQP, label="is_duplicate", folder="QQP", gaps=True),
        ("not_duplicate", "duplicate"),
        scores=("f1",),
    ),
    "stsb": GlueTask(
        Layout(text=_PAIR, columns=_PAIR, label="score", folder="STS-B", scale=(0.0, 5.0)),
        ("similarity",),
        "pearson",
        ("pearson", "spearman"),
    ),
    "mnli": GlueTask(
        Layout(
            text=("premise", "hypothesis"),
            columns=_PAIR,
            label="gold_label",
            words=("entailment", "neutral", "contradiction"),
            files=(
                ("train", "train.tsv"),
                *((split, f"dev_{split.partition('_')[2]}.tsv") for split in _MNLI),
            ),
            folder="MNLI",
        ),
        ("entailment", "neutral", "contradiction"),
        validation=_MNLI,
    ),
    "qnli": GlueTask(
        Layout(text=_QNLI, columns=_QNLI, words=_ENTAILMENT, folder="QNLI"),
        _ENTAILMENT,
    ),
    "rte": GlueTask(
        Layout(text=_PAIR, columns=_PAIR, words=_ENTAILMENT, folder="RTE"), _ENTAILMENT
    ),
    "wnli": GlueTask(
        Layout(text=_PAIR, columns=_PAIR, folder="WNLI"), ("not_entailment", "entailment")
    ),
}


def find(name: str) -> GlueTask:
    """The task of a name.

    Raises:
      ValueError: there is none; the message lists them.

    >>> find("rte").labels
    ('entailment', 'not_entailment')
    """
    if name not in TASKS:
        near = difflib.get_close_matches(str(name), TASKS, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"task {name!r} is none of GLUE's{hint}; there are {', '.join(TASKS)}.")
    return TASKS[name]
