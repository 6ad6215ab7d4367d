"""docs/scaling.md: its tables are what the script prints, and its recipe runs."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.places import ROOT

DOC = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def run(*command, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment,
    )  # fmt: skip


def test_tables_are_what_the_script_prints():
    done = run(ROOT / "scripts" / "make_scaling_table.py")
    assert done.returncode == 0, done.stderr
    assert "| 7B | 6,738,415,616 |" in done.stdout  # as Llama 2 is known to have
    assert done.stdout in DOC


@pytest.mark.slow
def test_recipe_runs(tmp_path):
    (recipe,) = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    (tmp_path / "recipe.py").write_text(recipe + CHECKS)
    done = run(tmp_path / "recipe.py", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert done.returncode == 0, done.stderr


# Of one device, by the definition (merge), without a mesh.
CHECKS = """
assert params["params"]["up"]["kernel"].addressable_shards[0].data.shape == (4, 32)
assert state[0]["params"]["up"]["kernel"].a.addressable_shards[0].data.shape == (4, 4)
plain = jax.tree.map(np.asarray, params)
adapter = lora.init(jax.random.key(1), model.apply, plain, config, x)
state = adapter, tx.init(adapter)
def single(state, x, y):
    loss = lambda a: jnp.mean(jnp.square(model.apply(lora.merge(plain, a), x) - y))
    value, grads = jax.value_and_grad(loss)(state[0])
    updates, opt_state = tx.update(grads, state[1], state[0])
    return (optax.apply_updates(state[0], updates), opt_state), value
single = jax.jit(single)
for _ in range(20):
    state, wanted = single(state, x, jnp.ones((8, 16)))
np.testing.assert_allclose(value, wanted, rtol=1e-4)
assert wanted < 0.9 * np.mean(np.square(model.apply(plain, x) - 1))
"""


def test_tests_that_are_named_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(?:test_\w+\.py::)?(test_\w+)`", DOC):
        assert f"def {name}(" in tests, name
    for name in re.findall(r"`(test_\w+\.py)", DOC):
        assert list((ROOT / "tests").rglob(name)), name
    for field in re.findall(r"--config\.([\w.]+)=", DOC):
        assert field.split(".")[0] in ("mesh", "model", "data")
