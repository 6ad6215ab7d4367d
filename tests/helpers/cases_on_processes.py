"""One of the processes of tests/training/test_first_values_on_processes.py.

    python -m tests.helpers.cases_on_processes DIRECTORY COUNT NUMBER PORT

writes into DIRECTORY the adapters that this process starts with, case by case.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from lora_jax import paths
from lora_jax.tasks import classification
from lora_jax.training import mesh, partitioning
from lora_jax.training.state import initial_state
from tests.helpers import tiny_encoder

CASES = {
    "lora_ga": {"lora.init": "lora_ga"},
    "eva": {"lora.init": "eva"},
    "dora": {"lora.init": "lora_ga", "lora.method": "dora", "accumulate": 2},
    "pissa": {"lora.init": "pissa", "lora.method": "dora"},
}


def make(root, case, **changes):
    """The arrays of the adapter at step 0, made as the loop makes it."""
    config = tiny_encoder.config(root, init_batches=2, **CASES[case], **changes)
    devices = mesh.find(config)
    task, settings = classification.make_task(config, devices)
    task = partitioning.place_task(devices, task, config)
    state, _ = initial_state(task, config, settings, devices=devices)
    return paths.named_leaves(partitioning.on_host(devices, state.adapter))


def main(root, count, number, port):
    jax.config.update("jax_numpy_rank_promotion", "raise")
    changes = {}
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
        changes = {"mesh.data": -1, "mesh.fsdp": 2}
    for case in CASES:
        found = make(root, case, **changes)
        np.savez(root / f"{case}-{number}-of-{count}.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
