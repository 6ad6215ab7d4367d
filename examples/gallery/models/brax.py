"""brax: networks of reinforcement learning."""

import jax
from brax.training.agents.ppo.networks import make_ppo_networks

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("brax")


@LIBRARY.model("PPO's policy and value")
def ppo(batch: int) -> Model:
    """Two networks, as the training loop holds them."""
    networks = make_ppo_networks(
        16, 4, policy_hidden_layer_sizes=(32, 32), value_hidden_layer_sizes=(32, 32)
    )
    policy, value = networks.policy_network, networks.value_network
    params = {"policy": policy.init(jax.random.key(0)), "value": value.init(jax.random.key(1))}

    def fn(params: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return policy.apply(None, params["policy"], x), value.apply(None, params["value"], x)

    return Model(fn=fn, params=params, args=(bridges.normal(8 * batch, 16),), lines=3)
