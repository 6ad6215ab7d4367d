"""What a program does about its process: compiled programs are kept, and small pages are told of."""

import os

import pytest

from experiments import environment
from tests.helpers import programs, tiny_encoder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny_encoder.checkpoint(root / "model")
    tiny_encoder.data(root / "data")
    return root


def training(inputs, workdir, *more, **changes):
    fields = tiny_encoder.overrides(inputs) | {"steps": 2, "eval_every": 2} | changes
    flags = [f"--config.{k}={v}" for k, v in fields.items()]
    config = "--config=configs/sst2_minilm.py"
    return ["sst2", config, f"--workdir={workdir}", *flags, *more]


def test_what_is_compiled_is_kept_and_used_again(inputs, tmp_path):
    cache = tmp_path / "new" / "cache"
    first = programs.run(*training(inputs, tmp_path / "a", f"--compilation_cache={cache}"))
    assert first.returncode == 0, first.stderr
    assert f"Compiled programs are kept in {cache}, at most 2 GiB" in first.stderr
    kept = {path.name for path in cache.iterdir()}
    assert any("train_step" in name or name.endswith("-cache") for name in kept), kept
    again = programs.run(*training(inputs, tmp_path / "b", f"--compilation_cache={cache}"))
    assert again.returncode == 0 and "Compiled programs" not in again.stderr
    # The second start compiles nothing that the first has kept.
    compiled = {name for name in os.listdir(cache) if name.endswith("-cache")}
    assert compiled == {name for name in kept if name.endswith("-cache")}


def test_a_cache_that_cannot_be_made_is_one_line(inputs, tmp_path):
    (tmp_path / "file").touch()
    cache = f"--compilation_cache={tmp_path}/file/cache"
    done = programs.run(*training(inputs, tmp_path / "a", cache))
    assert done.returncode == 2 and done.stderr.startswith("error: Not a directory")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_dtype_of_a_run_is_said_and_stays(inputs, tmp_path):
    """And nothing compiled is kept, if the option is empty."""
    home = {"XDG_CACHE_HOME": str(tmp_path / "home")}
    arguments = training(inputs, tmp_path / "a", "--compilation_cache=", **{"model.dtype": "auto"})
    done = programs.run(*arguments, env=home)
    assert done.returncode == 0 and "activations in " in done.stdout, done.stderr
    assert "Compiled programs" not in done.stderr and not (tmp_path / "home").exists()
    assert '"dtype": "auto"' not in (tmp_path / "a" / "config.json").read_text()
    again = programs.run(*arguments, env=home)
    assert again.returncode == 0 and "as before" in again.stdout, again.stderr


PAGES = {"always": "[always] madvise never", "madvise": "always [madvise] never"}


@pytest.mark.parametrize(
    ("pages", "tunables", "is_told"),
    [
        ("madvise", "", True),
        ("madvise", "glibc.malloc.perturb=1", True),
        ("madvise", "glibc.malloc.hugetlb=1", False),
        ("always", "", False),
        ("", "", False),
    ],
)
def test_small_pages_are_told_of(pages, tunables, is_told, monkeypatch, tmp_path):
    if pages:
        (tmp_path / "enabled").write_text(PAGES[pages] + "\n")
    monkeypatch.setattr(environment, "_PAGES", tmp_path / "enabled")
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    told = environment.describe_pages()
    assert ("GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in told) == is_told
