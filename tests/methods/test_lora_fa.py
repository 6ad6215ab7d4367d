"""LoRA-FA: plain LoRA whose factor a stays as it was drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax.lowrank import LowRank
from lora_jax.methods.lora_fa import FrozenA, freeze_a
from lora_jax.names import Name
from lora_jax.peft import load_peft, save_peft
from tests.helpers import zoo
from tests.helpers.comparisons import assert_close, perturbed

CONFIG = dict(rank=2, alpha=3.0)


def make(model, **fields):
    config = lora.LoRAConfig(**CONFIG, targets=model.targets, **fields)
    return lora.init(jax.random.key(1), model.fn, model.params, config, model.x), config


def plain(adapter):
    """The same arrays as nodes of plain LoRA."""
    is_frozen = lambda x: isinstance(x, FrozenA)
    change = lambda x: LowRank(**vars(x)) if is_frozen(x) else x
    return jax.tree.map(change, adapter, is_leaf=is_frozen)


def test_is_plain_lora_with_a_frozen():
    model = zoo.ZOO["mlp"]()
    frozen, _ = make(model, train_a=False)
    free, _ = make(model)
    assert jax.tree.all(jax.tree.map(np.array_equal, plain(frozen), free))
    loss = lambda adapter: jnp.sum(
        lora.lift(model.fn)(lora.bind(model.params, adapter), model.x) ** 2
    )
    adapter = perturbed(frozen)
    got, want = jax.grad(loss)(adapter), jax.grad(loss)(plain(adapter))
    for name, node in adapters.nodes(got).items():
        assert not np.any(node.a)
        assert_close(node.b, adapters.nodes(want)[name].b)
    trained = sum(x.b.size for x in adapters.nodes(frozen).values())
    assert lora.summary(model.params, frozen).startswith(f"trainable params: {trained:,d} ||")


def test_the_backward_pass_keeps_less():
    """XLA's own figures: of each input it keeps the rank's numbers, not the width's."""
    width, rows, layers = 128, 512, 16
    kernels = {f"layer_{k}": {"kernel": jnp.zeros((width, width))} for k in range(layers)}

    def fn(params, x):
        for k in range(layers):
            x = x + x @ params[f"layer_{k}"]["kernel"]
        return x

    x = jnp.zeros((rows, width))

    def peak(train_a):
        config = lora.LoRAConfig(rank=2, train_a=train_a)
        adapter = lora.init(jax.random.key(0), fn, kernels, config, x)
        loss = lambda adapter, params, x: jnp.sum(lora.lift(fn)(lora.bind(params, adapter), x))
        grad = jax.jit(jax.grad(loss)).lower(adapter, kernels, x).compile()
        return grad.memory_analysis().temp_size_in_bytes

    assert peak(False) < 0.75 * peak(True)


def test_embeddings_learn():
    """PEFT freezes an ``a`` that is zero there, so that they never do."""
    model = zoo.ZOO["tied"]()
    config = lora.LoRAConfig(**CONFIG, targets=("embed",), train_a=False)
    adapter = lora.init(jax.random.key(1), model.fn, model.params, config, model.x)
    loss = lambda adapter: jnp.mean(
        lora.merge(model.params, adapter)["params"]["embed"]["embedding"] ** 2
    )
    tx = optax.multi_transform(
        {"trainable": optax.sgd(0.1), "frozen": optax.set_to_zero()}, lora.labels(adapter)
    )
    updates, _ = tx.update(jax.grad(loss)(adapter), tx.init(adapter), adapter)
    (node,) = adapters.nodes(optax.apply_updates(adapter, updates)).values()
    assert np.any(node.b) and not np.any(adapters.nodes(updates)["params/embed/embedding"].a)


def test_its_files_are_those_of_plain_lora(tmp_path):
    model = zoo.ZOO["mlp"]()
    adapter, config = make(model, train_a=False)
    adapter = perturbed(adapter)
    lora.save(tmp_path / "frozen", adapter, config)
    lora.save(tmp_path / "plain", plain(adapter), config)
    files = [sorted(p.name for p in (tmp_path / d).iterdir()) for d in ("frozen", "plain")]
    assert files[0] == files[1]  # the weights are named after their content
    again, config_again = lora.load(tmp_path / "frozen", model.params)
    assert config_again == config and not config.train_a
    assert jax.tree.structure(again) == jax.tree.structure(adapter)


def test_peft_reads_plain_lora(tmp_path):
    params = {"dense": {"kernel": jnp.zeros((5, 3))}}
    names = [Name("dense/kernel", "dense.weight", transpose=True)]
    fn = lambda params, x: x @ params["dense"]["kernel"]
    config = lora.LoRAConfig(**CONFIG, train_a=False)
    adapter = perturbed(lora.init(jax.random.key(0), fn, params, config, jnp.zeros(5)))
    save_peft(tmp_path, params, adapter, config, names=names)
    again, _ = load_peft(tmp_path, params, names=names)
    assert jax.tree.structure(again) == jax.tree.structure(plain(adapter))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, plain(adapter)))


def test_other_nodes_are_refused():
    node = FrozenA(jnp.zeros((3, 1)), jnp.zeros((1, 2)), 2.0)
    with pytest.raises(ValueError, match="init='special' makes a node of the kind 'lora_fa'"):
        freeze_a(node, "special")
