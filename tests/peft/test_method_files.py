"""PEFT's files of VeRA and AdaLoRA: read as PEFT reads them, written byte for byte, and strictly."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax.methods.vera import draw_projections
from lora_jax.names import Name
from lora_jax.peft import load_peft, save_peft
from tests.helpers import method_goldens
from tests.helpers.comparisons import perturbed

CASES = ("vera_bert", "vera_gpt2", "vera_llama_no_projection", "adalora_bert", "adalora_gpt2")
QUICK = ("vera_llama_no_projection", "adalora_bert")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
cases = pytest.mark.parametrize(
    ("case", "scan"),
    [
        pytest.param(case, scan, marks=[pytest.mark.slow] * (scan or case not in QUICK))
        for case in CASES
        for scan in (False, True)
    ],
)
MODEL = {"small": {"kernel": jnp.ones((4, 3))}, "large": {"kernel": jnp.ones((6, 5))}}
NAMES = [Name(f"{x}/kernel", f"{x}.weight", transpose=True) for x in MODEL]
FN = lambda p, x: (x[:4] @ p["small"]["kernel"]).sum() + (x @ p["large"]["kernel"]).sum()


@cases
def test_computes_what_peft_computes(case, scan):
    arrays, base = method_goldens.golden(case)
    fn, params, table = method_goldens.base(base, scan_layers=scan)
    adapter, config = load_peft(method_goldens.METHODS / case, params, names=table)
    assert config.method == case.split("_")[0]
    method_goldens.check_outputs(fn, params, adapter, arrays)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_has_the_gradients_of_peft(case, tmp_path):
    arrays, base = method_goldens.golden(case)
    fn, params, table = method_goldens.base(base)
    adapter, config = load_peft(method_goldens.METHODS / case, params, names=table)
    method_goldens.check_gradients(fn, params, adapter, config, arrays, table, tmp_path)


@cases
def test_is_written_byte_for_byte(case, scan, tmp_path):
    _, base = method_goldens.golden(case)
    _, params, table = method_goldens.base(base, scan_layers=scan)
    folder = method_goldens.METHODS / case
    adapter, config = load_peft(folder, params, names=table)
    save_peft(tmp_path, params, adapter, config, names=table)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_projections_are_those_of_torch():
    """Against those that PEFT has written for the key 0."""
    for case, shape in (("vera_bert", (32, 37)), ("vera_gpt2", (37, 96))):
        tensors = safetensors.numpy.load_file(method_goldens.METHODS / case / WEIGHTS)
        drawn = draw_projections(0, 5, *shape)
        for got, name in zip(drawn, ("A", "B"), strict=True):
            np.testing.assert_array_equal(got, tensors[f"base_model.vera_{name}"])


def make(method, **fields):
    config = lora.LoRAConfig(rank=2, method=method, **fields)
    return lora.init(jax.random.key(0), FN, MODEL, config, jnp.ones(6)), config


@pytest.mark.parametrize("seed", [0, 7])
def test_a_fresh_vera_has_the_projections_of_its_key(seed, tmp_path):
    adapter, config = make("vera", projection_seed=seed)
    save_peft(tmp_path, MODEL, adapter, config, names=NAMES)
    words = json.loads((tmp_path / CONFIG).read_text())
    assert (words["projection_prng_key"], words["save_projection"], words["r"]) == (seed, True, 2)
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS)
    assert tensors["base_model.vera_A"].shape == (2, 6)
    assert tensors["base_model.vera_B"].shape == (5, 2)
    assert not any("small.vera_A" in name for name in tensors)
    change(tmp_path, {"save_projection": False}, drop=("base_model.vera_A", "base_model.vera_B"))
    again, config_again = load_peft(tmp_path, MODEL, names=NAMES)
    assert config_again.projection_seed == seed
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def change(directory, words, *, drop=(), tensors=None):
    """Changes words of a directory, and tensors of its file."""
    old = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(old | words))
    held = safetensors.numpy.load_file(directory / WEIGHTS)
    new = {n: x for n, x in held.items() if n not in drop} | (tensors or {})
    safetensors.numpy.save_file(new, directory / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("words", "options", "says"),
    [
        ({}, {"drop": ("base_model.vera_A",)}, "base_model.vera_A is missing, and save_projection"),
        (
            {},
            {"tensors": {"base_model.vera_B": np.zeros((9, 2), np.float32)}},
            r"vera_B has shape \(9, 2\) instead of \(5, 2\)",
        ),
        ({"lora_alpha": 8}, {}, "lora_alpha is 8, which is no word of VERA"),
        ({"use_dora": True}, {}, "use_dora is True"),
        ({"projection_prng_key": -1}, {}, "projection_prng_key: must be a whole number"),
        ({"save_projection": "yes"}, {}, "save_projection: must be true or false"),
        ({"r": 3}, {}, r"vera_lambda_d has shape \(2,\) instead of \(3,\)"),
    ],
)
def test_a_wrong_vera_is_refused(words, options, says, tmp_path):
    adapter, config = make("vera")
    save_peft(tmp_path, MODEL, adapter, config, names=NAMES)
    change(tmp_path, words, **options)
    with pytest.raises(ValueError, match=says):
        load_peft(tmp_path, MODEL, names=NAMES)


def test_projections_that_differ_can_not_be_shared(tmp_path):
    """PEFT overwrites what all adapters share without a word; here nothing is shared unseen."""
    adapter, config = make("vera")
    small = adapter["small"]["kernel"]
    other = adapter | {"small": {"kernel": dataclasses.replace(small, a=small.a + 1)}}
    with pytest.raises(ValueError, match="different projections of their inputs"):
        save_peft(tmp_path, MODEL, other, config, names=NAMES)


def test_a_fresh_adalora_keeps_its_triplets(tmp_path):
    adapter, config = make("adalora")
    save_peft(tmp_path, MODEL, adapter, config, names=NAMES)
    words = json.loads((tmp_path / CONFIG).read_text())
    assert (words["init_r"], words["r"], words["rank_pattern"]) == (2, 8, None)
    assert words["total_step"] > words["tinit"] + words["tfinal"]  # or PEFT does not read it
    again, config_again = load_peft(tmp_path, MODEL, names=NAMES)
    assert config_again.method == "adalora" and config_again.rank == 2
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_triplets_that_change_nothing_are_left_out(tmp_path):
    adapter, config = make("adalora")
    adapter = perturbed(adapter)
    small = adapter["small"]["kernel"]
    small = dataclasses.replace(small, e=small.e.at[0].set(0))
    adapter = adapter | {"small": {"kernel": small}}
    save_peft(tmp_path, MODEL, adapter, config, names=NAMES)
    words = json.loads((tmp_path / CONFIG).read_text())
    assert words["rank_pattern"] == {"small.lora_E": [False, True], "large.lora_E": [True, True]}
    again, config = load_peft(tmp_path, MODEL, names=NAMES)
    jax.tree.map(
        np.testing.assert_array_equal, lora.merge(MODEL, again), lora.merge(MODEL, adapter)
    )
    copy = tmp_path / "copy"
    save_peft(copy, MODEL, again, config, names=NAMES)
    assert (copy / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ({"small.lora_E": [True, True]}, "rank_pattern and the adapted modules differ in large"),
        ({"small.lora_E": [True], "large.lora_E": [True, True]}, r"has 1 entries, not 2"),
        ({"small.lora_E": 3, "large.lora_E": [True]}, "must be null or an object with lists"),
        (
            {"small.lora_E": [True, False], "large.lora_E": [True, True]},
            r"small.lora_A has shape \(2, 4\) instead of \(1, 4\)",
        ),
    ],
)
def test_a_wrong_adalora_is_refused(pattern, says, tmp_path):
    adapter, config = make("adalora")
    save_peft(tmp_path, MODEL, perturbed(adapter), config, names=NAMES)
    change(tmp_path, {"rank_pattern": pattern})
    with pytest.raises(ValueError, match=says):
        load_peft(tmp_path, MODEL, names=NAMES)


@pytest.mark.parametrize("method", ["vera", "adalora"])
def test_embeddings_are_refused(method, tmp_path):
    table = {"wte": {"embedding": jnp.ones((7, 4))}}
    fn = lambda p, ids: p["wte"]["embedding"][ids]
    config = lora.LoRAConfig(rank=2, targets=("wte",), method=method)
    adapter = lora.init(jax.random.key(0), fn, table, config, jnp.zeros(2, int))
    with pytest.raises(ValueError, match="of the kind embedding, which PEFT does not adapt with"):
        save_peft(tmp_path, table, adapter, config, names=[Name("wte/embedding", "wte.weight")])
