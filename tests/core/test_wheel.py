"""What a user installs: one package, that needs nothing but its dependencies and disturbs nobody."""

import re
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest

from tests.helpers.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]  # installs packages


def run(*command, cwd):
    done = subprocess.run([str(x) for x in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__")
    for folder in ("lora_jax", "experiments", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, source, cwd=out)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An environment that holds the wheel and what it asks for, and nothing else."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=True)
    pins = ROOT / "constraints.txt"
    run(home / "bin" / "pip", "install", "-q", "-c", pins, wheel, cwd=home)
    return home / "bin" / "python"


def test_it_holds_one_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"lora_jax"}
    wanted = {"py.typed", "data/reviews/train.tsv", "data/reviews/validation.tsv"}
    wanted |= {"data/tutor/train.jsonl", "data/tutor/validation.jsonl"}
    assert {f"lora_jax/{name}" for name in wanted} <= set(names)
    here = {str(p.relative_to(ROOT)) for p in (ROOT / "lora_jax").rglob("*.py")}
    assert here == {name for name in names if name.endswith(".py")}


def test_links_of_its_description_lead_from_everywhere(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    text = archive.read(name).decode()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > 10 and all(link.startswith("https://") for link in links)
    assert "Description-Content-Type: text/markdown" in text


def test_the_readmes_example_beside_folders_of_the_users_own(python, tmp_path):
    """Whatever a user calls ``configs`` or ``experiments``, neither meets the other."""
    for name in ("configs", "experiments"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"mine = {name!r}\n")
    (example,) = re.findall(r"## In code\n\n```python\n(.*?)```", README, flags=re.DOTALL)
    check = "\nimport configs, experiments\nprint(configs.mine, experiments.mine)\n"
    out = run(python, "-W", "error", "-c", example + check, cwd=tmp_path)
    assert out.startswith("trainable params:") and out.endswith("configs experiments\n")
    assert (tmp_path / "runs" / "readme").is_dir()


@pytest.mark.parametrize(
    "part, extra", [("models.hub", "models"), ("models.tokenizer", "models"), ("data", "train"), ("training", "train"), ("tasks", "train"), ("sweeps", "train")]
)  # fmt: skip
def test_a_part_that_needs_more_says_what_to_install(python, tmp_path, part, extra):
    done = subprocess.run(
        [str(python), "-c", f"import lora_jax.{part}"], cwd=tmp_path, capture_output=True, text=True
    )
    *_, last = done.stderr.splitlines()
    assert last.startswith(f"ModuleNotFoundError: lora_jax.{part} needs ")
    assert last.endswith(f": pip install 'lora_jax[{extra}]'")
