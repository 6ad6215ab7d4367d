"""Which kernels an adapter has, and the values that it starts with."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import lowrank, paths
from lora_jax.adapter import base_leaves
from lora_jax.config import ALL_LINEAR, LoRAConfig
from lora_jax.lowrank import LowRank
from lora_jax.transform.lift import trace

PyTree = Any
Array = jax.Array


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
      scale)``, the factors in the kernel's dtype or float32, the wider, and the scale a Python
      float, with the config's rate of dropout; and copies of the leaves that ``config.train``
      names. The leaves of this tree are what is trained.

    Raises:
      ValueError: an entry of the config matches nothing, or nothing that can be adapted; targets
        and train overlap; a rank exceeds the smaller side of its kernel; a scale that the factors'
        dtype can't hold; or ``params`` are bound to an adapter.

    >>> params = {"dense": {"kernel": jnp.zeros((10, 6)), "bias": jnp.zeros(6)}}
    >>> fn = lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"]
    >>> config = LoRAConfig(rank=2, targets=("dense",))
    >>> adapter = init(jax.random.key(0), fn, params, config, jnp.zeros(10))
    >>> jax.tree.map(jnp.shape, adapter)["dense"]["kernel"].b
    (2, 6)
    """
    leaves = base_leaves(params)
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
    dtype = lowrank.wide_dtype(w.dtype)
    # crc32 of the path: the same number in every process, unlike `hash`.
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return LowRank(
        a=lowrank.init_a(key, w.shape, axes, rank, dtype),
        b=jnp.zeros(lowrank.factor_shapes(w.shape, axes, rank)[1], dtype),
        scale=_checked_scale(name, config.kernel_scale(name), dtype),
        axes=axes,
        dropout=config.dropout,
    )


def _checked_scale(name: str, scale: float, dtype: Any) -> float:
    limits = jnp.finfo(dtype)
    if not float(limits.tiny) <= scale <= float(limits.max):
        raise ValueError(
            f"The scale alpha / rank of the kernel {name!r} would be {scale}, which {dtype} can't "
            "hold. Choose another alpha (alpha_pattern sets it per kernel)."
        )
    return scale
