"""Chooses the kernels of an adapter, and makes its first values."""

import dataclasses
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import hints, paths
from lora_jax.adapted_biases import find_biases, init_biases
from lora_jax.adapter import base_leaves
from lora_jax.config import ALL_LINEAR, LoRAConfig
from lora_jax.factors import IN, OUT, factor_shapes, positions, wide_dtype
from lora_jax.kernels import (
    KERNEL,
    Kernels,
    Leaf,
    Row,
    Table,
    find_kernels,
    is_real,
    max_rank,
)
from lora_jax.methods import ANY_RANK, METHODS
from lora_jax.methods.start import Start
from lora_jax.nodes import Adapted
from lora_jax.quantized import as_array
from lora_jax.trained_tokens import choose_tokens, init_tokens

PyTree = Any
Array = jax.Array


def init(
    key: Array, fn: Callable, params: PyTree, config: LoRAConfig, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Makes the adapter with which the adapted function starts as ``fn`` itself.

    ``fn(params, *args, **kwargs)`` is traced abstractly, never run, to learn which axes of each
    kernel are inputs, outputs and batch. Then ``a ~ U(-1/√fan_in, 1/√fan_in)`` and ``b = 0``, so
    that ``ΔW = 0`` (Hu et al. 2021, section 4.1), or what ``config.init`` says. Each kernel's draw
    depends on the key, its own path and shapes alone: another choice of targets leaves it as it is.

    Args:
      key: PRNG key.
      fn: function to adapt, whose first argument is the parameters.
      params: its parameters: arrays or ``jax.ShapeDtypeStruct`` in any containers.
      config: what to adapt and train.
      *args: example arguments; arrays may be given as ``jax.ShapeDtypeStruct``.
      **kwargs: likewise.

    Returns:
      Nested dictionaries with, per kernel, ``LowRank(a (*batch, *in, rank), b (*batch, rank, *out),
      scale)``, the factors in the kernel's dtype or float32, the wider, and the scale a Python
      float, with the config's rate of dropout; and copies of the leaves that ``config.train``
      names. The leaves of this tree are what is trained.

    Raises:
      ValueError: an entry of the config matches nothing, or nothing that can be adapted; targets
        and train overlap; a rank exceeds the smaller side of a kernel that the config names
        ("all-linear" takes the largest rank that each kernel allows); the factors' dtype can't hold
        a scale; or ``params`` are bound to an adapter.

    Warns:
      UserWarning: a kernel that was asked for can't be adapted; an equation has a form that is not
        understood, so that kernels may be missing; an adapter is not smaller than its kernel.
        :func:`tabulate` lists every leaf with the reason.

    >>> params = {"dense": {"kernel": jnp.zeros((10, 6)), "bias": jnp.zeros(6)}}
    >>> fn = lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"]
    >>> config = LoRAConfig(rank=2, targets=("dense",))
    >>> adapter = init(jax.random.key(0), fn, params, config, jnp.zeros(10))
    >>> jax.tree.map(jnp.shape, adapter)["dense"]["kernel"].b
    (2, 6)
    """
    leaves = base_leaves(params)
    choice = choose(fn, params, config, args, kwargs, leaves=leaves)
    return make_adapter(key, choice, config, leaves, METHODS[config.method])


def make_adapter(
    key: Array,
    choice: "Choice",
    config: LoRAConfig,
    leaves: Mapping[str, Any],
    make_node: Callable[[Start], Adapted],
) -> dict[str, Any]:
    """Makes the adapter of a choice; the results, errors and warnings are those of :func:`init`.

    Args:
      key: PRNG key.
      choice: what to adapt and train.
      config: settings of the adapter.
      leaves: leaves of the parameters by name.
      make_node: function that makes the node of a kernel.
    """
    trained = choice.trained
    for what, chosen in (("train", trained), ("train_tokens", choice.tokens)):
        if abstract := [n for n in chosen if isinstance(leaves[n], jax.ShapeDtypeStruct)]:
            raise ValueError(
                f"{what} needs the values of {paths.listing(abstract)}, and got shapes only."
            )
    _warn(choice, config)
    # Copies, so that a step that donates the adapter spares the base.
    full = {n: jnp.array(as_array(leaves[n]), copy=True) for n in leaves if n in trained}
    sides = _find_largest_sides(choice)
    starts = {n: _make_start(key, n, choice, config, leaves[n], sides) for n in choice.ranks}
    nodes = {n: make_node(start) for n, start in starts.items()}
    nodes |= init_biases(nodes, choice.biases)
    nodes |= init_tokens(choice.kernels, choice.tokens, leaves)
    return paths.nest({n: (nodes | full)[n] for n in leaves if n in nodes or n in full})


def tabulate(fn: Callable, params: PyTree, config: LoRAConfig, *args: Any, **kwargs: Any) -> Table:
    """Lists every leaf of the parameters: what it is, and what becomes of it, or why nothing does.

    Args:
      fn: function to adapt, as for :func:`init`; it is traced, never run.
      params: its parameters: arrays or ``jax.ShapeDtypeStruct`` in any containers.
      config: what to adapt and train.
      *args: example arguments; arrays may be given as ``jax.ShapeDtypeStruct``.
      **kwargs: likewise.

    Returns:
      A :class:`~lora_jax.kernels.Table`, with a row for each leaf by name, which prints as a table.

    Raises:
      ValueError: as :func:`init`.

    >>> params = {"dense": {"kernel": jnp.zeros((10, 2)), "bias": jnp.zeros(2)}}
    >>> fn = lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"]
    >>> print(tabulate(fn, params, LoRAConfig(rank=4), jnp.zeros(10)))
    leaf         shape kind   axes action  rank
    dense/bias   2     other       frozen       is a vector or a number: it has no two sides
    dense/kernel 10×2  kernel io   adapted 2    the rank is lowered from 4 to what the kernel allows
    """
    leaves = base_leaves(params)
    choice = choose(fn, params, config, args, kwargs, leaves=leaves)
    kernels = choice.kernels
    if not kernels.leaves:  # where nothing is to be adapted, `choose` does not look for kernels
        kernels = find_kernels(fn, params, args, kwargs, config, leaves=leaves)
    rows = {n: _make_row(n, leaf, choice, config) for n, leaf in kernels.leaves.items()}
    return Table(rows=rows, unknown=kernels.unknown)


def _make_row(name: str, leaf: Leaf, choice: "Choice", config: LoRAConfig) -> Row:
    if name in choice.trained:
        return Row(leaf=leaf, action="trained", note="in full")
    if name in choice.biases.values():
        return Row(leaf=leaf, action="adapted", note="as the kernel beside it")
    if name in choice.tokens:
        return Row(leaf=leaf, action="tokens", note=f"{len(choice.tokens[name])} of them")
    if name not in choice.ranks:
        skipped = "" if leaf.reason or not leaf.axes else "not among the targets"
        return Row(leaf=leaf, action="frozen", note=leaf.reason or skipped)
    rank, wanted = choice.ranks[name], config.kernel_rank(name)
    lowered = f"the rank is lowered from {wanted} to what the kernel allows"
    note = lowered if rank < wanted else ""
    return Row(leaf=leaf, action="adapted", rank=rank, note=note)


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


def _warn(choice: Choice, config: LoRAConfig) -> None:
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


def _find_largest_sides(choice: Choice) -> tuple[int, int]:
    """Finds the largest numbers of inputs and of outputs among the kernels to adapt."""
    leaves = [choice.kernels.leaves[name] for name in choice.ranks]
    size = lambda leaf, role: math.prod(leaf.shape[k] for k in positions(leaf.axes, role))
    n_in, n_out = (max((size(leaf, role) for leaf in leaves), default=0) for role in (IN, OUT))
    return n_in, n_out


def _make_start(
    key: Array,
    name: str,
    choice: Choice,
    config: LoRAConfig,
    w: Any,
    largest_sides: tuple[int, int],
) -> Start:
    leaf, rank = choice.kernels.leaves[name], choice.ranks[name]
    dtype = wide_dtype(leaf.dtype)
    return Start(
        # crc32 of the path: the same number in every process, unlike `hash`.
        key=jax.random.fold_in(key, zlib.crc32(name.encode())),
        name=name,
        kernel=w,
        axes=leaf.axes,
        rank=rank,
        scale=_check_scale(name, config.kernel_scale(name, rank), dtype),
        dtype=dtype,
        dropout=config.dropout,
        init=config.init,
        train_a=config.train_a,
        largest_sides=largest_sides,
        projection_seed=config.projection_seed,
    )


def _check_scale(name: str, scale: float, dtype: Any) -> float:
    limits = jnp.finfo(dtype)
    if not float(limits.tiny) <= scale <= float(limits.max):
        raise ValueError(
            f"The scale alpha / rank of the kernel {name!r} would be {scale}, which {dtype} can't "
            "hold. Choose another alpha (alpha_pattern sets it per kernel)."
        )
    return scale
