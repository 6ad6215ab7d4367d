"""The tasks of GLUE (Wang et al. 2018): layouts of their data, labels and scores."""

import dataclasses
import difflib
from typing import Any

from lora_jax.data.tsv import SENTENCES, Layout
from lora_jax.tasks.text_task import TextTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueTask(TextTask):
    """One task.

    Attributes:
      layout: layout of its data.
    """

    layout: Layout


def _make_task(layout: Layout, **about: Any) -> GlueTask:
    """Makes a task from the layout of its data, which says what its texts and labels are."""
    is_regression = layout.scale is not None
    return GlueTask(layout=layout, texts=layout.text, is_regression=is_regression, **about)


_PAIR = ("sentence1", "sentence2")
_QQP = ("question1", "question2")
_QNLI = ("question", "sentence")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("validation_matched", "validation_mismatched")

_TASKS = (
    _make_task(
        name="cola",
        layout=Layout(header=("source", "label", "star", "sentence"), folder="CoLA"),
        labels=("unacceptable", "acceptable"),
        score="matthews",
        scores=("matthews",),
    ),
    _make_task(name="sst2", layout=SENTENCES, labels=("negative", "positive")),
    _make_task(
        name="mrpc",
        layout=Layout(
            text=_PAIR, columns=("#1 String", "#2 String"), label="Quality", folder="MRPC"
        ),
        labels=("not_equivalent", "equivalent"),
        scores=("f1",),
    ),
    _make_task(
        name="qqp",
        layout=Layout(text=_QQP, columns=_QQP, label="is_duplicate", folder="QQP", gaps=True),
        labels=("not_duplicate", "duplicate"),
        scores=("f1",),
    ),
    _make_task(
        name="stsb",
        layout=Layout(text=_PAIR, columns=_PAIR, label="score", folder="STS-B", scale=(0.0, 5.0)),
        labels=("similarity",),
        score="pearson",
        scores=("pearson", "spearman"),
    ),
    _make_task(
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
    _make_task(
        name="qnli",
        layout=Layout(text=_QNLI, columns=_QNLI, words=_ENTAILMENT, folder="QNLI"),
        labels=_ENTAILMENT,
    ),
    _make_task(
        name="rte",
        layout=Layout(text=_PAIR, columns=_PAIR, words=_ENTAILMENT, folder="RTE"),
        labels=_ENTAILMENT,
    ),
    _make_task(
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
