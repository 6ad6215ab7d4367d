"""``Start``: what a method knows of a kernel when it makes the first values of its node."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.factors import BATCH, IN, OUT, positions, wide_dtype
from lora_jax.quantized import as_array, is_quantized
from lora_jax.whole_arrays import gather

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """A kernel that is to be adapted, and the settings that hold for it.

    Attributes:
      key: PRNG key of this kernel alone.
      name: path of the kernel, for messages.
      kernel: frozen kernel: an array, a quantized one, or a ``jax.ShapeDtypeStruct``.
      axes: role of each kernel axis, for example "io"; see :mod:`lora_jax.factors`.
      rank: rank of the factors.
      scale: number that the product of the factors is multiplied by.
      dtype: dtype of what is trained.
      dropout: rate in [0, 1) of the dropout on the input of the branch.
      init: name of the first values of the factors; see :mod:`lora_jax.methods.initial_values`.
      train_a: whether the factor ``a`` is trained.
      largest_sides: largest numbers of inputs and of outputs among the kernels of the adapter.
      projection_seed: seed of the projections that kernels share (VeRA).
    """

    key: Array
    name: str
    kernel: Any
    axes: str
    rank: int
    scale: float
    dtype: Any
    dropout: float
    init: str
    train_a: bool = True
    largest_sides: tuple[int, int] = (0, 0)
    projection_seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return tuple(self.kernel.shape)

    def matrices(self, what: str) -> Iterator[Array]:
        """Yields the kernel's matrices ``(in, out)``, one for each entry of its batch axes.

        They are in float32 or wider. Of a quantized kernel one at a time is decoded.

        Args:
          what: setting that needs them, for the message.

        Raises:
          ValueError: there is only a shape.
        """
        self.require_numbers(what)
        sizes_of = lambda role: [self.shape[k] for k in positions(self.axes, role)]
        if is_quantized(self.kernel) and self.kernel.roles == self.axes:
            for index in np.ndindex(*sizes_of(BATCH)):
                entry = jax.tree.map(lambda x, index=index: x[index], self.kernel)
                yield gather(entry.matrix()).astype(entry.dtype).astype(wide_dtype(entry.dtype))
            return
        order = positions(self.axes, BATCH + IN + OUT)
        stack = jnp.transpose(gather(jnp.asarray(as_array(self.kernel))), order)
        sides = [math.prod(sizes_of(role)) for role in (IN, OUT)]
        for matrix in stack.reshape(-1, *sides):
            yield matrix.astype(wide_dtype(matrix.dtype))

    def require_numbers(self, what: str) -> None:
        """Checks that the kernel has numbers; arguments and errors as in :meth:`matrices`."""
        if isinstance(self.kernel, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{what} needs the numbers of {self.name!r}, and got its shape only. Give the "
                "parameters themselves."
            )
