"""Flax Linen: layers that the library brings, and the ways in which it stacks and loops them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("flax")


class Block(nn.Module):
    """A transformer's block of Flax's own layers."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)))), None


class Scanned(nn.Module):
    """Blocks in one scan, rematerialised."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes, keys = {"params": 0}, {"params": True}
        x, _ = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs=keys, length=3)()(x, None)
        return nn.Dense(16)(x)


@LIBRARY.model("scanned, rematerialised transformer")
def scanned(batch: int) -> Model:
    """Kernels stacked along the axis of the scan."""
    return bridges.linen(Scanned(), bridges.normal(batch, 5, 32))


class Normalised(nn.Module):
    """Kernels that are divided by a norm before their use."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.WeightNorm(nn.Dense(24))(x))
        x = nn.relu(nn.SpectralNorm(nn.Dense(24))(x, update_stats=False))
        return nn.Dense(16)(x)


@LIBRARY.model("nn.WeightNorm and nn.SpectralNorm")
def normalised(batch: int) -> Model:
    """The norm is of the full kernel, which is formed for it."""
    return bridges.linen(Normalised(), bridges.normal(batch, 16))


class ActorCritic(nn.Module):
    """A recurrent policy with an ensemble of critics."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.RNN(nn.GRUCell(32))(nn.relu(nn.Dense(32)(x)))
        critics = nn.vmap(
            nn.Dense,
            in_axes=None,
            out_axes=-1,
            axis_size=4,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        return nn.Dense(9)(x), critics(8)(x)


@LIBRARY.model("recurrent actor-critic, vmapped critics")
def actor_critic(batch: int) -> Model:
    """A cell in a scan, and kernels with an axis of the ensemble."""
    return bridges.linen(ActorCritic(), bridges.normal(batch, 6, 16))


class Convolutions(nn.Module):
    """Strided, grouped, depthwise and transposed convolutions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(32, (3, 3))(x)))
        x = nn.relu(nn.Conv(32, (3, 3), feature_group_count=4)(x))
        x = nn.relu(nn.Conv(32, (3, 3), feature_group_count=32)(x))
        return nn.Dense(10)(jnp.mean(nn.ConvTranspose(16, (2, 2), strides=(2, 2))(x), (1, 2)))


@LIBRARY.model("nn.Conv and nn.ConvTranspose")
def convolutions(batch: int) -> Model:
    """Batch statistics are constants."""
    return bridges.linen(Convolutions(), bridges.normal(batch, 16, 16, 3))
