"""The part of the gallery whose libraries the tests' environment has, and the gallery's own tools."""

import ast
import dataclasses
import importlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax as lora
from examples.gallery import __main__ as command
from examples.gallery import measure, page, registry
from examples.gallery.model import Entry, Model
from tests.helpers.places import ROOT

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
    published = ROOT / "docs" / "gallery" / page.file_name(row)
    text = published.read_text(encoding="utf-8") if published.exists() else ""
    if f"\n## {name}\n" in text:  # of a page that has the model
        assert f"\n## {name}\n\n{page.describe(row)}\n" in text


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


def test_a_page_says_how_a_model_is_called_and_what_explain_says(tmp_path):
    row = measure.measure(_entry(_two_products, PARAMS, tables=("bias",)), "1.0", depth="trace")
    page.write(tmp_path / "page.md", [row])
    text = (tmp_path / "page" / "ours.md").read_text()
    model = _entry(_two_products, PARAMS).build(2)
    adapter = lora.init(jax.random.key(1), model.fn, PARAMS, lora.LoRAConfig(), *model.args)
    for part in (
        lora.explain(model.fn, PARAMS, adapter, *model.args),
        lora.summary(PARAMS, adapter),
        "`float32[2, 16]`",
        "Every use stays factored",
    ):
        assert str(part) in text
    assert "[ours 1.0](gallery/ours.md)" in (tmp_path / "page.md").read_text()


def test_code_of_models_that_one_function_registers_says_what_differs():
    def entry(size, sizes):
        fn = lambda params, x: size * sum(sizes.values()) * x @ params["kernel"]

        def build(batch):
            return Model(fn=fn, params={"kernel": np.ones((16, size))}, args=(np.ones((batch, 16)),), lines=len(sizes))  # fmt: skip

        return Entry(library="ours", name="model", build=build)

    sizes = {f"number_of_something_{k}": k for k in range(4)}
    row = measure.measure(entry(12, sizes), "1.0", depth="trace")
    assert row.problems == []
    space = {}
    exec(row.code.partition("def build")[0], {}, space)
    assert space["size"] == 12 and space["sizes"] == sizes
    assert "\n\ndef build(batch):" in row.code and 'sizes = {\n    "number' in row.code


def test_a_kernel_that_is_formed_is_explained(tmp_path):
    varied = np.arange(12 * 16, dtype=np.float32).reshape(12, 16)
    fn = lambda params, x: x @ params["kernel"] @ (params["table"] * varied)
    with_reason = measure.measure(_entry(fn, PARAMS), "1.0", depth="trace")
    (fallback,) = with_reason.fallbacks
    assert "varies over inputs and outputs" in fallback
    (text,) = [x for part, x in page.REASONS.items() if part in fallback]
    assert text in page.describe(with_reason) and text in page.page([with_reason])
    assert "Every use stays factored" not in page.describe(with_reason)


def test_rows_of_one_model_are_merged():
    old = measure.Row(library="b 1", name="m", kernels=1, output=1e-6, flops=[0.5, 1.0], date="2026-01-01", problems=["old"])  # fmt: skip
    traced = measure.Row(library="b 1", name="m", kernels=2, code="pass", date="2026-01-02")
    other = measure.Row(library="A 1", name="m")
    first, second = page.merge([old, other, traced])
    assert first == other
    assert second == dataclasses.replace(traced, output=1e-6, flops=[0.5, 1.0], date="2026-01-01", problems=["old"])  # fmt: skip
    again = dataclasses.replace(old, output=2e-6, problems=[])
    assert page.merge([old, traced, again]) == [again]


# Of each library that people asked about, a model.
ASKED = {
    "google-tunix": "Gemma3",
    "dm-haiku": "transformer of hk.MultiHeadAttention",
    "brax": "PPO's policy and value",
    "keras-hub": "GemmaBackbone",
    "diffrax": "neural ODE (Tsit5, PIDController, RecursiveCheckpointAdjoint)",
    "e3nn-jax": "flax.Linear and tensor_product",
    "transformers": "FlaxWhisperForConditionalGeneration",
}


TABLE = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
ROWS = {}  # library: the names of its models, in the table of all
for library, name in re.findall(r"^\| \[?([\w-]+) [\w.]+\S* \| (.*?) \|", TABLE, re.MULTILINE):
    ROWS.setdefault(library, []).append(name)


@pytest.mark.parametrize("library", ROWS)
def test_published_pages(library):
    """Each model of the table has a section, and each library a page that the table leads to."""
    names = ROWS[library]
    links = re.findall(
        rf"^\| \[{library} [\w.]+\]\(gallery/{library}\.md\) \| (.*?) \|", TABLE, re.MULTILINE
    )
    assert links == names
    assert library not in ASKED or ASKED[library] in names
    text = (ROOT / "docs" / "gallery" / f"{library}.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [*names, page.CODE]
    assert f'Library("{library}")' in text and f"\ngallery/{library}\n" in TABLE
    assert text.count("What `explain` says:\n\n```text\n") == len(names)


# Functions of the gallery's files that register models which are alike, by a part of the name.
REGISTERS = ("LIBRARY.model", "_encoder", "_pair", "_vision", "_convolutions")


def _registered():
    """The names of each library's models, or the parts of names that its files give.

    Read from the source, since the libraries are not installed here.
    """
    found = {}
    for file in registry.files():
        path = Path(registry.__file__).parent / "models" / f"{file}.py"
        calls = [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.Call)]
        first = lambda call: call.args[0].value if isinstance(call.args[0], ast.Constant) else None
        named = [(ast.unparse(x.func), first(x)) for x in calls if x.args]
        (library,) = [name for function, name in named if function == "Library"]
        names = [name for function, name in named if function in REGISTERS and name]
        found.setdefault(library.lower(), []).extend(names)
    return found


@pytest.mark.parametrize(("library", "names"), _registered().items())
def test_each_model_of_the_gallery_is_published(library, names):
    missing = [name for name in names if not any(name in row for row in ROWS.get(library, ()))]
    assert not missing and names
    assert len(ROWS[library]) == len(names)


def test_the_first_line_counts_them():
    count = sum(map(len, ROWS.values()))
    assert f"\n{count} models of {len(ROWS)} libraries." in TABLE and count >= 80


def test_each_file_of_a_library_is_registered():
    folder = registry.__file__.removesuffix("registry.py") + "models"
    files = {path.stem for path in Path(folder).glob("*.py")}
    assert files - {"__init__"} == set(registry.files())
