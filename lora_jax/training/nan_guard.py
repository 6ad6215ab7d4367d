"""Keeps what is no number out of a run: a step that meets it changes neither adapter nor moments.

The check is part of the compiled step, so that the device never waits for the host to allow an
update; the host hears of it with the step's metrics, one step late.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lora_jax as lora
from lora_jax import paths

PyTree = Any

DECAY = 0.98  # of the running mean of the loss: it reaches back some 50 steps
SETTLED = 50  # losses that it must have seen before a spike is measured by it


class Health(NamedTuple):
    """What is remembered from step to step; part of the training state.

    Attributes:
      skips: steps in a row, up to now, whose update was left out.
      seen: losses in the mean; those of steps that were left out do not count.
      mean: ``Σ (1 - DECAY) DECAY^(n-i) loss_i``, which starts from 0.
    """

    skips: jax.Array
    seen: jax.Array
    mean: jax.Array


class Verdict(NamedTuple):
    """What the device found of a step.

    Attributes:
      loss: its mean loss.
      usual: the running mean of the losses before it, 0 before the first.
      first: the first leaf, in the adapter's order, whose gradient is not finite; -1 for none.
      skips: 0 if the step is good, else how many in a row were left out, this one included.
    """

    loss: jax.Array
    usual: jax.Array
    first: jax.Array
    skips: jax.Array


class Policy(NamedTuple):
    """What the host does about it.

    Attributes:
      action: "stop", or "skip" to go on without the step's update.
      patience: so many steps in a row that are left out stop the run all the same.
      spike: a loss above so many times the running mean counts as not finite; 0 for no such limit.
      names: of the adapter's leaves, in order.
    """

    action: str
    patience: int
    spike: float
    names: Sequence[str]


def healthy() -> Health:
    """The memory of a run at step 0."""
    return Health(jnp.int32(0), jnp.int32(0), jnp.float32(0.0))


def judge(
    health: Health, loss: jax.Array, grads: PyTree, *, spike: float
) -> tuple[Verdict, Health]:
    """Looks at a step's loss and gradient.

    The spike's measure is the exponential mean of the losses so far, corrected for its start at 0
    (Kingma & Ba 2015, section 3).
    """
    loss = jnp.asarray(loss, jnp.float32)
    usual = health.mean / jnp.maximum(1 - DECAY ** health.seen.astype(jnp.float32), 1 - DECAY)
    first = _first_bad(grads)
    bad = ~jnp.isfinite(loss) | (first >= 0)
    if spike:
        bad = bad | ((health.seen >= SETTLED) & (loss > spike * usual))
    skips = jnp.where(bad, health.skips + 1, 0)
    mean = DECAY * health.mean + (1 - DECAY) * loss
    new = Health(
        skips,
        health.seen + jnp.where(bad, 0, 1),
        jnp.where(bad, health.mean, mean),
    )
    return Verdict(loss, usual, first, skips), new


def _first_bad(grads: PyTree) -> jax.Array:
    trained = zip(jax.tree.leaves(grads), jax.tree.leaves(lora.mask(grads)), strict=True)
    bad = [
        ~jnp.all(jnp.isfinite(x)) if is_trained else jnp.bool_(False) for x, is_trained in trained
    ]
    bad = jnp.stack(bad)
    return jnp.where(jnp.any(bad), jnp.argmax(bad).astype(jnp.int32), -1)


def kept(verdict: Verdict, new: PyTree, old: PyTree) -> PyTree:
    """The new values after a good step, else the old; schedules go on with the steps either way."""
    is_clock = lambda x: isinstance(x, optax.ScaleByScheduleState)

    def choose(new: Any, old: Any) -> Any:
        return new if is_clock(new) else jnp.where(verdict.skips == 0, new, old)

    return jax.tree.map(choose, new, old, is_leaf=is_clock)


def policy(config: Any, adapter: PyTree) -> Policy:
    """The policy of a config, for this adapter."""
    return Policy(
        config.guard.action, config.guard.patience, config.guard.spike,
        tuple(paths.named_leaves(adapter)),
    )  # fmt: skip


def complaint(policy: Policy, step: int, verdict: Verdict) -> str:
    """What is wrong with a step, in a sentence without its end; "" if nothing is.

    Raises:
      FloatingPointError: the run is to stop; its arguments are what is wrong, and more on that.
    """
    if not verdict.skips:
        return ""
    said, more = _what(policy, step, verdict)
    if policy.action == "stop":
        raise FloatingPointError(said, more)
    if verdict.skips >= policy.patience:
        more += f", after {int(verdict.skips)} steps in a row that were left out (guard.patience)"
        raise FloatingPointError(said, more)
    return said + more


def _what(policy: Policy, step: int, verdict: Verdict) -> tuple[str, str]:
    """What is wrong, and where."""
    first = policy.names[int(verdict.first)] if verdict.first >= 0 else ""
    where = f", and the gradient is not finite, first at {first}" if first else ""
    loss = float(verdict.loss)
    if not math.isfinite(loss):
        return f"The training loss is {loss} at step {step}", where
    if first:
        return f"The gradient is not finite at step {step}", f", first at {first}"
    usual = f"{float(verdict.usual):.4g}, its running mean"
    return (
        f"The training loss is {loss:.4g} at step {step}",
        f", more than guard.spike {policy.spike:g} times {usual}",
    )
