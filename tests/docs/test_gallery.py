"""The part of the gallery whose libraries the tests' environment has, and the gallery's own tools."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from examples.gallery import __main__ as command
from examples.gallery import measure, page, registry
from examples.gallery.model import Entry, Model

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of other libraries

MODELS = {  # file: the models' names
    "flax_linen": (
        "scanned, rematerialised transformer",
        "nn.WeightNorm and nn.SpectralNorm",
        "recurrent actor-critic, vmapped critics",
        "nn.Conv and nn.ConvTranspose",
    ),
    "flax_nnx": ("nnx.RNN(OptimizedLSTMCell)", "nnx layers with a tied head"),
    "equinox_nn": ("eqx.nn.MultiheadAttention and Linear", "eqx.nn.GRUCell and Conv1d"),
    "keras_layers": ("Embedding, MultiHeadAttention, LSTM", "Conv2D, SeparableConv2D"),
}


@pytest.fixture(autouse=True)
def _promotion_as_the_models_need_it():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name"), [(f, n) for f, names in MODELS.items() for n in names])
def test_model(file, name):
    try:
        library = importlib.import_module(f"examples.gallery.models.{file}").LIBRARY
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed (extra `examples`)")
    (entry,) = [entry for entry in library.entries if entry.name == name]
    row = measure.measure(entry, "", depth="values")
    assert row.problems == []
    assert row.kernels and row.output < 2e-5


def _entry(fn, params, **kwargs):
    x = jax.random.normal(jax.random.key(0), (2, 16))
    build = lambda batch: Model(fn=fn, params=params, args=(x[:batch],), lines=1)
    return Entry(library="ours", name="model", build=build, **kwargs)


PARAMS = {"kernel": np.ones((16, 12), np.float32), "table": np.ones((12, 16), np.float32)}


def _two_products(params, x):
    return x @ params["kernel"] @ params["table"]


def test_a_table_that_is_adapted_is_a_problem():
    (problem,) = measure.measure(_entry(_two_products, PARAMS, tables=("table",)), "").problems
    assert problem == "takes for kernels: table"


def test_a_leaf_that_is_left_out_is_listed():
    fn = lambda params, x: x @ params["kernel"] + params["table"].sum(1)
    (left_out,) = measure.measure(_entry(fn, PARAMS), "").left_out
    assert left_out.startswith("table (12, 16): goes into 'reduce_sum'")
    assert measure.measure(_entry(fn, PARAMS, tables=("table",)), "").left_out == []


def test_a_function_that_gives_other_values_when_lifted_is_a_problem(monkeypatch):
    monkeypatch.setattr(measure, "merged", lambda fn: lambda p, a, *x: 2 * fn(p, *x))
    assert "lifted and merged differ" in measure.measure(_entry(_two_products, PARAMS), "").problems


def test_other_kernels_with_one_row_are_a_problem():
    def fn(params, x):
        return _two_products(params, x) if len(x) > 1 else x @ params["kernel"]

    (problem,) = measure.measure(_entry(fn, PARAMS), "", depth="trace").problems
    assert problem == "a batch of one: leaves out table"


def test_command_writes_rows_and_page_and_tells_by_its_status(tmp_path, monkeypatch, capsys):
    entries = [_entry(_two_products, PARAMS), _entry(_two_products, PARAMS, tables=("table",))]
    monkeypatch.setattr(registry, "entries", lambda environment: entries)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    rows, text = tmp_path / "rows.json", tmp_path / "page.md"
    assert command.main([f"--json={rows}", f"--write={text}"]) == 1
    assert "2 models, 1 with problems" in capsys.readouterr().out
    assert page.page([measure.Row(**x) for x in json.loads(rows.read_text())]) == text.read_text()
    assert "* ours 1.0, model: takes for kernels: table" in text.read_text()
    entries.pop()
    assert command.main(["--only=ours", "--depth=trace"]) == 0
    assert command.main(["--only=theirs"]) == 1


def test_each_file_of_a_library_is_registered():
    folder = registry.__file__.removesuffix("registry.py") + "models"
    files = {path.stem for path in Path(folder).glob("*.py")}
    assert files - {"__init__"} == set(registry.files())
