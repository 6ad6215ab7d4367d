"""The contract: every kind of adapter, on every model of the zoo, keeps every promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax.lowrank import LowRank
from lora_jax.methods.bias import AdaptedBias
from lora_jax.methods.tokens import Tokens
from lora_jax.nodes import is_adapted
from tests.helpers import zoo
from tests.helpers.comparisons import assert_close, perturbed

is_lora = lambda x: isinstance(x, LowRank)
RANK = 2
METHODS = {
    "lora": dict(rank=RANK, alpha=3.0),
    "dora": dict(rank=RANK, alpha=3.0, method="dora"),
    "lora_fa": dict(rank=RANK, alpha=3.0, train_a=False),
    "vera": dict(rank=RANK, method="vera"),
    "adalora": dict(rank=RANK, alpha=3.0, method="adalora"),
    "offset": dict(rank=RANK, alpha=3.0, init="pissa"),
    "dora_offset": dict(rank=RANK, alpha=3.0, method="dora", init="pissa"),
    "lora_head": dict(rank=RANK, alpha=3.0, train=("head",)),
    "bitfit": dict(targets=(), train=("re:.*bias",)),
    "probe": dict(targets=(), train=("head",)),
    "full": dict(targets=(), train=("re:.*",)),
    "biases": dict(rank=RANK, alpha=3.0, adapt_bias=True),
    "tokens": dict(rank=RANK, alpha=3.0, train_tokens={"embed": (9, 2, 3)}),
}
# What not every model of the zoo has: a table of tokens, a bias beside each kernel.
ONLY = {"tokens": ("tied",), "biases": ("mlp", "scanned")}

# These are slow but for one model and the value of lift.
RARE = ("lora_fa", "vera", "adalora", "dora_offset")
# Numbers that are trained for a kernel of so many kernels along its batch axes, inputs and outputs.
COUNTS = {
    "dora": lambda b, i, o: b * (RANK * (i + o) + o),
    "dora_offset": lambda b, i, o: b * (RANK * (i + o) + o),
    "lora_fa": lambda b, i, o: b * RANK * o,
    "vera": lambda b, i, o: b * (RANK + o),
    "adalora": lambda b, i, o: b * RANK * (i + o + 1),
}


class Case:
    def __init__(self, model, method):
        self.model = zoo.ZOO[model]()
        fields = METHODS[method]
        self.config = lora.LoRAConfig(**{"targets": self.model.targets, **fields})
        key = jax.random.key(1)
        fn, params, x = self.model.fn, self.model.params, self.model.x
        self.initial = lora.init(key, fn, params, self.config, x)
        self.adapter = perturbed(self.initial)
        self.kernels = {n: x for n, x in adapters.nodes(self.adapter).items() if is_adapted(x)}

    # Compiled once, and used by several tests. Parameters are arguments, as in real use: as
    # constants they would be folded, in another order, by the compiler.

    @functools.cached_property
    def lifted_output(self):
        return jax.jit(self.lifted)(self.adapter, self.model.x, self.model.params)

    @functools.cached_property
    def merged_output(self):
        return jax.jit(self.merged)(self.adapter, self.model.x, self.model.params)

    @functools.cached_property
    def lifted_gradient(self):
        return self.compute_lifted_gradient(self.adapter, self.model.x, self.model.params)

    @functools.cached_property
    def compute_lifted_gradient(self):
        return self.make_gradient(self.lifted)

    def gradient(self, run):
        return self.make_gradient(run)(self.adapter, self.model.x, self.model.params)

    def make_gradient(self, run):
        weights = np.random.default_rng(9).normal(size=self.merged_output.shape).astype(np.float32)
        return jax.jit(jax.grad(lambda *args: jnp.sum(weights * run(*args))))

    def merged(self, adapter, x=None, params=None):
        params = self.model.params if params is None else params
        return self.model.fn(lora.merge(params, adapter), self.model.x if x is None else x)

    def lifted(self, adapter, x=None, params=None, strict=True):
        params = self.model.params if params is None else params
        fn = lora.lift(self.model.fn, strict=strict)
        return fn(lora.bind(params, adapter), self.model.x if x is None else x)


@functools.cache
def case(model, method):
    return Case(model, method)


def assert_same(got, want):
    """The same structure, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_array_equal(np.asarray(g), np.asarray(w))


def grouped(model, *rest, slow=False):
    """Arguments of a test: all tests of a model share a process, and what is compiled there."""
    marks = [pytest.mark.xdist_group(model)] + [pytest.mark.slow] * slow
    return pytest.param(model, *rest, marks=marks)


# By default all holds for one model with every method and for scanned layers with LoRA; that a model
# is lifted to the values of the merged one holds for one of each kind. CI runs all.
FEW = ("mlp", "scanned")


