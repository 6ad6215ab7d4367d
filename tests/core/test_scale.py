"""The scale is a hyperparameter: nothing that trains, averages, clips or decays can reach it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import lora_jax as lora
from lora_jax import sharding
from lora_jax.adapter import as_data
from lora_jax.lowrank import LowRank, scaled_b, with_array_scale
from lora_jax.nodes import scale_array

KEY = jax.random.key(0)
W = jax.random.normal(jax.random.key(1), (8, 6))
PARAMS, X = {"w": W, "b": jnp.ones(6)}, jax.random.normal(jax.random.key(2), (5, 8))
CONFIG = lora.LoRAConfig(rank=3, alpha=7.0, targets=("w",), train=("b",))
fn = lambda p, x: x @ p["w"] + p["b"][None]


def adapter(config=CONFIG, key=KEY):
    made = lora.init(key, fn, PARAMS, config, X)
    return made | {"w": dataclasses.replace(made["w"], b=0.1 + made["w"].b)}


def loss(a):
    return jnp.mean(lora.lift(fn)(lora.bind(PARAMS, a), X) ** 2)


def test_the_leaves_are_what_is_trained():
    a = adapter()
    assert type(a["w"].scale) is float and a["w"].scale == 7 / 3 == CONFIG.kernel_scale("w")
    paths, _ = jax.tree_util.tree_flatten_with_path(a)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    assert names == ["['b']", "['w'].a", "['w'].b"]
    bound, _ = jax.tree_util.tree_flatten_with_path(lora.bind(PARAMS, as_data(a)))
    names = [jax.tree_util.keystr(path) for path, _ in bound]
    assert names == ["['b'].value", "['w'].a", "['w'].b", "['w'].scale", "['w'].w"]


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(0.1, momentum=0.9)),
    "decay alone": lambda: optax.chain(optax.add_decayed_weights(0.5), optax.scale(-0.1)),
    "lion": lambda: optax.lion(1e-3, weight_decay=1.0),
    "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "accumulated": lambda: optax.MultiSteps(optax.adamw(1e-2, weight_decay=0.1), 2),
    "average": lambda: optax.chain(optax.ema(0.9), optax.scale(-0.1)),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.scale(-0.1)),
    "schedule-free": lambda: contrib.schedule_free_adamw(1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_moves_it(name):
    tx, a = OPTIMIZERS[name](), adapter()
    state = tx.init(a)

    @jax.jit
    def step(a, state):
        updates, state = tx.update(jax.grad(loss)(a), state, a)
        return optax.apply_updates(a, updates), state

    new = a
    for _ in range(6):
        new, state = step(new, state)
    assert new["w"].scale == 7 / 3
    assert not np.allclose(new["w"].b, a["w"].b) and not np.allclose(new["b"], a["b"])
    assert step._cache_size() == 1  # the number is not another structure after a step


def test_adamw_without_labels_is_adamw_on_the_factors_alone():
    """Beside the same update written for a dictionary of plain arrays."""
    a, tx = adapter(), optax.adamw(1e-2, weight_decay=0.1)
    plain = {"a": a["w"].a, "b": a["w"].b, "bias": a["b"]}
    plain_loss = lambda q: jnp.mean((X @ (W + 7 / 3 * q["a"] @ q["b"]) + q["bias"][None]) ** 2)
    state, plain_state = tx.init(a), tx.init(plain)
    for _ in range(5):
        updates, state = tx.update(jax.grad(loss)(a), state, a)
        a = optax.apply_updates(a, updates)
        updates, plain_state = tx.update(jax.grad(plain_loss)(plain), plain_state, plain)
        plain = optax.apply_updates(plain, updates)
    for got, want in ((a["w"].a, plain["a"]), (a["w"].b, plain["b"]), (a["b"], plain["bias"])):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_averages_and_maps_keep_it():
    a, other = adapter(), adapter(key=jax.random.key(9))
    average = optax.incremental_update(other, a, 0.25)
    assert average["w"].scale == 7 / 3
    np.testing.assert_allclose(average["w"].a, 0.75 * a["w"].a + 0.25 * other["w"].a, rtol=1e-6)
    assert jax.tree.map(jnp.zeros_like, a)["w"].scale == 7 / 3
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), a)
    assert half["w"].scale == 7 / 3 and half["w"].a.dtype == jnp.bfloat16
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in (a["w"].a, a["w"].b, a["b"])))
    np.testing.assert_allclose(optax.tree.norm(a), norm, rtol=1e-6)


@pytest.mark.parametrize("change", [lambda a: a, as_data], ids=["number", "array"])
@pytest.mark.parametrize("bound", [False, True])
def test_labels_and_specs_have_the_structure_of_the_tree(change, bound):
    tree = lora.bind(PARAMS, change(adapter())) if bound else change(adapter())
    for made in (lora.labels(tree), lora.mask(tree)):
        assert jax.tree.structure(made) == jax.tree.structure(tree)
        jax.tree.map(lambda x, y: None, tree, made)
    if not bound:
        specs = {n: jax.sharding.PartitionSpec() for n in PARAMS}
        made = sharding.adapter_specs(specs, tree)
        assert jax.tree.structure(made) == jax.tree.structure(tree)


def test_several_alphas_are_one_program_and_never_have_a_gradient():
    alphas = (1.0, 4.0, 7.0)
    configs = [dataclasses.replace(CONFIG, alpha=x, dropout=x / 10) for x in alphas]
    each = [adapter(config) for config in configs]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *map(as_data, each))
    assert stacked["w"].scale.shape == (3,)
    traced = []
    run = jax.jit(jax.vmap(lambda a: traced.append(1) or jax.value_and_grad(loss)(a)))
    values, grads = run(stacked)
    run(jax.tree.map(lambda x: x + 1, stacked))
    assert len(traced) == 1
    np.testing.assert_allclose(values, [loss(as_data(a)) for a in each], rtol=1e-5)
    assert np.all(grads["w"].scale == 0) and np.all(np.any(grads["w"].a, axis=(1, 2)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_the_product_has_the_bits_that_an_array_gives(dtype):
    b = jax.random.normal(KEY, (3, 6)).astype(dtype)
    node = LowRank(jnp.zeros((8, 3), dtype), b, 7 / 3)
    got = scaled_b(node)
    assert got.dtype == jnp.float32
    want = np.asarray(b).astype(np.float32) * np.float32(7 / 3)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(scaled_b(with_array_scale(node)), want)
    np.testing.assert_array_equal(jax.jit(scaled_b)(node), want)
    assert scale_array(node).dtype == np.float32


def test_in_double_precision_it_is_exact():
    with jax.enable_x64(True):
        node = LowRank(jnp.zeros((8, 3), float), jnp.ones((3, 6), float), 7 / 3)
        assert scaled_b(node).dtype == jnp.float64 and scaled_b(node)[0, 0] == 7 / 3


@pytest.mark.parametrize("number", [2, 2.0, np.float32(2), np.float64(2), np.int64(2), np.int8(2)])
def test_any_number_becomes_a_float(number):
    node = LowRank(jnp.zeros((8, 3)), jnp.zeros((3, 6)), number)
    assert type(node.scale) is float and node.scale == 2
    assert len(jax.tree.leaves(node)) == 2


@pytest.mark.parametrize("array", [np.array(2.0), jnp.array(2.0), jnp.float32(2)])
def test_an_array_stays_a_leaf_whatever_a_map_makes_of_it(array):
    node = LowRank(jnp.zeros((8, 3)), jnp.zeros((3, 6)), array)
    assert len(jax.tree.leaves(node)) == 3
    for change in (
        float_or_shape,
        lambda x: 0,
        lambda x: True,
        np.asarray,
        lambda x: np.float32(0),
    ):
        made = jax.tree.map(change, node)
        assert jax.tree.structure(made) == jax.tree.structure(node)
    axes = jax.tree.map(lambda x: 0, node)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), node)
    assert jax.vmap(scaled_b, in_axes=(axes,))(stacked).shape == (2, 3, 6)


def float_or_shape(x):
    return float(x) if jnp.ndim(x) == 0 else jnp.shape(x)[0]


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, np.float32("nan")])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ValueError, match="must be finite"):
        LowRank(jnp.zeros((8, 3)), jnp.zeros((3, 6)), scale)


@pytest.mark.parametrize("alpha", [1e40, 1e-60])
def test_a_scale_that_the_dtype_can_not_hold_is_refused(alpha):
    with pytest.raises(ValueError, match=r"'w' would be .* float32 can't hold"):
        adapter(dataclasses.replace(CONFIG, alpha=alpha))
