"""The protocol of nodes: a method that `toy_method.py` alone knows goes through everything there is."""

import dataclasses
import functools
import json
import pickle
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import fields, sharding
from lora_jax.lowrank import LowRank
from lora_jax.names import Name
from lora_jax.nodes import KINDS, Adapted, Field, Terms, Trained, as_node
from lora_jax.registration import register
from lora_jax.sweeps import vmapped_step
from lora_jax.training.state import TrainState
from tests.helpers import toy_method, zoo
from tests.helpers.places import ROOT
from tests.helpers.toy_method import Toy

GOLDENS = ROOT / "tests" / "goldens" / "adapters"
# Float32 sums in another order: a few ulps of values of order one, through a few layers.
CLOSE = dict(rtol=1e-4, atol=1e-4)


@functools.cache
def case(name):
    """A model of the zoo, and an adapter of toys with a head that is trained in full."""
    model = zoo.ZOO[name]()
    config = lora.LoRAConfig(rank=2, alpha=3.0, targets=model.targets, train=("head",))
    adapter = lora.init(jax.random.key(0), model.fn, model.params, config, model.x)
    is_plain = lambda x: isinstance(x, LowRank)
    made = lambda x: toy_method.make_like(x, seed=x.b.size) if is_plain(x) else x
    return model, config, jax.tree.map(made, adapter, is_leaf=is_plain)


def entries(adapter):
    return {n: x for n, x in adapters.nodes(adapter).items() if toy_method.is_toy(x)}


def assert_close(got, want, **tolerance):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **(tolerance or CLOSE)), got, want)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


# ---- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.slow
def test_lift_is_merge_is_the_definition(name):
    """Values and gradients on every model, all uses factored; `toy_method.merge` is an einsum of its own."""
    model, _, adapter = case(name)
    run = {
        "lift": lambda a, p, x: lora.lift(model.fn, strict=True)(lora.bind(p, a), x),
        "merge": lambda a, p, x: model.fn(lora.merge(p, a), x),
        "definition": lambda a, p, x: model.fn(toy_method.merge(p, a), x),
    }

    def both(f):
        loss = lambda a, p, x: (jnp.mean(jnp.sin(f(a, p, x))), f(a, p, x))
        return jax.jit(jax.grad(loss, has_aux=True))(adapter, model.params, model.x)

    (grads, got), (merged_grads, merged), (want_grads, want) = map(both, run.values())
    assert_close([got, merged], [want, want])
    for name, node in entries(grads).items():
        expected = entries(want_grads)[name]
        for field in ("d", "b", "g"):
            assert_close(getattr(node, field), getattr(expected, field))
            assert_close(getattr(entries(merged_grads)[name], field), getattr(expected, field))
        assert np.any(node.g) and not np.any(node.a)  # `a` is frozen: no gradient reaches it
    base = model.fn(model.params, model.x)
    assert not np.allclose(got, base, atol=1e-3)


@pytest.mark.parametrize("name", ["scanned_remat", "experts", "tied"])
@pytest.mark.slow
def test_vmap_over_adapters(name):
    model, _, adapter = case(name)
    other = jax.tree.map(lambda x: 0.5 * x, adapter)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), adapter, other)
    lifted = lambda a: lora.lift(model.fn, strict=True)(lora.bind(model.params, a), model.x)
    want = [model.fn(toy_method.merge(model.params, a), model.x) for a in (adapter, other)]
    assert_close(jax.jit(jax.vmap(lifted))(stacked), jnp.stack(want))


def test_bfloat16_models_stay_so():
    model, _, adapter = case("attention")
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    adapter = jax.tree.map(
        lambda x: x if toy_method.is_toy(x) else half(x), adapter, is_leaf=toy_method.is_toy
    )
    params, x = half(model.params), half(model.x)
    got = jax.jit(lambda a: lora.lift(model.fn, strict=True)(lora.bind(params, a), x))(adapter)
    want = jax.jit(lambda a: model.fn(lora.merge(params, a), x))(adapter)
    assert got.dtype == want.dtype == jnp.bfloat16
    # Eight bits of mantissa, through a few layers.
    scale = float(np.abs(np.asarray(want, np.float32)).max())
    assert_close(
        np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=0, atol=0.06 * scale
    )


def test_dropout_is_on_the_branch_alone():
    params, x = {"w": jnp.ones((8, 6))}, jnp.ones((400, 8))
    fn = lambda p, x: x @ p["w"]
    node = toy_method.make_like(LowRank(jnp.zeros((8, 2)), jnp.zeros((2, 6)), 1.5, dropout=0.5))
    run = lambda a, **how: lora.lift(fn, **how)(lora.bind(params, {"w": a}), x)
    dropped = run(node, dropout_key=jax.random.key(0))
    plain = run(node, dropout=0.0)
    assert not np.allclose(dropped, plain)
    # Inverted dropout keeps the mean: the gain of the frozen part has none.
    assert_close(dropped.mean(0), plain.mean(0), rtol=0, atol=0.25)
    no_branch = dataclasses.replace(node, b=jnp.zeros_like(node.b))
    key = jax.random.key(1)
    assert_close(run(no_branch, dropout_key=key), run(no_branch, dropout=0.0), rtol=1e-6)


