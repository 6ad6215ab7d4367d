"""docs/methods.md names every method, and CONTRIBUTING's walk-through adds one by a file and a line."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.methods import METHODS
from lora_jax.nodes import KINDS
from lora_jax.sweeps import vmapped_step
from lora_jax.training.state import TrainState
from tests.helpers.places import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_both_tables_have_every_method():
    """The first two tables of the page; further ones are of sections."""
    found = re.findall(r'^\| `"(\w+)"`', PAGE.split("\n## ")[0], flags=re.M)
    assert found == [*METHODS] * 2


def test_what_the_page_shows_is_printed(capsys):
    (snippet, printed), *_ = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.S)
    exec(compile(snippet, "methods.md", "exec"), {})
    assert capsys.readouterr().out == printed


@pytest.fixture
def diagonal(monkeypatch):
    """The walk-through's file, and its line."""
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", GUIDE, re.S) if "Diagonal" in x)
    space = {"__name__": "diagonal"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), space)
    line = re.search(r'The line is `"(\w+)": (\w+)` in `METHODS`', GUIDE)
    monkeypatch.setitem(METHODS, line[1], space[line[2]])
    yield space["Diagonal"]
    KINDS.pop("diagonal")


def test_the_walk_through(diagonal, tmp_path):
    params = {"layers": jax.random.normal(jax.random.key(0), (3, 8, 8)) / 3}
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
    x = jnp.ones((2, 8))
    config = lora.LoRAConfig(rank=2, method="diagonal")
    adapter = lora.init(jax.random.key(1), fn, params, config, x)
    lifted = lambda a: lora.lift(fn, strict=True)(lora.bind(params, a), x)
    np.testing.assert_array_equal(lifted(adapter), fn(params, x))
    key = jax.random.key(2)
    adapter = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(key, x.shape), adapter)
    node = adapter["layers"]
    change = np.einsum("bir,br,bro->bio", *map(np.asarray, (node.a, node.d, node.b)))
    merged = np.asarray(params["layers"]) + node.scale * change
    np.testing.assert_allclose(lora.merge(params, adapter)["layers"], merged, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lifted(adapter), fn({"layers": merged}, x), rtol=1e-5, atol=1e-5)
    assert lora.summary(params, adapter).startswith(f"trainable params: {3 * 2 * (8 + 1 + 8)} ||")
    lora.save(tmp_path, adapter, config)
    loaded, again = lora.load(tmp_path, params)
    assert again == config and isinstance(loaded["layers"], diagonal)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    assert_padded(node)


def assert_padded(node):
    """Zeros along the rank change nothing, so that a sweep may pad."""
    state = TrainState(np.array(0), {"w": jax.tree.map(np.asarray, node)}, (), None)
    small = vmapped_step.Member(state, np.array(True), (), np.array(0.0), {})
    grow = lambda shape: tuple(n + 2 if n == 2 else n for n in shape)  # the rank
    padded = vmapped_step.pad(small, jax.tree.map(lambda x: grow(np.shape(x)), small))
    w = jnp.ones((3, 8, 8))
    got, want = (m.state.adapter["w"].merge(w) for m in (padded, small))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
