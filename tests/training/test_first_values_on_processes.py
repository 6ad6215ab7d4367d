"""First values that need a pass over data, in several real processes: those of one process."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import tiny_encoder
from tests.helpers.places import ROOT

COUNT, SECONDS = 2, 300  # each with two devices
CASES = ("lora_ga", "eva", "dora", "pissa")


def start(root, count, number, port):
    program = [sys.executable, "-m", "tests.helpers.cases_on_processes", root, count, number, port]
    flags = f"--xla_force_host_platform_device_count={2 if count > 1 else 1}"
    env = os.environ | {"XLA_FLAGS": flags}
    return subprocess.Popen(
        [*map(str, program)], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    tiny_encoder.checkpoint(root / "model")
    tiny_encoder.data(root / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for count in (1, COUNT):
        running = [start(root, count, number, port) for number in range(count)]
        try:
            for process in running:
                _, said = process.communicate(timeout=SECONDS)
                assert process.returncode == 0, said[-4000:]
        finally:
            for process in running:  # one that has failed leaves the others waiting
                process.kill()
                process.communicate()
    return root


def read(root, case, number, count):
    with np.load(root / f"{case}-{number}-of-{count}.npz") as stored:
        return {name: stored[name] for name in stored}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_process_has_the_first_values_of_one(case, root):
    """Each makes its rows of the batches alone; the base is split over them."""
    one, first = read(root, case, 0, 1), read(root, case, 0, COUNT)
    assert one.keys() == first.keys()
    for number in range(1, COUNT):
        other = read(root, case, number, COUNT)
        for name, x in first.items():
            np.testing.assert_array_equal(other[name], x, err_msg=name)
    for name, x in one.items():
        # Sums over rows in another order, of which singular vectors are made.
        np.testing.assert_allclose(first[name], x, rtol=0, atol=2e-5, err_msg=name)
