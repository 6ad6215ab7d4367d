"""An Equinox module, whose weights are ``(out, in)``; ``explain``: all weights factored."""

import equinox as eqx
import jax
import jax.numpy as jnp

import lora_jax as lora
from examples import common


def main() -> common.Result:
    """Fits a wave."""
    model = eqx.nn.MLP(4, 1, width_size=32, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    fn = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    x = jax.random.normal(jax.random.key(1), (64, 4))
    config = lora.LoRAConfig(rank=2, targets=("layers/0", "layers/1"), train=("layers/2",))
    adapter = lora.init(jax.random.key(2), fn, params, config, x)
    wave = jnp.sin(x.sum(-1, keepdims=True))
    loss = lambda y: jnp.mean((y - wave) ** 2)
    result = common.ten_steps(fn, params, adapter, loss=loss, x=x)
    assert isinstance(result.merged, eqx.nn.MLP)  # a module again, once combined with `static`
    return result


if __name__ == "__main__":
    main()
