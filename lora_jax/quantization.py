"""``quantize``: which kernels of a parameter tree are stored in fewer bits."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lora_jax import paths
from lora_jax.adapter import base_leaves, nodes
from lora_jax.config import ALL_LINEAR
from lora_jax.kernels import KERNEL, Table
from lora_jax.nodes import is_adapted
from lora_jax.quantized import Quantized, is_quantized
from lora_jax.schemes import Scheme, encode, find_scheme, misfit

PyTree = Any
HEADS = ("lm_head", "head", "classifier", "score")  # and, where names alone tell them, embeddings
SKIPPED = (*HEADS, "embedding")


def quantize(
    params: PyTree,
    scheme: str = "nf4",
    *,
    like: Table | PyTree | Mapping[str, str],
    targets: Sequence[str] = (ALL_LINEAR,),
    skip: Sequence[str] = SKIPPED,
    block: int | None = None,
    dtype: Any = None,
) -> PyTree:
    """Stores kernels in fewer bits, for :func:`lora_jax.lift` to use them as if they were arrays.

    A quantized leaf stands for an array; :func:`lora_jax.bind` puts an adapter onto it, and
    ``lift(fn)(quantized, *args)`` takes it with or without one. Its numbers are made at each
    product, in each pass anew, so that the kernels of a scan over layers are never all there at
    once (Dettmers et al. 2023, section 3). :func:`lora_jax.merge` gives plain arrays.

    Args:
      params: arrays, or ``jax.ShapeDtypeStruct``, in any containers.
      scheme: "nf4", "nf4_double", "fp4", "fp4_double", "int8", "int4", "float8_e4m3" or
        "float8_e4m3_blocks"; see :func:`lora_jax.schemes.encode`.
      like: what says which axes of a kernel are inputs, outputs and batch: a table that
        :func:`lora_jax.tabulate` has made for the function, an adapter, or roles by pattern, as in
        ``LoRAConfig.roles``.
      targets: patterns of kernels, as in ``LoRAConfig.targets``. "all-linear" stands for those that
        ``like`` knows as kernels and that are at least as large as a block; rows that are looked up
        are none, also where they make logits, too.
      skip: patterns of kernels that "all-linear" leaves out: by default heads and embeddings.
      block: number of inputs that share a scale; None for that of the scheme.
      dtype: dtype of the arrays that the leaves stand for, such as the model's for computations;
        None for that of each kernel.

    Returns:
      The tree of ``params`` with a :class:`~lora_jax.quantized.Quantized` leaf for each kernel.

    Raises:
      ValueError: a scheme that does not exist; a target that matches nothing, or nothing of which
        the roles are known; a kernel of integers, with NaN, or that does not fit the scheme; or
        ``params`` are bound to an adapter.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params = {"up": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}}
    >>> fn = lambda p, x: x @ p["up"]["kernel"] + p["up"]["bias"]
    >>> table = lora.tabulate(fn, params, lora.LoRAConfig(), jnp.ones(64))
    >>> small = quantize(params, "nf4", like=table)
    >>> small["up"]["kernel"].shape, small["up"]["kernel"].codes.nbytes
    ((64, 32), 1024)
    >>> lora.lift(fn)(small, jnp.ones(64)).shape
    (32,)
    """
    chosen, leaves = find_scheme(scheme, block), base_leaves(params)
    roles, kernels = _find_roles(like, leaves)
    explicit = [entry for entry in targets if entry != ALL_LINEAR]
    hits = paths.select(explicit, leaves, what="targets")
    _check_known(hits, roles)
    named = {n for names in hits.values() for n in names if n in roles}
    if ALL_LINEAR in targets:
        spared = {n for n in kernels for entry in skip if paths.matches(entry, n)}
        named |= {n for n in kernels - spared if _is_usual(leaves[n], chosen)}
    _check_fit({n: leaves[n] for n in leaves if n in named}, roles, scheme, chosen)
    make = lambda n, x: _encode(n, x, scheme, roles[n], block=block, dtype=dtype)
    new = [make(n, x) if n in named else x for n, x in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_quantized), new)


def _find_roles(like: Any, leaves: Mapping[str, Any]) -> tuple[dict[str, str], set[str]]:
    """Returns the roles of the axes of each leaf that has any, and those that are kernels."""
    if isinstance(like, Table):
        known = {n: row.leaf for n, row in like.rows.items() if row.leaf.axes}
        linear = {n for n, leaf in known.items() if leaf.kind == KERNEL and leaf.is_weight}
        looked_up = {n for n in linear if known[n].is_looked_up}
        roles = {n: leaf.axes for n, leaf in known.items()}
        kernels = linear - looked_up
    elif isinstance(like, Mapping) and like and all(isinstance(x, str) for x in like.values()):
        hits = paths.select(like, leaves, what="like")
        pairs = [(n, like[pattern]) for pattern, names in hits.items() for n in names]
        roles = dict(reversed(pairs))  # the first pattern counts
        kernels = set(roles)
    else:
        roles = {n: x.axes for n, x in nodes(like).items() if is_adapted(x)}
        kernels = set(roles)
    if missing := [n for n in roles if n not in leaves]:
        raise ValueError(
            f"like has {paths.listing(missing)}, which the parameters lack; parameters here: "
            f"{paths.listing(leaves)}."
        )
    return roles, kernels


def _is_usual(x: Any, scheme: Scheme) -> bool:
    """Tells whether a kernel is an array of at least one block."""
    return not is_quantized(x) and x.size >= scheme.block


def _check_known(hits: Mapping[str, Sequence[str]], roles: Mapping[str, str]) -> None:
    unknown = [entry for entry, names in hits.items() if not set(names) & set(roles)]
    if unknown:
        raise ValueError(
            f"targets entries {unknown} match parameters, but none of which `like` says what its "
            f"axes are. Those that it knows: {paths.listing(roles)}. Give their roles: "
            f'like={{"{unknown[0]}": "io"}}.'
        )


def _check_fit(
    leaves: Mapping[str, Any], roles: Mapping[str, str], name: str, scheme: Scheme
) -> None:
    problems = {n: _describe_problem(x, roles[n], name, scheme) for n, x in leaves.items()}
    if bad := [f"{n} {problem}" for n, problem in problems.items() if problem]:
        raise ValueError(f"These can't be quantized: {'; '.join(bad)}.")


def _describe_problem(x: Any, axes: str, name: str, scheme: Scheme) -> str:
    return "is quantized already" if is_quantized(x) else misfit(x, axes, name, scheme)


def _encode(name: str, x: Any, scheme: str, axes: str, **options: Any) -> Quantized:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda x: encode(x, scheme, axes, **options), x)
    try:
        return encode(x, scheme, axes, **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
