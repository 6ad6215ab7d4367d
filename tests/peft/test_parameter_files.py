"""Bare parameters in PEFT's files (target_parameters): experts, and matrices that are no layer's."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax import lax

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import paths
from lora_jax.lowrank import LowRank
from lora_jax.names import Name
from lora_jax.peft import load_peft, save_peft
from tests.helpers import method_goldens, slow
from tests.helpers.comparisons import perturbed

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
E, D, H, R = 3, 4, 6, 2
SIZES = jnp.array([2, 0, 3])
NAMES = [
    Name("moe/up", "moe.up", transpose=True, axes="bio"),
    Name("moe/down", "moe.down", axes="bio"),  # (experts, in, out): the module says is_transposed
    Name("moe/gate", "moe.gate.weight", transpose=True, is_bare=True),
    Name("proj/kernel", "proj.weight", transpose=True),
]


def params_of(**more):
    rng = np.random.default_rng(0)
    shapes = {"moe/up": (E, D, H), "moe/down": (E, H, D), "moe/gate": (D, E), "proj/kernel": (D, 5)}
    made = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} | more
    return paths.nest({n: jnp.asarray(x) for n, x in made.items()})


def moe(params, x):
    """Rows in groups, one for each expert; the router only scales them."""
    p = params["moe"]
    weights = jax.nn.softmax(x @ p["gate"]).max(-1, keepdims=True)
    y = lax.ragged_dot(jax.nn.relu(lax.ragged_dot(x, p["up"], SIZES)), p["down"], SIZES)
    return (weights * y) @ params["proj"]["kernel"]


X = jnp.asarray(np.random.default_rng(1).normal(size=(5, D)), jnp.float32)


def make(**fields):
    config = lora.LoRAConfig(rank=R, alpha=6.0, **({"targets": ("moe", "proj")} | fields))
    params = params_of()
    adapter = lora.init(jax.random.key(0), moe, params, config, X)
    return params, perturbed(adapter), config


def words_of(folder):
    return json.loads((folder / CONFIG).read_text())


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / WEIGHTS)


def change(folder, words=None, **tensors):
    (folder / CONFIG).write_text(json.dumps(words_of(folder) | (words or {})))
    new = {n: x for n, x in (tensors_of(folder) | tensors).items() if x is not None}
    safetensors.numpy.save_file(new, folder / WEIGHTS, metadata={"format": "pt"})


def test_experts_stay_factored_and_are_merged_as_peft_lays_them_out(tmp_path):
    params, adapter, config = make(rank_pattern={"down": 1})
    lifted = lora.lift(moe, strict=True)(lora.bind(params, adapter), X)
    merged = lora.merge(params, adapter)
    np.testing.assert_allclose(lifted, moe(merged, X), rtol=1e-5, atol=1e-5)
    save_peft(tmp_path, params, adapter, config, names=NAMES)
    words, tensors = words_of(tmp_path), tensors_of(tmp_path)
    assert words["target_modules"] == ["proj"]
    assert words["target_parameters"] == ["down", "gate.weight", "up"]
    assert words["rank_pattern"] == {"down": 1} and words["r"] == R
    # The first parameter of a module is innermost.
    up, down = (
        [tensors[f"{PREFIX}moe.{around}lora_{x}.weight"] for x in "AB"]
        for around in ("base_layer.", "")
    )
    assert [x.shape for x in (*up, *down)] == [(R * E, D), (H, R * E), (E, H), (D, E)]
    # PEFT's ParamWrapper: A by expert, then rank; B by rank, then expert; with is_transposed the
    # product is turned to (in, out).
    for name, (a, b), rank in (("up", up, R), ("down", down, 1)):
        product = np.einsum(
            "ore,eri->eio", b.reshape(len(b), rank, E), a.reshape(E, rank, a.shape[1])
        )
        want = np.asarray(params["moe"][name]) + 6.0 / rank * product
        np.testing.assert_allclose(merged["moe"][name], want, rtol=1e-5, atol=1e-5)
    a, b = (tensors[f"{PREFIX}moe.gate.lora_{x}.weight"] for x in "AB")
    want = np.asarray(params["moe"]["gate"]) + 6.0 / R * (b @ a).T
    np.testing.assert_allclose(merged["moe"]["gate"], want, rtol=1e-5, atol=1e-5)
    again, read = load_peft(tmp_path, params, names=NAMES)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    assert read.rank_pattern == {"moe/down": 1}
    save_peft(tmp_path / "again", params, again, read, names=NAMES)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("which", ["up", "down"])
def test_the_words_say_which_parameter_a_tensor_is_for(which, tmp_path):
    """PEFT's names are the same for either if only one of a module is adapted."""
    params, adapter, config = make(targets=(which,))
    save_peft(tmp_path, params, adapter, config, names=NAMES)
    assert set(tensors_of(tmp_path)) == {f"{PREFIX}moe.lora_{x}.weight" for x in "AB"}
    assert words_of(tmp_path)["target_modules"] == []
    again, _ = load_peft(tmp_path, params, names=NAMES)
    assert [*adapters.nodes(again)] == [f"moe/{which}"]
    other = {"up": "down", "down": "up"}[which]
    change(tmp_path, {"target_parameters": [f"moe.{other}"]})
    with pytest.raises(ValueError, match=r"moe.lora_A.weight has shape .* instead of"):
        load_peft(tmp_path, params, names=NAMES)
    change(tmp_path, {"target_parameters": ["moe.up", "moe.down"]})
    with pytest.raises(ValueError, match=r"moe.base_layer.lora_A.weight is missing"):
        load_peft(tmp_path, params, names=NAMES)


