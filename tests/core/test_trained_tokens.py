"""Trained tokens: rows of a table, or outputs of a head, that replace those of the base."""

import dataclasses
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import fields, quantization, quantized, sharding
from lora_jax.methods.tokens import TrainedOutputs, TrainedRows
from tests.helpers import zoo
from tests.helpers.comparisons import assert_close, perturbed

V, D = 11, 6
RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
IDS = jnp.array([[0, 3, 9, 9], [2, 10, 1, 3]])
PARAMS = {"table": draw(V, D), "up": draw(D, D), "head": draw(D, V)}
CONFIG = lora.LoRAConfig(rank=2, targets=("up",), train_tokens={"table": (9, 2, 3)})


def tied(p, ids):
    return jnp.tanh(p["table"][ids] @ p["up"]) @ p["table"].T


def untied(p, ids):
    return jnp.tanh(p["table"][ids] @ p["up"]) @ p["head"]


def make(fn=tied, params=PARAMS, config=CONFIG):
    return lora.init(jax.random.key(0), fn, params, config, IDS)


def lifted(fn, adapter, params=PARAMS, **options):
    return lora.lift(fn, strict=True, **options)(lora.bind(params, adapter), IDS)


def assert_same(got, want):
    """The same structure, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(g).dtype == np.asarray(w).dtype
        np.testing.assert_array_equal(np.asarray(g), np.asarray(w))


def of_rows(table, ids, rows):
    """The table with other rows, by numpy alone."""
    new = np.array(table)
    for k, i in enumerate(ids):
        new[i] = rows[k]
    return new


# ---- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fn", [tied, untied])
def test_starts_as_the_base_bit_for_bit(fn, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    adapter = make(fn, params)
    assert adapter["table"].rows.dtype == jnp.float32
    for run in (lambda f, *args: f(*args), lambda f, *args: jax.jit(f)(*args)):
        want = run(fn, params, IDS)
        assert_same(run(lambda a, p: lifted(fn, a, p), adapter, params), want)
    assert_same(lora.merge(params, adapter), params)


def test_merge_puts_exactly_the_trained_rows():
    adapter = perturbed(make())
    merged = lora.merge(PARAMS, adapter)
    rows = np.asarray(adapter["table"].rows)
    np.testing.assert_array_equal(merged["table"], of_rows(PARAMS["table"], (9, 2, 3), rows))


def test_a_lookup_gives_exactly_the_trained_rows():
    adapter = perturbed(make())
    look_up = lambda p, ids: p["table"][ids]
    adapter = {"table": TrainedRows(adapter["table"].rows, adapter["table"].ids)}
    got = jax.jit(lambda a: lifted(look_up, a))(adapter)
    np.testing.assert_array_equal(got, lora.merge(PARAMS, adapter)["table"][IDS])


@pytest.mark.parametrize("fn", [tied, untied])
def test_lift_and_gradients_equal_merge(fn):
    adapter = perturbed(make(fn))
    merged = lambda a: fn(lora.merge(PARAMS, a), IDS)
    assert_close(lifted(fn, adapter), merged(adapter), rtol=1e-5, atol=1e-5)
    loss = lambda run: jax.grad(lambda a: jnp.sum(jnp.sin(run(a))))(adapter)
    got, want = loss(lambda a: lifted(fn, a)), loss(merged)
    assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert all(np.any(x) for x in jax.tree.leaves(got))


def test_outputs_of_a_head():
    """A head that nothing is tied to has its tokens as outputs."""
    config = lora.LoRAConfig(targets=(), train_tokens={"table": (9,), "head": (0, 10)})
    adapter = make(untied, config=config)
    assert isinstance(adapter["head"], TrainedOutputs) and adapter["head"].columns.shape == (D, 2)
    np.testing.assert_array_equal(adapter["head"].columns, PARAMS["head"][:, jnp.array([0, 10])])
    assert_same(jax.jit(lambda a: lifted(untied, a))(adapter), jax.jit(untied)(PARAMS, IDS))
    adapter = perturbed(adapter)
    merged = lora.merge(PARAMS, adapter)
    want = np.array(PARAMS["head"])
    want[:, [0, 10]] = adapter["head"].columns
    np.testing.assert_array_equal(merged["head"], want)
    assert_close(lifted(untied, adapter), untied(merged, IDS), rtol=1e-5, atol=1e-5)


def test_head_with_outputs_first():
    fn = lambda p, x: x @ p["head"].T
    params, x = {"head": draw(V, D)}, draw(2, D)
    config = lora.LoRAConfig(targets=(), train_tokens={"head": (4, 1)})
    adapter = perturbed(lora.init(jax.random.key(0), fn, params, config, x))
    merged = lora.merge(params, adapter)["head"]
    assert adapter["head"].axes == "oi"
    np.testing.assert_array_equal(
        merged, of_rows(params["head"], (4, 1), adapter["head"].columns.T)
    )
    got = lora.lift(fn, strict=True)(lora.bind(params, adapter), x)
    assert_close(got, x @ merged.T, rtol=1e-5, atol=1e-5)


def test_a_stack_of_heads():
    fn = lambda p, x: jnp.einsum("bi,bio->bo", x, p["heads"])
    params, x = {"heads": draw(3, D, V)}, draw(3, D)
    config = lora.LoRAConfig(targets=(), train_tokens={"heads": (4, 1)})
    adapter = perturbed(lora.init(jax.random.key(0), fn, params, config, x))
    merged = lora.merge(params, adapter)
    assert adapter["heads"].columns.shape == (3, D, 2)
    np.testing.assert_array_equal(merged["heads"][..., 1], adapter["heads"].columns[..., 1])
    got = lora.lift(fn, strict=True)(lora.bind(params, adapter), x)
    assert_close(got, fn(merged, x), rtol=1e-5, atol=1e-5)


def test_a_use_that_forms_the_table():
    fn = lambda p, ids: jnp.sort(p["table"], axis=0)[ids]
    node = TrainedRows(draw(2, D), (9, 2))
    adapter = {"table": node}
    got = lora.lift(fn)(lora.bind(PARAMS, adapter), IDS)
    np.testing.assert_array_equal(got, fn(lora.merge(PARAMS, adapter), IDS))


def test_rows_are_not_dropped():
    adapter = perturbed(make(config=dataclasses.replace(CONFIG, targets=(), dropout=0.5)))
    key = jax.random.key(1)
    for options in ({"dropout_key": key}, {"dropout": 0.9, "dropout_key": key}, {}):
        assert_close(lifted(tied, adapter, **options), tied(lora.merge(PARAMS, adapter), IDS))


def test_under_vmap_scan_and_remat():
    several = [perturbed(make(), seed=s) for s in range(2)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *several)
    got = jax.vmap(lambda a: lifted(tied, a))(stacked)
    want = jnp.stack([tied(lora.merge(PARAMS, a), IDS) for a in several])
    assert_close(got, want, rtol=1e-5, atol=1e-5)

    def scanned(p, ids):
        return jax.lax.map(jax.checkpoint(lambda row: tied(p, row[None])[0]), ids)

    got = lora.lift(scanned, strict=True)(lora.bind(PARAMS, several[0]), IDS)
    assert_close(got, want[0], rtol=1e-5, atol=1e-5)


def test_a_quantized_table_and_head():
    plain = {"table": draw(16, 32), "head": draw(32, 16)}
    fn = lambda p, ids: p["table"][ids] @ p["head"]
    like = lora.init(jax.random.key(0), fn, plain, lora.LoRAConfig(targets=("table", "head")), IDS)
    params = quantization.quantize(plain, "int8", like=like, targets=("table", "head"), skip=())
    assert all(map(quantized.is_quantized, params.values()))
    config = lora.LoRAConfig(targets=(), train_tokens={"table": (9,), "head": (3, 2)})
    adapter = lora.init(jax.random.key(0), fn, params, config, IDS)
    assert_close(lifted(fn, adapter, params), fn(lora.merge(params, {}), IDS), rtol=1e-5, atol=1e-5)
    adapter = perturbed(adapter)
    got = lora.lift(fn, strict=True)(lora.bind(params, adapter), IDS)
    assert_close(got, fn(lora.merge(params, adapter), IDS), rtol=1e-5, atol=1e-5)


def test_a_model_of_flax_with_all_linear():
    model = zoo.ZOO["tied"]()
    config = lora.LoRAConfig(rank=2, train_tokens={"embed": (1, 4)})
    adapter = lora.init(jax.random.key(0), model.fn, model.params, config, model.x)
    names = list(adapters.nodes(adapter))
    assert "params/embed/embedding" in names and len(names) == 8
    use = lora.explain(model.fn, model.params, adapter, model.x).kernels["params/embed/embedding"]
    assert use.factored == 2 and not use.fallbacks
    text = str(lora.tabulate(model.fn, model.params, config, model.x))
    assert "params/embed/embedding 11×8 kernel io tokens 2 of them" in " ".join(text.split())
    trained = lora.summary(model.params, adapter)
    without = lora.LoRAConfig(rank=2, targets=("block", "head"))
    plain = lora.init(jax.random.key(0), model.fn, model.params, without, model.x)
    count = lambda text: int(text.split()[2].replace(",", ""))
    assert count(trained) == count(lora.summary(model.params, plain)) + 2 * 8


# ---- The tree ------------------------------------------------------------------------------------


def test_ids_belong_to_the_structure():
    adapter = make()
    node = adapter["table"]
    assert len(jax.tree.leaves(node)) == 1 and node.ids == (9, 2, 3)
    assert all(jax.tree.leaves(lora.mask(adapter)))
    assert fields.count(node) == (3 * D, 3 * D)
    for tree in (adapter, lora.bind(PARAMS, adapter), adapters.as_data(adapter)):
        assert_same(pickle.loads(pickle.dumps(tree)), tree)
        empty = jax.tree.map(jnp.zeros_like, tree)
        assert_same(serialization.from_bytes(empty, serialization.to_bytes(tree)), tree)
    run = lambda a: lifted(tied, a)
    exported = jax.export.export(jax.jit(run))(adapter).serialize()
    assert_close(jax.export.deserialize(exported).call(adapter), run(adapter))
    narrow = dataclasses.replace(node, rows=node.rows.astype(jnp.bfloat16))
    assert fields.widen(narrow).rows.dtype == jnp.float32


def test_specs_follow_the_table():
    spec = jax.sharding.PartitionSpec
    adapter = {"t": TrainedRows(draw(2, D), (9, 2)), "h": TrainedOutputs(draw(D, 2), (9, 2))}
    made = sharding.adapter_specs(
        {"t": spec("tensor", "fsdp"), "h": spec("fsdp", "tensor")}, adapter
    )
    assert tuple(made["t"].rows) == (None, "fsdp") and tuple(made["h"].columns) == ("fsdp", None)


def test_saved_and_loaded_exactly(tmp_path):
    adapter = perturbed(make())
    lora.save(tmp_path, adapter, CONFIG)
    loaded, config = lora.load(tmp_path, PARAMS)
    assert config == CONFIG
    assert_same(loaded, adapter)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), adapter)
    lora.save(tmp_path, stacked, CONFIG)
    assert_same(lora.load(tmp_path, PARAMS)[0], stacked)
    with pytest.raises(ValueError, match=r"table of shape \(4, 6\) can't.*\[9\] are none of its 4"):
        lora.load(tmp_path, PARAMS | {"table": draw(4, D)})


# ---- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((2, 17), "must map patterns of tables to numbers of rows"),
        ("embed", "must map patterns"),
        (
            {"table": ()},
            r"train_tokens\['table'\] must hold numbers of rows, from 0 on, .*got \(\)",
        ),
        ({"table": 3}, "from 0 on, .*got 3"),
        ({"table": (1.5,)}, "from 0 on"),
        ({"table": (True,)}, "from 0 on"),
        ({"table": (-1, 2)}, "from 0 on"),
        ({"table": (5, 2, 5)}, r"has \[5\] more than once"),
        ({"": (5,)}, "non-empty strings"),
    ],
)
def test_a_config_refuses(value, message):
    with pytest.raises(ValueError, match=message):
        lora.LoRAConfig(train_tokens=value)


def test_words_of_others():
    with pytest.raises(TypeError, match="train_tokens is this library's name for trainable_token_"):
        lora.LoRAConfig(trainable_token_indices=[2])
    config = lora.LoRAConfig(train_tokens={"table": np.array([3, 1])})
    assert lora.LoRAConfig.from_json(config.to_json()) == config
    assert config.train_tokens == {"table": (3, 1)}
    assert "train_tokens" not in lora.LoRAConfig().to_dict()
    with pytest.raises(ValueError, match="targets, train and train_tokens are all empty"):
        lora.LoRAConfig(targets=())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"train_tokens": {"table": (3, 11)}},
            r"'table': the ids \[11\] are none of its 11 tokens",
        ),
        ({"train_tokens": {"tabel": (3,)}}, "'tabel' matches no parameter.*did you mean 'table'"),
        ({"targets": ("table",), "train_tokens": {"table": (3,)}}, "both name 'table'"),
        ({"train": ("table",), "train_tokens": {"table": (3,)}}, "both name 'table'"),
        ({"train_tokens": {"table": (3,), "re:ta.*": (4,)}}, "Two entries.*match 'table'"),
        ({"train_tokens": {"bias": (3,)}}, "none with one axis of tokens.*Tables here: table"),
    ],
)
def test_what_can_not_be(fields, message):
    params = PARAMS | {"bias": draw(V)}
    fn = lambda p, ids: tied(p, ids) + p["bias"][None, None]
    config = dataclasses.replace(CONFIG, **fields)
    with pytest.raises(ValueError, match=f"(?s){message}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(fn, params, config)


def test_shapes_are_not_enough():
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(ValueError, match="train_tokens needs the values of table"):
        make(params=shapes)
    assert "tokens" in str(lora.tabulate(tied, shapes, CONFIG, IDS))


def test_nodes_that_do_not_fit():
    for node, message in (
        (TrainedRows(draw(2, D), (9, 20)), r"ids \[20\] are none of its 11 tokens"),
        (TrainedRows(draw(2, D), (9, 9)), r"ids \[9\] are there more than once"),
        (TrainedRows(draw(2, D), (9,)), r"needs rows and ids of \(\(2, 6\), \(2,\)\)"),
        (TrainedRows(draw(2, 5), (9, 1)), r"needs rows and ids of"),
        (TrainedRows(draw(2), (9, 1), axes="ii"), "not one axis of tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.bind(PARAMS, {"table": node})
    with pytest.raises(ValueError, match="ids of a node must be a row of whole numbers"):
        TrainedRows(draw(1, D), (1.5,))
