"""The optimizer that a config describes."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import fields
from lora_jax.nodes import Field, is_node
from lora_jax.training import durations, rank_budget

PyTree = Any
Scalar = float | jax.Array | np.ndarray
DECAYS = ("linear", "cosine", "none")
# Multipliers of the learning rate, with their defaults.
MULTIPLIERS = {"b_rate": 1.0, "embedding_rate": 1.0}
_WARMUP = "optimizer.warmup"
_BUDGET = "optimizer.budget"
_EMBEDDING = "embedding"  # what Flax calls the table of `nn.Embed` and `nnx.Embed`


def check(config: ConfigDict) -> None:
    """Checks the fields of the section ``optimizer``.

    Raises:
      ValueError: names all fields that are wrong.
    """
    if problems := list(list_problems(config)):
        raise ValueError(f"{'; '.join(problems)}.")


def list_problems(config: ConfigDict) -> Iterator[str]:
    """Says what is wrong with the section ``optimizer``."""
    if not 0 < config.learning_rate < math.inf:
        yield f"optimizer.learning_rate must be positive, got {config.learning_rate}"
    for field in ("weight_decay", "clip_norm"):
        if not 0 <= config[field] < math.inf:
            yield f"optimizer.{field} must not be negative, got {config[field]}"
    for field, value in read_multipliers(config).items():
        if not 0 < value < math.inf:
            yield (
                f"optimizer.{field} multiplies the learning rate and must be positive, got {value}"
            )
    try:
        durations.parse_field(_WARMUP, config.warmup, number="fraction")
    except ValueError as error:
        yield str(error).rstrip(".")
    yield from _list_budget_problems(config)
    if config.decay not in DECAYS:
        yield f"optimizer.decay must be one of {', '.join(DECAYS)}, got {config.decay!r}"


def _list_budget_problems(config: ConfigDict) -> Iterator[str]:
    if not 0 <= config.get("orthogonality", 0.0) < math.inf:
        yield f"optimizer.orthogonality must not be negative, got {config.orthogonality}"
    fields = config.get("budget")
    if not fields:
        return
    if fields.target_rank < 0:
        yield f"{_BUDGET}.target_rank must be at least 1, or 0 for none, got {fields.target_rank}"
    if fields.every < 1:
        yield f"{_BUDGET}.every must be at least 1, got {fields.every}"
    for name in ("beta1", "beta2"):
        if not 0 < fields[name] < 1:
            yield f"{_BUDGET}.{name} must be between 0 and 1, got {fields[name]}"
    for name in ("begin", "end"):
        try:
            durations.parse_field(f"{_BUDGET}.{name}", fields[name], number="fraction")
        except ValueError as error:
            yield str(error).rstrip(".")


def read_multipliers(config: ConfigDict) -> dict[str, float]:
    """Returns the multipliers of the learning rate; a config without them has the defaults."""
    return {name: config.get(name, default) for name, default in MULTIPLIERS.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the optimizer: numbers, or JAX scalars where a sweep varies them.

    Attributes:
      learning_rate: learning rate at its peak.
      warmup_steps: number of steps of the linear rise to the peak; 0 for none.
      total_steps: step at which the decay has come to zero.
      weight_decay: weight decay of AdamW; it is multiplied by the learning rate.
      clip_norm: largest global norm of a gradient; infinite for no limit.
      b_rate: multiplier of the learning rate for the factors ``b`` (LoRA+).
      embedding_rate: multiplier of the learning rate for embeddings, adapted or trained in full; it
        holds for both of their factors.
      budget: budget of AdaLoRA's ranks; None to keep them all.
    """

    learning_rate: Scalar
    warmup_steps: Scalar
    total_steps: Scalar
    weight_decay: Scalar
    clip_norm: Scalar
    b_rate: Scalar = 1.0
    embedding_rate: Scalar = 1.0
    budget: rank_budget.Budget | None = None