def test_layers_of_experts_have_a_file_entry_each(tmp_path):
    table = [Name("layers/moe/up", "layers.{}.moe.up", transpose=True, axes="bio")]
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"layers": {"moe": {"up": draw(2, E, D, H)}}}
    node = LowRank(draw(2, E, D, R), draw(2, E, R, H), 2.0, axes="bbio")
    adapter = {"layers": {"moe": {"up": node}}}
    save_peft(tmp_path, params, adapter, lora.LoRAConfig(rank=R, alpha=4.0), names=table)
    tensors = tensors_of(tmp_path)
    a = tensors[f"{PREFIX}layers.1.moe.lora_A.weight"].reshape(E, R, D)
    b = tensors[f"{PREFIX}layers.1.moe.lora_B.weight"].reshape(H, R, E)
    np.testing.assert_array_equal(a.transpose(0, 2, 1), node.a[1])
    np.testing.assert_array_equal(b.transpose(2, 1, 0), node.b[1])
    again, _ = load_peft(tmp_path, params, names=table)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"use_dora": True}, "target_parameters can't be used with use_dora True"),
        ({"lora_dropout": 0.1}, "target_parameters can't be used with lora_dropout 0.1"),
        ({"lora_bias": True}, "target_parameters can't be used with lora_bias True"),
        ({"fan_in_fan_out": True}, "target_parameters can't be used with fan_in_fan_out True"),
        ({"init_lora_weights": "pissa"}, "can't be used with init_lora_weights 'pissa'"),
        ({"target_parameters": "moe.up"}, "target_parameters: must be null or a list of names"),
        ({"target_parameters": ["moe.up", "other"]}, "entry 'other' selects no parameter"),
        ({"target_parameters": None}, r"target_modules names nothing"),
        ({"target_parameters": ["moe.up", "proj.weight"], "target_modules": ["proj"]},
         "for proj.weight, and its module is adapted as well"),
        ({"target_parameters": ["moe.up", "table"]}, "for table, which no module within the model"),
        ({"target_parameters": ["moe.up", "moe.bias"]}, "for moe.bias, which is no matrix"),
        ({"target_modules": ["moe.gate"]}, "moe.gate has no kernel that could be adapted"),
        ({"rank_pattern": {"moe.gate.weight": 2}}, "rank_pattern key .* matches no adapted"),
    ],
)  # fmt: skip
def test_what_peft_refuses_is_refused_by_name(words, message, tmp_path):
    params, adapter, config = make(targets=("up",))
    save_peft(tmp_path, params, adapter, config, names=NAMES)
    change(tmp_path, words)
    more = {"table": np.ones((5, 2), np.float32), "moe/bias": np.ones(3, np.float32)}
    table = [*NAMES, Name("table", "table"), Name("moe/bias", "moe.bias")]
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path, params_of(**more), names=table)


