"""discretax: state-space models in Equinox."""

import equinox as eqx
import jax
from discretax import models
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("discretax")
TABLES = ("Lambda", "_log$", "log_step")


def _classifier(kind: type, batch: int, **sizes: int) -> Model:
    """A model between an encoder and a head; batch norm uses its running statistics."""
    keys = jax.random.split(jax.random.key(0), 3)
    encoder = LinearEncoder(in_features=8, out_features=32, key=keys[0])
    middle = kind(hidden_dim=32, num_blocks=1, key=keys[1], **sizes)
    head = ClassificationHead(in_features=32, out_features=10, key=keys[2])
    full, state = eqx.nn.make_with_state(eqx.nn.Sequential)([encoder, middle, head])
    full = eqx.nn.inference_mode(full)
    run = lambda full, row: full(row, state, key=jax.random.key(1))[0]
    call = lambda full, x: jax.vmap(lambda row: run(full, row), axis_name="batch")(x)
    return bridges.equinox(full, bridges.normal(batch, 64, 8), call=call)


@LIBRARY.model("S5", tables=TABLES)
def s5(batch: int) -> Model:
    """Complex kernels, stored as pairs of real ones or as complex ones."""
    return _classifier(models.S5, batch)


@LIBRARY.model("LRU", tables=TABLES)
def lru(batch: int) -> Model:
    """Complex kernels."""
    return _classifier(models.LRU, batch)


@LIBRARY.model("LinOSS", tables=TABLES)
def linoss(batch: int) -> Model:
    """Oscillators as a state space."""
    return _classifier(models.LinOSS, batch)


@LIBRARY.model("DeltaNet", tables=TABLES)
def deltanet(batch: int) -> Model:
    """The delta rule in parts, and kernels with an output of one."""
    return _classifier(models.DeltaNet, batch, chunk_size=16)
