"""jraph: graph networks, with functions of Flax Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph

from examples.gallery import bridges
from examples.gallery.model import Library, Model
from examples.gallery.models.egnn import graph

LIBRARY = Library("jraph")


def _graph(nodes: jax.Array) -> jraph.GraphsTuple:
    count = len(nodes)
    return jraph.GraphsTuple(
        nodes=nodes,
        edges=jnp.ones((4 * count, 8)),
        globals=jnp.ones((1, 8)),
        n_node=jnp.array([count]),
        n_edge=jnp.array([4 * count]),
        **graph(count),
    )


class Attention(nn.Module):
    """Graph attention and a graph convolution."""

    @nn.compact
    def __call__(self, nodes: jax.Array) -> jax.Array:
        logits = lambda sent, received, edges: nn.Dense(1)(jnp.concatenate([sent, received], -1))
        attention = jraph.GAT(nn.Dense(32), logits)
        convolution = jraph.GraphConvolution(nn.Dense(16), add_self_edges=True)
        return convolution(attention(_graph(nodes))).nodes


@LIBRARY.model("GAT and GraphConvolution")
def attention(batch: int) -> Model:
    """The nodes are the rows."""
    return bridges.linen(Attention(), bridges.normal(12 * batch, 16))


class Network(nn.Module):
    """A graph network that updates edges, nodes and the graph's own features."""

    @nn.compact
    def __call__(self, nodes: jax.Array) -> jax.Array:
        update = lambda: jraph.concatenated_args(lambda x: nn.Dense(16)(nn.relu(nn.Dense(32)(x))))
        net = jraph.GraphNetwork(update(), update(), update())
        embed = jraph.GraphMapFeatures(nn.Dense(16), nn.Dense(16), nn.Dense(16))
        return net(net(embed(_graph(nodes)))).nodes


@LIBRARY.model("GraphNetwork")
def network(batch: int) -> Model:
    """Each function has kernels of its own in each of two rounds."""
    return bridges.linen(Network(), bridges.normal(12 * batch, 16))
