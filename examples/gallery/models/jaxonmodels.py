"""jaxonmodels: models in Equinox."""

import jax
from jaxonmodels.models.mamba import Mamba

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("jaxonmodels")


@LIBRARY.model("Mamba", tables=(r"A_log$",))
def mamba(batch: int) -> Model:
    """A selective scan, and one array shared by embedding and head."""
    return bridges.equinox(Mamba(32, 60, 2, key=jax.random.key(0)), bridges.ids(batch, 16, 60))
