"""Adapter directories: what a damaged or foreign one says, and what survives a failed save."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import zoo

import lora_jax as lora
from lora_jax import serialize
from lora_jax.files import write_atomically

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def saved():
    model = zoo.ZOO["mlp"]()
    config = lora.LoRAConfig(rank=2, targets=("up", "down"), train=("head",))
    adapter = lora.init(jax.random.key(0), model.fn, model.params, config, model.x)
    return model.params, adapter, config


@pytest.fixture
def directory(saved, tmp_path):
    _, adapter, config = saved
    lora.save(tmp_path, adapter, config, base="base-1", metadata={"note": [1, "two"]})
    return tmp_path


def edit(directory, change=None, tensors=None):
    """Rewrites the directory as someone with a grudge would, with a right checksum."""
    about = json.loads((directory / "adapter.json").read_text())
    weights = directory / about["weights"]["file"]
    if tensors:
        data = safetensors.numpy.save(tensors(safetensors.numpy.load(weights.read_bytes())))
        weights.write_bytes(data)
        about["weights"]["sha256"] = serialize.hashlib.sha256(data).hexdigest()
    if change:
        change(about)
    (directory / "adapter.json").write_text(json.dumps(about))


def test_two_files_and_no_pickle(directory):
    names = sorted(p.suffix for p in directory.iterdir())
    assert names == [".json", ".safetensors"]
    about = json.loads((directory / "adapter.json").read_text())
    assert about["base"] == "base-1" and about["library_version"] == lora.__version__
    assert about["format_version"] == 1 and about["config"]["rank"] == 2
    assert serialize.read_metadata(directory) == {"note": [1, "two"], "base": "base-1"}


def test_replaces_the_previous_adapter(directory, saved):
    params, adapter, config = saved
    more = jax.tree.map(lambda x: x + 1, adapter)
    lora.save(directory, more, config)
    assert len(list(directory.iterdir())) == 2
    loaded, _ = lora.load(directory, params)
    jax.tree.map(np.testing.assert_array_equal, loaded, more)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept(saved, tmp_path, dtype):
    params, adapter, config = saved
    params, adapter = (jax.tree.map(lambda x: x.astype(dtype), t) for t in (params, adapter))
    lora.save(tmp_path, adapter, config)
    loaded, _ = lora.load(tmp_path, params)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}


def test_float64_needs_x64(saved, tmp_path):
    params, adapter, config = saved
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), adapter)
    lora.save(tmp_path, wide, config)
    with pytest.raises(ValueError, match="jax_enable_x64"):
        lora.load(tmp_path, params)
    with jax.enable_x64(True):
        loaded, _ = lora.load(tmp_path, jax.tree.map(lambda x: x.astype(np.float64), params))
        assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(np.float64)}


def test_all_problems_come_in_one_error(directory, saved):
    params, _, _ = saved

    def damage(tensors):
        kernel = "params/up/kernel"
        del tensors[f"{kernel}/b"]
        tensors["params/extra"] = np.zeros(2, np.float32)
        tensors["params/down/kernel/a"] = np.zeros((3, 2), np.float32)
        tensors["params/head/bias"] = np.full(3, np.nan, np.float32)
        tensors["params/head/kernel"] = tensors["params/head/kernel"].astype(np.float16)
        return tensors

    edit(directory, tensors=damage)
    with pytest.raises(ValueError) as error:
        lora.load(directory, params, base="base-2")
    for part in (
        "tensor params/up/kernel/b is missing",
        "tensor params/extra is unexpected",
        "params/down/kernel of shape (16, 8) needs",
        "NaN or infinity in params/head/bias",
        "params/head/kernel has dtype float32, not float16",
        "made for base 'base-1', and this base is 'base-2'",
    ):
        assert part in str(error.value)


def test_another_base(directory, saved):
    params, _, _ = saved
    lora.load(directory, params, base="base-1")
    lora.load(directory, params)
    with pytest.raises(ValueError, match="made for base 'base-1'"):
        lora.load(directory, params, base="other")
    with pytest.raises(ValueError, match="no parameter at params/down/kernel, params/up/kernel"):
        lora.load(directory, {"params": {"head": params["params"]["head"]}})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d, w: w.write_bytes(w.read_bytes()[:-7]), "truncated or changed"),
        (
            lambda d, w: w.write_bytes(w.read_bytes()[:40] + b"!" + w.read_bytes()[41:]),
            "truncated or",
        ),
        (lambda d, w: w.unlink(), "is missing"),
        (lambda d, w: (d / "adapter.json").write_text("{"), "is damaged"),
        (lambda d, w: (d / "adapter.json").write_text("[" * 100_000), "is damaged"),
        (lambda d, w: (d / "adapter.json").write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda d, w: (d / "adapter.json").write_text("[]"), "not an adapter of this library"),
        (lambda d, w: edit(d, lambda a: a.update(format_version=9)), "format version 9"),
        (lambda d, w: edit(d, lambda a: a.pop("kernels")), "kernels missing"),
        (lambda d, w: edit(d, lambda a: a["config"].update(rank=0)), "config in .* is damaged"),
        (lambda d, w: edit(d, lambda a: a["config"].update(rnk=1)), "Unknown LoRAConfig fields"),
        (
            lambda d, w: edit(d, lambda a: a["weights"].update(file="../x.safetensors")),
            "no weights file",
        ),
        (
            lambda d, w: edit(d, lambda a: a["kernels"].update({"params/up/kernel": "xy"})),
            "are no roles",
        ),
        (lambda d, w: edit(d, lambda a: a["kernels"].update({"params/up/kernel": "i"})), "1 axes"),
    ],
)
def test_damaged_directories(directory, saved, damage, says):
    (weights,) = directory.glob("*.safetensors")
    damage(directory, weights)
    with pytest.raises(ValueError, match=says):
        lora.load(directory, saved[0])


def test_no_adapter(tmp_path, saved):
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(
        FileNotFoundError, match=r"no adapter.json; the directory holds \['other.txt'\]"
    ):
        lora.load(tmp_path, saved[0])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        lora.load(tmp_path / "gone", saved[0])


def test_nan_is_not_saved_and_the_previous_adapter_stays(directory, saved):
    params, adapter, config = saved
    broken = jax.tree.map(lambda x: x * jnp.nan, adapter)
    with pytest.raises(ValueError, match="not saved: NaN"):
        lora.save(directory, broken, config)
    with pytest.raises(ValueError, match="JSON types"):
        lora.save(directory, adapter, config, metadata={"x": object()})
    jax.tree.map(np.testing.assert_array_equal, lora.load(directory, params)[0], adapter)


def test_a_full_disk_leaves_the_previous_file(tmp_path):
    """A limit on file sizes stops the write halfway, as a full disk does."""
    code = (
        "import sys, signal, resource\n"
        "from lora_jax.files import write_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_atomically(sys.argv[1], b'x' * 5000)\n"
        "except OSError as error:\n    print(error); sys.exit(3)\n"
    )
    path = tmp_path / "file"
    write_atomically(path, b"old")
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 3 and "the file that was there is intact" in done.stdout
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000  # this process is not limited


def test_a_path_that_cannot_be_written():
    with pytest.raises(OSError, match="Could not write"):
        write_atomically("/dev/null/file", b"x")


def test_a_kill_at_any_moment_leaves_a_whole_adapter(tmp_path, saved):
    """Two adapters are saved in turns by a process that is killed; one of them is there, whole."""
    params, adapter, config = saved
    lora.save(tmp_path, adapter, config)
    code = (
        "import sys, jax, zoo, lora_jax as lora\n"
        "model = zoo.ZOO['mlp']()\n"
        "adapter, config = lora.load(sys.argv[1], model.params)\n"
        "other = jax.tree.map(lambda x: x + 1, adapter)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    lora.save(sys.argv[1], other, config); lora.save(sys.argv[1], adapter, config)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    rng = np.random.default_rng(0)
    seen = set()
    process = None
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=env
        )
        assert process.stdout.readline() == b"ready\n"
        try:
            process.wait(timeout=0.05 + 0.2 * rng.random())
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        process.stdout.close()
        loaded, _ = lora.load(tmp_path, params)
        first = float(loaded["params"]["head"]["bias"][0] - adapter["params"]["head"]["bias"][0])
        seen.add(round(first))
        jax.tree.map(
            lambda x, y, d=first: np.testing.assert_allclose(x, y + d, atol=1e-6), loaded, adapter
        )
        lora.save(tmp_path, adapter, config)  # also clears what the killed process left
    assert seen <= {0, 1}
