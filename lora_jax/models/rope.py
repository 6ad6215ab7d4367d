"""Rotary position embeddings (Su et al. 2021), with the scalings that are built."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# The parameters that each type has besides the base, by their names in config.json.
_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip


class Rope(NamedTuple):
    """The rotation of each position; field names as in ``config.json``.

    Attributes:
      rope_theta: base of the frequencies, ``theta**(-2i/d)`` for pair ``i`` of ``d/2``.
      rope_type: "default"; "linear", where all frequencies are divided by ``factor``; or "llama3",
        where only low frequencies are, and those between the two bounds in part.
      factor: factor by which the context grows.
      low_freq_factor: number of turns in the original context below which a frequency is divided.
      high_freq_factor: number of turns above which a frequency stays as it is.
      original_max_position_embeddings: length of the original context, in tokens.
    """

    rope_theta: float = 10_000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def from_hf(parameters: Mapping[str, Any], *, theta: float, positions: int) -> Rope:
    """Reads the entry ``rope_parameters`` (or ``rope_scaling``, its older name) of a config.

    Args:
      parameters: the entry.
      theta: the base if the entry has none.
      positions: the original context if the entry has none.

    Raises:
      ValueError: the type is not built, or parameters are missing or out of range.

    >>> from_hf({"type": "linear", "factor": 2.0}, theta=500.0, positions=8)[:3]
    (500.0, 'linear', 2.0)
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _PARAMETERS:
        raise ValueError(f"rope_type {kind!r} is not built; built are {', '.join(_PARAMETERS)}.")
    if parameters.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor is {parameters['partial_rotary_factor']!r} in the rope "
            "parameters; only 1.0 is built."
        )
    defaults = {"rope_theta": theta, "original_max_position_embeddings": positions}
    values = defaults | {name: value for name, value in parameters.items() if value is not None}
    missing = [name for name in _PARAMETERS[kind] if name not in values]
    if missing:
        raise ValueError(f"rope_type {kind!r} needs {', '.join(missing)} in the rope parameters.")
    rope = Rope(
        rope_type=kind, **{name: values[name] for name in ("rope_theta", *_PARAMETERS[kind])}
    )
    _check(rope)
    return rope


def _check(rope: Rope) -> None:
    for name in ("rope_theta", *_PARAMETERS[rope.rope_type]):
        value = getattr(rope, name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} in the rope parameters must be positive, got {value!r}.")
    if rope.rope_type == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise ValueError(
            f"low_freq_factor {rope.low_freq_factor} in the rope parameters must be less than "
            f"high_freq_factor {rope.high_freq_factor}."
        )


def to_hf(rope: Rope) -> dict[str, Any]:
    """Returns the entry ``rope_parameters`` for ``config.json``."""
    return {
        name: getattr(rope, name)
        for name in ("rope_theta", "rope_type", *_PARAMETERS[rope.rope_type])
    }


def compute_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Computes the radians per position of each pair of features: float32 ``(head_dim / 2,)``.

    >>> compute_frequencies(Rope(rope_theta=100.0), 4).tolist()
    [1.0, 0.10000000149011612]
    """
    frequencies = rope.rope_theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if rope.rope_type == "linear":
        frequencies = frequencies / rope.factor
    elif rope.rope_type == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        share = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = share * frequencies + (1 - share) * frequencies / rope.factor
    return frequencies.astype(np.float32)


def compute_angles(rope: Rope, positions: Array, head_dim: int) -> tuple[Array, Array]:
    """Computes cosine and sine of the angles, each float32 ``(*positions.shape, head_dim / 2)``."""
    turns = jnp.expand_dims(positions.astype(jnp.float32), -1)
    scale = jnp.expand_dims(jnp.asarray(compute_frequencies(rope, head_dim)), range(positions.ndim))
    return jnp.cos(turns * scale), jnp.sin(turns * scale)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates each pair of features by its angle (Su et al. 2021, eq. 34), in float32 or wider.

    Args:
      x: ``(batch, length, heads, d)``; feature ``i`` is paired with ``i + d/2``.
      cos: ``(batch, length, d/2)``; see :func:`compute_angles`.
      sin: the same.

    Returns:
      ``(batch, length, heads, d)`` in the dtype of ``x``.
    """
    high = jnp.promote_types(x.dtype, jnp.float32)
    first, second = jnp.split(x.astype(high), 2, axis=-1)
    cos, sin = cos[:, :, None, :].astype(high), sin[:, :, None, :].astype(high)
    pairs = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(pairs, axis=-1).astype(x.dtype)
