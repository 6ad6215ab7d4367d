"""Adapters: small trees that overlay a parameter tree.

At the path of a leaf an adapter holds a :class:`~lora_jax.lowrank.LowRank` node, which is added to
the kernel there, or a plain array, which replaces the leaf. An adapter is a nested dictionary with
the path components as keys, whatever containers the parameters use. LoRA, LoRA with a trained
head, BitFit, a linear probe and full fine-tuning are all values of this one type.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import interpreter, lowrank, paths
from lora_jax.config import ALL_LINEAR, LoRAConfig
from lora_jax.lift import trace
from lora_jax.lowrank import LowRank, Trained

PyTree = Any
Array = jax.Array
TRAINABLE, FROZEN = "trainable", "frozen"


def init(
    key: Array, fn: Callable, params: PyTree, config: LoRAConfig, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Makes the adapter with which the adapted function starts as ``fn`` itself.

    ``fn(params, *args, **kwargs)`` is traced abstractly, never run, to learn which axes of each
    kernel are inputs, outputs and batch. Then ``a ~ U(-1/√fan_in, 1/√fan_in)`` and ``b = 0``, so
    that ``ΔW = 0`` (Hu et al. 2021, section 4.1). Each kernel's draw depends on the key, its own
    path and shapes alone: another choice of targets leaves it as it is.

    Args:
      key: PRNG key.
      fn: the function to adapt, of the parameters and then anything.
      params: its parameters: arrays or ``jax.ShapeDtypeStruct`` in any containers.
      config: what to adapt and train.
      *args: example arguments; arrays may be given as ``jax.ShapeDtypeStruct``.
      **kwargs: likewise.

    Returns:
      Nested dictionaries with, per kernel, ``LowRank(a (*batch, *in, rank), b (*batch, rank, *out),
      scale ())`` in the kernel's dtype or float32, the wider; and copies of the leaves that
      ``config.train`` names.

    Raises:
      ValueError: an entry of the config matches nothing, or nothing that can be adapted; targets
        and train overlap; a rank exceeds the smaller side of its kernel.

    >>> params = {"dense": {"kernel": jnp.zeros((10, 6)), "bias": jnp.zeros(6)}}
    >>> fn = lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"]
    >>> config = LoRAConfig(rank=2, targets=("dense",))
    >>> adapter = init(jax.random.key(0), fn, params, config, jnp.zeros(10))
    >>> jax.tree.map(jnp.shape, adapter)["dense"]["kernel"].b
    (2, 6)
    """
    leaves = paths.named_leaves(params)
    trained = _trained(leaves, config)
    axes = _target_axes(fn, params, config, (args, kwargs), trained=trained)
    _check_patterns(config, axes)
    abstract = [n for n in trained if isinstance(leaves[n], jax.ShapeDtypeStruct)]
    if abstract:
        raise ValueError(
            f"train needs the values of {paths.listing(abstract)}, and got shapes only."
        )
    # Copies, so that a step that donates the adapter spares the base.
    full = {n: jnp.array(leaves[n], copy=True) for n in leaves if n in trained}
    nodes = {n: _init_node(key, n, leaves[n], axes=a, config=config) for n, a in axes.items()}
    return paths.nest({n: (nodes | full)[n] for n in leaves if n in nodes or n in full})


def _trained(leaves: Mapping[str, Any], config: LoRAConfig) -> set[str]:
    """Names of the leaves that ``config.train`` selects; integers (counters, keys) can't train."""
    real = [n for n, x in leaves.items() if _is_real(x)]
    return {n for hits in paths.select(config.train, real, what="train").values() for n in hits}


