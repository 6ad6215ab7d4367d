"""e3nn-jax: layers that commute with rotations."""

import e3nn_jax as e3nn
import flax.linen as nn
import jax

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("e3nn-jax")


class Layer(nn.Module):
    """Linear maps between irreducible representations, around a tensor product."""

    @nn.compact
    def __call__(self, positions: jax.Array, features: jax.Array) -> jax.Array:
        x = e3nn.flax.Linear("16x0e + 8x1o")(e3nn.IrrepsArray("16x0e", features))
        directions = e3nn.spherical_harmonics("1o", e3nn.IrrepsArray("1o", positions), True)
        x = e3nn.flax.Linear("16x0e + 8x1o")(e3nn.tensor_product(x, directions))
        return e3nn.flax.Linear("9x0e + 8x1o")(e3nn.scalar_activation(x)).array


@LIBRARY.model("flax.Linear and tensor_product")
def layer(batch: int) -> Model:
    """One kernel for each kind of representation."""
    return bridges.linen(Layer(), bridges.normal(16 * batch, 3), bridges.normal(16 * batch, 16))
