"""What the documentation shows is run: README snippets, its commands, and docstrings."""

import ast
import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import configs
import experiments
import lora_jax
from lora_jax.tasks import glue_config
from tests.helpers.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALLATION = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")


def _modules(*packages):
    for package in packages:
        yield package.__name__
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield info.name


@pytest.mark.parametrize("name", list(_modules(lora_jax)))
def test_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_docstrings_of_programs():
    names = list(_modules(experiments, configs))
    assert {"experiments.sst2", "experiments.sweep", "configs.common"} <= set(names)
    done = subprocess.run(
        [sys.executable, "tests/helpers/run_docstrings.py", *names],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_snippets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) == 1
    space = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), space)
    assert "trainable params: 355 || all params: 1,443" in capsys.readouterr().out
    assert space["value"] < 1.1 and Path("runs/readme").is_dir()
    merged = space["model"].apply(space["merged"], space["x"])
    np.testing.assert_allclose(space["logits"], merged, rtol=1e-5, atol=1e-6)


def test_snippets_of_any_function(capsys):
    text = (ROOT / "docs" / "any_function.md").read_text(encoding="utf-8")
    space = {}
    for snippet in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(snippet, "any_function.md", "exec"), space)
    shown = re.search(r"```text\n(.*?)```", text, flags=re.DOTALL).group(1).splitlines()
    printed = capsys.readouterr().out
    assert all(line in printed for line in shown) and len(shown) == 4


def test_snippets_of_quantization(capsys):
    text = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(snippet, "quantization.md", "exec"), {})
    assert capsys.readouterr().out == shown


@pytest.mark.slow
def test_snippets_of_methods():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for snippet in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(snippet, "methods.md", "exec"), {})


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda p: p.stem
)
def test_commands_name_what_exists(page):
    text = page.read_text(encoding="utf-8")
    commands = re.findall(r"^\$ (.*?)(?:  +#.*)?$", text, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        for target in re.findall(r"^make ([\w-]+)", command):
            assert f"\n{target}:" in makefile or f" {target}" in makefile.partition(".PHONY")[2]
        for module in re.findall(
            r"-m ((?:experiments|benchmarks|examples|scripts)[\w.]*)", command
        ):
            place = ROOT / module.replace(".", "/")
            assert place.with_suffix(".py").is_file() or place.is_dir(), module
        for config in re.findall(r"--config=(configs/\S+)", command):
            assert (ROOT / config).is_file()


def test_the_readme_names_the_commands_to_begin_with():
    commands = re.findall(r"^\$ (.*?)(?:  +#.*)?$", README, flags=re.MULTILINE)
    assert commands[:3] == ["pip install .", "make quickstart", "make sweep-quickstart"]
    assert "`make test`" in README and "`make docs`" in README


def _tested_versions():
    """Name and version of everything that CI pins."""
    pins = [(ROOT / file).read_text(encoding="utf-8") for file in ("constraints.txt", ".ci/run")]
    return [
        (name.lower(), v) for text in pins for name, v in re.findall(r"([\w-]+)==([\w.]+)", text)
    ]


def _table_of_versions(names):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    admitted = dict(re.match(r"([\w-]+)(.*)", line).groups() for line in lines)
    tested = dict(_tested_versions())
    rows = [f"| {n} | `{admitted[n]}` | {tested[n]} |" for n in names]
    head = ["| | admitted | in `constraints.txt` |", "|---|---|---|"]
    return "\n".join([*head, f"| Python | `{project['requires-python']}` | |", *rows]) + "\n"


def test_versions_are_those_that_ci_tests():
    begin, end = (
        "<!-- versions, from pyproject.toml and constraints.txt -->\n",
        "<!-- end of the versions -->",
    )
    names = ("jax", "flax", "numpy", "optax", "orbax-checkpoint", "safetensors")
    assert INSTALLATION.partition(begin)[2].partition(end)[0] == _table_of_versions(names)
    pages = ("results", "flax_code", "installation")
    text = README + "".join((ROOT / "docs" / f"{p}.md").read_text(encoding="utf-8") for p in pages)
    named = re.findall(r"\b(jax|flax|numpy|optax|torch|transformers|PEFT) (\d+(?:\.\d+)+)", text)
    assert len(named) > 3
    for name, version in named:
        tested = [v for n, v in _tested_versions() if n == name.lower()]
        assert any(f"{v}.".startswith(f"{version}.") for v in tested), (name, version, tested)
    floor = re.search(
        r"^requires-python = \">=(.*)\"$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    newest = re.search(
        r"^release=.*Python ([\d.]+)$", (ROOT / "scripts/test_newest.sh").read_text(), re.MULTILINE
    )
    assert set(re.findall(r"Python (\d[\d.]*\d)", README + INSTALLATION)) == {floor[1], newest[1]}


def test_import_is_light():
    """`import lora_jax` brings in none of what the experiments need."""
    code = (
        "import sys, lora_jax\n"
        "heavy = 'optax orbax tensorflow tensorflow_datasets tokenizers huggingface_hub absl.flags "
        "ml_collections matplotlib lora_jax.models experiments'.split()\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, cwd=ROOT,
    )  # fmt: skip
    assert out.stdout.strip() == "[]"


def test_public_names():
    assert sorted(set(lora_jax.__all__) - {"__version__"}) == sorted(
        "LoRAConfig init init_from_activations init_from_gradients init_from_residuals bind lift merge labels mask summary "
        "explain save load quantize tabulate from_nnx update_nnx from_keras update_keras Explanation "
        "LowRank peft sharding".split()
    )
    for name in lora_jax.__all__:
        if name != "__version__":
            assert getattr(lora_jax, name).__doc__


@pytest.mark.parametrize("path", sorted(Path(ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_configs_are_locked_and_valid(path):
    if path.stem in ("__init__", "common"):
        pytest.skip("not a config of its own")
    config = importlib.import_module(f"configs.{path.stem}").get_config()
    assert config.is_locked and config.lora.is_locked
    assert f"--config=configs/{path.name}" in path.read_text(encoding="utf-8")
    fields = config.lora.to_dict()
    if glue_config.DEFAULT in fields["targets"]:  # known with the model's family alone
        fields |= {"targets": ("query",), "train": ("classifier",)}
    lora_jax.LoRAConfig.from_dict(fields)


def test_every_test_that_the_documents_name_exists():
    """And the slow ones are marked as such there."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`(\*?)", text)
    assert len(named) > 40
    for file, name, star in named:
        source = next((ROOT / "tests").rglob(file)).read_text(encoding="utf-8")
        tests = {x.name: x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef)}
        assert name in tests, (file, name)
        marks = [ast.unparse(x) for x in tests[name].decorator_list]
        slow = "pytestmark = pytest.mark.slow" in source or "pytest.mark.slow" in marks
        assert bool(star) == slow, (file, name)
