"""Arrays that lie on several devices or processes, made whole for decompositions."""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

Array = jax.Array


def gather(x: Array) -> Array:
    """Returns an array of which each process has all, and each device of a mesh of explicit axes.

    One that the compiler splits over devices of this process alone stays as it is. What processes
    compute of the result, each for itself, is the same.

    Args:
      x: array, or tracer of one; all processes give their part of the same array.
    """
    if not isinstance(x, Tracer) and not x.is_fully_addressable:
        return jnp.asarray(multihost_utils.process_allgather(x, tiled=True))
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is None or all(entry is None for entry in sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