# ---- What follows from the table -----------------------------------------------------------------


def test_labels_masks_and_counts():
    model, _, adapter = case("scanned")
    made = lora.labels(adapter)
    assert jax.tree.structure(made) == jax.tree.structure(adapter)
    want = {"a": "frozen", "d": "trainable", "b": "trainable", "g": "trainable"}
    for name, node in entries(made).items():
        assert {field: getattr(node, field) for field in want} == want, name
    bound = lora.mask(lora.bind(model.params, adapter))
    assert not any(node.w or node.a for node in jax.tree.leaves(bound, is_leaf=toy_method.is_toy) if toy_method.is_toy(node))  # fmt: skip
    each = entries(adapter).values()
    head = sum(x.size for n, x in adapters.nodes(adapter).items() if not toy_method.is_toy(x))
    trained = sum(x.d.size + x.b.size + x.g.size for x in each) + head
    total = sum(x.size for x in jax.tree.leaves(model.params)) + trained - head
    total += sum(x.a.size for x in each)
    said = lora.summary(model.params, adapter)
    assert said.startswith(f"trainable params: {trained:,d} || all params: {total:,d} ||")


def test_shapes_that_do_not_fit_are_told():
    params = {"w": jnp.zeros((8, 6))}
    node = toy_method.make_like(LowRank(jnp.zeros((8, 2)), jnp.zeros((2, 6)), 1.0))
    with pytest.raises(
        ValueError, match=r"w of shape \(8, 6\) needs a, d, b, g and scale of .*\(6,\)"
    ):
        lora.bind(params, {"w": dataclasses.replace(node, g=jnp.zeros(5))})
    with pytest.raises(ValueError, match="2 axes 'io'"):
        lora.merge({"w": jnp.zeros((3, 8, 6))}, {"w": node})
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), node)
    with pytest.raises(ValueError, match=r"stack with leading axes \(2,\)"):
        lora.merge(params, {"w": stacked})


def test_specs_follow_the_kernels():
    plain = LowRank(jnp.zeros((3, 4, 2)), jnp.zeros((3, 2, 6)), jnp.ones(()), axes="bio")
    made = sharding.adapter_specs(
        {"w": P(None, "fsdp", "tensor")}, {"w": toy_method.make_like(plain)}
    )["w"]
    got = {name: tuple(getattr(made, name)) for name in Toy.table}
    assert got == {
        "a": (None, "fsdp", None), "d": (None, None), "b": (None, None, "tensor"),
        "g": (None, "tensor"), "scale": (),
    }  # fmt: skip


def test_widening():
    node = toy_method.make_like(LowRank(jnp.zeros((8, 2)), jnp.zeros((2, 6), jnp.bfloat16), 1.5))
    node = dataclasses.replace(node, a=node.a.astype(jnp.float16))
    wide = fields.widen(node)
    assert {getattr(wide, n).dtype for n in ("a", "d", "b", "g")} == {jnp.dtype(jnp.float32)}
    assert wide.scale == 1.5


def test_scales_as_data():
    node = toy_method.make_like(LowRank(jnp.zeros((8, 2)), jnp.zeros((2, 6)), 1.5, dropout=0.5))
    made = adapters.as_data({"w": node})["w"]
    assert len(jax.tree.leaves(node)) == 4 and len(jax.tree.leaves(made)) == 5
    assert made.scale.dtype == jnp.float32 and float(made.scale) == 1.5 and made.dropout == 0.0
    assert jax.tree.structure(jax.tree.map(float_of, made)) == jax.tree.structure(made)


def float_of(x):
    return float(np.sum(x))


def member(rank, out=6):
    plain = LowRank(jnp.zeros((8, rank)), jnp.zeros((rank, out)), jnp.float32(1.5))
    adapter = {"w": toy_method.make_like(plain, seed=rank)}
    state = TrainState(np.array(0), adapter, jax.tree.map(jnp.zeros_like, adapter), None)
    found = vmapped_step.Member(state, np.array(True), (), 0.0, {})
    return jax.tree.map(np.asarray, found)


