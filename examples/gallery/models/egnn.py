"""egnn-jax: graph networks that commute with rotations, in Haiku."""

import jax
import jax.numpy as jnp
import jraph
from egnn_jax.egnn import EGNN

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("egnn-jax")


def graph(nodes: int) -> dict[str, jax.Array]:
    """Arrays of a graph in which each node has edges to the next four."""
    senders = jnp.repeat(jnp.arange(nodes), 4)
    receivers = (senders + jnp.tile(jnp.arange(1, 5), nodes)) % nodes
    return {"senders": senders, "receivers": receivers}


@LIBRARY.model("EGNN")
def egnn(batch: int) -> Model:
    """Messages between nodes, which are the rows."""
    nodes = 12 * batch
    counts = {"n_node": jnp.array([nodes]), "n_edge": jnp.array([4 * nodes]), "globals": None}
    edges = graph(nodes)

    def network(features: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs = jraph.GraphsTuple(nodes=features, edges=None, **edges, **counts)
        return EGNN(hidden_size=32, output_size=8, num_layers=2)(inputs, positions)

    return bridges.haiku(network, bridges.normal(nodes, 16), bridges.normal(nodes, 3))
