"""Chooses the rows that are held out of training, for the evaluation."""

import numpy as np

from lora_jax.data.order import HOLDOUT, permutation


def choose_holdout(
    groups: np.ndarray, labels: np.ndarray | None, count: int, seed: int
) -> np.ndarray:
    """Chooses about ``count`` rows at random, of each class in its proportion.

    The rows of a group (of the same text) are held out together, or not at all. No class loses its
    last group, so that what is evaluated has been trained on.

    Args:
      groups: ``(n,)``, number of the group of each row, from 0.
      labels: ``(n,)``, number of the class of each row, of which that of a group's first row
        counts; None to draw from all alike.
      count: number of groups to hold out.
      seed: integer in ``[0, 2**64)``.

    Returns:
      ``(n,)`` bool, True for rows that are held out.

    >>> groups, labels = np.arange(20), np.repeat([0, 1], [15, 5])
    >>> held_out = choose_holdout(groups, labels, 4, seed=0)
    >>> np.bincount(labels[held_out]).tolist()
    [3, 1]
    """
    _, first = np.unique(groups, return_index=True)
    classes = np.zeros(len(first), np.int64) if labels is None else labels[first]
    order = permutation(len(first), seed, stream=HOLDOUT)
    by_class = order[np.argsort(classes[order], kind="stable")]
    sorted_classes = classes[by_class]
    _, starts, sizes = np.unique(sorted_classes, return_index=True, return_counts=True)
    places = np.arange(len(first)) - np.repeat(starts, sizes)
    size = np.repeat(sizes, sizes)
    # The k-th of a class of n is due when its share of all that are drawn is (k + 1/2) / n.
    due = np.where(places == size - 1, np.inf, (places + 0.5) / size)
    rank = np.empty(len(first), np.int64)
    rank[order] = np.arange(len(first))  # equal shares are taken in the random order
    chosen = by_class[np.lexsort((rank[by_class], due))[:count]]
    last = by_class[np.isinf(due)]
    return np.isin(groups, np.setdiff1d(chosen, last))