def test_factors_that_no_word_names_are_told_of(tmp_path):
    params, adapter, config = make()
    save_peft(tmp_path, params, adapter, config, names=NAMES)
    change(tmp_path, {"target_parameters": ["moe.down", "gate.weight"]})
    with pytest.raises(ValueError, match="which target_parameters does not name"):
        load_peft(tmp_path, params, names=NAMES)


def test_what_has_no_form_there_is_not_written(tmp_path):
    params, adapter, config = make(method="dora")
    with pytest.raises(ValueError, match=r"moe/up is adapted by the method 'dora' and is a bare"):
        save_peft(tmp_path, params, adapter, config, names=NAMES)
    silent = [row._replace(axes="") for row in NAMES]
    params, adapter, config = make()
    with pytest.raises(ValueError, match="does not say which axes are inputs"):
        save_peft(tmp_path, params, adapter, config, names=silent)
    assert not any(tmp_path.iterdir())


def test_first_values_from_the_weights_are_written_as_plain_lora(tmp_path):
    params, adapter, config = make(targets=("up",), init="pissa")
    save_peft(tmp_path, params, adapter, config, names=NAMES)
    again, _ = load_peft(tmp_path, params, names=NAMES)
    up = lambda adapter: lora.merge(params, adapter)["moe"]["up"]
    np.testing.assert_allclose(up(again), up(adapter), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="'moe/up|moe/up is adapted by"):
        save_peft(tmp_path, params, adapter, config, names=NAMES, init="pissa")


def test_dropout_is_written_as_zero_and_told(tmp_path):
    params, adapter, config = make(dropout=0.1)
    with pytest.warns(UserWarning, match="lora_dropout is written as 0 and not as 0.1"):
        save_peft(tmp_path, params, adapter, config, names=NAMES)
    assert words_of(tmp_path)["lora_dropout"] == 0.0


def test_matrices_are_read_and_written_as_peft_does(tmp_path):
    """A projection and an embedding by their parameters."""
    params, table, adapter, config = check_golden("parameters_llama", tmp_path)
    # Without PEFT's words they are adapted as modules, which computes the same.
    new = lora.LoRAConfig.from_dict(config.to_dict() | {"origin": {}})
    save_peft(tmp_path / "new", params, adapter, new, names=table)
    assert words_of(tmp_path / "new")["target_parameters"] is None
    again, _ = load_peft(tmp_path / "new", params, names=table)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize(
    ("case", "scan"),
    slow.after(1, [(x, s) for s in (False, True) for x in ("experts_mixtral", "router_mixtral")]),
)
def test_experts_are_read_and_written_as_peft_does(case, scan, tmp_path):
    check_golden(case, tmp_path, scan_layers=scan)


SINGLE = f"{PREFIX}model.layers.{{}}.block_sparse_moe.experts.{{}}.{{}}.lora_{{}}.weight"


def single_experts(folder, words=None, layers=(0, 1)):
    """The golden adapter with factors of single experts of rank 2, as PEFT wrote them on v4."""
    shutil.copytree(method_goldens.METHODS / "experts_mixtral", folder, dirs_exist_ok=True)
    rng = np.random.default_rng(0)
    sizes = {"w1": (40, 32), "w2": (32, 40), "w3": (40, 32)}
    held = {n: None for n in tensors_of(folder) if "experts" in n}
    for k in layers:
        for e in range(3):
            for name, (n_out, n_in) in sizes.items():
                for side, shape in (("A", (2, n_in)), ("B", (n_out, 2))):
                    x = 0.2 * rng.normal(size=shape)
                    held[SINGLE.format(k, e, name, side)] = x.astype(np.float32)
    about = {"target_modules": ["q_proj", "w1", "w2", "w3"], "target_parameters": None}
    about |= {"lora_dropout": 0.1, "r": 4, "rank_pattern": {"w[123]": 2}}
    change(folder, about | (words or {}), **held)
    return folder


