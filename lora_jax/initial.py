"""Chooses the kernels of an adapter, and makes its first values."""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import hints, paths
from lora_jax.adapted_biases import init_biases
from lora_jax.adapter import base_leaves
from lora_jax.choice import Choice, choose, warn
from lora_jax.config import LoRAConfig
from lora_jax.factors import IN, OUT, positions, wide_dtype
from lora_jax.kernels import (
    Leaf,
    Row,
    Table,
    find_kernels,
)
from lora_jax.methods import FROM_FACTORS, METHODS
from lora_jax.methods.start import Start
from lora_jax.nodes import Adapted
from lora_jax.quantized import as_array
from lora_jax.trained_tokens import init_tokens

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
    hints.check_key(key)
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
    warn(choice, config)
    # Copies, so that a step that donates the adapter spares the base.
    full = {n: jnp.array(as_array(leaves[n]), copy=True) for n in leaves if n in trained}
    sides = _find_largest_sides(choice)
    starts = {n: _make_start(key, n, choice, config, leaves[n], sides) for n in choice.ranks}
    nodes = {n: make_node(start) for n, start in starts.items()}
    nodes |= init_biases(nodes, choice.biases)
    nodes |= init_tokens(choice.kernels, choice.tokens, leaves)
    return paths.nest({n: (nodes | full)[n] for n in leaves if n in nodes or n in full})


def check_init(config: LoRAConfig, init: str, function: str) -> None:
    """Checks that a config asks for the first values that a function makes.

    Args:
      config: config that the function was given.
      init: first values that it makes.
      function: its name, for the message.

    Raises:
      ValueError: the config has another ``init``, or a method whose factors have other first
        values.
    """
    if config.init != init or config.method not in FROM_FACTORS:
        methods = " or ".join(map(repr, FROM_FACTORS))
        raise ValueError(
            f"{function} makes the first values init={init!r}, for the method {methods}, and the "
            f"config has method={config.method!r}, init={config.init!r}."
        )


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
