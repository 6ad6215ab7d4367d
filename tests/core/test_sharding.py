"""Specs from a table, and what follows from them for adapters and optimisers; on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

import lora_jax as lora
from configs import common
from lora_jax import paths, sharding
from lora_jax.lowrank import LowRank, factor_shapes
from lora_jax.models import registry
from lora_jax.models.families import CLASSIFIER
from lora_jax.training.mesh import ONE, check, find
from tests.helpers import slow

P = PartitionSpec
MESH = AbstractMesh((2, 4, 2), sharding.AXES)
zeros = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)


def spec(shape, *rules, mesh=MESH, name="up/kernel", **options):
    """The spec of one array."""
    tree = paths.nest({name: zeros(*shape)})
    (found,) = jax.tree.leaves(sharding.specs(tree, rules, mesh, **options))
    return tuple(found)


COLUMN = ("up/kernel", ("fsdp", "tensor"))


@pytest.mark.parametrize(
    "shape, rules, wanted",
    [
        ((16, 64), [COLUMN], ("fsdp", "tensor")),
        ((3, 16, 64), [COLUMN], (None, "fsdp", "tensor")),  # stacked layers stay whole
        ((8, 5, 16, 64), [COLUMN], (None, None, "fsdp", "tensor")),
        ((18, 64), [COLUMN], (None, ("tensor", "fsdp"))),  # 18 by 4 does not go, 64 by 8 does
        ((18, 6), [COLUMN], (None, "tensor")),  # nor does 6 by 8: then not at all
        ((4, 18, 6), [COLUMN], (None, None, "tensor")),  # and never along the layers
        ((16, 63), [COLUMN], ("fsdp", None)),
        ((16, 64), [("kernel", (("fsdp", "tensor"), None))], (("fsdp", "tensor"), None)),
        (
            (16, 64),
            [("re:.*kernel", (None, "tensor"))],
            (None, "tensor"),
        ),  # not asked for: not filled
        ((16, 64), [("up", ()), COLUMN], (None, None)),  # the first rule holds
        ((16, 64), [], (None, "fsdp")),  # no rule: the largest axis
        ((64, 64), [], (None, "fsdp")),
        ((64, 6), [], ("fsdp", None)),
        ((4, 7), [], ("fsdp", None)),  # the first axis rather than none
        ((12, 64, 3), [], (None, "fsdp", None)),
        ((8,), [], ("fsdp",)),
        ((7,), [], (None,)),
        ((), [], ()),
    ],
)
def test_specs(shape, rules, wanted):
    assert spec(shape, *rules) == wanted


def test_a_mesh_without_fsdp_fills_nothing():
    mesh = AbstractMesh((4,), ("model",))
    assert spec((16, 64), ("kernel", (None, "model")), mesh=mesh) == (None, "model")
    assert spec((16, 64), mesh=mesh) == (None, None)
    assert spec((16, 64), mesh=mesh, fill="model") == (None, "model")


@pytest.mark.parametrize(
    "rules, said",
    [
        ([("kernel", ("rows", None))], r"names \['rows'\], and the mesh has the axes 'data', 'fsdp'"),
        ([("kernel", ("fsdp", "fsdp"))], r"names \['fsdp'\] twice"),
        ([("kernel", (None, None, "fsdp"))], "'up/kernel' has 2 axes, fewer than the spec"),
        ([("kernle", ("fsdp",))], "'kernle' matches no parameter .did you mean 'kernel'"),
    ],
)  # fmt: skip
def test_rules_that_can_not_be_meant(rules, said):
    with pytest.raises(ValueError, match=said):
        spec((16, 64), *rules)


def test_all_mistakes_in_one_error():
    with pytest.raises(ValueError, match="(?s)rows.*fewer than.*matches no"):
        spec((16,), ("kernel", ("rows", None)), ("none", ()))
    assert spec((16, 64), ("none", ()), COLUMN, strict=False) == ("fsdp", "tensor")


def node(axes, *shape, rank=2):
    a, b = factor_shapes(shape, axes, rank)
    return LowRank(zeros(*a), zeros(*b), zeros(), axes=axes)


@pytest.mark.parametrize(
    "axes, kernel, a, b",
    [
        ("io", P("fsdp", "tensor"), ("fsdp", None), (None, "tensor")),
        ("oi", P("fsdp", "tensor"), ("tensor", None), (None, "fsdp")),
        ("bio", P(None, "fsdp", "tensor"), (None, "fsdp", None), (None, None, "tensor")),
        ("ioo", P("fsdp", "tensor"), ("fsdp", None), (None, "tensor", None)),  # a shorter spec
        ("iio", P("tensor", None, "fsdp"), ("tensor", None, None), (None, "fsdp")),
        ("bio", P("experts", None, ("a", "b")), ("experts", None, None), ("experts", None, ("a", "b"))),
        ("io", P(), (None, None), (None, None)),
    ],
)  # fmt: skip
def test_factors_are_split_as_their_kernel(axes, kernel, a, b):
    adapter = {"w": node(axes, *(4,) * len(axes))}
    found = sharding.adapter_specs({"w": kernel, "other": P()}, adapter)["w"]
    assert (tuple(found.a), tuple(found.b), tuple(found.scale)) == (a, b, ())
    assert jax.tree.structure(adapter) == jax.tree.structure({"w": found})


def test_adapter_specs_take_any_specs_and_name_what_is_missing():
    mesh = Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    adapter = {"head": {"kernel": zeros(4, 2)}, "w": node("io", 4, 4)}
    theirs = {"head": {"kernel": NamedSharding(mesh, P("fsdp"))}, "w": NamedSharding(mesh, P(None, "fsdp"))}  # fmt: skip
    found = sharding.adapter_specs(theirs, adapter)
    assert tuple(found["head"]["kernel"]) == ("fsdp",) and tuple(found["w"].b) == (None, "fsdp")
    with pytest.raises(ValueError, match="The adapter has head/kernel, for which there is no spec"):
        sharding.adapter_specs({"w": P()}, adapter)
    with pytest.raises(ValueError, match="w has 2 axes, fewer than its spec"):
        sharding.adapter_specs({"w": P(None, None, "fsdp")}, {"w": node("io", 4, 4)})
    with pytest.raises(ValueError, match="PartitionSpec or a NamedSharding is needed"):
        sharding.adapter_specs({"w": "fsdp"}, {"w": node("io", 4, 4)})


@pytest.mark.parametrize("rule", ["adamw", "sgd", "adafactor", "multi_steps", "ema"])
def test_states_of_optimisers_are_split_as_the_adapter(rule):
    """As optax itself tells which arrays are like parameters."""
    adapter = jax.tree.map(
        lambda x: jnp.zeros(x.shape), {"up": {"kernel": node("io", 16, 64)}, "bias": zeros(8)}
    )
    made = {
        "adamw": lambda: optax.adamw(1e-3), "sgd": lambda: optax.sgd(1e-3, momentum=0.9),
        "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=4),
        "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-3), 2), "ema": lambda: optax.ema(0.9),
    }[rule]()  # fmt: skip
    split = sharding.adapter_specs(
        {"up": {"kernel": P("fsdp", "tensor")}, "bias": P("fsdp")}, adapter
    )
    state = made.init(adapter)
    found = sharding.state_specs(state, adapter, split)
    like = lambda x, s: s if x.ndim == len(s) else P()  # adafactor has vectors for its matrices
    wanted = optax.tree_map_params(made, like, state, split, transform_non_params=lambda _: P())
    same = jax.tree.map(lambda x, y: tuple(x) == tuple(y), found, wanted)
    if rule != "adafactor":  # whose vectors have no counterpart, and are on every device
        assert all(jax.tree.leaves(same))


def test_optimiser_of_the_experiments():
    adapter = {"kernel": LowRank(jnp.zeros((16, 2)), jnp.zeros((2, 8)), jnp.ones(()))}
    tx = optax.multi_transform(
        {"trainable": optax.adamw(1e-3), "frozen": optax.set_to_zero()}, lora.labels(adapter)
    )
    split = sharding.adapter_specs({"kernel": P("fsdp", "tensor")}, adapter)
    state = tx.init(adapter)
    found = sharding.state_specs(state, adapter, split)
    by_shape = {(16, 2): ("fsdp", None), (2, 8): (None, "tensor")}
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True))
    assert sum(x.ndim == 2 for x, _ in pairs) == 4  # two moments of two factors
    assert all(tuple(s) == by_shape.get(x.shape, ()) for x, s in pairs)


def test_what_a_device_holds():
    tree = {"w": zeros(16, 64), "odd": zeros(7, 3)}
    specs = sharding.specs(tree, [("w", ("fsdp", "tensor"))], MESH)
    assert sharding.replicated(tree, specs) == ["odd"]
    assert sharding.bytes_per_device(tree, specs, MESH) == 4 * (16 * 64 // 8 + 21)


def test_placing_keeps_values():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
    where = NamedSharding(mesh, P(None, "fsdp"))
    x = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    for given in (x, jnp.asarray(x), x.T.copy().T):
        made = sharding.put(given, where)
        assert made.sharding == where
        np.testing.assert_array_equal(made, x)
    rounded = sharding.put(x, where, jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    stacked = sharding.put_layers((3, 4), np.float32, iter(x), where)
    np.testing.assert_array_equal(stacked, x)
    x[:] = -1  # nothing on the devices is a view of what was given
    assert float(rounded[0, 1]) == 1 and float(stacked[0, 1]) == 1


def test_constraints_do_nothing_without_a_mesh():
    made = jax.make_jaxpr(lambda x: sharding.split_lookup(sharding.split_rows(x)))(jnp.ones((4, 8)))
    assert not made.eqns


def test_dropout_is_the_same_with_and_without_constraints():
    """A model may be told of a mesh; its low-rank branches draw the same."""

    def fn(params, x, mark):
        for name in ("one", "two"):
            x = mark(jnp.tanh(x @ params[name]))
        return x

    mesh = Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    marked = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
    params = {n: jax.random.normal(jax.random.key(k), (8, 8)) for k, n in enumerate(("one", "two"))}
    config = lora.LoRAConfig(rank=2)
    x, outputs = jnp.ones((4, 8)), []
    for mark in (lambda x: x, marked):
        f = lambda p, x, mark=mark: fn(p, x, mark)
        adapter = jax.tree.map(
            lambda y: y + 0.1, lora.init(jax.random.key(3), f, params, config, x)
        )
        lifted = lora.lift(f, dropout=0.5, dropout_key=jax.random.key(4))
        outputs.append(lifted(lora.bind(params, adapter), x))
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("family", registry.FAMILIES, ids=lambda f: f.model_type[0])
@pytest.mark.parametrize("scan", slow.after(1, [True, False]))
def test_every_family_says_how_its_kernels_are_split(family, scan):
    """Each kernel has a rule; an eighth is left of all; layers that are stacked stay whole."""
    head = CLASSIFIER if CLASSIFIER in family.models else next(iter(family.models))
    model = family.models[head](family.config(), scan_layers=scan)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *family.inputs(head))
    leaves = paths.named_leaves(shapes)
    specs = sharding.specs(shapes, family.sharding, MESH, strict=False)
    ruled = {n for n in leaves if any(paths.matches(p, n) for p, _ in family.sharding)}
    matrices = {n for n in leaves if n.endswith(("/kernel", "/embedding"))}
    assert matrices - ruled <= {n for n in matrices if "relative_attention_bias" in n}
    total = sum(x.size * x.dtype.itemsize for x in leaves.values())
    eight = AbstractMesh((1, 8, 1), sharding.AXES)
    split = sharding.specs(shapes, family.sharding, eight, strict=False)
    assert sharding.bytes_per_device(shapes, split, eight) / total == pytest.approx(1 / 8, rel=1e-3)
    stacks = [n for n in leaves if scan and "layer" in n.split("/")[-3:]]
    assert all(tuple(paths.named_leaves(specs)[n])[:1] == (None,) for n in stacks)


def config(**mesh):
    made = common.base_config()
    made.pmap = mesh.pop("pmap", False)
    made.mesh.update(mesh)
    return made


@pytest.mark.parametrize(
    "mesh, said",
    [
        (dict(data=0), "mesh.data must be a whole number of at least 1, or -1, got 0"),
        (dict(data=-2), "mesh.data must be a whole number of at least 1, or -1, got -2"),
        (dict(fsdp=-1), "mesh.fsdp must be a whole number of at least 1, got -1"),
        (dict(tensor=0), "mesh.tensor must be a whole number of at least 1, got 0"),
        (dict(data=2), "needs 2 devices or more .data 2 x fsdp 1 x tensor 1., and there are 1"),
        (dict(data=-1, fsdp=3), "needs 3 devices or more"),
        (dict(pmap=True, fsdp=2), "pmap splits the rows of a batch alone, and mesh.fsdp is 2"),
    ],
)
def test_meshes_that_can_not_be(mesh, said):
    with pytest.raises(ValueError, match=said):
        check(config(**mesh))


def test_one_device_is_no_mesh():
    assert find(config()) == ONE
    assert find(config(data=-1)) == ONE


def test_partitioned_kernels_of_flax():
    """Kernels that Flax itself annotates: their specs serve as they are."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", "tensor"))
    model = nn.Dense(8, kernel_init=init)
    x = jnp.ones((2, 4))
    boxed = model.init(jax.random.key(0), x)
    theirs = nn.get_partition_spec(boxed)
    params = nn.unbox(boxed)
    adapter = lora.init(jax.random.key(1), model.apply, params, lora.LoRAConfig(rank=2), x)
    found = sharding.adapter_specs(theirs, adapter)["params"]["kernel"]
    assert tuple(found.a) == ("fsdp", None) and tuple(found.b) == (None, "tensor")
