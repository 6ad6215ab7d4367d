"""What a program does about its process: compiled programs are kept, and small pages are told of."""

import json
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
    # The second start compiles no step that the first has kept (what takes hardly longer than the
    # shortest compilation that is kept may be among those of the one and not of the other).
    steps = lambda names: {x for x in names if x.startswith("jit_step") and x.endswith("-cache")}
    assert steps(kept) == steps(os.listdir(cache)) != set()


def test_a_start_runs_what_such_a_start_has_compiled(inputs, tmp_path):
    """With the results of a process that compiles everything itself, whatever the seed."""
    cache = f"--compilation_cache={tmp_path}/cache/"
    seeds = {"a": 0, "b": 0, "c": 1}
    for name, seed in seeds.items():
        done = programs.run(*training(inputs, tmp_path / name, cache, seed=seed))
        assert done.returncode == 0, done.stderr
        (index,) = (tmp_path / "cache" / "starts").glob("*.json")
        used = json.loads(index.read_text())
        assert {key.split()[0] for key in used} == {"train", "evaluate"}
        kept = sorted((tmp_path / "cache" / "starts").glob("*.program"))
        assert {path.stem for path in kept} == set(used.values())
    alone = programs.run(*training(inputs, tmp_path / "d", "--compilation_cache=", seed=1))
    assert alone.returncode == 0, alone.stderr
    adapters = {x: next((tmp_path / x / "adapter").glob("*.safetensors")) for x in "abcd"}
    assert adapters["a"].read_bytes() == adapters["b"].read_bytes()
    assert adapters["c"].read_bytes() == adapters["d"].read_bytes()


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
