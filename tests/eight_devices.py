"""Runs the cases of test_meshes.py on 8 virtual devices, in a process of its own.

    python tests/eight_devices.py DIRECTORY CASE ...

prints a JSON object with what each case has shown.
"""

import ast
import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax
import numpy as np
import tiny
from collectives import collectives

from configs import common
from experiments import classification, devices, stepping
from lora_jax import paths

STEPS = 50


def config(root, **changes):
    made = common.base_config()
    for field, value in (tiny.overrides(root) | changes).items():
        tupled = isinstance(value, str) and value.startswith("(")
        made.update_from_flattened_dict({field: ast.literal_eval(value) if tupled else value})
    return made.lock()


def start(c):
    on = devices.find(c)
    task, settings = classification.make_task(c)
    state, tx = stepping.initial_state(task, c, settings)
    state = stepping.usable(devices.place(on, stepping.storable(state), task.base))
    if on.pmap:
        task = task._replace(base=devices.stacked(on, task.base))
    step = stepping.make_train_step(task, tx, settings.dropout, on=on, like=state)
    return on, task, state, step


def losses(c):
    on, task, state, step = start(c)
    found = []
    for k in range(STEPS):
        state, sums = step(state, task.base, task.train_batch(k))
        found.append(float(sums[0]) / float(sums[-1]))
    scores = stepping.evaluate(stepping.make_eval_step(task, on), state.adapter, task)
    adapter = devices.on_host(on, state.adapter)
    norms = {name: float(np.linalg.norm(x)) for name, x in paths.named_leaves(adapter).items()}
    return dict(losses=found, scores=scores, norms=norms)


def bytes_of_base(task):
    first = jax.devices()[0]
    leaves = paths.named_leaves(task.base)
    here = lambda x: sum(s.data.nbytes for s in x.addressable_shards if s.device == first)
    return {name: (here(x), x.nbytes) for name, x in leaves.items()}


def program(c):
    _, task, state, step = start(c)
    compiled = step.lower(state, task.base, task.train_batch(0)).compile()
    memory = compiled.memory_analysis()
    kernels = [x for x in paths.named_leaves(task.base).values() if x.ndim > 1]
    trained = {
        n: x.shape for n, x in paths.named_leaves(state.adapter).items() if not n.endswith("scale")
    }
    return dict(
        collectives=[x._asdict() for x in collectives(compiled.as_text())],
        temporary=memory.temp_size_in_bytes,
        base=bytes_of_base(task),
        kernels=sorted({x.shape for x in kernels}),
        largest=max(x.nbytes for x in kernels),
        trained=trained,
    )


MESHES = {
    "one": {},
    "data": {"mesh.data": 8},
    "fsdp": {"mesh.fsdp": 8},
    "tensor": {"mesh.tensor": 2},
    "mixed": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
    "pmap": {"mesh.data": 8, "pmap": True},
}


def case(root, name):
    kind, _, mesh = name.partition(":")
    options = MESHES[mesh]
    if kind == "still":  # no dropout
        c = config(root, **options, **{"model.name": str(root / "still"), "lora.dropout": 0.0})
        return losses(c)
    return {"losses": losses, "program": program}[kind](config(root, **options))


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    root = Path(sys.argv[1])
    print(json.dumps({name: case(root, name) for name in sys.argv[2:]}))
