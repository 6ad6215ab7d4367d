"""Nothing that is read can run code: no pickle, no eval, in our sources and in what they call."""

import ast
import io
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

import lora_jax as lora
from lora_jax.models import checkpoints
from lora_jax.training import checkpointing
from tests.helpers import tiny_task
from tests.helpers.places import ROOT

SOURCES = [
    p
    for part in ("lora_jax", "experiments", "configs")
    for p in sorted((ROOT / part).rglob("*.py"))
]
MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "joblib",
    "yaml",
    "torch",
    "msgpack",
}
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen"}
# Config files are Python programs that a user names on the command line; nothing else is loaded so.
# The head of a model card is written as YAML, by `safe_dump`; none is read.
ALLOWED = {
    ("lora_jax/training/config_files.py", "exec_module"),
    ("lora_jax/tasks/model_card.py", "yaml"),
}


def suspicious(path):
    """What in a source could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        else:
            names = []
        found += [name for name in names if name in MODULES]
        if not isinstance(node, ast.Call):
            continue
        bare = isinstance(node.func, ast.Name) and node.func.id
        method = isinstance(node.func, ast.Attribute) and node.func.attr
        if bare in CALLS or method in {"system", "popen", "exec_module", "load_module", "run_path"}:
            found.append(bare or method)
        found += [k.arg for k in node.keywords if k.arg == "allow_pickle" and not is_false(k.value)]
        found += (
            ["shell=True"]
            if any(k.arg == "shell" and not is_false(k.value) for k in node.keywords)
            else []
        )
    return found


def is_false(node):
    return isinstance(node, ast.Constant) and node.value is False


def test_the_sources_neither_unpickle_nor_evaluate():
    assert len(SOURCES) > 80
    found = {(str(p.relative_to(ROOT)), what) for p in SOURCES for what in suspicious(p)}
    assert found == ALLOWED


@pytest.mark.parametrize("code", [
    "import pickle", "from pickle import loads", "eval('1')", "exec(x)", "import yaml.loader",
    "np.load(x, allow_pickle=True)", "os.system(x)", "subprocess.run(x, shell=True)",
])  # fmt: skip
def test_the_search_finds_what_it_is_for(tmp_path, code):
    (tmp_path / "x.py").write_text(code)
    assert suspicious(tmp_path / "x.py")


class Bomb:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return open, (self._path, "w")


def npy(bomb):
    file = io.BytesIO()
    np.save(file, np.array([bomb], object), allow_pickle=True)
    return file.getvalue()


AUDITED = """
import sys
from pathlib import Path
import jax
from tests.helpers import tiny_task
from lora_jax.training import checkpointing
from absl import logging
logging.set_verbosity(logging.FATAL)
like, seen = tiny_task.state(), []
jax.block_until_ready(like)
armed = False
sys.addaudithook(lambda event, args: seen.append(event) if armed else None)
for directory in map(Path, sys.argv[1:]):
    with checkpointing.manager(directory) as manager:
        armed = True
        try:
            checkpointing.restore(manager, like)
        except ValueError:
            pass
        armed = False
bad = {e for e in seen if e.startswith(("pickle", "marshal", "exec", "os.exec", "os.system", "os.posix_spawn", "subprocess"))}
print("events", len(seen) > 20, sorted(bad))
"""


def test_restoring_a_checkpoint_unpickles_nothing(tmp_path):
    """Python's audit hooks see every class that a pickle asks for, and every code that is run."""
    with checkpointing.manager(tmp_path / "whole") as manager:
        checkpointing.save(manager, 3, tiny_task.state(), {})
    bomb = Bomb(tmp_path / "exploded")
    runs = [tmp_path / "whole"]
    for number, data in enumerate((pickle.dumps(bomb), npy(bomb))):
        files = [p for p in (tmp_path / "whole").rglob("*") if p.is_file()]
        for k, path in enumerate(files):
            copy = tmp_path / f"copy{number}-{k}"
            shutil.copytree(tmp_path / "whole", copy)
            (copy / path.relative_to(tmp_path / "whole")).write_bytes(data)
            runs.append(copy)
        copy = tmp_path / f"added{number}"
        shutil.copytree(tmp_path / "whole", copy)
        for name in (
            "checkpoint",
            "state.pkl",
            "_METADATA.pkl",
            "arrays.npy",
            "checkpoint.msgpack",
        ):
            (copy / "3" / name).write_bytes(data)
            (copy / "3" / "state" / name).write_bytes(data)
        runs.append(copy)
    path = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, *map(str, runs)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path}, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "events True []"
    assert not (tmp_path / "exploded").exists()


def test_pickles_in_the_place_of_weights_are_refused(tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    base = {"dense": {"kernel": np.ones((4, 4), np.float32)}}
    for name in ("adapter.json", "adapter_model.bin", "adapter.pkl"):
        directory = tmp_path / name
        directory.mkdir()
        (directory / name).write_bytes(bomb)
        with pytest.raises((ValueError, OSError)):
            lora.load(directory, base)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "bert"}')
    (model / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(ValueError, match="can run code when opened, and is not read here"):
        checkpoints.load(model, head="classifier")
    (model / "model.safetensors").write_bytes(bomb)
    with pytest.raises(ValueError, match="no safetensors file"):
        checkpoints.load(model, head="classifier")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb).close()  # it is one
    assert (tmp_path / "exploded").exists()
