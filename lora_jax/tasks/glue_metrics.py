"""The scores of GLUE (Wang et al. 2018, table 1) that are not means over examples.

Each function takes predictions and labels ``(n,)`` and returns a Python float. A score that is not
defined, because all predictions or all labels are the same, is 0, as GLUE has it.
"""

import numpy as np


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Computes ``2·TP / (2·TP + FP + FN)`` of class 1.

    >>> f1(np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0]))
    0.5
    """
    hits = np.sum((predictions == 1) & (labels == 1))
    total = np.sum(predictions == 1) + np.sum(labels == 1)
    return float(2 * hits / total) if total else 0.0


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Computes Matthews' correlation of two classes, Pearson's of their numbers 0 and 1.

    >>> matthews(np.array([1, 1, 0, 0]), np.array([1, 1, 0, 0]))
    1.0
    >>> matthews(np.array([1, 1, 1, 1]), np.array([1, 1, 0, 0]))
    0.0
    """
    return pearson(predictions, labels)


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Computes Pearson's correlation.

    >>> round(pearson(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0])), 4)
    0.982
    """
    if _is_constant(predictions) or _is_constant(labels):
        return 0.0
    # In float64; rounding may still put it a little outside.
    return float(np.clip(np.corrcoef(np.float64(predictions), np.float64(labels))[0, 1], -1, 1))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Computes Spearman's correlation: Pearson's of the ranks; equal values share a rank.

    >>> round(spearman(np.array([1.0, 2.0, 40.0]), np.array([1.0, 2.0, 3.0])), 4)
    1.0
    """
    from scipy import stats  # slow to import, and needed only here

    return pearson(stats.rankdata(predictions), stats.rankdata(labels))


def _is_constant(values: np.ndarray) -> bool:
    return bool(np.all(values == values[:1]))


SCORES = {"f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}
