"""Chooses the leaves that a config wants adapted or trained, and says what it leaves out."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax import hints, paths
from lora_jax.adapted_biases import find_biases
from lora_jax.config import ALL_LINEAR, LoRAConfig
from lora_jax.factors import factor_shapes
from lora_jax.kernels import (
    KERNEL,
    Kernels,
    Leaf,
    find_kernels,
    is_real,
    max_rank,
)
from lora_jax.methods import ANY_RANK
from lora_jax.trained_tokens import choose_tokens

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What a config chooses among the leaves of a parameter tree.

    Attributes:
      kernels: all leaves, with what each is to the function.
      ranks: rank of each kernel to adapt, in the order of the leaves.
      trained: names of the leaves to train in full.
      tokens: ids of the rows, or outputs, to train of each leaf that has some.
      biases: leaf of the bias that is adapted beside each kernel; empty if none is to be.
      omissions: reasons why leaves are not adapted: those that were asked for and can't be, and
        those that "all-linear" leaves out since they can't be, or since their use can't be seen.
    """

    kernels: Kernels
    ranks: Mapping[str, int]
    trained: frozenset[str]
    tokens: Mapping[str, tuple[int, ...]]
    biases: Mapping[str, str]
    omissions: Mapping[str, str]


def choose(
    fn: Callable,
    params: PyTree,
    config: LoRAConfig,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    leaves: Mapping[str, Any],
) -> Choice:
    """Finds the kernels of ``fn`` and chooses those that the config wants; see :func:`init`.

    Args:
      fn: function to adapt.
      params: its parameters.
      config: what to adapt and train.
      args: example arguments after the parameters.
      kwargs: example keyword arguments.
      leaves: leaves of ``params`` by name.
    """
    hints.check_config(config, LoRAConfig)
    hints.check_function(fn)
    real = [n for n, x in leaves.items() if is_real(x)]
    train_hits = paths.select(config.train, real, what="train")
    trained = frozenset(n for hits in train_hits.values() for n in hits)
    explicit = [entry for entry in config.targets if entry != ALL_LINEAR]
    hits = paths.select(explicit, leaves, what="targets")
    _check_overlap(hits, trained)
    if not config.targets and not config.train_tokens:
        _check_patterns(config, [])
        none = Kernels(leaves={})
        return Choice(kernels=none, ranks={}, trained=trained, tokens={}, biases={}, omissions={})
    kernels = find_kernels(fn, params, args, kwargs, config, leaves=leaves)
    named = {n for names in hits.values() for n in names}
    kernels = _assume_usual_roles(kernels, named)
    usable = kernels.adaptable()
    _check_explicit(hits, kernels)
    tokens = choose_tokens(config, kernels, others=named | trained)
    chosen = set(named)
    if ALL_LINEAR in config.targets:
        chosen |= _select_all_linear(kernels, trained | set(tokens))
    _check_patterns(config, [n for n in usable if n in chosen])
    ranks = {n: _choose_rank(n, usable[n], config, n in named) for n in usable if n in chosen}
    missed = [n for n in leaves if _is_missed(kernels, n, named, config)]
    omissions = {n: kernels.leaves[n].reason for n in missed}
    return Choice(
        kernels=kernels,
        ranks=ranks,
        trained=trained,
        tokens=tokens,
        biases=find_biases(kernels, ranks, trained) if config.adapt_bias else {},
        omissions=omissions,
    )


def _assume_usual_roles(kernels: Kernels, named: set[str]) -> Kernels:
    """Gives named matrices whose use can't be seen the roles of kernels with inputs first.

    With either roles they have the same adapters; only the scale of the first values differs.
    """
    hidden = [n for n in kernels.leaves if n in named and _is_hidden_matrix(kernels.leaves[n])]
    usual = {n: dataclasses.replace(kernels.leaves[n], kind=KERNEL, axes="io") for n in hidden}
    return dataclasses.replace(kernels, leaves={**kernels.leaves, **usual})


def _is_hidden_matrix(leaf: Leaf) -> bool:
    return bool(leaf.hidden_in) and len(leaf.shape or ()) == 2 and not leaf.axes


def _is_missed(kernels: Kernels, name: str, named: set[str], config: LoRAConfig) -> bool:
    """Tells whether a matrix was asked for and can't be adapted; biases do not count."""
    leaf = kernels.leaves[name]
    if "bias" in name.rpartition("/")[2]:
        return False
    if leaf.axes or len(leaf.shape or ()) < 2 or not leaf.is_weight:
        return False
    is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
    return name in named or (ALL_LINEAR in config.targets and (is_complex or bool(leaf.hidden_in)))


def _check_overlap(hits: Mapping[str, Iterable[str]], trained: Iterable[str]) -> None:
    both = sorted({n for names in hits.values() for n in names} & set(trained))
    if both:
        raise ValueError(
            f"targets and train overlap in {paths.listing(both)}: a leaf is either adapted or "
            "trained in full. Narrow one of them."
        )


