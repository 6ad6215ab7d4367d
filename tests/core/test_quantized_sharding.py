"""Where the parts of quantized kernels lie, and what goes from device to device."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from lora_jax import sharding
from lora_jax.quantized_sharding import part_specs
from lora_jax.schemes import encode
from tests.helpers.places import ROOT

SIZES = {"fsdp": 4, "tensor": 2}


def specs(scheme, shape, axes, *spec, block=None):
    leaf = encode(jnp.ones(shape), scheme, axes, block=block)
    made = part_specs(leaf, PartitionSpec(*spec), SIZES)
    names = ("codes", "scales", "nested", "offset", "zeros")
    return {n: tuple(x) for n in names if (x := getattr(made, n, None)) is not None}


def test_parts_lie_as_the_kernel_does():
    both = ("fsdp", "tensor")
    assert specs("nf4", (256, 8), "io", *both) == {"codes": both, "scales": both}
    turned = ("tensor", "fsdp")
    assert specs("int4", (8, 256), "oi", *both, block=64) == dict.fromkeys(
        ("codes", "scales", "zeros"), turned
    ) | {"codes": turned}
    made = specs("nf4_double", (3, 256, 2, 4), "bioo", None, "fsdp", "tensor")
    assert made["codes"] == made["scales"] == (None, "fsdp", "tensor")
    assert made["nested"] == (None, None) and made["offset"] == (None,)


@pytest.mark.parametrize(
    "scheme, shape, axes, spec, want",
    [
        # Two blocks can't be split over four devices, and so the codes aren't.
        ("nf4", (128, 8), "io", ("fsdp", "tensor"), (None, "tensor")),
        # One scale for all inputs is on every device.
        ("int8", (128, 8), "io", ("fsdp", "tensor"), ("fsdp", "tensor")),
        # Blocks that run over the whole kernel.
        ("nf4", (96, 8), "io", ("fsdp", "tensor"), (None, None)),
        # A second axis of a side is not one piece of the matrix.
        ("nf4", (256, 4, 2), "ioo", (None, None, "tensor"), (None, None)),
        ("nf4", (2, 128, 4), "iio", ("tensor", None, None), ("tensor", None)),
        ("nf4", (256, 8), "io", (("fsdp", "tensor"), None), (None, None)),
        ("nf4", (512, 8), "io", (("fsdp", "tensor"), None), (("fsdp", "tensor"), None)),
    ],
)
def test_splits_that_keep_blocks_whole(scheme, shape, axes, spec, want):
    made = specs(scheme, shape, axes, *spec)
    assert made["codes"] == want
    if scheme == "int8":
        assert made["scales"] == (None, "tensor")


def test_specs_of_a_tree_have_one_for_each_kernel():
    params = {"up": encode(jnp.ones((256, 64)), "nf4"), "bias": jnp.ones(64)}
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    made = sharding.specs(params, [("up", ("fsdp", "tensor"))], mesh)
    assert tuple(made["up"]) == ("fsdp", "tensor") and tuple(made["bias"]) == ("fsdp",)
    held = sharding.bytes_per_device(params, made, mesh)
    assert held == (256 * 64 // 2 + 4 * 64 * 4) // 8 + 4 * 64 // 4
    assert sharding.replicated(params, made) == []


@pytest.mark.slow
def test_codes_travel_and_not_numbers():
    """On four devices: values, gradients, and the largest array that is gathered."""
    program = [sys.executable, "-m", "tests.helpers.cases_on_quantized"]
    run = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout)
    for name, case in found.items():
        assert case["loss"] < 1e-5 and case["gradients"] < 1e-5, name
        assert np.isclose(case["held"], case["really"]) and case["held"] < 0.27, name
        up = ("fsdp", "tensor")
        assert case["specs"] == [str((None, *up[::-1])), str((None, *up))], name
    # Bytes for each number of a kernel, of which a device may hold half.
    largest = {name: case["largest"] for name, case in found.items()}
    assert largest == {"nf4_double fsdp": 0.5, "int8 fsdp": 1, "nf4 tensor": 0, "nf4 mixed": 0.25}
