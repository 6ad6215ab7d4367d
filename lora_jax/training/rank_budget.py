"""The budget of AdaLoRA's ranks (Zhang et al. 2023, section 3.2 and 3.3), as a transformation.

Each step estimates how important each triplet is for the loss; the entries of ``e`` of the least
important ones are set to zero, by the update, so that what is left is the budget of that step.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.factors import BATCH
from lora_jax.methods.adalora import AdaLoRA
from lora_jax.nodes import is_node

PyTree = Any
Array = jax.Array
Scalar = float | Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Settings of a budget: numbers, or JAX scalars.

    Attributes:
      target_rank: mean rank of a kernel at the end.
      begin: last step, of which the first is 0, with the whole budget; PEFT's ``tinit``.
      final: first step whose choice holds to the end; PEFT's ``total_step - tfinal``.
      every: number of steps from one choice to the next; PEFT's ``deltaT``.
      beta1: decay of the mean of the sensitivity.
      beta2: decay of the mean of its uncertainty.
    """

    target_rank: Scalar
    begin: Scalar
    final: Scalar
    every: Scalar
    beta1: Scalar
    beta2: Scalar


class BudgetState(NamedTuple):
    """State of :func:`allocate`.

    Attributes:
      step: number of steps that are done.
      rule: state of the rule.
      sensitivity: running mean of ``|p·g|`` of each entry of the nodes.
      uncertainty: running mean of its deviation.
      kept: whether each triplet was kept by the last choice, in place of ``e``.
    """

    step: Array
    rule: PyTree
    sensitivity: PyTree
    uncertainty: PyTree
    kept: PyTree


