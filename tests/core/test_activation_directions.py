"""EVA: `a` starts with the principal components of a kernel's inputs, which no pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import products
from lora_jax.config import LoRAConfig
from lora_jax.lowrank import LowRank
from lora_jax.methods.dora import DoRA
from lora_jax.methods.lora_fa import FrozenA
from tests.helpers import zoo
from tests.helpers.comparisons import assert_close

RNG = np.random.default_rng(0)
LAYERS, WIDTH, OUT = 3, 10, 4


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {"layers": normal(LAYERS, WIDTH, WIDTH) / 3, "head": normal(WIDTH, OUT)}
X = normal(6, 7, WIDTH) * 0.6 ** jnp.arange(WIDTH)[None, None] + 0.5
MASK = jnp.arange(7)[None] < jnp.array([7, 3, 5, 7, 2, 6])[:, None]
BATCHES = [(X, MASK), (X / 2, MASK)]


def run(params, x):
    """Outputs of a scan with rematerialization and of a head, and what went into each."""
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), x))
    last, inputs = jax.lax.scan(layer, x, params["layers"])
    head = jax.jit(lambda x, w: jnp.einsum("oi,bti->bto", w.T, x))
    return head(last, params["head"]), {"layers": inputs, "head": last[None]}


def loss(params, batch):
    x, mask = batch
    return jnp.sum(jnp.where(mask[..., None], run(params, x)[0], 0) ** 2)


def components(rows):
    """Of numpy's SVD of centered rows: vectors, and parts of the variance."""
    rows = np.asarray(rows, np.float64)
    _, s, vh = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return vh.T, s**2 / np.sum(s**2)


def seen(name):
    """The rows that each matrix of a kernel sees, without padding."""
    each = [run(PARAMS, x)[1][name][:, np.asarray(mask)] for x, mask in BATCHES]
    return np.concatenate(each, axis=1)


def assert_same_subspace(a, vectors, atol=1e-3):
    a = np.asarray(a, np.float64)
    assert_close(a.T @ a, np.eye(a.shape[1]), rtol=0, atol=1e-5)
    assert_close(a @ a.T, vectors @ vectors.T, rtol=0, atol=atol)


def make(rho=1.0, params=PARAMS, **fields):
    config = LoRAConfig(**({"rank": 2, "alpha": 3.0, "init": "eva"} | fields))
    key = jax.random.key(0)
    return lora.init_from_activations(key, loss, params, config, *BATCHES, rho=rho)


@pytest.mark.slow  # a doctest of the function is not
def test_components_of_what_reaches_each_kernel():
    """Through a loop, rematerialization and a nested jit; rows of padding do not count."""
    adapter = make()
    for name, node in adapters.nodes(adapter).items():
        assert isinstance(node, LowRank) and node.scale == 1.5 and not np.any(node.b)
        for a, rows in zip(node.a.reshape(-1, WIDTH, 2), seen(name), strict=True):
            vectors, ratios = components(rows)
            assert ratios[1] > 1.5 * ratios[2]  # so that two of them are well defined
            assert_same_subspace(a, vectors[:, :2])
            assert abs(np.asarray(a)[:, 0] @ vectors[:, 0]) > 0.999
    np.testing.assert_array_equal(lora.merge(PARAMS, adapter)["head"], PARAMS["head"])


@pytest.mark.parametrize(
    ("fields", "cls"), [({"method": "dora"}, DoRA), ({"train_a": False}, FrozenA)]
)
def test_other_methods_take_the_same_factors(fields, cls):
    x, w = normal(30, 12) * 0.6 ** jnp.arange(12)[None], normal(12, 8)
    mean = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    run = lambda **fields: lora.init_from_activations(
        jax.random.key(0), mean, {"w": w}, LoRAConfig(rank=2, init="eva", **fields), x
    )["w"]
    node = run(**fields)
    assert type(node) is cls
    np.testing.assert_array_equal(node.a, run().a)
    np.testing.assert_array_equal(node.merge(w), w)


@pytest.mark.slow
def test_ranks_are_shared_out_by_what_components_explain():
    adapter = make(rho=2.0, rank=1)
    ratios = {n: np.mean([components(r)[1][:2] for r in seen(n)], axis=0) for n in PARAMS}
    # Four ranks: the stack takes three at a time.
    order = sorted((-x, n) for n in PARAMS for x in ratios[n])
    budget, want = 4, dict.fromkeys(PARAMS, 0)
    for _, name in order:
        cost = LAYERS if name == "layers" else 1
        if cost <= budget:
            want[name], budget = want[name] + 1, budget - cost
    found = {n: x.a.shape[-1] for n, x in adapters.nodes(adapter).items()}
    assert found == {n: r for n, r in want.items() if r}
    assert {x.scale for x in adapters.nodes(adapter).values()} == {3.0}  # alpha / the first rank


