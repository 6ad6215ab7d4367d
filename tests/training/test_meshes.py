"""Meshes of 8 virtual devices give the numbers of one device, and move what they should.

The devices must be asked for before JAX starts, so the cases run in processes of their own
(tests/helpers/cases_on_8_devices.py), a few in each.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import tiny_encoder
from tests.helpers.places import ROOT

pytestmark = pytest.mark.xdist_group("meshes")  # what takes long is done once


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("meshes")
    tiny_encoder.checkpoint(root / "model")
    tiny_encoder.data(root / "data")
    shutil.copytree(root / "model", root / "still")
    about = json.loads((root / "still" / "config.json").read_text())
    about |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (root / "still" / "config.json").write_text(json.dumps(about))
    return root


def run(root, *cases):
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.cases_on_8_devices", str(root), *cases], cwd=ROOT,
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The partitioner says so where it finds no better way than to gather everything.
    assert "Involuntary full rematerialization" not in done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found(root):
    return run(root, "losses:fsdp", "stream:mixed", "host:fsdp", "chunks:mixed")


@pytest.fixture(scope="module")
def trained(root):
    return run(root, *(f"losses:{mesh}" for mesh in ("one", "data", "fsdp", "tensor", "mixed")))


def close(one, other):
    # 50 steps of float32, whose sums are made in another order; 1e-5 is what is promised.
    np.testing.assert_allclose(other, one, rtol=1e-5)


@pytest.mark.parametrize("mesh", ["data", "fsdp", "tensor", "mixed"])
@pytest.mark.slow
def test_losses_are_those_of_one_device(trained, mesh):
    """With dropout, whose draw does not depend on the mesh."""
    one, other = trained["losses:one"], trained[f"losses:{mesh}"]
    assert one["losses"][-1] < 0.6 * one["losses"][0]  # something is learnt
    close(one["losses"], other["losses"])
    assert other["stays"]


@pytest.mark.slow
def test_adalora_chooses_the_ranks_of_one_device(root):
    found = run(root, "adalora:one", "adalora:mixed")
    one, mixed = found["adalora:one"], found["adalora:mixed"]
    close(one["losses"], mixed["losses"])
    assert mixed["stays"]


@pytest.mark.slow
def test_evaluation_is_that_of_one_device(trained):
    one, mixed = (trained[f"losses:{mesh}"]["scores"] for mesh in ("one", "mixed"))
    assert one.keys() == mixed.keys()
    close(list(one.values()), list(mixed.values()))


def test_an_eighth_of_the_base_on_each_device(found):
    base = found["losses:fsdp"]["base"]
    odd = {name for name, (here, total) in base.items() if 8 * here != total}
    assert odd == {"params/classifier/bias"}  # two numbers can't be divided by 8
    here, total = (sum(sizes) for sizes in zip(*base.values(), strict=True))
    assert here / total == pytest.approx(1 / 8, rel=0.01)


@pytest.mark.slow
def test_only_gradients_of_the_adapter_are_summed_over_data(trained):
    about = trained["losses:data"]
    assert {x["kind"] for x in about["collectives"]} == {"all-reduce"}
    shapes = [s for x in about["collectives"] for s in x["shapes"] if s]
    # Some in the layout of their transposes.
    assert sorted(map(sorted, shapes)) == sorted(map(sorted, about["trained"].values()))


def test_fsdp_gathers_kernels_one_by_one(found):
    about = found["losses:fsdp"]
    kernels = {tuple(s) for s in about["kernels"]}
    trained = {tuple(s) for s in about["trained"].values()}
    gathered = {
        tuple(s) for x in about["collectives"] if x["kind"] == "all-gather" for s in x["shapes"]
    }
    assert gathered & kernels  # each whole when its turn comes ...
    largest = max(int(np.prod(s)) * 4 for s in kernels)
    assert max(x["largest"] for x in about["collectives"]) <= largest
    summed = {
        tuple(s) for x in about["collectives"] if x["kind"] in ("all-reduce", "reduce-scatter")
        for s in x["shapes"]
    }  # fmt: skip
    # ... but no gradient of one: what is summed is trained, or a number, or a vector.
    assert {s for s in summed if len(s) > 1} <= trained


def test_a_checkpoint_is_loaded_into_its_pieces(found):
    about = found["stream:mixed"]
    assert set(about["fresh"]) == {"classifier/bias", "classifier/kernel"}
    for what in ("same", "redrawn", "placed", "rounded"):
        assert [name for name, right in about[what].items() if not right] == [], what
    fresh = {name for name, dtype in about["dtypes"].items() if dtype == "float32"}
    assert fresh == {f"params/{name}" for name in about["fresh"]}


@pytest.mark.parametrize("scan", ["False", "True"])
def test_host_memory_is_a_tensor_above_the_result(found, scan):
    """Also where layers are stacked, whose leaves are six tensors each."""
    about = found["host:fsdp"]
    # The tensor, its check for numbers that are none, and what the interpreter makes on the way.
    assert about[scan] < about["result"] + 2.5 * about["tensor"]
    assert about["result"] > 15 * about["tensor"]


def test_logits_stay_on_their_devices(found):
    """By chunks, with the vocabulary split as well: what travels is the head's kernel, once a pass."""
    about = found["chunks:mixed"]
    assert about["loss"] < 1e-5 and about["gradients"] < 1e-5
    assert about["loops"] == 2  # forward and back
    wide = {tuple(s) for x in about["collectives"] for s in x["shapes"] if {256, 512} & {*s}}
    assert wide <= {(16, 256), (256, 2), (2, 256)}  # the kernel, and the gradient of its factor
    assert about["gathered in"] and {*about["gathered in"]} == {"ENTRY"}


@pytest.mark.slow
def test_pmap_gives_the_numbers_of_one_device(root):
    """Without dropout: there, each device of a pmap draws for itself."""
    found = run(root, "still:one", "still:pmap")
    one, pmap = found["still:one"], found["still:pmap"]
    assert one["losses"][-1] < 0.6 * one["losses"][0]
    close(one["losses"], pmap["losses"])
    close(list(one["scores"].values()), list(pmap["scores"].values()))


@pytest.mark.slow
def test_parts_of_a_batch_on_a_mesh(root):
    """Accumulation and rematerialisation change no number, on a mesh and in a pmap."""
    found = run(root, "parts:one", "parts:fsdp", "parts:mixed", "parts:pmap")
    for name, about in found.items():
        np.testing.assert_allclose(
            about["losses"], found["parts:one"]["losses"], rtol=1e-5, err_msg=name
        )


@pytest.mark.slow
def test_the_base_is_never_whole_on_a_device(root):
    """Of a Llama with 16 stacked layers, the program has one layer's kernels at a time."""
    about = run(root, "memory:fsdp")["memory:fsdp"]
    assert about["arguments"] < about["base"] / 8 * 1.4  # the adapter is a quarter of the rest
    assert about["temporary"] < about["base"] / 3  # mostly activations
    assert max(x["largest"] for x in about["collectives"]) <= about["layer"]


@pytest.mark.slow
def test_other_families_with_stacked_layers(root):
    """With plain LoRA, LoRA-FA and VeRA."""
    found = run(root, "family:llama", "family:mixtral", "family:gpt2", "family:t5")
    for name, about in found.items():
        assert about["one"][-1] < 0.997 * about["one"][0], name  # far more than what is tolerated
        np.testing.assert_allclose(about["mixed"], about["one"], rtol=1e-5, err_msg=name)
