"""What users write, for mypy and pyright: README's library code, and types that they rely on.

It is checked (`make types`), not run; `tests/docs` runs the documents.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, assert_type

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import lora_jax as lora
from lora_jax.lowrank import scaled_b
from lora_jax.methods.initial_values import INITS
from lora_jax.methods.start import Start
from lora_jax.nodes import Adapted, Field, Terms
from lora_jax.registration import register
from lora_jax.sweeps import results, scheduler, trials
from lora_jax.tasks import chat, classifier

model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(3)])
x, y = jnp.ones((8, 16)), jnp.zeros(8, jnp.int32)
params = model.init(jax.random.key(0), x)
key = jax.random.key(1)


def apply(params: Mapping[str, Any], x: jax.Array, *, scale: float = 1.0) -> jax.Array:
    """Computes logits."""
    return jnp.asarray(model.apply(params, x)) * scale


# A config takes lists, too; what is wrong is an error of the type checker as well.
config = lora.LoRAConfig(rank=2, alpha=4.0, targets=["layers_0"], train=("layers_2",))
lora.LoRAConfig(rank_pattern={"layers_0": 4}, init="pissa", roles={"w": "io"})
lora.LoRAConfig(train_tokens={"embedding": [1, 2]}, targets=())
lora.LoRAConfig(ranks=2)  # type: ignore[call-arg]
lora.LoRAConfig(rank="2")  # type: ignore[arg-type]

adapter = lora.init(key, apply, params, config, x)
assert_type(adapter, dict[str, Any])
assert_type(lora.summary(params, adapter), str)
print(lora.tabulate(apply, params, config, x).rows["params/layers_0/kernel"].leaf.axes)

# `lift` keeps the signature and the result of a function.
lifted = lora.lift(apply, dropout=0.1, dropout_key=key)
assert_type(lifted(lora.bind(params, adapter), x, scale=2.0), jax.Array)
lifted(lora.bind(params, adapter), x, factor=2.0)  # type: ignore[call-arg]
lora.lift(apply)(lora.bind(params, adapter), "x")  # type: ignore[arg-type]


@jax.jit
def step(adapter: dict[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Takes a step of gradient descent."""

    def loss(adapter: dict[str, Any]) -> jax.Array:
        return lora.lift(apply)(lora.bind(params, adapter), x).mean()

    gradient = jax.grad(loss)(adapter)
    return jax.tree.map(lambda a, g: a - 0.1 * g, adapter, gradient)


adapter = step(adapter, params)
labels: Any = lora.labels(adapter)
mask: Any = lora.mask(adapter)

# `merge` gives a tree of the same containers.
plain = {"w": jnp.ones((3, 2))}
assert_type(lora.merge(plain, {}), dict[str, jax.Array])

# An explanation is data, and prints by itself.
explanation = lora.explain(apply, params, adapter, x)
assert_type(explanation, lora.Explanation)
for name, use in explanation.kernels.items():
    assert_type(name, str)
    assert_type(use.factored, int)
    assert_type(use.fallbacks, tuple[str, ...])

# Files.
lora.save(Path("runs/readme"), adapter, config, base="my-model", metadata={"epochs": 3})
loaded, loaded_config = lora.load("runs/readme", params)
assert_type(loaded, dict[str, Any])
assert_type(loaded_config, lora.LoRAConfig)
assert_type(lora.peft.is_peft("runs/readme"), bool)

# Quantized bases, NNX and other first values.
quantized = lora.quantize(params, "nf4", like=lora.tabulate(apply, params, config, x))
fn, nnx_params = lora.from_nnx(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
assert_type(nnx_params, dict[str, Any])
fn(nnx_params, jnp.ones((1, 2)))


def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
    """Computes a loss."""
    return apply(params, batch).mean()


lora.init_from_gradients(key, loss_fn, params, config, x, x)
lora.init_from_activations(key, loss_fn, params, config, x, rho=2.0)

# Nodes are public, and a node of an adapter is found by its class.
node = adapter["params"]["layers_0"]["kernel"]
if isinstance(node, lora.LowRank):
    assert_type(node.a, jax.Array)
    assert_type(node.scale, jax.Array | float)
    assert_type(node.merge(jnp.ones((16, 64))), jax.Array)


# A method of one's own, as in CONTRIBUTING.md.
@register
@dataclasses.dataclass(frozen=True, eq=False)
class Diagonal(Adapted):
    """``W' = W + s·a·diag(d)·b``."""

    kind: ClassVar[str] = "diagonal"
    reads_kernel: ClassVar[bool] = False
    table: ClassVar[Mapping[str, Field]] = {
        "a": Field("bir"),
        "d": Field("br"),
        "b": Field("bro"),
        "scale": Field("", is_trained=False, scales="b"),
    }

    a: jax.Array
    d: jax.Array
    b: jax.Array
    scale: jax.Array | float
    w: jax.Array | None = None
    axes: str = "io"
    name: str = ""
    dropout: float = 0.0

    def terms(self, w: jax.Array) -> Terms:
        """Returns the factors, the diagonal being in the first."""
        inputs = [self.axes.count("b") + k for k in range(self.axes.count("i"))]
        return Terms(self.a * jnp.expand_dims(self.d, inputs), scaled_b(self))


def start_diagonal(start: Start) -> Diagonal:
    """Makes the node with which a kernel starts."""
    first = INITS[start.init](start)
    if not isinstance(first, lora.LowRank):
        raise ValueError("The first values are those of another method.")
    d = jnp.ones(start.rank, start.dtype)
    return Diagonal(first.a, d, first.b, first.scale, axes=first.axes)


diagonal = start_diagonal(
    Start(
        key=key, name="w", kernel=plain["w"], axes="io", rank=1, scale=1.0, dtype=jnp.float32,
        dropout=0.0, init="uniform",
    )
)  # fmt: skip
assert_type(diagonal.d, jax.Array)

# Sweeps, and programs as functions.
sweep = results.load(Path("runs/sweep"))
assert_type(sweep.rows[0].score, float | None)
assert_type(results.to_markdown(sweep), str)
assert_type([cell.mean for cell in results.cells(sweep)], list[float | None])
assert_type(trials.select([], ["lora.rank=4"]), list[trials.Trial])
assert_type(scheduler.survivors(9, 3, 1), int)
assert_type(classifier.load("runs/sst2/adapter").labels, tuple[str, ...])
assert_type(chat.reply(chat.load("runs/chat"), [{"role": "user", "content": "Hello"}]), str)