def pairs(*, slow):
    """Every model with every method, some of which are slow."""
    cases = [
        grouped(model, method, slow=slow(model, method))
        for model in zoo.ZOO
        for method in METHODS
        if model in ONLY.get(method, (model,))
    ]
    return pytest.mark.parametrize(("model", "method"), cases)


def is_slow(model, method):
    """Offsets are of the class that test_initial_values.py has by default."""
    if method in (*RARE, "offset"):
        return True
    return model != "mlp" and (model, method) != ("scanned", "lora")


both = pairs(slow=is_slow)
SOME = (*FEW, "attention", "conv", "experts", "tied", "nnx", "lstm_optimized", "remat")
widely = pairs(
    slow=lambda model, method: (
        model not in FEW[: 1 if method in RARE else 2]
        and (model not in SOME or method != "lora_head")
    )
)
lowrank_only = pytest.mark.parametrize("model", [grouped(model) for model in zoo.ZOO])
few = pytest.mark.parametrize("model", [grouped(m, slow=m not in FEW) for m in zoo.ZOO])
fewest = pytest.mark.parametrize("model", [grouped(m, slow=m != "mlp") for m in zoo.ZOO])


@pytest.mark.xdist_group("groups")
def test_groups_are_honoured(request):
    """pytest-xdist writes a group into the name of a test; not every pytest lets it."""
    grouping = request.config.getoption("loadgroup", False)
    assert not grouping or request.node.nodeid.endswith("@groups")


@both
def test_starts_as_the_base_bit_for_bit(model, method):
    c = case(model, method)
    params, x = c.model.params, c.model.x
    base = jax.jit(c.model.fn)(params, x)
    assert_same(jax.jit(c.merged)(c.initial, x, params), base)
    got = jax.jit(c.lifted)(c.initial, x, params)
    if (model, method) == ("plain", "dora"):
        # Without LLVM's optimizations XLA rounds the tanh of a branch by what it is fused with, and
        # the compiled base differs from the base op by op, too. Values are near one: an ulp or two.
        assert_close(got, base, rtol=0, atol=2**-23)
    else:
        assert_same(got, base)


@widely
def test_lift_equals_merge(model, method):
    c = case(model, method)
    assert_close(c.lifted_output, c.merged_output)
    base = jax.jit(c.model.fn)(c.model.params, c.model.x)
    assert not np.allclose(c.lifted_output, base, atol=1e-3)


@both
def test_gradients_equal_those_of_merge(model, method):
    c = case(model, method)
    got, want = c.lifted_gradient, c.gradient(c.merged)
    assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert all(np.any(g) for g in jax.tree.leaves(_trainable(got)))


def _trainable(tree):
    return jax.tree.map(lambda x, t: x if t else None, tree, lora.mask(tree))


@both
def test_training_leaves_the_base_untouched(model, method):
    c = case(model, method)
    before = jax.tree.map(np.array, c.model.params)
    tx = optax.multi_transform(
        {"trainable": optax.adamw(1e-2), "frozen": optax.set_to_zero()}, lora.labels(c.initial)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(adapter, state, grads):
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state

    adapter = lora.init(jax.random.key(1), c.model.fn, c.model.params, c.config, c.model.x)
    state = tx.init(adapter)
    for _ in range(3):
        grads = c.compute_lifted_gradient(adapter, c.model.x, c.model.params)
        adapter, state = update(adapter, state, grads)
    assert_same(jax.tree.map(np.array, c.model.params), before)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), adapter, c.initial)
    assert jax.tree.leaves(moved) == jax.tree.leaves(lora.mask(adapter))


@lowrank_only
def test_change_has_the_rank_asked_for(model):
    c = case(model, "lora")
    merged = adapters.nodes(lora.merge(c.model.params, c.adapter))
    base = adapters.nodes(c.model.params)
    for name, node in c.kernels.items():
        change = np.asarray(merged[name], np.float64) - np.asarray(base[name], np.float64)
        order = [k for role in "bio" for k, axis in enumerate(node.axes) if axis == role]
        n_in = np.prod([change.shape[k] for k, axis in enumerate(node.axes) if axis == "i"])
        stack = np.transpose(change, order)
        stack = stack.reshape(*stack.shape[: node.axes.count("b")], int(n_in), -1)
        singular = np.linalg.svd(stack, compute_uv=False)
        assert np.all(singular[..., RANK - 1] > 1e-3), name
        assert np.all(singular[..., RANK:] < 1e-5), name


@few
def test_change_is_linear_in_alpha(model):
    c = case(model, "lora")
    double = lambda x: dataclasses.replace(x, scale=2 * x.scale) if is_lora(x) else x
    twice = jax.tree.map(double, c.adapter, is_leaf=is_lora)
    base, one, two = (
        adapters.nodes(t)
        for t in (
            c.model.params,
            lora.merge(c.model.params, c.adapter),
            lora.merge(c.model.params, twice),
        )
    )
    for name in c.kernels:
        assert_close(two[name] - base[name], 2 * (one[name] - base[name]), rtol=1e-5, atol=1e-6)
    assert all(float(x.scale) == 1.5 for x in c.kernels.values())  # alpha 3 / rank 2
    assert_close(jax.jit(c.lifted)(twice), jax.jit(c.merged)(twice))


