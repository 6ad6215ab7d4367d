"""Hugging Face's FlaxGPT2 (transformers 4.56.2); ``explain``: all factored, the tied head too."""

import jax
import jax.numpy as jnp
import optax
from transformers import FlaxGPT2LMHeadModel, GPT2Config

import lora_jax as lora
from examples import common


def main() -> common.Result:
    """Predicts the next token of sequences that count upwards."""
    config = GPT2Config(
        vocab_size=40,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = FlaxGPT2LMHeadModel(config, seed=0)
    ids = (jnp.arange(8)[:, None] + jnp.arange(12)) % 40
    fn = lambda params, ids: model(ids, params=params).logits
    settings = lora.LoRAConfig(rank=4, targets=("c_attn", "c_proj", "c_fc", "wte"))
    adapter = lora.init(jax.random.key(1), fn, model.params, settings, ids)

    def loss(logits: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    return common.ten_steps(fn, model.params, adapter, loss=loss, x=ids)


if __name__ == "__main__":
    main()
