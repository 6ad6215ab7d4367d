"""A method that lives in this file alone, to show what a method needs and what it need not touch.

``W' = (1 + g) ⊙ W + s·a·diag(d)·b``: a gain for each output, and a frozen ``a``.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.adapter import nodes
from lora_jax.nodes import Adapted, Field, Terms, with_array_scale
from lora_jax.registration import register


@register
@dataclasses.dataclass(frozen=True, eq=False)
class Toy(Adapted):
    kind: ClassVar[str] = "toy"
    table: ClassVar[Mapping[str, Field]] = {
        "a": Field("bir", is_trained=False),
        "d": Field("br"),
        "b": Field("bro"),
        "g": Field("bo"),
        "scale": Field("", is_trained=False, scales="b"),
    }

    a: jax.Array
    d: jax.Array
    b: jax.Array
    g: jax.Array
    scale: jax.Array | float
    w: jax.Array | None = None
    axes: str = "io"
    name: str = ""
    dropout: float = 0.0

    def terms(self, w):
        scale = jax.lax.stop_gradient(jnp.asarray(with_array_scale(self).scale))
        wide = self.d.reshape(*self.d.shape, *[1] * self.axes.count("o"))
        return Terms(self.a, scale * wide * self.b, 1 + self.g)


# ---- What a test needs of it ---------------------------------------------------------------------

is_toy = lambda x: isinstance(x, Toy)


def make_like(node, seed=0):
    """A node for the kernel of a plain LoRA's, with random values."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.uniform(-1, 1, size=shape), node.b.dtype)
    n = node.axes.count("b")
    batch, (rank, *out) = node.b.shape[:n], node.b.shape[n:]
    return Toy(
        a=draw(*node.a.shape), d=draw(*batch, rank), b=draw(*node.b.shape),
        g=draw(*batch, *out) / 2, scale=node.scale, axes=node.axes, dropout=node.dropout,
    )  # fmt: skip


def merge_kernel(w, node, xp=np):
    """What the node makes of a kernel, by one einsum over its axes."""
    letters = "cdefghjklm"[: len(node.axes)]
    of = lambda role: "".join(x for x, r in zip(letters, node.axes, strict=True) if r == role)
    i, o, b = of("i"), of("o"), of("b")
    change = xp.einsum(f"{b}{i}r,{b}r,{b}r{o}->{letters}", node.a, node.d, node.b)
    kept = xp.einsum(f"{letters},{b}{o}->{letters}", w, 1 + node.g)
    return (kept + node.scale * change).astype(w.dtype)


def merge(params, adapter, xp=jnp):
    """The same for a whole tree, whose other entries replace leaves."""
    entries = nodes(adapter)
    make = lambda w, x: merge_kernel(w, x, xp) if is_toy(x) else x
    leaves = paths.named_leaves(params).items()
    new = [make(w, entries[name]) if name in entries else w for name, w in leaves]
    return jax.tree.structure(params).unflatten(new)
