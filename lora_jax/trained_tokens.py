"""Chooses the tables of which some rows are trained, and makes their first values."""

from collections.abc import Collection, Mapping
from typing import Any

import jax

from lora_jax import paths
from lora_jax.config import LoRAConfig
from lora_jax.factors import wide_dtype
from lora_jax.kernels import TABLE, Kernels, Leaf
from lora_jax.methods.tokens import (
    TiedRows,
    Tokens,
    TrainedOutputs,
    TrainedRows,
    describe_ids,
    start_tokens,
)
from lora_jax.quantized import as_array

Array = jax.Array


def choose_tokens(
    config: LoRAConfig, kernels: Kernels, *, others: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Chooses the leaves that ``config.train_tokens`` names, with their ids.

    Args:
      config: config of the adapter.
      kernels: all leaves, with what each is to the function.
      others: names of the leaves that are adapted or trained in full.

    Raises:
      ValueError: an entry matches no table or head, or a leaf that is to be adapted or trained in
        full as well; or an id is none of its tokens.
    """
    hits = paths.select(config.train_tokens, kernels.leaves, what="train_tokens")
    tokens: dict[str, tuple[int, ...]] = {}
    for pattern, names in hits.items():
        fitting = [n for n in names if _has_tokens(kernels.leaves[n])]
        if not fitting:
            raise ValueError(_describe_unfit(pattern, names, kernels))
        for name in fitting:
            _check(name, kernels.leaves[name], tuple(config.train_tokens[pattern]), others)
            if name in tokens:
                raise ValueError(f"Two entries of train_tokens match {name!r}: leave one out.")
            tokens[name] = tuple(config.train_tokens[pattern])
    return {n: tokens[n] for n in kernels.leaves if n in tokens}


def init_tokens(
    kernels: Kernels, tokens: Mapping[str, tuple[int, ...]], leaves: Mapping[str, Any]
) -> dict[str, Tokens]:
    """Makes the nodes of the chosen leaves, in float32 or the leaf's dtype if that is wider.

    Args:
      kernels: all leaves, with what each is to the function.
      tokens: ids by leaf, from :func:`choose_tokens`.
      leaves: leaves of the parameters by name.
    """
    made = {}
    for name, ids in tokens.items():
        leaf = kernels.leaves[name]
        dtype = wide_dtype(leaf.dtype)
        kernel = as_array(leaves[name])
        made[name] = start_tokens(_choose_class(leaf), kernel, leaf.axes, ids, dtype)
    return made


def _choose_class(leaf: Leaf) -> type[TrainedRows | TrainedOutputs]:
    """Chooses by the use: tokens are looked up along the inputs, and a head has them as outputs."""
    if leaf.kind == TABLE:
        return TrainedRows
    return TiedRows if leaf.is_looked_up else TrainedOutputs


def _has_tokens(leaf: Leaf) -> bool:
    return bool(leaf.axes) and leaf.axes.count(_choose_class(leaf).side) == 1


def _describe_unfit(pattern: str, names: list[str], kernels: Kernels) -> str:
    reasons = [f"{n} {kernels.leaves[n].reason or 'has several such axes'}" for n in names]
    return (
        f"train_tokens entry {pattern!r} matches parameters, but none with one axis of tokens, as "
        f"a table that is looked up and a head have: {'; '.join(reasons[:8])}. Tables here: "
        f"{paths.listing(n for n, leaf in kernels.leaves.items() if leaf.is_looked_up)}."
    )


def _check(name: str, leaf: Leaf, ids: tuple[int, ...], others: Collection[str]) -> None:
    if name in others:
        raise ValueError(
            f"train_tokens and another entry of the config (targets or train) both name {name!r}: "
            "either some of its rows are trained, or the whole of it is adapted or trained. Leave "
            "one out."
        )
    size = (leaf.shape or ())[leaf.axes.index(_choose_class(leaf).side)]
    if problem := describe_ids(ids, size):
        raise ValueError(f"train_tokens can't train rows of {name!r}: {problem}.")
