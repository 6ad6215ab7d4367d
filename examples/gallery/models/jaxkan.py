"""jaxkan: Kolmogorov-Arnold networks in Flax NNX."""

from jaxkan.models.KAN import KAN

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("jaxkan")


@LIBRARY.model("KAN of Chebyshev polynomials")
def chebyshev(batch: int) -> Model:
    """Weights of the polynomials, of rank three."""
    return bridges.nnx(KAN([16, 12, 9], "chebyshev", {"D": 5}), bridges.normal(16 * batch, 16))


@LIBRARY.model("KAN of splines")
def spline(batch: int) -> Model:
    """Weights of the splines and of the residual."""
    return bridges.nnx(KAN([16, 12, 9], "spline", {"k": 3, "G": 5}), bridges.normal(16 * batch, 16))