def test_ranks_are_padded_for_a_sweep():
    members = [member(1), member(3)]
    shapes = vmapped_step.common_shapes(members)
    padded = [vmapped_step.pad(m, shapes) for m in members]
    w = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    for m, p in zip(members, padded, strict=True):
        node = p.state.adapter["w"]
        assert node.a.shape == (8, 3) and node.g.shape == (6,)
        assert_close(
            toy_method.merge_kernel(w, node),
            toy_method.merge_kernel(w, m.state.adapter["w"]),
            rtol=1e-6,
        )
        assert_same(vmapped_step.cut(p, m), m)
    vmapped_step.stack(padded, 2)
    loss = lambda a: jnp.sum(lora.merge({"w": w}, a)["w"] ** 2)
    grads = jax.grad(loss)(padded[0].state.adapter)["w"]
    assert not np.any(grads.b[1:]) and not np.any(grads.d[1:])  # padding stays zero


@register
@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Adapted):
    """A toy with an axis of its own that is no rank: numbers of rows."""

    kind = "rows"
    table = {"rows": Field("k", is_trained=False), "values": Field("ko")}

    rows: jax.Array
    values: jax.Array
    w: jax.Array | None = None
    axes: str = "io"
    name: str = ""
    dropout: float = 0.0

    def terms(self, w):
        a = jax.nn.one_hot(self.rows, w.shape[0], dtype=self.values.dtype).T
        return Terms(a, self.values - w[self.rows])


def test_trained_rows_of_a_table(tmp_path):
    """A method that sees the frozen kernel, with integers among its arrays."""
    table = jax.random.normal(jax.random.key(0), (7, 4))
    params, ids = {"table": table}, jnp.array([[0, 3, 5], [6, 3, 3]])
    fn = lambda p, ids: jnp.tanh(p["table"][ids]) @ p["table"].T
    adapter = {"table": Rows(jnp.array([3, 6]), jnp.ones((2, 4)))}
    want = {"table": table.at[jnp.array([3, 6])].set(1.0)}
    assert_close(lora.merge(params, adapter), want, rtol=1e-5)
    got = lora.lift(fn, strict=True)(lora.bind(params, adapter), ids)
    assert_close(got, fn(want, ids))
    lora.save(tmp_path, adapter, lora.LoRAConfig(targets=("table",)))
    assert_same(lora.load(tmp_path, params)[0], adapter)
    assert jax.tree.leaves(lora.mask(adapter)) == [False, True]


def test_a_sweep_refuses_what_zeros_can_not_fill():
    def member(rows):
        node = Rows(np.arange(rows), np.ones((rows, 4)))
        state = TrainState(np.array(0), {"table": node}, (), None)
        return vmapped_step.Member(state, np.array(True), (), np.array(0.0), {})

    with pytest.raises(ValueError, match=r"ranks.*of table: .*'k': 2.*'k': 3"):
        vmapped_step.common_shapes([member(2), member(3)])
    vmapped_step.common_shapes([member(2), member(2)])


# ---- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "scanned"])
def test_saved_and_loaded_exactly(name, tmp_path):
    model, config, adapter = case(name)
    lora.save(tmp_path, adapter, config)
    about = json.loads((tmp_path / "adapter.json").read_text())
    kinds = {n: x["kind"] for n, x in about["nodes"].items()}
    assert about["format_version"] == 2 and set(kinds.values()) == {"toy", "full"}
    loaded, again = lora.load(tmp_path, model.params)
    assert again == config
    assert_same(loaded, adapter)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), adapter)
    lora.save(tmp_path, stacked, config)
    assert_same(lora.load(tmp_path, model.params)[0], stacked)


def test_damage_is_told(tmp_path):
    model, config, adapter = case("mlp")
    node = adapter["params"]["up"]["kernel"]
    wrong = adapter | {"params": adapter["params"] | {"up": {"kernel": dataclasses.replace(node, d=node.d[:1])}}}  # fmt: skip
    with pytest.raises(ValueError, match="params/up/kernel has a, d, b, g and scale of shapes"):
        lora.save(tmp_path, wrong, config)
    lora.save(tmp_path, adapter, config)
    edit(tmp_path, lambda about: about["nodes"]["params/up/kernel"].update(kind="lora"))
    with pytest.raises(ValueError, match="tensor params/up/kernel/d is unexpected"):
        lora.load(tmp_path, model.params)


def edit(directory, change):
    about = json.loads((directory / "adapter.json").read_text())
    change(about)
    (directory / "adapter.json").write_text(json.dumps(about))


@pytest.mark.parametrize("kind", ["another", None, ["toy"]])
def test_an_unknown_kind_is_refused_by_name(kind, tmp_path):
    model, config, adapter = case("mlp")
    lora.save(tmp_path, adapter, config)
    edit(tmp_path, lambda about: about["nodes"]["params/up/kernel"].update(kind=kind))
    with pytest.raises(ValueError, match="(?s)kinds .*at params/up/kernel.*'full', 'lora'.*import the module") as error:  # fmt: skip
        lora.load(tmp_path, model.params)
    assert str(kind) in str(error.value).replace('"', "")
    edit(tmp_path, lambda about: about["nodes"].update({"params/up/kernel": "toy"}))
    with pytest.raises(ValueError, match="at params/up/kernel"):
        lora.load(tmp_path, model.params)