def settings(config: ConfigDict, total_steps: int, *, per_epoch: int | None = None) -> Settings:
    """Returns the settings that a config describes.

    Args:
      config: section ``optimizer`` of a config.
      total_steps: number of steps of the run.
      per_epoch: number of steps of an epoch, which may measure the warm-up; by default that of the
        whole run.

    Raises:
      ValueError: as :func:`check`; or the warm-up takes as long as the run.
    """
    check(config)
    warmup = durations.to_steps(
        config.warmup, per_epoch=per_epoch or total_steps, total=total_steps, number="fraction"
    )
    if warmup and warmup >= total_steps:
        raise ValueError(
            f"{_WARMUP} {config.warmup!r} takes {warmup} steps, and the run has {total_steps}: the "
            "learning rate would never come to its peak."
        )
    return Settings(
        learning_rate=config.learning_rate,
        warmup_steps=warmup,
        total_steps=total_steps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm or math.inf,
        **read_multipliers(config),
        budget=_read_budget(config, total_steps, per_epoch or total_steps),
    )


def _read_budget(config: ConfigDict, total: int, per_epoch: int) -> rank_budget.Budget | None:
    fields = config.get("budget")
    if not fields or not fields.target_rank:
        return None
    count = lambda name: durations.to_steps(
        fields[name], per_epoch=per_epoch, total=total, number="fraction"
    )
    begin, end = count("begin"), count("end")
    if begin >= total - end:
        raise ValueError(
            f"{_BUDGET}.begin {fields.begin!r} and {_BUDGET}.end {fields.end!r} take {begin} and "
            f"{end} steps, and the run has {total}: there is none left in which ranks could fall."
        )
    return rank_budget.Budget(
        target_rank=fields.target_rank,
        begin=begin,
        final=total - end,
        every=fields.every,
        beta1=fields.beta1,
        beta2=fields.beta2,
    )


def schedule(settings: Settings, decay: str) -> optax.Schedule:
    """Returns a linear warm-up, then the decay to zero at the last step; or none, for "none".

    The cosine is ``(1 + cos πx) / 2`` of the peak (Loshchilov & Hutter 2017, eq. 5), where ``x`` is
    the fraction of the decay that is over. Optax's own schedules take the number of steps as a
    Python number, and a sweep has an array.

    >>> steps = {"warmup_steps": 2, "total_steps": 6}
    >>> settings = Settings(learning_rate=0.5, weight_decay=0.0, clip_norm=1.0, **steps)
    >>> rate = schedule(settings, "linear")
    >>> [float(rate(step)) for step in range(7)]
    [0.0, 0.25, 0.5, 0.375, 0.25, 0.125, 0.0]
    """
    return lambda step: _compute_rate(settings, decay, jnp.asarray(step, float), jnp)


def _compute_rate(s: Settings, decay: str, step: Scalar, xp: ModuleType) -> Scalar:
    """Computes the learning rate with ``xp``, which is numpy or ``jax.numpy``."""
    rise = step / xp.maximum(s.warmup_steps, 1)
    left = (s.total_steps - step) / xp.maximum(s.total_steps - s.warmup_steps, 1)
    if decay == "cosine":
        left = 0.5 * (1 - xp.cos(xp.pi * xp.clip(left, 0.0, 1.0)))
    if decay == "none":
        left = xp.ones_like(left)
    fraction = xp.where(step < s.warmup_steps, rise, left)
    return s.learning_rate * xp.clip(fraction, 0.0, 1.0)


def make_rate(
    config: ConfigDict, total_steps: int, *, per_epoch: int | None = None
) -> Callable[[int], float]:
    """Returns the function from a step, of which the first is 1, to its learning rate.

    It is :func:`schedule` for the host, whose first update has number 0. Arguments are as in
    :func:`settings`.
    """
    numbers = settings(config, total_steps, per_epoch=per_epoch)
    return lambda step: float(_compute_rate(numbers, config.decay, np.float64(step - 1), np))


def describe_rates(config: ConfigDict, learning_rate: float) -> dict[str, float]:
    """Returns the learning rates of a step by name, as they are logged.

    A rate that a multiplier sets apart has a name of its own.

    >>> describe_rates(ConfigDict({"b_rate": 16.0}), 0.5)
    {'learning_rate': 0.5, 'b_learning_rate': 8.0}
    """
    apart = {name: x for name, x in read_multipliers(config).items() if x != 1.0}
    name_rate = lambda name: f"{name.removesuffix('_rate')}_learning_rate"
    more = {name_rate(name): x * learning_rate for name, x in apart.items()}
    return {"learning_rate": learning_rate} | more