def _is_real(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _target_axes(
    fn: Callable, params: PyTree, config: LoRAConfig, inputs: tuple, *, trained: set[str]
) -> dict[str, str]:
    """Roles of the axes of each kernel to adapt."""
    leaves = {n: x for n, x in paths.named_leaves(params).items() if _is_real(x)}
    explicit = [entry for entry in config.targets if entry != ALL_LINEAR]
    hits = paths.select(explicit, leaves, what="targets")
    _check_overlap(hits, trained)
    if not config.targets:
        return {}
    uses = kernel_uses(fn, params, *inputs[0], **inputs[1])
    missing = [entry for entry, names in hits.items() if not set(names) & set(uses)]
    if missing:
        raise ValueError(
            f"targets entries {missing} match parameters, but none that the function contracts, "
            f"convolves or looks up, so there is no kernel to adapt. Kernels here: "
            f"{paths.listing(uses)}."
        )
    chosen = {n for names in hits.values() for n in names}
    if ALL_LINEAR in config.targets:
        linear = {n for n, (kind, _) in uses.items() if kind != "gather"} - trained
        if not linear:
            raise ValueError(
                f"targets {ALL_LINEAR!r} finds no kernel: the function contracts none of its "
                f"parameters, or `train` names them all. Kernels here: {paths.listing(uses)}."
            )
        chosen |= linear
    return {n: axes for n, (_, axes) in uses.items() if n in chosen}


def _check_overlap(hits: Mapping[str, Iterable[str]], trained: set[str]) -> None:
    both = sorted({n for names in hits.values() for n in names} & trained)
    if both:
        raise ValueError(
            f"targets and train overlap in {paths.listing(both)}: a leaf is either adapted or "
            "trained in full. Narrow one of them."
        )


def _check_patterns(config: LoRAConfig, kernels: Iterable[str]) -> None:
    for what in ("rank_pattern", "alpha_pattern"):
        paths.select(getattr(config, what), kernels, what=what)


def kernel_uses(fn: Callable, params: PyTree, *args: Any, **kwargs: Any) -> dict[str, tuple]:
    """Finds the kernels of ``fn``: ``{name: (primitive, axes)}`` for each leaf used as one.

    A leaf used in several ways (a tied embedding) gets the roles of its lookup if there is one,
    of its first use otherwise.
    """
    leaves = paths.named_leaves(params)
    probes = [
        LowRank(None, None, None, w=x, name=name) if _is_real(x) and x.ndim > 1 else x
        for name, x in leaves.items()
    ]
    probed = jax.tree.structure(params).unflatten(probes)
    events = [e for e in trace(fn, (probed, *args), kwargs) if _has_both_sides(e.roles)]
    linear = {e.name for e in events if e.primitive != "gather"}
    found: dict[str, tuple] = {}
    for event in sorted(events, key=lambda e: e.primitive != "gather"):  # a stable sort
        kind = "dot_general" if event.name in linear else "gather"
        found.setdefault(event.name, (kind, event.roles))
    return {name: found[name] for name in leaves if name in found}


def _has_both_sides(roles: str) -> bool:
    return lowrank.IN in roles and lowrank.OUT in roles


def _init_node(key: Array, name: str, w: Any, *, axes: str, config: LoRAConfig) -> LowRank:
    rank, most = config.kernel_rank(name), lowrank.max_rank(w.shape, axes)
    if rank > most:
        raise ValueError(
            f"rank {rank} is larger than the kernel {name!r} of shape {tuple(w.shape)} allows to "
            f"mean anything: its change has rank {most} at most. Lower the rank (rank_pattern sets "
            "it per kernel), or train the kernel in full (train)."
        )
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    # crc32 of the path: the same number in every process, unlike `hash`.
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return LowRank(
        a=lowrank.init_a(key, w.shape, axes, rank, dtype),
        b=jnp.zeros(lowrank.factor_shapes(w.shape, axes, rank)[1], dtype),
        scale=jnp.asarray(config.kernel_scale(name), dtype),
        axes=axes,
    )


def nodes(adapter: PyTree) -> dict[str, Any]:
    """The nodes of an adapter by path: ``LowRank`` or a plain array."""
    return paths.named_leaves(adapter, is_leaf=lowrank.is_node)


def bind(params: PyTree, adapter: PyTree) -> PyTree:
    """Puts the adapter into the tree: kernels become unevaluated sums ``W_frozen + s·BA``.

    The result has the containers of ``params``, with a ``LowRank`` or ``Trained`` node where the
    adapter has an entry. Call it through :func:`lora_jax.lift`.

    Raises:
      ValueError: the adapter has a path that ``params`` lacks, or a shape that does not fit.
    """
    return _overlay(params, adapter, _bound)


def merge(params: PyTree, adapter: PyTree) -> PyTree:
    """Rewrites the tree to plain arrays, each adapted kernel being ``W + s·BA``.

    This is the definition of what an adapter means. The result has the structure, shapes and
    dtypes of ``params``, which is left as it is; the sum is rounded once to the kernel's dtype.

    Raises:
      ValueError: the adapter has a path that ``params`` lacks, or a shape that does not fit.
    """
    return _overlay(params, adapter, _merged)


def _bound(name: str, leaf: Array, node: Any) -> Any:
    if isinstance(node, LowRank):
        return dataclasses.replace(node, w=leaf, name=name)
    return Trained(node)


def _merged(name: str, leaf: Array, node: Any) -> Array:
    return lowrank.merged(leaf, node) if isinstance(node, LowRank) else node


def _overlay(params: PyTree, adapter: PyTree, put: Callable) -> PyTree:
    entries = nodes(adapter)
    leaves = paths.named_leaves(params)
    problems = misfits(leaves, entries)
    if problems:
        raise ValueError("The adapter does not fit the parameters: " + "; ".join(problems) + ".")
    new = [put(n, x, entries[n]) if n in entries else x for n, x in leaves.items()]
    return jax.tree.structure(params).unflatten(new)


def misfits(leaves: Mapping[str, Any], entries: Mapping[str, Any]) -> list[str]:
    """Says where an adapter's entries do not fit the leaves of a parameter tree."""
    unknown = [name for name in entries if name not in leaves]
    problems = [_misfit(n, leaves[n], x) for n, x in entries.items() if n in leaves]
    if unknown:
        problems.append(
            f"no parameter at {paths.listing(unknown)}; parameters here: {paths.listing(leaves)}"
        )
    return [p for p in problems if p]


def _misfit(name: str, leaf: Any, node: Any) -> str:
    if not isinstance(node, LowRank):
        fits = jnp.shape(node) == jnp.shape(leaf)
        return "" if fits else f"{name} has shape {jnp.shape(leaf)}, not {jnp.shape(node)}"
    if node.w is not None:
        return f"{name} is already bound to a kernel; pass the adapter itself"
    shape = jnp.shape(leaf)
    if len(node.axes) != len(shape):
        return (
            f"{name} has shape {shape}, but its adapter is for {len(node.axes)} axes {node.axes!r}"
        )
    rank = (jnp.shape(node.a) or (0,))[-1]
    want = (*lowrank.factor_shapes(shape, node.axes, rank), ())
    have = jnp.shape(node.a), jnp.shape(node.b), jnp.shape(node.scale)
    fits = want == have
    return "" if fits else f"{name} of shape {shape} needs a, b and scale of {want}, not {have}"


def labels(tree: PyTree) -> PyTree:
    """Labels each leaf "trainable" or "frozen", for ``optax.multi_transform``.

    Takes an adapter or a bound tree. Factors and leaves trained in full are trainable; scales,
    and in a bound tree the base, are frozen.

    >>> node = LowRank(jnp.zeros((3, 1)), jnp.zeros((1, 2)), jnp.ones(()))
    >>> jax.tree.leaves(labels({"kernel": node, "bias": jnp.zeros(2)}))
    ['trainable', 'trainable', 'trainable', 'frozen']
    """
    bound = any(
        isinstance(x, Trained) or (isinstance(x, LowRank) and x.w is not None)
        for x in jax.tree.leaves(tree, is_leaf=lowrank.is_node)
    )

    def label(node: Any) -> Any:
        if isinstance(node, LowRank):
            w = None if node.w is None else FROZEN
            return dataclasses.replace(node, a=TRAINABLE, b=TRAINABLE, scale=FROZEN, w=w)
        if isinstance(node, Trained):
            return Trained(TRAINABLE)
        return FROZEN if bound else TRAINABLE

    return jax.tree.map(label, tree, is_leaf=lowrank.is_node)


def mask(tree: PyTree) -> PyTree:
    """True for each trainable leaf, for ``optax.masked``; see :func:`labels`."""
    return jax.tree.map(lambda label: label == TRAINABLE, labels(tree))


def summary(params: PyTree, adapter: PyTree) -> str:
    """Counts parameters, in PEFT's words.

    Factors are trainable and added to the total; a leaf trained in full is counted once, where
    PEFT counts it twice (frozen original and copy).

    >>> params = {"kernel": jnp.zeros((1024, 1024))}
    >>> node = LowRank(jnp.zeros((1024, 8)), jnp.zeros((8, 1024)), jnp.ones(()))
    >>> summary(params, {"kernel": node})
    'trainable params: 16,384 || all params: 1,064,960 || trainable%: 1.5385'
    """
    entries = nodes(adapter).values()
    added = sum(_size(x.a) + _size(x.b) for x in entries if isinstance(x, LowRank))
    trained = added + sum(_size(x) for x in entries if not isinstance(x, LowRank))
    # Modules of some libraries hold functions and flags beside their arrays.
    total = added + sum(_size(x) for x in jax.tree.leaves(params) if hasattr(x, "shape"))
    return (
        f"trainable params: {trained:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trained / max(total, 1):.4f}"
    )


def _size(x: Any) -> int:
    return int(np.prod(jnp.shape(x), dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """How one adapted kernel is used: ``factored`` times as a sum, and formed for these reasons."""

    factored: int
    fallbacks: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The uses of each adapted kernel; prints as a table."""

    kernels: Mapping[str, KernelUse]

    def __str__(self) -> str:
        rows = [f"{len(self.kernels)} adapted kernels"]
        for name, use in self.kernels.items():
            unused = "" if use.factored or use.fallbacks else " (never used)"
            rows.append(f"{name}: factored {use.factored}, formed {len(use.fallbacks)}{unused}")
            rows += [f"    formed by {reason}" for reason in use.fallbacks]
        return "\n".join(rows)


def explain(
    fn: Callable, params: PyTree, adapter: PyTree, *args: Any, **kwargs: Any
) -> Explanation:
    """Tells, per adapted kernel, how often it stays factored and where ``W + s·BA`` is formed.

    Each place in the code counts once, also inside a loop. ``fn`` is traced, never run; arrays may
    be given as ``jax.ShapeDtypeStruct``.
    """
    names = [n for n, node in nodes(adapter).items() if isinstance(node, LowRank)]
    events = trace(fn, (bind(params, adapter), *args), kwargs)
    uses = {name: [e for e in events if name in e.name.split(" + ")] for name in names}
    return Explanation({name: _kernel_use(found) for name, found in uses.items()})


def _kernel_use(events: list[interpreter.Event]) -> KernelUse:
    formed = [e for e in events if e.reason]
    reasons = tuple(f"{e.primitive} ({e.reason}) at {e.source}" for e in formed)
    return KernelUse(len(events) - len(formed), reasons)