def test_a_newer_format_is_refused_with_what_to_do(tmp_path):
    model, config, adapter = case("mlp")
    lora.save(tmp_path, adapter, config)
    edit(tmp_path, lambda about: about.update(format_version=3, library_version="9.1"))
    with pytest.raises(ValueError, match=r"format version 3.*'9.1'.*versions \[1, 2\].*newer one"):
        lora.load(tmp_path, model.params)


def test_format_1_is_read():
    """A directory as the library wrote it before nodes had kinds: scripts/make_adapter_goldens.py."""
    folder = GOLDENS / "format_1"
    assert json.loads((folder / "adapter.json").read_text())["format_version"] == 1
    io = np.load(folder / "io.npz")
    params = {"up": {"kernel": io["up"]}, "down": {"kernel": io["down"]}, "bias": io["bias"]}
    adapter, config = lora.load(folder, params, base="golden")
    node = adapter["up"]["kernel"]
    assert isinstance(node, LowRank) and node.scale == 1.5 and node.axes == "io"
    assert config.rank_pattern == {"down": 1} and adapter["down"]["kernel"].scale == 3.0
    fn = lambda p, x: jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"] + p["bias"][None]
    got = lora.lift(fn, strict=True)(lora.bind(params, adapter), io["x"])
    assert_close(got, io["y"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="made for base 'golden'"):
        lora.load(folder, params, base="other")


def test_format_1_with_damage(tmp_path):
    for file in (GOLDENS / "format_1").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path, lambda about: about["kernels"].update({"up/kernel": "xy"}))
    with pytest.raises(ValueError, match="axes 'xy' of up/kernel are no roles"):
        lora.load(tmp_path, {})
    edit(tmp_path, lambda about: about.pop("kernels"))
    with pytest.raises(ValueError, match="kernels missing"):
        lora.load(tmp_path, {})


def test_peft_refuses_it_by_name(tmp_path):
    model, config, adapter = case("mlp")
    names = [
        Name(f"params/{m}/{leaf}", f"{m}.{torch}", transpose=leaf == "kernel")
        for m in ("up", "down", "head")
        for leaf, torch in (("kernel", "weight"), ("bias", "bias"))
    ]
    with pytest.raises(ValueError, match="params/up/kernel is adapted by the method 'toy'.*lora_jax.save"):  # fmt: skip
        lora.peft.save_peft(tmp_path, model.params, adapter, config, names=names)


def test_in_the_hands_of_others():
    model, _, adapter = case("mlp")
    for tree in (adapter, lora.bind(model.params, adapter), adapters.as_data(adapter)):
        assert_same(pickle.loads(pickle.dumps(tree)), tree)
        empty = jax.tree.map(jnp.zeros_like, tree)
        assert_same(serialization.from_bytes(empty, serialization.to_bytes(tree)), tree)
    run = lambda a, x: lora.lift(model.fn)(lora.bind(model.params, a), x)
    exported = jax.export.export(jax.jit(run))(adapter, model.x).serialize()
    assert_close(jax.export.deserialize(exported).call(adapter, model.x), run(adapter, model.x))


def test_nobody_asks_for_the_class_of_plain_lora():
    """Whoever did would have to be changed for the next method."""
    sources = [p for folder in ("lora_jax", "experiments") for p in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 50
    asking = re.compile(r"isinstance\([^)]*\bLowRank\b")
    assert not [p.name for p in sources if asking.search(p.read_text(encoding="utf-8"))]


# ---- Registration --------------------------------------------------------------------------------


def test_the_table_and_the_fields_are_the_same():
    with pytest.raises(ValueError, match=r"Short has the fields .*'g'.*table says"):

        @register
        @dataclasses.dataclass(frozen=True, eq=False)
        class Short(Toy):
            kind = "short"
            table = {name: field for name, field in Toy.table.items() if name != "g"}

    with pytest.raises(ValueError, match="Again has the kind 'toy', which is that of Toy"):

        @register
        @dataclasses.dataclass(frozen=True, eq=False)
        class Again(Toy):
            pass

    assert KINDS["toy"] is Toy and KINDS["lora"] is LowRank and KINDS["full"] is Trained


def test_a_plain_array_has_a_row_of_the_table():
    x = jnp.ones((2, 3))
    assert as_node(x).kind == "full" and fields.count(x) == (6, 0)
    assert list(fields.tensors("head/kernel", x)) == ["head/kernel"]
    assert fields.shapes(x, (4, 5)) == {"value": (4, 5)}
