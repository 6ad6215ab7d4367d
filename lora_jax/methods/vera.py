"""VeRA: trained vectors between random projections that kernels share (Kopiczko et al. 2024)."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.factors import BATCH, IN, OUT, positions
from lora_jax.methods.start import Start
from lora_jax.nodes import Adapted, Field, Terms
from lora_jax.registration import register

Array = jax.Array
INITIAL_D = 0.1  # first value of `lambda_d`, as in PEFT and in the paper (section 3.3)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class Vera(Adapted):
    """A term ``A·diag(λ_d)·B·diag(λ_b)`` (section 3.2, eq. 2) whose vectors alone are trained.

    All kernels share two projections, of which each node holds the part of its own size: a kernel
    with fewer inputs than the largest one has the first rows of ``A``. The layers of a stacked
    kernel have one copy. Files hold equal parts once.

    Attributes:
      a: ``(*in, rank)``, frozen; the paper's ``A`` transposed.
      b: ``(rank, *out)``, frozen; the paper's ``B`` transposed.
      lambda_d: ``(*batch, rank)``.
      lambda_b: ``(*batch, *out)``; zero at first.
    """

    kind: ClassVar[str] = "vera"
    reads_kernel: ClassVar[bool] = False
    # Both vectors have the rate of `b` in LoRA+, as PEFT has it.
    table: ClassVar[Mapping[str, Field]] = {
        "a": Field("ir", is_trained=False),
        "b": Field("ro", is_trained=False),
        "lambda_d": Field("br", has_b_rate=True),
        "lambda_b": Field("bo", has_b_rate=True),
    }

    a: Array
    b: Array
    lambda_d: Array
    lambda_b: Array
    w: Array | None = None
    axes: str = "io"
    name: str = ""
    dropout: float = 0.0

    def terms(self, w: Array) -> Terms:
        """Returns ``a``, and ``b`` with both vectors."""
        n = self.axes.count(BATCH)
        batch, n_out = self.lambda_d.shape[:n], self.axes.count(OUT)
        d = jnp.expand_dims(self.lambda_d, range(n + 1, n + 1 + n_out))
        b = jnp.expand_dims(self.b, range(n))
        scaled = d * b * jnp.expand_dims(self.lambda_b, n)
        return Terms(jnp.broadcast_to(self.a, (*batch, *self.a.shape)), scaled)


def start_vera(start: Start) -> Vera:
    """Makes the first values: ``λ_b = 0``, so that the change of the kernel is zero."""
    n_in, n_out = start.largest_sides
    a, b = draw_projections(start.projection_seed, start.rank, n_in, n_out)
    a, b = take_parts(a, b, start.shape, start.axes)
    batch, out = (
        tuple(start.shape[k] for k in positions(start.axes, role)) for role in (BATCH, OUT)
    )
    return Vera(
        a=jnp.asarray(a, start.dtype),
        b=jnp.asarray(b, start.dtype),
        lambda_d=jnp.full((*batch, start.rank), INITIAL_D, start.dtype),
        lambda_b=jnp.zeros((*batch, *out), start.dtype),
        axes=start.axes,
        dropout=start.dropout,
    )


def take_parts(
    a: np.ndarray, b: np.ndarray, shape: tuple[int, ...], axes: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the parts of shared projections that belong to one kernel.

    Args:
      a: ``(rank, inputs)``, the paper's ``A``.
      b: ``(outputs, rank)``, the paper's ``B``.
      shape: shape of the kernel.
      axes: role of each axis of the kernel.

    Returns:
      ``(*in, rank)`` and ``(rank, *out)``.
    """
    n_in, n_out = (tuple(shape[k] for k in positions(axes, role)) for role in (IN, OUT))
    rank = a.shape[0]
    own_a, own_b = a[:, : math.prod(n_in)], b[: math.prod(n_out)]
    return own_a.T.reshape(*n_in, rank), own_b.T.reshape(rank, *n_out)


@functools.lru_cache(maxsize=1)  # for the kernels of one adapter, one after the other
def draw_projections(seed: int, rank: int, n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws the shared projections as PEFT does, bit for bit: Kaiming-uniform, by a seed.

    Args:
      seed: seed of the generator; PEFT's ``projection_prng_key``.
      rank: rank of the projections.
      n_in: largest number of inputs among the kernels.
      n_out: largest number of outputs among the kernels.

    Returns:
      ``A (rank, n_in)`` and ``B (n_out, rank)`` in float32, the second from the same stream.

    >>> a, b = draw_projections(0, 2, 3, 4)
    >>> a.shape, b.shape, float(abs(a).max()) < (6 / 3) ** 0.5
    ((2, 3), (4, 2), True)
    """
    # torch's generator on a CPU is a Mersenne twister, of whose words a uniform draw in float32
    # takes the lower 24 bits.
    generator = np.random.RandomState(seed % 2**32)
    draw = functools.partial(_draw_uniform, generator)
    return draw((rank, n_in), n_in), draw((n_out, rank), rank)


def _draw_uniform(generator: np.random.RandomState, shape: tuple[int, int], fan: int) -> np.ndarray:
    bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(fan)
    low, high = np.float32(-bound), np.float32(bound)
    words = generator.randint(0, 2**32, size=math.prod(shape), dtype=np.uint32)
    fraction = (words & np.uint32(2**24 - 1)).astype(np.float64) * 2.0**-24
    values = fraction * np.float64(high - low) + np.float64(low)
    return values.astype(np.float32).reshape(shape)
