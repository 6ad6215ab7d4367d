"""Rotary position embeddings (Su et al. 2021), and the scalings of them that are built."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# What each type needs besides the base; words as in config.json.
_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip


class Rope(NamedTuple):
    """How positions become angles; words as in ``config.json``.

    Attributes:
      rope_theta: base of the frequencies, ``theta**(-2i/d)`` for pair ``i`` of ``d/2``.
      rope_type: "default"; "linear", all frequencies divided by ``factor``; or "llama3", only the
        low ones, and those between the two bounds in part.
      factor: by which the context grows.
      low_freq_factor: frequencies with fewer turns than this in the original context are divided.
      high_freq_factor: frequencies with more turns than this stay.
      original_max_position_embeddings: the original context, in tokens.
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
      ValueError: a type that is not built, or words that are missing or out of range.

    >>> from_hf({"type": "linear", "factor": 2.0}, theta=500.0, positions=8)[:3]
    (500.0, 'linear', 2.0)
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _NEEDS:
        raise ValueError(f"rope_type {kind!r} is not built; built are {', '.join(_NEEDS)}.")
    if parameters.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor is {parameters['partial_rotary_factor']!r} in the rope "
            "parameters; only 1.0 is built."
        )
    defaults = {"rope_theta": theta, "original_max_position_embeddings": positions}
    known = defaults | {name: value for name, value in parameters.items() if value is not None}
    missing = [name for name in _NEEDS[kind] if name not in known]
    if missing:
        raise ValueError(f"rope_type {kind!r} needs {', '.join(missing)} in the rope parameters.")
    rope = Rope(rope_type=kind, **{name: known[name] for name in ("rope_theta", *_NEEDS[kind])})
    return _checked(rope)


def _checked(rope: Rope) -> Rope:
    for name in ("rope_theta", *_NEEDS[rope.rope_type]):
        value = getattr(rope, name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} in the rope parameters must be positive, got {value!r}.")
    if rope.rope_type == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise ValueError(
            f"low_freq_factor {rope.low_freq_factor} in the rope parameters must be less than "
            f"high_freq_factor {rope.high_freq_factor}."
        )
    return rope


def to_hf(rope: Rope) -> dict[str, Any]:
    """The entry ``rope_parameters`` for ``config.json``."""
    return {
        name: getattr(rope, name) for name in ("rope_theta", "rope_type", *_NEEDS[rope.rope_type])
    }


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of features, ``(head_dim / 2,)`` float32.

    >>> frequencies(Rope(rope_theta=100.0), 4).tolist()
    [1.0, 0.10000000149011612]
    """
    found = rope.rope_theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if rope.rope_type == "linear":
        found = found / rope.factor
    elif rope.rope_type == "llama3":
        turns = rope.original_max_position_embeddings * found / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        found = kept * found + (1 - kept) * found / rope.factor
    return found.astype(np.float32)


def angles(rope: Rope, positions: Array, head_dim: int) -> tuple[Array, Array]:
    """Cosine and sine, each ``(*positions.shape, head_dim / 2)`` float32."""
    turned = jnp.expand_dims(positions.astype(jnp.float32), -1)
    scale = jnp.expand_dims(jnp.asarray(frequencies(rope, head_dim)), range(positions.ndim))
    return jnp.cos(turned * scale), jnp.sin(turned * scale)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns each pair of features by its angle (Su et al. 2021, eq. 34), in float32 at least.

    Args:
      x: ``(batch, length, heads, d)``; feature ``i`` is paired with ``i + d/2``.
      cos: ``(batch, length, d/2)``; see :func:`angles`.
      sin: the same.

    Returns:
      As ``x``.
    """
    high = jnp.promote_types(x.dtype, jnp.float32)
    first, second = jnp.split(x.astype(high), 2, axis=-1)
    cos, sin = cos[:, :, None, :].astype(high), sin[:, :, None, :].astype(high)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