def allocate(
    rule: optax.GradientTransformationExtraArgs, budget: Budget
) -> optax.GradientTransformationExtraArgs:
    """Prunes triplets after each update of a rule.

    Args:
      rule: rule of the optimizer; its updates are what is added to the parameters.
      budget: settings.
    """

    def init(params: PyTree) -> BudgetState:
        nodes = _pick(params)
        zeros = lambda: jax.tree.map(jnp.zeros_like, nodes)
        kept = _map_nodes(lambda x: _only_e(x, jnp.ones(x.e.shape, bool)), nodes)
        return BudgetState(jnp.int32(0), rule.init(params), zeros(), zeros(), kept)

    def update(grads: PyTree, state: BudgetState, params: PyTree = None, **extra: Any) -> tuple:
        updates, rule_state = rule.update(grads, state.rule, params, **extra)
        new = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), _pick(params), _pick(updates))
        is_open = state.step < budget.final
        means = _update_means(state, new, _pick(grads), budget)
        sensitivity, uncertainty = _choose(is_open, means, (state.sensitivity, state.uncertainty))
        scores = _map_nodes(_score, sensitivity, uncertainty)
        is_choice = (is_open & (state.step > budget.begin) & (state.step % budget.every == 0)) | (
            state.step == budget.final
        )
        chosen = _choose_triplets(scores, new, state.step, budget)
        kept = _choose(is_choice, chosen, state.kept)
        is_pruning = is_choice | (state.step > budget.final)
        updates = _prune(updates, params, kept, is_pruning)
        return updates, BudgetState(state.step + 1, rule_state, sensitivity, uncertainty, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def count_kernels(adapter: PyTree) -> tuple[int, int]:
    """Counts the kernels that AdaLoRA adapts, those of a stack one by one, and their triplets."""
    nodes = _nodes(adapter)
    return sum(math.prod(x.e.shape[:-1]) for x in nodes), sum(x.e.size for x in nodes)


def _nodes(tree: PyTree) -> list[AdaLoRA]:
    return [x for x in jax.tree.leaves(tree, is_leaf=is_node) if isinstance(x, AdaLoRA)]


def _pick(tree: PyTree) -> PyTree:
    """Puts nothing in place of all that is no node of AdaLoRA."""
    keep = lambda x: x if isinstance(x, AdaLoRA) else optax.MaskedNode()
    return jax.tree.map(keep, tree, is_leaf=is_node)


def _map_nodes(change: Any, *trees: PyTree) -> PyTree:
    return jax.tree.map(change, *trees, is_leaf=is_node)


def _only_e(node: AdaLoRA, e: Any) -> AdaLoRA:
    nothing = optax.MaskedNode()
    return dataclasses.replace(node, a=nothing, b=nothing, e=e, scale=nothing)


def _choose(is_first: Array, first: PyTree, second: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(is_first, x, y), first, second)


def _update_means(
    state: BudgetState, params: PyTree, grads: PyTree, budget: Budget
) -> tuple[PyTree, PyTree]:
    """Updates the means of the sensitivity and of its uncertainty."""
    beta1, beta2 = budget.beta1, budget.beta2
    now = jax.tree.map(lambda p, g: jnp.abs(p * g), params, grads)
    mean = jax.tree.map(
        lambda m, x: (beta1 * m + (1 - beta1) * x).astype(m.dtype), state.sensitivity, now
    )
    deviation = jax.tree.map(lambda x, m: jnp.abs(x - m), now, mean)
    uncertainty = jax.tree.map(
        lambda u, x: (beta2 * u + (1 - beta2) * x).astype(u.dtype), state.uncertainty, deviation
    )
    return mean, uncertainty


def _score(sensitivity: AdaLoRA, uncertainty: AdaLoRA) -> AdaLoRA:
    """Computes the importance of each triplet, in place of ``e``.

    That of an entry is its sensitivity times its uncertainty.
    """
    a, b, e = (getattr(sensitivity, name) * getattr(uncertainty, name) for name in ("a", "b", "e"))
    n = sensitivity.axes.count(BATCH)
    of_a = jnp.mean(a, axis=tuple(range(n, a.ndim - 1)))
    of_b = jnp.mean(b, axis=tuple(range(n + 1, b.ndim)))
    return _only_e(sensitivity, e + of_a + of_b)


def _choose_triplets(scores: PyTree, params: PyTree, step: Array, budget: Budget) -> PyTree:
    """Chooses the most important triplets of all kernels together."""
    # Columns of zeros are what a sweep has added, or what a file has lost.
    used = [jnp.any(x.a != 0, axis=_inputs(x)) for x in _nodes(params)]
    values = [
        jnp.where(is_used, x.e, -1.0) for x, is_used in zip(_nodes(scores), used, strict=True)
    ]
    flat = jnp.concatenate([x.ravel() for x in values])
    n_kernels = sum(math.prod(x.shape[:-1]) for x in values)
    most = jnp.sum(jnp.stack([jnp.sum(x) for x in used]))
    n_kept = _compute_budget(step, most, budget.target_rank * n_kernels, budget)
    places = jnp.argsort(jnp.argsort(flat))  # of equal scores, the later ones are kept
    kept = places >= flat.size - n_kept
    bounds = np.cumsum([x.size for x in values])[:-1]
    parts = iter(jnp.split(kept, bounds))
    return _map_nodes(lambda x: _only_e(x, next(parts).reshape(x.e.shape)), scores)


def _inputs(node: AdaLoRA) -> tuple[int, ...]:
    return tuple(range(node.axes.count(BATCH), node.a.ndim - 1))


def _compute_budget(step: Array, most: Array, least: Scalar, budget: Budget) -> Array:
    """Computes the number of triplets to keep: it falls with a third power."""
    left = 1 - jnp.asarray(step - budget.begin, float) / (budget.final - budget.begin)
    falling = jnp.floor((most - least) * jnp.clip(left, 0.0, 1.0) ** 3 + least)
    return jnp.where(step >= budget.final, least, falling).astype(int)


def _prune(updates: PyTree, params: PyTree, kept: PyTree, is_pruning: Array) -> PyTree:
    """Makes updates that set the entries of triplets that are not kept to zero."""
    by_place = iter(_nodes(kept))

    def prune(update: Any, node: Any) -> Any:
        if not isinstance(node, AdaLoRA):
            return update
        is_lost = is_pruning & ~next(by_place).e
        return dataclasses.replace(update, e=jnp.where(is_lost, -node.e, update.e))

    return _map_nodes(prune, updates, params)
