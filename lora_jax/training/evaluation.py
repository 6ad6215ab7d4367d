"""The evaluation of an adapter on a task's examples, each counted once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import lora_jax as lora
from lora_jax.training import metrics, partitioning
from lora_jax.training.mesh import ONE, Devices
from lora_jax.training.task import Batch, Task

PyTree = Any


def eval_step(task: Task) -> Callable:
    """Returns a pure function ``(adapter, base, batch) -> (sums, logits or None)``.

    There are logits, the outputs, if the task has scores to compute from them.
    """

    def step(adapter: PyTree, base: PyTree, batch: Batch) -> tuple:
        outputs = lora.lift(task.apply, dropout=0.0)(lora.bind(base, adapter), batch, None)
        return task.metrics(outputs, batch), None if task.scores is None else outputs

    return step


def make_eval_step(task: Task, devices: Devices = ONE) -> Callable:
    """Compiles :func:`eval_step` for the devices."""
    return partitioning.compile_eval_step(devices, eval_step(task))


def evaluate(eval_step: Callable, adapter: PyTree, task: Task) -> dict[str, float]:
    """Computes loss and scores over all evaluation examples, each counted once."""
    batches = task.eval_batches()
    return combine(task, [(batch, *eval_step(adapter, task.base, batch)) for batch in batches])


def combine(
    task: Task, results: list[tuple[Batch, NamedTuple, jax.Array | None]]
) -> dict[str, float]:
    """Computes loss and scores from the batches of an evaluation, their sums and their logits."""
    values = metrics.combine([sums for _, sums, _ in results])
    values.pop("examples")
    if task.scores is not None:
        logits = {
            int(index): row
            for batch, _, rows in results
            for index, row in zip(batch["index"], np.asarray(rows), strict=True)
        }
        values |= task.scores(np.stack([logits[k] for k in range(len(logits))]))
    return values
