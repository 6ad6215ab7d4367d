"""The blocks of `docs/coming_from.md`: each of another library with the block of this one beside it."""

import json
import math
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from tests.helpers.snippets import run, section, snippets

# That others promote ranks and warn is none of our business.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _promotion_as_the_others_need_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):
        yield


def blocks(heading):
    return [snippet for snippet, _ in snippets(section("coming_from", heading))]


@pytest.mark.slow
def test_nnx_lora_and_the_same_by_hand():
    """The blocks of this library under the heading of PEFT make the names that the others use."""
    _, ours = blocks("PEFT")
    space = {}
    for snippet in (ours, *blocks("nnx.LoRA"), *blocks("Doing it by hand")):
        run(snippet, space)
    x = jnp.ones((3, 16))
    np.testing.assert_allclose(space["same"], space["wrapped"](x), rtol=1e-6)
    np.testing.assert_allclose(space["before"], space["after"], rtol=1e-6)


def count_trained(printed):
    """The number of trained parameters in the line that either library prints."""
    return int(re.search(r"trainable params: ([\d,]+)", printed)[1].replace(",", ""))


@pytest.mark.parity
def test_peft(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft", reason="PEFT's block needs peft, transformers and torch")
    printed, spaces = {}, {}
    for name, snippet in zip(("theirs", "ours"), blocks("PEFT"), strict=True):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        spaces[name] = {}
        run(snippet, spaces[name])
        printed[name] = capsys.readouterr().out
    counts = {name: count_trained(text) for name, text in printed.items()}
    hidden, layers, rank = 32, 2, 8
    assert counts["ours"] == layers * 2 * 2 * hidden * rank + hidden * 2 + 2
    assert counts["theirs"] == counts["ours"]
    files = {
        name: safetensors.numpy.load_file(tmp_path / name / "adapter/adapter_model.safetensors")
        for name in spaces
    }
    shapes = {
        name: {k: (x.shape, x.dtype) for k, x in tensors.items()} for name, tensors in files.items()
    }
    assert shapes["theirs"] == shapes["ours"] and shapes["ours"]
    read = lambda name: json.loads((tmp_path / name / "adapter/adapter_config.json").read_text())
    theirs, ours = read("theirs"), read("ours")
    for key in ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias"):
        assert theirs[key] == ours[key], key
    assert {"query", "value"} == set(theirs["target_modules"])
    assert {"classifier"} <= set(theirs["modules_to_save"]) & set(ours["modules_to_save"])
    # What was saved here opens there, with nothing missing and nothing over.
    import peft

    base = spaces["theirs"]["merged"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened = peft.PeftModel.from_pretrained(base, tmp_path / "ours/adapter")
    said = [str(w.message) for w in caught]
    assert not [m for m in said if re.search("missing|[Uu]nexpected|did not match", m)], said
    state = {k: v.numpy() for k, v in peft.get_peft_model_state_dict(opened).items()}
    assert state.keys() == files["ours"].keys()
    for name, tensor in files["ours"].items():
        np.testing.assert_array_equal(state[name], tensor, err_msg=name)


def test_qwix():
    """Given the same numbers, both compute the same; qwix keeps its factors beside the kernel."""
    pytest.importorskip("qwix", reason="qwix's block needs qwix: pip install qwix")
    theirs, ours = blocks("qwix")
    there, here = {}, {}
    run(theirs, there)
    run(ours, here)
    tree = nn.unbox(there["variables"])["params"]
    assert {n for n, x in tree.items() if "kernel_lora_a" in x} == {"query", "value"}
    assert set(here["adapter"]["params"]) == {"query", "value"}
    keys = iter(jax.random.split(jax.random.key(1), 4))
    for name, leaves in tree.items():
        for factor in {"kernel_lora_a", "kernel_lora_b"} & set(leaves):
            leaves[factor] = jax.random.normal(next(keys), leaves[factor].shape)
        assert name not in here["adapter"]["params"] or "kernel_lora_b" in leaves
    params, adapter = {}, {}
    for name, leaves in tree.items():
        params[name] = {k: x for k, x in leaves.items() if "lora" not in k}
        if "kernel_lora_a" in leaves:
            node = here["adapter"]["params"][name]["kernel"]
            a, b = (leaves[k].reshape(x.shape) for k, x in (("kernel_lora_a", node.a), ("kernel_lora_b", node.b)))  # fmt: skip
            assert math.prod(leaves["kernel_lora_a"].shape) == node.a.size
            adapter[name] = {"kernel": lora.LowRank(a, b, node.scale, axes=node.axes)}
    bound = lora.bind({"params": params}, {"params": adapter})
    x, model = jax.random.normal(jax.random.key(2), here["x"].shape), here["attention"]
    expected = there["lora_model"].apply({"params": tree}, x)
    assert np.abs(expected - model.apply({"params": params}, x)).max() > 0.1
    np.testing.assert_allclose(lora.lift(model.apply)(bound, x), expected, rtol=1e-4, atol=1e-5)
