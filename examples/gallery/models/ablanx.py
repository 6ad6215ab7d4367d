"""ablanx: a language model of antibodies, its sizes those of its definition (12 layers of 480)."""

import jax.numpy as jnp
from ablang_jax import model as ablang

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("ablanx")


@LIBRARY.model("one block of AbLang2's encoder")
def block(batch: int) -> Model:
    """The library's sizes are constants of the module, so this is one of its twelve blocks."""
    frequencies = 1 / 10000 ** (jnp.arange(0, 24, 2) / 24)
    x, mask = bridges.normal(batch, 32, 480), jnp.ones((batch, 32))
    return bridges.linen(ablang.Block(), x, mask, frequencies)
