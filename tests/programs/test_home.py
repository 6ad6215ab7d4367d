"""Programs write into the home directory nothing but the cache of compiled programs, of which they tell."""

import os
import sys

import pytest

from experiments import environment
from tests.helpers import programs, tiny_encoder

# Where libraries look for a place in which to keep something.
PLACES = (
    "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "KERAS_HOME",
    "MPLCONFIGDIR", "TFDS_DATA_DIR", "WANDB_DIR", "JAX_COMPILATION_CACHE_DIR",
)  # fmt: skip

CACHE = os.path.join(".cache", "lora_jax", "")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home, in which every library is left to its defaults."""
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def written(home):
    """Files and folders of the home, but for what lies in the cache that is told of."""
    found = [str(path.relative_to(home)) for path in sorted(home.rglob("*"))]
    return [path for path in found if path != ".cache" and not f"{path}/".startswith(CACHE)]


def start(*arguments):
    done = programs.start(*arguments)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_run_and_what_comes_after_it(home, tmp_path):
    tiny_encoder.checkpoint(tmp_path / "model")
    fields = tiny_encoder.overrides(tmp_path) | {
        "data.source": "reviews",
        "lora.train": "classifier",
        "steps": 4,
        "data.train_examples": 40,
    }
    flags = [f"--config.{k}={v}" for k, v in fields.items()]
    run, peft = tmp_path / "run", tmp_path / "peft"
    done = start("sst2", "--config=configs/quickstart.py", f"--workdir={run}", *flags)
    assert f"Compiled programs are kept in {home}/.cache/lora_jax/compiled" in done.stderr
    assert f"Fonts for figures are listed in {home}/.cache/lora_jax/matplotlib." in done.stderr
    assert written(home) == []
    start("predict", f"--adapter={run}/adapter", "the film was good")
    start("export", f"--adapter={run}/adapter", f"--out={peft}", "--peft")
    assert written(home) == []


@pytest.mark.slow
def test_a_sweep_and_its_report(home, tmp_path):
    tiny_encoder.checkpoint(tmp_path / "model")
    tiny_encoder.data(tmp_path / "data", n=40)
    fields = tiny_encoder.overrides(tmp_path) | {"steps": 2}
    del fields["lora.rank"]
    flags = [f"--config.{k}={v}" for k, v in fields.items()]
    sweep = ["--sweep=lora.rank=1,2", f"--workdir={tmp_path / 'sweep'}"]
    start("sweep", "--config=configs/sst2_minilm.py", *sweep, *flags)
    start("report", tmp_path / "sweep")
    assert written(home) == []


@pytest.mark.slow
def test_help_leaves_no_trace(home):
    start("sst2", "--config=configs/quickstart.py", "--help")
    assert list(home.iterdir()) == []


def test_a_place_that_matplotlib_has_stays(home, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    environment.place_fonts()
    assert os.environ["MPLCONFIGDIR"] == f"{home}/.cache/lora_jax/matplotlib"
    assert "Fonts for figures are listed" in capsys.readouterr().err
    monkeypatch.setenv("MPLCONFIGDIR", "/elsewhere")
    environment.place_fonts()
    assert os.environ["MPLCONFIGDIR"] == "/elsewhere"
    monkeypatch.delenv("MPLCONFIGDIR")
    (home / ".config" / "matplotlib").mkdir(parents=True)
    environment.place_fonts()
    assert "MPLCONFIGDIR" not in os.environ and capsys.readouterr().err == ""