def adamw(settings: Settings, adapter: PyTree, decay: str) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov & Hutter 2019) for the leaves of an adapter that are trained."""
    clip = optax.clip_by_global_norm(settings.clip_norm)
    rule = optax.adamw(schedule(settings, decay), weight_decay=settings.weight_decay)
    rule = multiply_rates(rule, settings, adapter)
    if settings.budget is not None:
        _check_budget(settings.budget, adapter)
        rule = rank_budget.allocate(rule, settings.budget)
    parts = {"trainable": optax.chain(clip, rule), "frozen": optax.set_to_zero()}
    return optax.multi_transform(parts, lora.labels(adapter))


def _check_budget(budget: rank_budget.Budget, adapter: PyTree) -> None:
    if isinstance(budget.target_rank, jax.Array):  # of a sweep, whose runs were checked alone
        return
    kernels, triplets = rank_budget.count_kernels(adapter)
    if not kernels:
        raise ValueError(
            f"{_BUDGET}.target_rank is {budget.target_rank}, and no kernel is adapted by AdaLoRA: "
            'set lora.method="adalora", or target_rank to 0.'
        )
    if budget.target_rank * kernels >= triplets:
        raise ValueError(
            f"{_BUDGET}.target_rank is {budget.target_rank}, and kernels begin with a rank of "
            f"{triplets / kernels:g}, which is to fall: choose a lower target_rank, or a higher "
            "lora.rank."
        )


def multiply_rates(
    tx: optax.GradientTransformationExtraArgs, settings: Settings, adapter: PyTree
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the updates of some leaves: LoRA+ (Hayou et al. 2024, section 4), and embeddings.

    As in PEFT an embedding has a rate of its own, whatever the rate of ``b``. A multiplier that is
    the number 1 costs nothing: with no other ones, the transformation is returned as it is. The
    state is that of ``tx`` in any case.

    Args:
      tx: rule whose updates are proportional to the learning rate.
      settings: multipliers.
      adapter: adapter that is trained.

    Raises:
      ValueError: the adapter has no leaf that a multiplier is for.
    """
    multipliers = {name: getattr(settings, name) for name in MULTIPLIERS}
    multipliers = {name: x for name, x in multipliers.items() if _is_set(x)}
    if not multipliers:
        return tx
    groups = label_rates(adapter)
    if idle := sorted(set(multipliers) - set(jax.tree.leaves(groups))):
        raise ValueError(
            f"optimizer.{idle[0]} is {multipliers[idle[0]]}, and the adapter has no leaf that it "
            f"is for: {_MEANINGS[idle[0]]}. Leave it at 1, or adapt such a leaf."
        )

    def multiply(update: Any, group: str) -> Any:
        factor = 1.0 if _is_masked(update) else multipliers.get(group, 1.0)
        return update * jnp.asarray(factor, update.dtype) if _is_set(factor) else update

    def compute(grads: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> tuple:
        updates, state = tx.update(grads, state, params, **extra)
        return jax.tree.map(multiply, updates, groups, is_leaf=_is_masked), state

    return optax.GradientTransformationExtraArgs(tx.init, compute)


_MEANINGS = {
    "b_rate": "it is for the factors b of kernels that are no embeddings",
    "embedding_rate": f"it is for leaves called {_EMBEDDING!r}",
}


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)  # of what another part of the optimizer is for


def _is_set(multiplier: Scalar) -> bool:
    return not isinstance(multiplier, int | float) or multiplier != 1


def label_rates(adapter: PyTree) -> PyTree:
    """Labels each leaf of an adapter with the multiplier of its learning rate, "" for none."""

    def label(name: str, entry: Any) -> Any:
        is_table = name.rpartition("/")[2] == _EMBEDDING
        return fields.map_fields(lambda _, field, x: _label_rate(field, is_table), entry)

    labels = [label(name, x) for name, x in adapters.nodes(adapter).items()]
    return jax.tree.unflatten(jax.tree.structure(adapter, is_leaf=is_node), labels)


def _label_rate(field: Field, is_table: bool) -> str:
    if not field.is_trained:
        return ""
    if is_table:
        return "embedding_rate"
    return "b_rate" if field.has_b_rate else ""


def make(
    config: ConfigDict, adapter: PyTree, total_steps: int, *, per_epoch: int | None = None
) -> optax.GradientTransformation:
    """Makes the optimizer of a config, for an adapter; arguments as in :func:`settings`.

    Raises:
      ValueError: as :func:`settings`.
    """
    return adamw(settings(config, total_steps, per_epoch=per_epoch), adapter, config.decay)
