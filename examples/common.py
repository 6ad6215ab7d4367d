"""What the examples share: ten steps of training, and the check that lifted equals merged."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import lora_jax as lora

PyTree = Any


class Result(NamedTuple):
    """What an example has shown.

    Attributes:
      losses: before each of the ten steps, and after the last.
      explanation: what ``lora.explain`` says of the function.
      merged: the trained parameters as a plain tree.
      difference: the largest difference between the outputs of the lifted and the merged model.
    """

    losses: list[float]
    explanation: Any
    merged: PyTree
    difference: float


def ten_steps(fn: Callable, params: PyTree, adapter: PyTree, *, loss: Callable, x: Any) -> Result:
    """Trains an adapter of ``fn(params, x)`` on ``loss(output)``, merges it, and reports."""
    tx = optax.adam(1e-2)
    of_adapter = lambda adapter: loss(lora.lift(fn)(lora.bind(params, adapter), x))
    gradient, state, losses = jax.jit(jax.value_and_grad(of_adapter)), tx.init(adapter), []
    print(lora.summary(params, adapter))
    for _ in range(10):
        value, grads = gradient(adapter)
        updates, state = tx.update(grads, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        losses.append(float(value))
    losses.append(float(gradient(adapter)[0]))
    merged, explanation = lora.merge(params, adapter), lora.explain(fn, params, adapter, x)
    lifted = jax.jit(lora.lift(fn))(lora.bind(params, adapter), x)
    difference = float(np.max(np.abs(lifted - jax.jit(fn)(merged, x))))
    print(explanation)
    print(
        f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after; merged differs by {difference:.1e}"
    )
    return Result(losses, explanation, merged, difference)