@pytest.mark.parametrize("root", [False, True])
def test_factors_of_single_experts_become_those_of_a_parameter(root, tmp_path):
    _, params, table = method_goldens.base("mixtral")
    folder = single_experts(tmp_path, {"use_rslora": root})
    adapter, config = load_peft(folder, params, names=table)
    assert (config.rank, config.dropout) == (4, 0.1)
    merged = lora.merge(params, adapter)["params"]["model"]
    held, scale = tensors_of(folder), 8 / (np.sqrt(2) if root else 2)
    for k in range(2):
        moe = lambda tree, k=k: tree[f"layers_{k}"]["mlp"]["experts"]
        for name, parts in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
            change_of = lambda e, x, k=k: (
                held[SINGLE.format(k, e, x, "B")] @ held[SINGLE.format(k, e, x, "A")]
            )
            products = [np.concatenate([change_of(e, x) for x in parts]).T for e in range(3)]
            want = moe(params["params"]["model"])[name]["kernel"] + scale * np.stack(products)
            np.testing.assert_allclose(moe(merged)[name]["kernel"], want, rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="lora_dropout is written as 0"):
        save_peft(tmp_path / "new", params, adapter, config, names=table)
    words = words_of(tmp_path / "new")
    assert words["target_parameters"] == ["down_proj", "gate_up_proj"]
    again, _ = load_peft(tmp_path / "new", params, names=table)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize(
    ("words", "change_of", "message"),
    [
        ({}, {SINGLE.format(0, 1, "w3", "A"): None}, "0.block_sparse_moe.experts.1.w3.lora_A.weight"
         " is missing: there must be factors of all experts of model.layers.0.mlp.experts.gate_up"),
        ({}, {SINGLE.format(1, 2, "w2", "B"): np.ones((32, 3), np.float32)},
         "tensors of the experts of model.layers.1.mlp.experts.down_proj have shapes"),
        ({"rank_pattern": {"w[123]": 2, "1.w2": 3}, "alpha_pattern": {"experts.1.w2": 3}}, {},
         "alpha_pattern has several values for the experts of"),
        ({"rank_pattern": {}}, {}, r"lora_A.weight has shape \(12, 32\) instead of \(24, 32\)"),
        ({"use_dora": True}, {}, "target_parameters can't be used with use_dora True"),
    ],
)  # fmt: skip
def test_single_experts_that_do_not_belong_together(words, change_of, message, tmp_path):
    _, params, table = method_goldens.base("mixtral")
    folder = single_experts(tmp_path, words)
    change(folder, **change_of)
    with pytest.raises(ValueError, match=message):
        load_peft(folder, params, names=table)


def test_a_router_was_a_layer_before_transformers_5(tmp_path):
    """Its factors then have the names of a module, with the words for one."""
    _, params, table = method_goldens.base("mixtral")
    config = lora.LoRAConfig(rank=2, alpha=4.0, origin={"older": True})
    node = LowRank(jnp.ones((32, 2)), jnp.ones((2, 3)), 2.0)
    layers = {f"layers_{k}": {"mlp": {"gate": {"kernel": node}}} for k in range(2)}
    adapter = {"params": {"model": layers}}
    save_peft(tmp_path, params, adapter, config, names=table)
    assert words_of(tmp_path)["target_modules"] == ["gate"]
    name = f"{PREFIX}model.layers.1.block_sparse_moe.gate.lora_A.weight"
    assert tensors_of(tmp_path)[name].shape == (2, 32)
    again, read = load_peft(tmp_path, params, names=table)
    assert read.origin["older"]
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def check_golden(case, tmp_path, **options):
    """Logits, gradients and bytes of a directory by scripts/make_method_goldens.py."""
    arrays, base = method_goldens.golden(case)
    fn, params, table = method_goldens.base(base, **options)
    folder = method_goldens.METHODS / case
    adapter, config = load_peft(folder, params, names=table)
    method_goldens.check_outputs(fn, params, adapter, arrays)
    method_goldens.check_gradients(fn, params, adapter, config, arrays, table, tmp_path / "grads")
    save_peft(tmp_path, params, adapter, config, names=table)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    return params, table, adapter, config