def _check_explicit(hits: Mapping[str, Iterable[str]], kernels: Kernels) -> None:
    usable = kernels.adaptable()
    missing = {entry: names for entry, names in hits.items() if not set(names) & set(usable)}
    if missing:
        reasons = [f"{n}: {kernels.leaves[n].reason}" for names in missing.values() for n in names]
        raise ValueError(
            f"targets entries {list(missing)} match parameters, but none that the function "
            f"contracts, convolves or looks up, so there is no kernel to adapt. "
            f"{_shorten(reasons)}. Kernels here: {paths.listing(usable)}. If one of them is a "
            "kernel all the same, say which axes are inputs (i), outputs (o) and batch (b): "
            f'roles={{"{next(iter(missing))}": "io"}}.{_describe_unknown(kernels)}'
        )


def _shorten(reasons: list[str], most: int = 8) -> str:
    reasons = list(dict.fromkeys(reasons))
    return "; ".join([*reasons[:most], *(["..."] if len(reasons) > most else [])])


def _describe_unknown(kernels: Kernels) -> str:
    """Says which equations were not understood: kernels may be behind them."""
    if not kernels.unknown:
        return ""
    return (
        " Kernels may be missing, since the jaxpr of the function is not understood: "
        + "; ".join(kernels.unknown)
        + "."
    )


def _select_all_linear(kernels: Kernels, trained: Iterable[str]) -> set[str]:
    linear = {
        n for n, leaf in kernels.adaptable().items() if leaf.kind == KERNEL and leaf.is_weight
    } - set(trained)
    if not linear:
        raise ValueError(
            f"targets {ALL_LINEAR!r} finds no kernel: the function contracts none of its "
            f"parameters, or `train` names them all. Kernels here: "
            f"{paths.listing(kernels.adaptable())}.{_describe_hidden(kernels)}{_describe_unknown(kernels)}"
        )
    return linear


def _describe_hidden(kernels: Kernels) -> str:
    """Says which leaves go into primitives that can't be looked into; naming them adapts them."""
    hidden = [f"{n} {leaf.reason}" for n, leaf in kernels.leaves.items() if leaf.hidden_in]
    return f" Name those among these that are kernels: {_shorten(hidden)}." if hidden else ""


def _check_patterns(config: LoRAConfig, names: Iterable[str]) -> None:
    for what in ("rank_pattern", "alpha_pattern", "roles"):
        paths.select(getattr(config, what), names, what=what)


def _choose_rank(name: str, leaf: Leaf, config: LoRAConfig, is_named: bool) -> int:
    """Chooses the rank of a kernel; for "all-linear" it is what the kernel allows at most."""
    rank, most = config.kernel_rank(name), max_rank(leaf)
    if config.method in ANY_RANK:
        return rank
    explicit = is_named or any(paths.matches(p, name) for p in config.rank_pattern)
    if rank > most and explicit:
        raise ValueError(
            f"rank {rank} is larger than the kernel {name!r} of shape {leaf.shape} allows to "
            f"mean anything: its change has rank {most} at most. Lower the rank (rank_pattern sets "
            "it per kernel), or train the kernel in full (train)."
        )
    return min(rank, most)


def warn(choice: Choice, config: LoRAConfig) -> None:
    """Warns of kernels that were asked for and are not adapted, or that are adapted by a guess."""
    kernels = choice.kernels
    say = lambda text: warnings.warn(text, UserWarning, stacklevel=4)
    if kernels.unknown:
        say(f"Some kernels may not be adapted.{_describe_unknown(kernels)}")
    if choice.omissions:
        reasons = [f"{name} {reason}" for name, reason in choice.omissions.items()]
        say(f"Not adapted: {_shorten(reasons)}. lora_jax.tabulate lists every leaf.")
    guessed = [n for n in choice.ranks if kernels.leaves[n].hidden_in]
    if guessed:
        say(
            f"The use of {paths.listing(guessed)} can't be seen, since a primitive hides it: taken "
            'for a kernel whose first axis is its input. Say so (roles={"...": "io"}), or say '
            'otherwise (roles={"...": "oi"}), to be rid of this warning.'
        )
    wide = [n for n, r in choice.ranks.items() if _is_wide(kernels.leaves[n], r)]
    if wide and config.method not in ANY_RANK:
        say(
            f"The adapters of {paths.listing(wide)} are not smaller than their kernels: a lower "
            "rank, or training these in full (train), would do the same for less."
        )


def _is_wide(leaf: Leaf, rank: int) -> bool:
    """Tells whether the factors are as large as the kernel, at a rank that was not lowered."""
    shapes = factor_shapes(leaf.shape or (), leaf.axes, rank)
    size = sum(math.prod(shape) for shape in shapes)
    return size >= math.prod(leaf.shape or ()) and rank < max_rank(leaf)
