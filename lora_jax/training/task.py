"""What the training loop needs to know of a task: two values, ``Task`` and ``Recipe``."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lora_jax.config import LoRAConfig
from lora_jax.data.batches import Batch

PyTree = Any


class Score(NamedTuple):
    """The number of an evaluation that selects the best adapter.

    Attributes:
      name: "loss", or a name among the task's metrics and scores.
      higher_is_better: whether a higher value is better.
    """

    name: str = "accuracy"
    higher_is_better: bool = True

    def merit(self, value: float) -> float:
        """Returns the value with the sign with which the largest is the best."""
        return value if self.higher_is_better else -value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A model and its data, as the training loop sees them.

    Attributes:
      apply: ``(params, batch, key or None) -> outputs``, such as logits or the losses of tokens;
        there is no dropout without a key.
      metrics: ``(outputs, batch) -> sums``, a NamedTuple such as
        :class:`lora_jax.training.metrics.Sums`; its first field is the sum of losses, its last the
        sum of weights.
      train_batch: ``step -> batch``, a pure function. Among several processes it also gets
        ``rows``, the numbers of the batch's rows to make.
      eval_batches: ``() -> batches`` of one evaluation; also gets ``rows`` among several processes.
      steps_per_epoch: number of steps that see every training example once.
      base: frozen parameters.
      base_id: content hash of the frozen parameters.
      metadata: JSON that is saved with the adapter, so that it can be used without the config.
      notes: lines of the report at the start.
      adapter: adapter to start from, in place of one that is drawn.
      fresh_head: reason why the head is none of that adapter's; "" if it is.
      redraw_base: ``seed -> base``, for tasks that draw some frozen parameters by the run's seed:
        the base of a run with another seed, with other arrays for those leaves alone. None if no
        parameters are drawn.
      load_original: ``() -> base`` as it was before it was quantized; None where it was not.
      score: score that selects the best adapter.
      scores: ``logits -> numbers by name``, where the outputs are logits: from those of all
        evaluation examples in their order, for scores that are no means over examples. None if
        there are no such scores.
    """

    apply: Callable[[PyTree, Batch, jax.Array | None], PyTree]
    metrics: Callable[[PyTree, Batch], NamedTuple]
    train_batch: Callable[..., Batch]
    eval_batches: Callable[..., Iterable[Batch]]
    steps_per_epoch: int
    base: PyTree
    base_id: str
    metadata: dict[str, Any]
    notes: tuple[str, ...] = ()
    adapter: PyTree | None = None
    fresh_head: str = ""
    redraw_base: Callable[[int], PyTree] | None = None
    load_original: Callable[[], PyTree] | None = None
    score: Score = Score()
    scores: Callable[[np.ndarray], dict[str, float]] | None = None


class Recipe(NamedTuple):
    """How the configs of a program become tasks.

    Attributes:
      resolve: returns a copy of a config in which nothing is left to the task or the model.
      check: raises ValueError for mistakes in a config, before anything is loaded.
      make_task: ``(config, devices=None) -> (task, settings of the adapter)``; loads model and
        data. The devices are by default those that the config describes.
      base_config: returns a config with all fields that the program has, and their defaults.
        Whatever sets fields is compared with it; with None, the config that is given is taken for
        it.
      higher_is_better: whether the score that selects adapters is better if it is higher.
    """

    resolve: Callable[[ConfigDict], ConfigDict]
    check: Callable[[ConfigDict], None]
    make_task: Callable[..., tuple[Task, LoRAConfig]]
    base_config: Callable[[], ConfigDict] | None = None
    higher_is_better: bool = True
