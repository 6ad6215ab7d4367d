"""The NaN guard: a step whose loss or gradient is not finite changes neither adapter nor moments.

The check is part of the compiled step, so that the device never waits for the host to allow an
update. The host reads the verdict together with the step's metrics, one step late.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax import paths
from lora_jax.training import gradients

PyTree = Any

DECAY = 0.98  # decay of the running mean of the loss, which reaches back some 50 steps
MIN_LOSSES = 50  # losses that the mean must hold before a spike is measured by it


class Health(NamedTuple):
    """The guard's memory from step to step; it is part of the training state.

    Attributes:
      skips: number of consecutive steps, up to now, whose update was left out.
      count: number of losses in the mean; those of steps that were left out do not count.
      mean: ``Σ (1 - DECAY) DECAY^(n-i) loss_i``, which starts from 0.
    """

    skips: jax.Array
    count: jax.Array  # type: ignore[assignment]  # it hides tuple.count
    mean: jax.Array


class Verdict(NamedTuple):
    """The device's verdict on a step.

    Attributes:
      loss: mean loss of the step.
      running_mean: running mean of the losses before it; 0 before the first.
      bad_leaf: number, in the adapter's order, of the first leaf whose gradient is not finite; -1
        for none.
      skips: 0 if the step is good, else the number of consecutive steps that were left out, this
        one included.
      grad_norm: norm of the gradient, before it is clipped.
    """

    loss: jax.Array
    running_mean: jax.Array
    bad_leaf: jax.Array
    skips: jax.Array
    grad_norm: jax.Array


class Policy(NamedTuple):
    """The host's policy for steps that are not good.

    Attributes:
      action: "stop", or "skip" to go on without the step's update.
      patience: number of consecutive steps without an update that stop the run all the same.
      spike: multiple of the running mean above which a loss counts as not finite; 0 for no limit.
      names: names of the adapter's leaves, in order.
    """

    action: str
    patience: int
    spike: float
    names: Sequence[str]


def initial_health() -> Health:
    """Returns the guard's memory at step 0."""
    return Health(jnp.int32(0), jnp.int32(0), jnp.float32(0.0))


def judge(
    health: Health, loss: jax.Array, grads: PyTree, *, spike: float
) -> tuple[Verdict, Health]:
    """Judges a step by its loss and its gradient.

    A spike is measured by the exponential mean of the losses so far, corrected for its start at 0
    (Kingma & Ba 2015, section 3).
    """
    loss = jnp.asarray(loss, jnp.float32)
    running_mean = health.mean / jnp.maximum(
        1 - DECAY ** health.count.astype(jnp.float32), 1 - DECAY
    )
    bad_leaf = _find_bad_leaf(grads)
    bad = ~jnp.isfinite(loss) | (bad_leaf >= 0)
    if spike:
        bad = bad | ((health.count >= MIN_LOSSES) & (loss > spike * running_mean))
    skips = jnp.where(bad, health.skips + 1, 0)
    mean = DECAY * health.mean + (1 - DECAY) * loss
    new = Health(
        skips,
        health.count + jnp.where(bad, 0, 1),
        jnp.where(bad, health.mean, mean),
    )
    return Verdict(loss, running_mean, bad_leaf, skips, gradients.global_norm(grads)), new


def _find_bad_leaf(grads: PyTree) -> jax.Array:
    is_bad = jax.tree.map(_is_bad, grads, lora.mask(grads))
    bad = jnp.stack(jax.tree.leaves(is_bad))
    return jnp.where(jnp.any(bad), jnp.argmax(bad).astype(jnp.int32), -1)


def _is_bad(grad: jax.Array, is_trained: bool) -> jax.Array:
    return ~jnp.all(jnp.isfinite(grad)) if is_trained else jnp.bool_(False)


def choose(verdict: Verdict, new: PyTree, old: PyTree) -> PyTree:
    """Returns the new values after a good step, else the old ones.

    Schedules count every step.
    """
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)

    def choose_leaf(new: Any, old: Any) -> Any:
        return new if is_schedule(new) else jnp.where(verdict.skips == 0, new, old)

    return jax.tree.map(choose_leaf, new, old, is_leaf=is_schedule)


def make_policy(config: ConfigDict, adapter: PyTree) -> Policy:
    """Makes the policy of a config, for this adapter."""
    return Policy(
        config.guard.action, config.guard.patience, config.guard.spike,
        tuple(paths.named_leaves(adapter)),
    )  # fmt: skip


def check_step(policy: Policy, step: int, verdict: Verdict) -> str:
    """Says what is wrong with a step, in a sentence without its end; "" if nothing is.

    Raises:
      FloatingPointError: the run is to stop; the arguments are what is wrong, and details.
    """
    if not verdict.skips:
        return ""
    problem, details = _describe(policy, step, verdict)
    if policy.action == "stop":
        raise FloatingPointError(problem, details)
    if verdict.skips >= policy.patience:
        skips = int(verdict.skips)
        details += f", after {skips} steps in a row that were left out (guard.patience)"
        raise FloatingPointError(problem, details)
    return problem + details


def _describe(policy: Policy, step: int, verdict: Verdict) -> tuple[str, str]:
    """Says what is wrong with a step, and gives details."""
    leaf = policy.names[int(verdict.bad_leaf)] if verdict.bad_leaf >= 0 else ""
    loss = float(verdict.loss)
    if not math.isfinite(loss):
        details = f", and the gradient is not finite, first at {leaf}" if leaf else ""
        return f"The training loss is {loss} at step {step}", details
    if leaf:
        return f"The gradient is not finite at step {step}", f", first at {leaf}"
    mean = f"{float(verdict.running_mean):.4g}, its running mean"
    return (
        f"The training loss is {loss:.4g} at step {step}",
        f", more than guard.spike {policy.spike:g} times {mean}",
    )