@pytest.mark.slow
def test_a_quantized_base_sees_its_own_inputs():
    w, x = normal(64, 32), normal(30, 64) * 0.7 ** jnp.arange(64)[None]
    mean = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    stored = lora.quantize({"w": w}, "int8", like={"w": "io"})
    config = LoRAConfig(rank=2, init="eva", targets=("w",))
    adapter = lora.init_from_activations(jax.random.key(0), mean, stored, config, x)
    assert_same_subspace(adapter["w"].a, components(x)[0][:, :2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "attention", "scanned_remat", "experts", "nnx", "plain"])
def test_every_model_starts_as_itself(name):
    model = zoo.ZOO[name]()
    mean = lambda params, x: jnp.mean(model.fn(params, x) ** 2)
    config = LoRAConfig(rank=2, init="eva", targets=model.targets)
    adapter = lora.init_from_activations(jax.random.key(0), mean, model.params, config, model.x)
    nodes = adapters.nodes(adapter)
    usual = lora.init(jax.random.key(0), model.fn, model.params, LoRAConfig(rank=2, targets=model.targets), model.x)  # fmt: skip
    assert {n: x.a.shape for n, x in nodes.items()} == {
        n: x.a.shape for n, x in adapters.nodes(usual).items()
    }
    for node in nodes.values():
        a = np.asarray(node.a).reshape(-1, *node.a.shape[node.axes.count("b") :])
        a = a.reshape(a.shape[0], -1, 2)
        assert_close(
            np.swapaxes(a, 1, 2) @ a, np.broadcast_to(np.eye(2), (len(a), 2, 2)), atol=1e-4
        )
    lifted = lambda p, a, x: lora.lift(model.fn, strict=True)(lora.bind(p, a), x)
    want = jax.jit(model.fn)(model.params, model.x)
    np.testing.assert_array_equal(jax.jit(lifted)(model.params, adapter, model.x), want)


@pytest.mark.slow
def test_measuring_does_not_enter_the_cache_of_calls():
    """A nested jit is evaluated once for all that is the same, and this is not."""
    make()
    adapter = lora.init(jax.random.key(0), lambda p, x: run(p, x)[0], PARAMS, LoRAConfig(rank=2), X)
    moved = jax.tree.map(lambda x: x + 0.1, adapter)
    fn = lambda p, x: run(p, x)[0]
    lifted = lora.lift(fn)(lora.bind(PARAMS, moved), X)
    assert_close(lifted, fn(lora.merge(PARAMS, moved), X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": "pissa"}, "makes the first values init='eva', .* or 'dora', .*init='pissa'"),
        ({"init": "uniform", "method": "adalora"}, "has method='adalora', init='uniform'"),
        ({"rho": 0.5}, "rho must be at least 1, got 0.5"),
    ],
)
def test_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_no_batch_and_no_rows():
    config = LoRAConfig(rank=2, init="eva", targets=("table",))
    key, params = jax.random.key(0), {"table": normal(9, 4)}
    look_up = lambda params, ids: jnp.mean(params["table"][ids] ** 2)
    with pytest.raises(ValueError, match="needs a batch"):
        lora.init_from_activations(key, look_up, params, config)
    with pytest.raises(ValueError, match="does not see two or more for table: .*leave tables"):
        lora.init_from_activations(key, look_up, params, config, jnp.arange(5))


@pytest.mark.slow
def test_products_of_bfloat16_are_seen_too():
    w, x = normal(12, 8), normal(40, 12) * 0.6 ** jnp.arange(12)[None]
    half = lambda x: x.astype(jnp.bfloat16)
    dims = (((1,), (0,)), ((), ()))
    mean = lambda p, x: jnp.mean(
        products.dot_general(half(x), half(p["w"]), dims).astype(float) ** 2
    )
    config = LoRAConfig(rank=2, init="eva", targets=("w",))
    adapter = lora.init_from_activations(jax.random.key(0), mean, {"w": w}, config, x)
    assert_same_subspace(adapter["w"].a, components(half(x))[0][:, :2])
