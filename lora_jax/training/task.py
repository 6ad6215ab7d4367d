"""What the training loop needs to know of a task."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lora_jax.config import LoRAConfig
from lora_jax.data.batches import Batch

PyTree = Any


class Score(NamedTuple):
    """The number of an evaluation that selects the best adapter.

    Attributes:
      name: "loss", or a name among the task's metrics and scores.
      higher_is_better: whether more of it is better.
    """

    name: str = "accuracy"
    higher_is_better: bool = True

    def merit(self, value: float) -> float:
        """The value with the sign with which the largest is the best."""
        return value if self.higher_is_better else -value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What the loop needs to know of a task.

    Attributes:
      apply: ``(params, batch, key or None) -> logits``; no key, no dropout.
      metrics: ``(logits, batch) -> sums``, a NamedTuple such as :class:`metrics.Sums`; its first
        field is the sum of losses, its last the sum of weights.
      train_batch: the batch of a step, a pure function of the step. Among several processes also
        called with ``rows``, the numbers of the batch's rows that are to be made.
      eval_batches: makes the batches of one evaluation; likewise.
      steps_per_epoch: how many steps see every training example once.
      base: the frozen parameters.
      base_id: their content hash.
      metadata: saved with the adapter, so that it can be used without the config.
      notes: lines for the report at the start.
      adapter: adapter to start from, in place of one that is drawn.
      fresh_head: reason why the head is none of that adapter's; "" if it is.
      base_of: the frozen parameters as a run with another seed has them, for tasks that draw some
        by the run's seed: ``base``, with other arrays for those leaves alone. None if none are.
      score: what selects the best adapter.
      scores: ``(logits of all evaluation examples, in their order) -> numbers by name``, for what
        is no mean over examples. None if the means are all.
    """

    apply: Callable
    metrics: Callable
    train_batch: Callable[..., Batch]
    eval_batches: Callable[..., Iterable[Batch]]
    steps_per_epoch: int
    base: PyTree
    base_id: str
    metadata: dict
    notes: tuple[str, ...] = ()
    adapter: PyTree | None = None
    fresh_head: str = ""
    base_of: Callable[[int], PyTree] | None = None
    score: Score = Score()
    scores: Callable[[np.ndarray], dict[str, float]] | None = None


class Recipe(NamedTuple):
    """How a config becomes a task: what the runs of one program have in common.

    Attributes:
      resolve: gives a copy of a config that leaves nothing open.
      check: raises ValueError for the mistakes of a config, before anything is loaded.
      make_task: ``(config, devices=None) -> (task, settings of the adapter)``, loads model and
        data; the devices are by default those that the config describes.
    """

    resolve: Callable[[ConfigDict], ConfigDict]
    check: Callable[[ConfigDict], None]
    make_task: Callable[..., tuple[Task, LoRAConfig]]
