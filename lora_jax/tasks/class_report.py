"""How well each class is told from the others: confusion matrix, precision, recall and F1."""

import csv
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_MOST_CLASSES = 20  # of which a printed table has all; of more it has the worst
_MOST_IN_MATRIX = 8  # classes of which a printed report has the matrix
_WIDTH = 24  # characters of a class's name in a printed table
_WIDTH_OF_COLUMN = 14  # and at the head of a column of the matrix


class ClassScores(NamedTuple):
    """Scores of one class among the others (0 where nothing is counted, as scikit-learn has it).

    Attributes:
      precision: share of the examples taken for the class that are of it.
      recall: share of the examples of the class that are taken for it.
      f1: harmonic mean of the two.
      support: number of examples of the class.
    """

    precision: float
    recall: float
    f1: float
    support: int


class ClassReport(NamedTuple):
    """The predictions of a classifier on labelled examples.

    Attributes:
      labels: names of the classes.
      confusion: ``(classes, classes)`` int64, number of examples by class (row) and prediction
        (column).
    """

    labels: tuple[str, ...]
    confusion: np.ndarray


def make_report(labels: Sequence[str], truth: np.ndarray, predictions: np.ndarray) -> ClassReport:
    """Counts predictions by class.

    Args:
      labels: names of the classes.
      truth: ``(n,)``, number of the class of each example.
      predictions: ``(n,)``, number of the class that was predicted.

    >>> report = make_report(("no", "yes"), np.array([0, 0, 1]), np.array([0, 1, 1]))
    >>> report.confusion.tolist(), compute_scores(report)[0]
    ([[1, 1], [0, 1]], ClassScores(precision=1.0, recall=0.5, f1=0.6666666666666666, support=2))
    """
    n = len(labels)
    flat = np.bincount(np.int64(truth) * n + np.int64(predictions), minlength=n * n)
    return ClassReport(tuple(labels), flat.reshape(n, n))


def compute_scores(report: ClassReport) -> list[ClassScores]:
    """Computes the scores of each class."""
    hits = np.diag(report.confusion)
    found, support = report.confusion.sum(0), report.confusion.sum(1)
    divide = lambda a, b: float(a / b) if b else 0.0
    return [
        ClassScores(
            divide(hits[k], found[k]),
            divide(hits[k], support[k]),
            divide(2 * hits[k], found[k] + support[k]),
            int(support[k]),
        )
        for k in range(len(report.labels))
    ]


def average(report: ClassReport) -> dict[str, float]:
    """Computes accuracy, and mean scores of the classes that occur among labels or predictions."""
    occurs = (report.confusion.sum(0) + report.confusion.sum(1)) > 0
    scores = [x for x, there in zip(compute_scores(report), occurs, strict=True) if there]
    means = np.mean([x[:3] for x in scores], 0) if scores else np.zeros(3)
    total = report.confusion.sum()
    accuracy = float(np.trace(report.confusion) / total) if total else 0.0
    names = ("macro_precision", "macro_recall", "macro_f1")
    return {"accuracy": accuracy} | dict(zip(names, means.tolist(), strict=True))


def macro_f1(predictions: np.ndarray, truth: np.ndarray) -> float:
    """Computes the mean F1 score of the classes that occur among labels or predictions.

    >>> round(macro_f1(np.array([1, 1, 0, 2]), np.array([1, 0, 0, 2])), 4)
    0.7778
    """
    labels = tuple(map(str, range(1 + max(np.max(predictions), np.max(truth)))))
    return average(make_report(labels, truth, predictions))["macro_f1"]


def to_json(report: ClassReport) -> dict[str, Any]:
    """Converts a report to JSON types."""
    scores = zip(report.labels, compute_scores(report), strict=True)
    return {
        **average(report),
        "examples": int(report.confusion.sum()),
        "classes": {label: x._asdict() for label, x in scores},
        "confusion": report.confusion.tolist(),
    }


def to_csv(report: ClassReport) -> str:
    """Writes the confusion matrix as CSV: a row for each class, a column for each prediction."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", *report.labels])
    for label, row in zip(report.labels, report.confusion.tolist(), strict=True):
        writer.writerow([label, *row])
    return text.getvalue()


def describe(report: ClassReport) -> list[str]:
    """Writes a report for people: a line for each class, and the confusion matrix of a few."""
    scores = compute_scores(report)
    order = [k for k in range(len(scores)) if scores[k].support]
    hidden = len(scores) - len(order)
    if len(order) > _MOST_CLASSES:
        hidden += len(order) - _MOST_CLASSES
        order = sorted(order, key=lambda k: scores[k].f1)[:_MOST_CLASSES]
    lines = [f"{'class':<{_WIDTH}} precision  recall      f1  examples"]
    for k in order:
        x = scores[k]
        name = _shorten(report.labels[k])
        lines.append(
            f"{name:<{_WIDTH}} {x.precision:9.3f} {x.recall:7.3f} {x.f1:7.3f} {x.support:9,}"
        )
    if hidden:
        lines.append(f"({hidden} more classes: without an example here, or better than these)")
    means = average(report)
    lines.append(
        f"{'mean of the classes':<{_WIDTH}} {means['macro_precision']:9.3f} "
        f"{means['macro_recall']:7.3f} {means['macro_f1']:7.3f} {report.confusion.sum():9,}"
    )
    return [*lines, *_describe_confusion(report)]


def _describe_confusion(report: ClassReport) -> list[str]:
    n = len(report.labels)
    if n <= _MOST_IN_MATRIX:
        return _write_matrix(report)
    off = report.confusion - np.diag(np.diag(report.confusion))
    order = np.argsort(-off, axis=None, kind="stable")[:5]
    pairs = [divmod(int(k), n) for k in order if off.reshape(-1)[k]]
    return [
        f"most often confused: {report.labels[a]} taken for {report.labels[b]}: {off[a, b]:,}"
        for a, b in pairs
    ]


def _write_matrix(report: ClassReport) -> list[str]:
    heads = [_shorten(label, _WIDTH_OF_COLUMN) for label in report.labels]
    width = 2 + max(len(x) for x in [*heads, *map(str, report.confusion.reshape(-1))])
    lines = [f"{'is / taken for':<{_WIDTH}}" + "".join(f"{x:>{width}}" for x in heads)]
    for label, row in zip(report.labels, report.confusion, strict=True):
        lines.append(f"{_shorten(label):<{_WIDTH}}" + "".join(f"{x:>{width}}" for x in row))
    return lines


def _shorten(name: str, width: int = _WIDTH) -> str:
    """Shortens a name for a table; line breaks become blanks."""
    name = " ".join(name.split())
    return name if len(name) <= width else f"{name[: width - 1]}…"
