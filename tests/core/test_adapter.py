"""init, bind, merge, labels and summary, beyond what the contract suite pins."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax as lora
from lora_jax import paths
from lora_jax.adapter import nodes
from lora_jax.lowrank import LowRank, with_array_scale
from lora_jax.models import bert
from tests.helpers import zoo

KEY = jax.random.key(0)


def mlp():
    return zoo.ZOO["mlp"]()


def test_initial_values():
    params = {"w": jnp.zeros((400, 300)), "v": jnp.zeros((400, 300))}
    fn = lambda p, x: x @ p["w"] + x @ p["v"]
    adapter = lora.init(KEY, fn, params, lora.LoRAConfig(rank=64), jnp.zeros((1, 400)))
    a = np.asarray(adapter["w"].a)
    bound = 1 / 400**0.5
    assert np.max(np.abs(a)) <= bound and np.max(np.abs(a)) > 0.999 * bound
    # Moments of U(-bound, bound) within five standard errors.
    n = a.size
    assert abs(a.mean()) < 5 * bound / (3 * n) ** 0.5
    assert abs(a.var() - bound**2 / 3) < 5 * bound**2 * (4 / 45 / n) ** 0.5
    assert not np.any(adapter["w"].b)
    assert not np.allclose(a, adapter["v"].a)


def test_fan_in_counts_all_input_axes_of_one_kernel():
    fn = lambda p, x: jnp.einsum("eblhk,ehkd->ebld", x, p["w"])
    x = jax.ShapeDtypeStruct((3, 2, 5, 4, 25), jnp.float32)
    params = {"w": jnp.zeros((3, 4, 25, 40))}
    node = lora.init(KEY, fn, params, lora.LoRAConfig(rank=32), x)["w"]
    assert node.axes == "biio" and node.a.shape == (3, 4, 25, 32) and node.b.shape == (3, 32, 40)
    assert 0.099 < np.max(np.abs(node.a)) <= 0.1


def test_another_choice_of_targets_leaves_a_draw_as_it_is():
    m = mlp()
    init = lambda *targets: lora.init(
        KEY, m.fn, m.params, lora.LoRAConfig(rank=2, targets=targets), m.x
    )
    one, both = init("up"), init("down", "up")
    np.testing.assert_array_equal(one["params"]["up"]["kernel"].a, both["params"]["up"]["kernel"].a)
    assert "down" not in one["params"]


def test_never_runs_the_function():
    ran = []

    def fn(p, x):
        jax.debug.callback(lambda: ran.append(1))
        return x @ p["w"]

    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    adapter = lora.init(KEY, fn, {"w": shape(4, 6)}, lora.LoRAConfig(rank=2), shape(3, 4))
    assert adapter["w"].a.shape == (4, 2) and not ran


@pytest.mark.parametrize("targets", [("all-linear",), ("up/kernel",), ()])
def test_init_flattens_the_parameters_once(monkeypatch, targets):
    m, calls, named_leaves = mlp(), [], paths.named_leaves

    def count(tree, **options):
        calls.append(tree)
        return named_leaves(tree, **options)

    monkeypatch.setattr(paths, "named_leaves", count)
    config = lora.LoRAConfig(rank=2, targets=targets, train=("re:.*/bias",))
    lora.init(KEY, m.fn, m.params, config, m.x)
    assert len(calls) == 1 and calls[0] is m.params
    lora.tabulate(m.fn, m.params, config, m.x)
    assert len(calls) == 2


def test_all_linear_takes_every_contracted_kernel_but_what_is_trained():
    m = zoo.ZOO["tied"]()
    names = lambda **fields: set(
        nodes(lora.init(KEY, m.fn, m.params, lora.LoRAConfig(rank=2, **fields), m.x))
    )
    attention = {f"params/block/attention/{n}/kernel" for n in ("query", "key", "value", "out")}
    linear = attention | {f"params/{n}/kernel" for n in ("block/up", "block/down", "head")}
    assert names() == linear | {"params/embed/embedding"}  # tied: contracted as the output layer
    without = names(train=("head", "embed"))
    assert without == linear | {"params/embed/embedding", "params/head/bias"}


def test_other_collections_are_left_alone():
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(4, name="dense")(x))

    x = jax.random.normal(KEY, (3, 5))
    variables = Norm().init(KEY, x)
    fn = lambda v, x: Norm().apply(v, x, train=True, mutable=["batch_stats"])
    adapter = lora.init(KEY, fn, variables, lora.LoRAConfig(rank=2), x)
    assert list(nodes(adapter)) == ["params/dense/kernel"]
    out, stats = lora.lift(fn)(lora.bind(variables, adapter), x)
    want, want_stats = fn(variables, x)
    # Before 0.9 JAX compiled the statistics with the product, and XLA fused the two otherwise.
    exact = jax.__version_info__ >= (0, 9)
    same = (
        np.testing.assert_array_equal
        if exact
        else functools.partial(np.testing.assert_allclose, rtol=1e-5)
    )
    same(out, want)
    jax.tree.map(same, stats, want_stats)


def test_nnx_in_three_lines():
    model = zoo.NnxBlock(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    fn = lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)
    x = jnp.ones((2, 5, 8))
    adapter = lora.init(KEY, fn, params, lora.LoRAConfig(rank=2, targets=("value", "0")), x)
    assert list(nodes(adapter)) == ["attention/value/kernel", "layers/0/kernel"]
    merged = nnx.merge(graph, lora.merge(params, adapter), rest)
    np.testing.assert_allclose(merged(x), model(x), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(targets=("qurey",)), "targets entry 'qurey' matches no parameter"),
        (dict(targets=("upp",)), "did you mean 'up'"),
        (dict(targets=("up/bias",)), "none that the function contracts"),
        (dict(targets=("up",), train=("upward",)), "train entry 'upward' matches no parameter"),
        (dict(targets=("up", "head"), train=("re:.*head.*",)), "overlap in params/head"),
        (
            dict(rank=9, targets=("up",)),
            r"rank 9 is larger than the kernel 'params/\w+/kernel' of shape",
        ),
        (dict(rank_pattern={"head": 4}), "of shape \\(8, 3\\)"),
        (dict(rank=2, rank_pattern={"sideways": 1}), "rank_pattern entry 'sideways' matches no"),
        (dict(rank=2, alpha_pattern={"sideways": 1}), "alpha_pattern entry 'sideways'"),
        (dict(train=("re:.*kernel",)), "'all-linear' finds no kernel"),
    ],
)
def test_init_refuses(fields, says):
    m = mlp()
    with pytest.raises(ValueError, match=says):
        lora.init(KEY, m.fn, m.params, lora.LoRAConfig(**{"rank": 2, **fields}), m.x)


def test_rank_may_equal_the_smaller_side():
    m = mlp()
    config = lora.LoRAConfig(rank=8, rank_pattern={"head": 3})
    adapter = lora.init(KEY, m.fn, m.params, config, m.x)
    assert adapter["params"]["head"]["kernel"].a.shape == (8, 3)
    assert adapter["params"]["up"]["kernel"].a.shape == (8, 8)


def test_bind_and_merge_refuse_what_does_not_fit():
    m = mlp()
    adapter = lora.init(KEY, m.fn, m.params, lora.LoRAConfig(rank=2), m.x)
    for apply in (lora.bind, lora.merge):
        with pytest.raises(ValueError, match="no parameter at params/gone; parameters here"):
            apply(m.params, {"params": {"gone": jnp.zeros(3)}})
        with pytest.raises(ValueError, match=r"params/up/bias has shape \(16,\), not \(3,\)"):
            apply(m.params, {"params": {"up": {"bias": jnp.zeros(3)}}})
        with pytest.raises(ValueError, match="needs a, b and scale"):
            apply(m.params, {"params": {"up": {"kernel": adapter["params"]["down"]["kernel"]}}})
        with pytest.raises(ValueError, match="already bound.*Pass the adapter itself"):
            apply(m.params, lora.bind(m.params, adapter))
        with pytest.raises(ValueError, match=r"already bound to an adapter.*lora.merge\(params"):
            apply(lora.bind(m.params, adapter), adapter)


def test_everything_else_refuses_a_bound_tree():
    m = mlp()
    config = lora.LoRAConfig(rank=2, targets=("up",), train=("head",))
    adapter = lora.init(KEY, m.fn, m.params, config, m.x)
    bound = lora.bind(m.params, adapter)
    head = {"params": {"head": adapter["params"]["head"]}}  # no kernel: the trained leaves alone
    for tree in (bound, lora.bind(m.params, head)):
        for use in (
            lambda tree=tree: lora.summary(m.params, tree),
            lambda tree=tree: lora.summary(tree, adapter),
            lambda tree=tree: lora.explain(m.fn, m.params, tree, m.x),
            lambda tree=tree: lora.explain(m.fn, tree, adapter, m.x),
            lambda tree=tree: lora.init(KEY, m.fn, tree, config, m.x),
            lambda tree=tree: nodes(tree),
        ):
            with pytest.raises(ValueError, match="already bound"):
                use()


def test_a_second_adapter_on_the_merged_first():
    m = mlp()
    one, two = (
        jax.tree.map(
            lambda x: x + 0.1,
            lora.init(jax.random.key(k), m.fn, m.params, lora.LoRAConfig(rank=2), m.x),
        )
        for k in (0, 1)
    )
    got = lora.lift(m.fn)(lora.bind(lora.merge(m.params, one), two), m.x)
    name = lambda tree: tree["params"]["up"]["kernel"]
    both = lora.merge(lora.merge(m.params, one), two)
    want = name(m.params) + sum(8.0 * name(x).a @ name(x).b for x in (one, two))
    np.testing.assert_allclose(name(both), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, m.fn(both, m.x), rtol=1e-3, atol=1e-3)


KEYS = {
    "a leaf and what its key begins": {"w": (8, 6), "w/extra": (6, 4)},
    "the other way round": {"a/w/b": (8, 6), "a": {"w": (6, 4)}},
    "deep": {"m": {"w/x": {"k": (8, 6)}, "w": (6, 4)}},
    "slashes": {"/w": (8, 6), "a//b": (6, 4)},
    "numbers": {3: (8, 6), 10: (6, 4)},
    "a list": [(8, 6), (6, 4)],
    "an empty part": {"": {"k": (8, 6)}, "b": {"": (6, 4)}},
    "signs": {"a + b": (8, 6), "a.b": (6, 4)},
}


@pytest.mark.parametrize("shapes", KEYS.values(), ids=KEYS)
def test_keys_of_any_kind(shapes, tmp_path):
    is_shape = lambda x: isinstance(x, tuple)
    draw = lambda shape: jax.random.normal(jax.random.key(sum(shape)), shape)
    params = jax.tree.map(draw, shapes, is_leaf=is_shape)

    def fn(params, x):  # the product of the two, the larger first
        one, two = sorted(jax.tree.leaves(params), key=lambda w: -w.shape[0])
        return x @ one @ two

    x = jnp.ones((2, 8))
    config = lora.LoRAConfig(rank=2, alpha=2.0)
    adapter = jax.tree.map(lambda x: x + 0.1, lora.init(KEY, fn, params, config, x))
    assert set(nodes(adapter)) == set(paths.named_leaves(params)) and len(nodes(adapter)) == 2
    merged = lora.merge(params, adapter)
    for name, w in paths.named_leaves(merged).items():
        node = nodes(adapter)[name]
        want = paths.named_leaves(params)[name] + node.a @ node.b
        np.testing.assert_allclose(w, want, rtol=1e-5, atol=1e-5)
    got = lora.lift(fn, strict=True)(lora.bind(params, adapter), x)
    np.testing.assert_allclose(got, fn(merged, x), rtol=1e-4, atol=1e-4)
    uses = lora.explain(fn, params, adapter, x).kernels
    assert [use.factored for use in uses.values()] == [1, 1]
    lora.save(tmp_path, adapter, config)
    loaded, _ = lora.load(tmp_path, params)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


@pytest.mark.parametrize(
    "params, says",
    [
        ({"a/b": 1, "a": {"b": 2}}, "share the path 'a/b'"),
        ({1: 1, "1": 2}, "cannot be sorted.*Make them all strings"),
        ({1: 1, "a": 2}, "cannot be sorted"),
        ({"": jnp.ones((8, 6))}, "empty key"),
        ([{"1": {"a": 1}}, {1: {"b": 1}, "x": 1}], "cannot be sorted"),
    ],
)
def test_keys_that_can_not_be_told_apart(params, says):
    fn = lambda p, x: x
    for use in (
        lambda: lora.init(KEY, fn, params, lora.LoRAConfig(rank=2), jnp.ones(8)),
        lambda: lora.bind(params, {}),
        lambda: lora.merge(params, {}),
        lambda: lora.summary({"w": jnp.ones(3)}, params),
    ):
        with pytest.raises(ValueError, match=says):
            use()


def test_merge_keeps_structure_shapes_and_dtypes():
    m = mlp()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), m.params)
    adapter = lora.init(KEY, m.fn, params, lora.LoRAConfig(rank=2), m.x)
    merged = lora.merge(params, adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    assert adapter["params"]["up"]["kernel"].a.dtype == jnp.float32


def test_merge_against_numpy():
    m = mlp()
    adapter = lora.init(
        KEY, m.fn, m.params, lora.LoRAConfig(rank=2, alpha=3.0, targets=("up",)), m.x
    )
    node = adapter["params"]["up"]["kernel"]
    b = np.random.default_rng(0).normal(size=node.b.shape).astype(np.float32)
    merged = lora.merge(m.params, {"params": {"up": {"kernel": LowRank(node.a, b, node.scale)}}})
    w = np.asarray(m.params["params"]["up"]["kernel"], np.float64)
    want = w + 1.5 * np.asarray(node.a, np.float64) @ b
    np.testing.assert_allclose(merged["params"]["up"]["kernel"], want, rtol=1e-6, atol=1e-6)


def test_trained_leaves_are_copies_so_that_donation_spares_the_base():
    m = mlp()
    config = lora.LoRAConfig(targets=(), train=("head",))
    adapter = lora.init(KEY, m.fn, m.params, config, m.x)
    jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(adapter)
    assert np.all(np.isfinite(m.params["params"]["head"]["kernel"]))


def test_integers_are_never_trained():
    params = {"w": jnp.ones((4, 6)), "count": jnp.int32(3)}
    fn = lambda p, x: x @ p["w"]
    config = lora.LoRAConfig(targets=(), train=("re:.*",))
    assert list(nodes(lora.init(KEY, fn, params, config, jnp.ones((1, 4))))) == ["w"]


def test_labels_and_mask_in_optax():
    m = mlp()
    config = lora.LoRAConfig(rank=2, targets=("up",), train=("head",))
    adapter = lora.init(KEY, m.fn, m.params, config, m.x)
    assert jax.tree.leaves(lora.labels(adapter)) == 4 * ["trainable"]
    bound = lora.bind(m.params, adapter)
    labels = jax.tree.leaves(lora.labels(bound))
    assert labels.count("trainable") == 4
    assert labels.count("frozen") == len(jax.tree.leaves(m.params)) - 2  # all but the head
    grads = jax.tree.map(jnp.ones_like, adapter)
    parts = {"trainable": optax.sgd(1.0), "frozen": optax.set_to_zero()}
    for tx in (
        optax.multi_transform(parts, lora.labels),
        optax.partition(parts, lora.labels(adapter)),
        optax.chain(optax.masked(optax.sgd(1.0), lora.mask)),
    ):
        updates, _ = tx.update(grads, tx.init(adapter), adapter)
        node = updates["params"]["up"]["kernel"]
        assert np.all(node.a == -1) and np.all(node.b == -1)


def test_no_gradient_reaches_the_scale():
    m = mlp()
    adapter = lora.init(KEY, m.fn, m.params, lora.LoRAConfig(rank=2), m.x)
    adapter = jax.tree.map(with_array_scale, adapter, is_leaf=lambda x: isinstance(x, LowRank))
    adapter = jax.tree.map(jnp.ones_like, adapter)
    for run in (
        lambda a: lora.lift(m.fn)(lora.bind(m.params, a), m.x),
        lambda a: m.fn(lora.merge(m.params, a), m.x),
    ):
        grads = jax.grad(lambda a, run=run: jnp.sum(run(a) ** 2))(adapter)
        assert all(float(x.scale) == 0 for x in nodes(grads).values())


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class WithFunction:
    """As an Equinox module: a function and a flag are leaves beside the arrays."""

    weight: jax.Array
    activation: object = jax.nn.relu
    inference: bool = True


def test_a_module_with_functions_and_flags_among_its_leaves():
    fn = lambda p, x: p.activation(x @ p.weight) if p.inference else x
    params, x = WithFunction(jnp.ones((4, 3))), jnp.ones((2, 4))
    config = lora.LoRAConfig(rank=1, targets=("weight",))
    adapter = lora.init(KEY, fn, params, config, x)
    assert lora.summary(params, adapter).startswith("trainable params: 7 || all params: 19 ||")
    merged = lora.merge(params, adapter)
    assert merged.activation is jax.nn.relu and merged.inference is True
    lifted = lora.lift(fn, strict=True)(lora.bind(params, adapter), x)
    np.testing.assert_array_equal(lifted, fn(merged, x))


def test_summary_of_bert_base():
    config = bert.BertConfig()
    model = bert.BertForSequenceClassification(config, num_labels=2)
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, KEY, ids, ids)
    recipe = lora.LoRAConfig(rank=8, alpha=16.0, targets=("query", "value"))
    adapter = lora.init(KEY, model.apply, params, recipe, ids, ids)
    head = {n: jnp.zeros(x.shape) for n, x in params["params"]["classifier"].items()}
    adapter["params"]["classifier"] = head
    assert lora.summary(params, adapter) == (
        "trainable params: 296,450 || all params: 109,778,690 || trainable%: 0.2700"
    )


def test_abstract_parameters_and_trained_leaves():
    """Everything that `init` needs of the base is its shapes, unless leaves are trained in full."""
    fn = lambda p, x: x @ p["w"]
    params = {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32)}
    with pytest.raises(ValueError, match="values"):
        lora.init(KEY, fn, params, lora.LoRAConfig(targets=(), train=("w",)), jnp.ones((1, 4)))


def test_nnx_scanned_and_rematerialised():
    """Stacked layers made by `nnx.vmap` and run by `nnx.scan`, with state besides parameters."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(8, 8, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs)

        def __call__(self, x):
            return x + self.dropout(jnp.tanh(self.linear(x)))

    class Model(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(Block, in_axes=(0,), out_axes=0)
            self.blocks = nnx.split_rngs(splits=3)(make)(rngs)
            self.table = nnx.Embed(10, 8, rngs=rngs)

        def __call__(self, ids):
            step = nnx.remat(lambda block, x: block(x))
            run = nnx.scan(step, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            return self.table.attend(run(self.blocks, self.table(ids)))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    fn = lambda params, ids: nnx.merge(graph, params, rest, copy=True)(ids)
    ids = jnp.array([[1, 2, 9]])
    adapter = lora.init(KEY, fn, params, lora.LoRAConfig(rank=2), ids)
    assert {n: x.axes for n, x in nodes(adapter).items()} == {
        "blocks/linear/kernel": "bio", "table/embedding": "io",
    }  # fmt: skip
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    got = jax.jit(lora.lift(fn, strict=True))(lora.bind(params, adapter), ids)
    np.testing.assert_allclose(got, fn(lora.merge(params, adapter), ids), rtol=1e-4, atol=1e-5)


def test_a_sharding_constraint_keeps_the_kernel_factored():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    fn = lambda p, x: x @ jax.lax.with_sharding_constraint(p["w"], replicated)
    params, x = {"w": jnp.ones((4, 6))}, jnp.ones((3, 4))
    adapter = jax.tree.map(jnp.ones_like, lora.init(KEY, fn, params, lora.LoRAConfig(rank=2), x))
    got = jax.jit(lora.lift(fn, strict=True))(lora.bind(params, adapter), x)
    np.testing.assert_allclose(got, fn(lora.merge(params, adapter), x))
