"""The tasks of GLUE (Wang et al. 2018): layouts of their data, labels and scores."""

import dataclasses
import difflib

from lora_jax.data.tsv import SENTENCES, Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueTask:
    """One task.

    Attributes:
      name: name of the task.
      layout: layout of its data.
      labels: names of the predictions; a single one for a regression.
      score: name of the score that selects the best adapter; more is better.
      scores: names of what is reported beside the loss and, of a classifier, the accuracy.
      validation: splits to evaluate on; if there are several, each has an accuracy of its own as
        well.
    """

    name: str
    layout: Layout
    labels: tuple[str, ...]
    score: str = "accuracy"
    scores: tuple[str, ...] = ()
    validation: tuple[str, ...] = ("validation",)

    @property
    def is_regression(self) -> bool:
        """Whether its labels are real numbers."""
        return self.layout.scale is not None

    @property
    def has_pairs(self) -> bool:
        """Whether each of its examples is two sentences."""
        return len(self.layout.text) == 2


_PAIR = ("sentence1", "sentence2")
_QQP = ("question1", "question2")
_QNLI = ("question", "sentence")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("validation_matched", "validation_mismatched")

_TASKS = (
    GlueTask(
        name="cola",
        layout=Layout(header=("source", "label", "star", "sentence"), folder="CoLA"),
        labels=("unacceptable", "acceptable"),
        score="matthews",
        scores=("matthews",),
    ),
    GlueTask(name="sst2", layout=SENTENCES, labels=("negative", "positive")),
    GlueTask(
        name="mrpc",
        layout=Layout(
            text=_PAIR, columns=("#1 String", "#2 String"), label="Quality", folder="MRPC"
        ),
        labels=("not_equivalent", "equivalent"),
        scores=("f1",),
    ),
    GlueTask(
        name="qqp",
        layout=Layout(text=_QQP, columns=_QQP, label="is_duplicate", folder="QQP", gaps=True),
        labels=("not_duplicate", "duplicate"),
        scores=("f1",),
    ),
    GlueTask(
        name="stsb",
        layout=Layout(text=_PAIR, columns=_PAIR, label="score", folder="STS-B", scale=(0.0, 5.0)),
        labels=("similarity",),
        score="pearson",
        scores=("pearson", "spearman"),
    ),
    GlueTask(
        name="mnli",
        layout=Layout(
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
        labels=("entailment", "neutral", "contradiction"),
        validation=_MNLI,
    ),
    GlueTask(
        name="qnli",
        layout=Layout(text=_QNLI, columns=_QNLI, words=_ENTAILMENT, folder="QNLI"),
        labels=_ENTAILMENT,
    ),
    GlueTask(
        name="rte",
        layout=Layout(text=_PAIR, columns=_PAIR, words=_ENTAILMENT, folder="RTE"),
        labels=_ENTAILMENT,
    ),
    GlueTask(
        name="wnli",
        layout=Layout(text=_PAIR, columns=_PAIR, folder="WNLI"),
        labels=("not_entailment", "entailment"),
    ),
)
TASKS = {task.name: task for task in _TASKS}


def find(name: str) -> GlueTask:
    """Finds the task of a name.

    Raises:
      ValueError: there is none; the message lists them all.

    >>> find("rte").labels
    ('entailment', 'not_entailment')
    """
    if name not in TASKS:
        near = difflib.get_close_matches(str(name), TASKS, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"task {name!r} is none of GLUE's{hint}; there are {', '.join(TASKS)}.")
    return TASKS[name]
