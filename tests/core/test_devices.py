"""`lift` inside and around `shard_map`, and on meshes with explicit axes; on 4 virtual devices."""

import json
import subprocess
import sys

import pytest

from tests.helpers.places import ROOT


@pytest.mark.parametrize(
    "method", ["lora", "toy", "dora", "offset", "dora offset few", "vera", "adalora", "lora_fa"]
)
@pytest.mark.slow
def test_lift_equals_merge_on_several_devices(method):
    """Staying factored (the cases are strict), in values and gradients, with types that agree."""
    program = [sys.executable, "-m", "tests.helpers.cases_on_4_devices", *method.split()]
    run = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout)
    assert len(found) > (5 if "few" in method else 35)
    # Float32, through three layers at most; the devices sum in another order.
    far = {name: gaps for name, gaps in found.items() if max(gaps.values()) > 5e-5}
    assert not far, far
