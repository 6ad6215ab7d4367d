"""``init_from_residuals``: first values from what quantization took away (Li et al. 2023)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from lora_jax import paths
from lora_jax.adapter import base_leaves
from lora_jax.choice import choose
from lora_jax.config import LoRAConfig
from lora_jax.initial import make_adapter
from lora_jax.methods.initial_values import FROM_RESIDUALS, INITS, make_best_approximation
from lora_jax.methods.lora_fa import freeze_a
from lora_jax.methods.start import Start
from lora_jax.nodes import Adapted
from lora_jax.quantized import is_quantized

PyTree = Any
Array = jax.Array
_WHAT = f"init={FROM_RESIDUALS!r}"


def init_from_residuals(
    key: Array,
    fn: Callable,
    params: PyTree,
    config: LoRAConfig,
    original: PyTree,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Any]:
    """Makes the adapter with which a quantized base starts as near as can be to the original one.

    For a kernel ``W`` that is stored as ``Q``, ``s·a·b`` is the best approximation of rank ``r`` to
    ``W - Q``, with the roots of its singular values in each factor. It is LoftQ (Li et al. 2023,
    algorithm 1) with one step, PEFT's default: the base is the one that was quantized, and is not
    changed. PEFT does not divide the scale ``s`` out, so that its start is right for ``alpha = r``
    alone. Kernels that are not quantized start as with ``init="uniform"``.

    Args:
      key: PRNG key.
      fn: function to adapt, as for :func:`lora_jax.init`.
      params: its parameters, of which some are quantized.
      config: what to adapt and train, with ``init="loftq"``.
      original: the parameters before they were quantized, of the same names and shapes. One kernel
        at a time is decomposed.
      *args: example arguments of ``fn`` after the parameters.
      **kwargs: likewise.

    Returns:
      An adapter as from :func:`lora_jax.init`, of plain factors, whose product is not zero.

    Raises:
      ValueError: as :func:`lora_jax.init`; the config has another ``init``, or a method other than
        "lora"; no kernel to adapt is quantized; or ``original`` lacks one, has it in another shape,
        or quantized, too, or one is what it was before.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> fn, x = lambda p, x: x @ p["w"], jnp.ones((1, 64))
    >>> original = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    >>> small = lora.quantize(original, "nf4", like={"w": "io"})
    >>> config = LoRAConfig(rank=8, init="loftq")
    >>> adapter = init_from_residuals(jax.random.key(0), fn, small, config, original, x)
    >>> far = lambda params: float(jnp.linalg.norm(params["w"] - original["w"]))
    >>> far(lora.merge(small, adapter)) < 0.9 * far(lora.merge(small, {}))
    True
    """
    if (config.method, config.init) != ("lora", FROM_RESIDUALS):
        raise ValueError(
            f"init_from_residuals makes what method='lora', init={FROM_RESIDUALS!r} stand for, and "
            f"the config has method={config.method!r}, init={config.init!r}."
        )
    leaves, originals = base_leaves(params), base_leaves(original)
    choice = choose(fn, params, config, args, kwargs, leaves=leaves)
    quantized = {name: leaves[name] for name in choice.ranks if is_quantized(leaves[name])}
    _check(quantized, choice.ranks, originals)

    def make_node(start: Start) -> Adapted:
        if start.name not in quantized:
            node = INITS["uniform"](start)
        else:
            node = make_best_approximation(start, originals[start.name])
        return node if start.train_a else freeze_a(node, start.init)

    return make_adapter(key, choice, config, leaves, make_node)


def _check(
    quantized: Mapping[str, Any], ranks: Mapping[str, int], originals: Mapping[str, Any]
) -> None:
    if not quantized:
        raise ValueError(
            f"{_WHAT} makes up for what quantization takes away, and none of the kernels to adapt "
            f"is quantized: {paths.listing(ranks)}. Quantize the parameters first "
            "(lora_jax.quantize), or choose another init."
        )
    if missing := [name for name in quantized if name not in originals]:
        raise ValueError(
            f"original lacks {paths.listing(missing)}; it has {paths.listing(originals)}."
        )
    for name, leaf in quantized.items():
        if is_quantized(originals[name]):
            raise ValueError(f"original has {name!r} quantized, too: give it as it was before.")
        if originals[name].shape != leaf.shape:
            raise ValueError(
                f"original has {name!r} of shape {originals[name].shape}, and the parameters have "
                f"it of {leaf.shape}."
            )
