"""What the documentation shows is run: README snippets, its commands, and docstrings."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import configs
import experiments
import lora_jax
from experiments import settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _modules():
    for package in (lora_jax, experiments, configs):
        yield package.__name__
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield info.name


@pytest.mark.parametrize("name", list(_modules()))
def test_docstrings(name):
    # Flags of several programs may share a name: each module has a process of its own.
    code = f"import doctest, importlib; r = doctest.testmod(importlib.import_module({name!r})); print(r); raise SystemExit(r.failed)"
    if name.split(".")[0] == "lora_jax":
        result = doctest.testmod(importlib.import_module(name))
        assert result.failed == 0
    else:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_readme_snippets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 6
    space = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), space)
    assert "trainable params: 355 || all params: 1,443" in capsys.readouterr().out


def test_readme_commands_name_what_exists():
    commands = re.findall(r"^\$ (.*?)(?:  +#.*)?$", README, flags=re.MULTILINE)
    assert commands[:2] == ["make quickstart", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        for target in re.findall(r"^make ([\w-]+)", command):
            assert f"\n{target}:" in makefile
        for module in re.findall(r"-m (experiments[\w.]*)", command):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        for config in re.findall(r"--config=(\S+)", command):
            assert (ROOT / config).is_file()


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
        "LoRAConfig init bind lift merge labels mask summary explain save load "
        "from_nnx update_nnx from_keras update_keras".split()
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
    if settings.DEFAULT in fields["targets"]:  # known with the model's family alone
        fields |= {"targets": ("query",), "train": ("classifier",)}
    lora_jax.LoRAConfig.from_dict(fields)


def test_every_test_that_the_documents_name_exists():
    """And the slow ones are marked as such there."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`(\*?)", text)
    assert len(named) > 40
    for file, name, star in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"\ndef {name}(" in source, (file, name)
        before = source.split(f"\ndef {name}(")[0].rsplit("\n\n\n", 1)[-1]
        slow = "pytestmark = pytest.mark.slow" in source or "@pytest.mark.slow\n" in before
        assert bool(star) == slow, (file, name)