@both
def test_count_of_trainable_parameters(model, method):
    c = case(model, method)
    leaves = adapters.nodes(c.model.params)
    want = 0
    for name, x in adapters.nodes(c.adapter).items():
        if is_adapted(x) and not isinstance(x, Tokens | AdaptedBias):
            size = lambda role, name=name, x=x: int(
                np.prod(
                    [n for n, axis in zip(leaves[name].shape, x.axes, strict=True) if axis == role]
                )
            )
            count = COUNTS.get(method, lambda b, i, o: b * RANK * (i + o))
            want += count(*map(size, "bio"))
        elif isinstance(x, Tokens):
            want += x.values.size
        else:
            want += leaves[name].size
    assert lora.summary(c.model.params, c.adapter).startswith(f"trainable params: {want:,d} ||")


@few
def test_vmap_over_adapters(model):
    c = case(model, "lora_head")
    several = [perturbed(c.initial, seed=s) for s in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *several)
    want = jnp.stack([c.merged(a) for a in several])
    assert_close(jax.jit(jax.vmap(c.lifted))(stacked), want)
    assert_close(jax.jit(jax.vmap(c.merged))(stacked), want)


@both
def test_checkpoint_around_the_whole(model, method):
    c = case(model, method)
    assert_close(c.gradient(jax.checkpoint(c.lifted)), c.lifted_gradient, rtol=1e-4, atol=1e-4)


@both
def test_bfloat16_base_and_activations(model, method):
    c = case(model, method)
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    half = lambda t: jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x).astype(jnp.bfloat16)) if is_float(x) else x, t
    )
    params, x = half(c.model.params), half(c.model.x)
    # Factors stay in float32; leaves trained in full have the dtype of the base.
    adapter = jax.tree.map(lambda n: n if is_adapted(n) else half(n), c.adapter, is_leaf=is_adapted)
    got = jax.jit(c.lifted)(adapter, x, params)
    want = jax.jit(c.merged)(adapter, x, params)
    base = jax.eval_shape(c.model.fn, params, x)
    assert got.dtype == want.dtype == base.dtype  # float32 where the model itself says so (LSTM)
    scale = float(jnp.max(jnp.abs(want.astype(jnp.float32))))
    # Eight bits of mantissa, through a few layers.
    assert_close(got, want, rtol=0, atol=0.06 * scale)


@both
def test_eager_equals_jit(model, method):
    c = case(model, method)
    assert_close(c.lifted(c.adapter), c.lifted_output)


@both
def test_saved_and_loaded_exactly(model, method, tmp_path):
    c = case(model, method)
    lora.save(tmp_path, c.adapter, c.config, base="zoo")
    adapter, config = lora.load(tmp_path, c.model.params, base="zoo")
    assert config == c.config
    assert_same(adapter, c.adapter)


@pytest.mark.parametrize(
    ("model", "method"),
    [grouped(m, x, slow=x != "lora") for x in ("lora", "dora", "offset", *RARE) for m in zoo.ZOO],
)
def test_every_use_is_factored(model, method):
    c = case(model, method)
    report = lora.explain(c.model.fn, c.model.params, c.adapter, c.model.x)
    assert {n: u.fallbacks for n, u in report.kernels.items()} == dict.fromkeys(c.kernels, ())
    assert all(use.factored > 0 for use in report.kernels.values())


@pytest.mark.rounding
@fewest
def test_training_the_bound_tree_under_a_mask_gives_the_same_adapter(model):
    """Bit for bit, with the base bitwise unchanged, by either way of masking in optax."""
    c = case(model, "lora_head")
    params = c.model.params
    loss = lambda bound: jnp.mean(lora.lift(c.model.fn)(bound, c.model.x) ** 2)
    adamw = optax.adamw(1e-2)
    by_label = lambda tree: optax.multi_transform(
        {"trainable": adamw, "frozen": optax.set_to_zero()}, lora.labels(tree)
    )
    by_mask = lambda tree: optax.chain(
        optax.masked(adamw, lora.mask),
        optax.masked(optax.set_to_zero(), lambda t: jax.tree.map(lambda m: not m, lora.mask(t))),
    )

    def train(tree, loss, make):
        tx = make(tree)
        state = tx.init(tree)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(tree), state, tree)
            tree = optax.apply_updates(tree, updates)
        return tree

    alone = train(c.initial, lambda a: loss(lora.bind(params, a)), by_label)
    for make in (by_label, by_mask):
        whole = train(lora.bind(params, c.initial), loss, make)
        assert_same(whole, lora.bind(params, alone))
