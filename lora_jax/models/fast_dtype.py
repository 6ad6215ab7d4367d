"""Finds out in which dtype the products of a model are fast on the machine at hand."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import products

AUTO = "auto"  # the value of a setting that asks for this choice
_GAIN = 1.3  # speed of bfloat16, relative to float32, from which it is chosen
_SHAPES = {"cpu": (512, 768, 3072)}  # rows, inputs and outputs of the product
_LARGE = (4096, 4096, 4096)  # those of an accelerator
_ROUNDS = 5


class Choice(NamedTuple):
    """The dtype of the activations, and why.

    Attributes:
      dtype: name of the dtype.
      gain: speed of a product of bfloat16, relative to one of float32.
    """

    dtype: str
    gain: float

    def describe(self) -> str:
        """Says what was chosen and why, for a report."""
        return (
            f"activations in {self.dtype}: products of bfloat16 are {self.gain:.1f} times as fast "
            f"as those of float32 here (model.dtype=float32 or bfloat16 decides otherwise)"
        )


@functools.cache
def choose() -> Choice:
    """Chooses between float32 and bfloat16 by measuring one product, once in a process.

    It takes a few tenths of a second. bfloat16 must be 1.3 times as fast: it costs digits.
    """
    shape = _SHAPES.get(jax.default_backend(), _LARGE)
    wide, narrow = (_make_product(shape, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    rounds = [(_measure(wide), _measure(narrow)) for _ in range(_ROUNDS)]
    least_wide, least_narrow = map(min, zip(*rounds, strict=True))
    gain = least_wide / least_narrow
    return Choice("bfloat16" if gain >= _GAIN else "float32", gain)


def _make_product(
    shape: tuple[int, int, int], dtype: jax.typing.DTypeLike
) -> Callable[[], jax.Array]:
    """Makes a compiled product as a layer has it."""
    rows, inputs, outputs = shape
    x, w = jnp.ones((rows, inputs), dtype), jnp.ones((inputs, outputs), dtype)
    dims = (((1,), (0,)), ((), ()))
    run = jax.jit(lambda x, w: products.dot_general(x, w, dims, lax.Precision.DEFAULT))
    jax.block_until_ready(run(x, w))
    return lambda: run(x, w)


def _measure(run: Callable[[], jax.Array]) -> float:
    """Measures the seconds of a call."""
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin
