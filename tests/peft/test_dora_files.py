"""DoRA as PEFT computes, stores and merges it: scripts/make_dora_goldens.py made the directories."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax import lax

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import names as tables
from lora_jax import paths
from lora_jax.methods.dora import DoRA
from lora_jax.models import checkpoints
from lora_jax.names import Name
from lora_jax.peft import load_peft, save_peft
from tests.helpers import slow
from tests.helpers.places import ROOT

GOLDENS = ROOT / "tests" / "goldens" / "dora"
FILE, PREFIX = "adapter_model.safetensors", "base_model.model."
HEADS = {
    "bert": "classifier",
    "gpt2": "causal-lm",
    "llama": "causal-lm",
    "embedding_llama": "causal-lm",
}
CASES = ["convnet", "embedding_llama", "bert", "gpt2", "llama"]
# Models of some layers take seconds to compile; what a file means shows in its merged weights.
SOME = slow.after(1, CASES)


def conv_net(params, x):
    """The torch model of the goldens, on images (batch, height, width, channels)."""
    conv = functools.partial(
        lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )  # fmt: skip
    p = params
    x = conv(x, p["conv"]["kernel"], (2, 2), ((1, 1), (1, 1))) + p["conv"]["bias"][None, None, None]
    x = jax.nn.relu(x)
    x = conv(x, p["point"]["kernel"], (1, 1), "VALID") + p["point"]["bias"][None, None, None]
    return jax.nn.relu(x).mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"][None]


CONV_NAMES = [
    Name("conv/kernel", "conv.weight", kind="conv"),
    Name("conv/bias", "conv.bias"),
    Name("point/kernel", "point.weight", kind="conv"),
    Name("point/bias", "point.bias"),
    Name("head/kernel", "head.weight", transpose=True),
    Name("head/bias", "head.bias"),
]


@functools.cache
def setting(name):
    """Function of (params, x), parameters, table of names and goldens."""
    folder = GOLDENS / name
    golden = dict(np.load(folder / "io.npz"))
    if name == "convnet":
        stored = safetensors.numpy.load_file(folder / "base" / "model.safetensors")
        shapes = {"conv/kernel": (3, 3, 4, 6), "point/kernel": (1, 1, 6, 5), "head/kernel": (5, 3)}
        shapes |= {"conv/bias": (6,), "point/bias": (5,), "head/bias": (3,)}
        leaves = {n: np.empty(s, np.float32) for n, s in shapes.items()}
        weights = tables.weights(CONV_NAMES, leaves)
        leaves = {w.leaf: jnp.asarray(tables.from_tensor(w, stored[w.hf])) for w in weights}
        images = jnp.asarray(golden["pixel_values"].transpose(0, 2, 3, 1))
        return conv_net, paths.nest(leaves), CONV_NAMES, images, golden
    labels = {"num_labels": 3} if HEADS[name] == "classifier" else {}
    loaded = checkpoints.load(folder / "base", head=HEADS[name], **labels)
    mask = {"attention_mask": np.ones_like(golden["input_ids"])} if labels else {}
    fn = lambda params, ids: loaded.model.apply(params, ids, **mask)
    ids = jnp.asarray(golden["input_ids"], jnp.int32)
    return fn, loaded.params, checkpoints.names(loaded), ids, golden


def read(name, folder=None):
    _, params, table, _, _ = setting(name)
    return load_peft(folder or GOLDENS / name, params, names=table)


def file_of(folder):
    return safetensors.numpy.load_file(folder / FILE)


def rewrite(name, tmp_path, change):
    """A copy of a golden directory whose tensors are changed."""
    folder = tmp_path / "copy"
    shutil.copytree(GOLDENS / name, folder)
    tensors = file_of(folder)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", slow.after(2, CASES))
def test_merged_weights_are_those_of_peft(name):
    _, params, table, _, golden = setting(name)
    adapter, config = read(name)
    assert config.method == "dora"
    entries = adapters.nodes(adapter)
    assert {x.kind for x in entries.values() if hasattr(x, "kind")} == {"dora"}
    merged = paths.named_leaves(lora.merge(params, adapter))
    leaves = paths.named_leaves(params)
    changed = [n for n in golden if n.startswith("merged/")]
    compared = 0
    for weight in tables.weights(table, leaves):
        if f"merged/{weight.hf}" in changed:
            value = np.asarray(merged[weight.leaf])
            value = value if weight.layer is None else value[weight.layer]
            want = golden[f"merged/{weight.hf}"]
            np.testing.assert_allclose(tables.to_tensor(weight, value), want, rtol=0, atol=1e-5)
            compared += 1
    assert compared == len(changed) > 1


@pytest.mark.parametrize("name", SOME)
def test_logits_and_gradients_are_those_of_peft(name, tmp_path):
    fn, params, table, x, golden = setting(name)
    adapter, config = read(name)
    np.testing.assert_allclose(jax.jit(fn)(params, x), golden["logits_base"], rtol=0, atol=1e-5)
    assert np.abs(golden["logits"] - golden["logits_base"]).max() > 0.01

    def loss(adapter):
        logits = lora.lift(fn, strict=True)(lora.bind(params, adapter), x)
        return jnp.sum(golden["probe"] * logits), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(adapter)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-5)
    # A tree of gradients is a tree of nodes: written as a file, it has PEFT's names and shapes.
    keep = lambda node, grad: jax.tree.map(
        lambda g, v, t: g if t else v, grad, node, lora.mask(node)
    )
    save_peft(tmp_path, params, keep(adapter, grads), config, names=table)
    found = file_of(tmp_path)
    wanted = {n.removeprefix("grad/"): g for n, g in golden.items() if n.startswith("grad/")}
    assert set(wanted) == {n for n in found if "base_layer" not in n}
    largest = max(np.abs(g).max() for g in wanted.values())
    for key, want in wanted.items():
        np.testing.assert_allclose(found[key], want, rtol=0, atol=1e-5 * largest, err_msg=key)


@pytest.mark.parametrize("name", slow.after(2, CASES))
def test_files_are_written_back_byte_for_byte(name, tmp_path):
    _, params, table, _, _ = setting(name)
    adapter, config = read(name)
    save_peft(tmp_path / "again", params, adapter, config, names=table)
    for file in (FILE, "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (GOLDENS / name / file).read_bytes()


@pytest.mark.parametrize("name", slow.after(1, ["convnet", "llama"]))
def test_new_words_stand_for_the_same(name, tmp_path):
    """Without the words of the directory it came from, as for an adapter made here."""
    _, params, table, _, _ = setting(name)
    adapter, config = read(name)
    plain = lora.LoRAConfig.from_dict(config.to_dict() | {"origin": {}})
    save_peft(tmp_path, params, adapter, plain, names=table)
    again, new = read(name, tmp_path)
    assert new.method == "dora"
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_a_name_with_weight_behind_it_is_read(tmp_path):
    """PEFT reads `.lora_magnitude_vector.weight`, too, as its state dicts have it."""

    def rename(tensors):
        for key in [k for k in tensors if k.endswith("magnitude_vector")]:
            tensors[f"{key}.weight"] = tensors.pop(key)

    again, _ = read("convnet", rewrite("convnet", tmp_path, rename))
    jax.tree.map(np.testing.assert_array_equal, again, read("convnet")[0])


def test_names_of_a_state_dict_are_read(tmp_path):
    def rename(tensors):
        for key in [k for k in tensors if "lora_" in k]:
            name = key if key.endswith(".weight") else f"{key}.weight"
            tensors[name.removesuffix(".weight") + ".mine.weight"] = tensors.pop(key)

    again, _ = read("convnet", rewrite("convnet", tmp_path, rename))
    jax.tree.map(np.testing.assert_array_equal, again, read("convnet")[0])


def magnitude(tensors):
    return next(k for k in tensors if k.endswith("magnitude_vector"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(magnitude(t)), "magnitude_vector is missing"),
        (lambda t: t.update({magnitude(t): np.ones((1, 7, 1, 1), np.float32)}), "shape"),
        (lambda t: t.update({magnitude(t): np.ones(6, np.float32)}), r"\(6,\) instead of \(1, 6, 1, 1\)"),
        (lambda t: t.update({magnitude(t): np.full((1, 6, 1, 1), np.nan, np.float32)}), "NaN"),
        (lambda t: t.update({f"{PREFIX}head.lora_magnitude_vector": np.ones(3, np.float32)}), "not the module"),
    ],
)  # fmt: skip
def test_damage_is_told(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read("convnet", rewrite("convnet", tmp_path, change))


def test_magnitudes_that_no_word_asks_for_are_refused(tmp_path):
    folder = rewrite("convnet", tmp_path, lambda t: None)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(ValueError, match="of DoRA, which the words do not ask for"):
        read("convnet", folder)


def test_shapes_alone_are_not_enough():
    _, params, table, _, _ = setting("convnet")
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(ValueError, match="conv/kernel is adapted by DoRA, which needs the numbers"):
        load_peft(GOLDENS / "convnet", shapes, names=table)


def test_a_mixture_with_plain_lora_is_refused(tmp_path):
    """PEFT's words are for all modules of a file."""
    _, params, table, _, _ = setting("convnet")
    adapter, config = read("convnet")
    node = adapter["conv"]["kernel"]
    plain = lora.lowrank.LowRank(node.a, node.b, node.scale, axes=node.axes)
    mixed = adapter | {"conv": {"kernel": plain}}
    with pytest.raises(ValueError, match="by the methods 'lora' and 'dora', and a file of PEFT"):
        save_peft(tmp_path, params, mixed, config, names=table)


def test_plain_lora_from_the_words_of_dora_gets_new_words(tmp_path):
    _, params, table, _, _ = setting("convnet")
    adapter, config = read("convnet")
    is_dora = lambda x: isinstance(x, DoRA)
    plain = lambda x: lora.lowrank.LowRank(x.a, x.b, x.scale, axes=x.axes) if is_dora(x) else x
    made = jax.tree.map(plain, adapter, is_leaf=is_dora)
    save_peft(tmp_path, params, made, config, names=table)
    assert '"use_dora": false' in (tmp_path / "adapter_config.json").read_text()
    again, new = read("convnet", tmp_path)
    assert new.method == "lora"
    jax.tree.map(np.testing.assert_array_equal, again, made)
