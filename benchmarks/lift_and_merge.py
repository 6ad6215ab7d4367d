"""Compares ``lift`` with ``merge`` on whatever device JAX finds, for ``benchmarks.accelerator``."""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import lora_jax as lora
from benchmarks.bert_steps import ALPHA, RANK, Case, example
from benchmarks.vs_peft import MODELS
from lora_jax.models import bert

PyTree = Any


class Grouped(nn.Module):
    """Two convolutions in groups, the second one strided."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(batch, height, width, 64)`` to ``(batch, 10)``."""
        x = nn.silu(nn.Conv(128, (3, 3), feature_group_count=4)(x))
        x = nn.silu(nn.Conv(64, (3, 3), strides=2, feature_group_count=8)(x))
        return nn.Dense(10)(x.mean((1, 2)))


def checked_models() -> Iterator[tuple[str, Callable, PyTree, tuple]]:
    """Names, functions, parameters and arguments."""
    shape = MODELS["minilm"] | {"num_hidden_layers": 2}
    ids = jnp.asarray(example(Case((8, 64)))["input_ids"])
    keys = {"dropout": jax.random.key(5)}
    for name, options, call in [
        ("BERT", {}, {}),
        ("BERT, scanned", {"scan_layers": True}, {}),
        ("BERT, its own dropout", {}, {"deterministic": False, "rngs": keys}),
    ]:
        model = bert.BertForSequenceClassification(bert.BertConfig(**shape), **options)
        params = jax.jit(model.init)(jax.random.key(0), ids, ids)
        yield name, functools.partial(model.apply, **call), params, (ids, jnp.ones_like(ids))
    x, model = jax.random.normal(jax.random.key(1), (8, 32, 32, 64)), Grouped()
    yield "grouped convolutions", model.apply, jax.jit(model.init)(jax.random.key(0), x), (x,)


def rows() -> Iterator[dict]:
    """Relative differences from the reference, for each model and precision."""
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda given: list(compared(*given)), checked_models()):
            yield from found
    yield branch_dropout()


def compared(name: str, fn: Callable, params: PyTree, args: tuple) -> Iterator[dict]:
    """The rows of a model."""
    config = lora.LoRAConfig(rank=RANK, alpha=ALPHA, targets="all-linear")
    adapter = with_random_b(lora.init(jax.random.key(2), fn, params, config, *args))
    ways = {
        "lift": lambda a, p: lora.lift(fn)(lora.bind(p, a), *args),
        "merge": lambda a, p: fn(lora.merge(p, a), *args),
    }
    reference = evaluated(ways["merge"], adapter, params, "highest")
    for precision in ("highest", "default"):
        got = evaluated(ways["lift"], adapter, params, precision)
        value, gradient = (norm(g, w) for g, w in zip(got, reference, strict=True))
        yield {"model": name, "precision": precision, "value": value, "gradient": gradient}


def evaluated(fn: Callable, adapter: PyTree, params: PyTree, precision: str) -> tuple:
    """Logits, and the gradient of the sum of their sines."""

    def loss(adapter: PyTree, params: PyTree) -> tuple[jax.Array, jax.Array]:
        y = fn(adapter, params)
        return jnp.sum(jnp.sin(y)), y

    with jax.default_matmul_precision(precision):
        gradient, y = jax.jit(jax.grad(loss, has_aux=True))(adapter, params)
    return y, gradient


def norm(got: PyTree, want: PyTree) -> float:
    """The norm of the difference, relative to the norm of what it should be."""
    flat = lambda tree: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])
    got, want = flat(got), flat(want)
    return float(f"{jnp.linalg.norm(got - want) / jnp.linalg.norm(want):.2g}")


def with_random_b(adapter: PyTree) -> PyTree:
    """The adapter with noise in every leaf, as if it were trained."""
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noise = [0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return tree.unflatten([x + n for x, n in zip(leaves, noise, strict=True)])


def branch_dropout(draws: int = 1024) -> dict:
    """Tells how far the mean over masks is from no dropout, in standard errors of the mean."""
    fn, x = lambda p, x: x @ p["w"], jax.random.normal(jax.random.key(0), (16, 256))
    params = {"w": jax.random.normal(jax.random.key(1), (256, 256)) / 16}
    config = lora.LoRAConfig(rank=RANK, alpha=ALPHA, targets=("w",))
    bound = lora.bind(params, with_random_b(lora.init(jax.random.key(2), fn, params, config, x)))
    one = lambda key: lora.lift(fn, dropout=0.25, dropout_key=key)(bound, x)
    with jax.default_matmul_precision("highest"):
        y = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(4), draws))
        far = (y.mean(0) - lora.lift(fn)(bound, x)) / (y.std(0) / draws**0.5)
    rms, worst = float(jnp.sqrt(jnp.mean(far**2))), float(abs(far).max())
    return {"model": "dropout of the branch", "rms": round(rms, 3), "worst": round(worst, 2)}
