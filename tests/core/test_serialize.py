"""Adapter directories: what a damaged or foreign one says, and what survives a failed save."""

import dataclasses
import json
import os
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax import serialize
from lora_jax.files import read_safetensors, write_atomically
from lora_jax.lowrank import LowRank
from tests.helpers import slow, zoo
from tests.helpers.places import ROOT


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
    assert about["format_version"] == 2 and about["config"]["rank"] == 2
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
        (lambda d, w: edit(d, lambda a: a.pop("nodes")), "nodes missing"),
        (lambda d, w: edit(d, lambda a: a["config"].update(rank=0)), "config in .* is damaged"),
        (lambda d, w: edit(d, lambda a: a["config"].update(rnk=1)), "Unknown LoRAConfig fields"),
        (
            lambda d, w: edit(d, lambda a: a["weights"].update(file="../x.safetensors")),
            "no weights file",
        ),
        (
            lambda d, w: edit(d, lambda a: a["nodes"]["params/up/kernel"].update(axes="xy")),
            "are no roles",
        ),
        (lambda d, w: edit(d, lambda a: a["nodes"]["params/up/kernel"].update(axes="i")), "1 axes"),
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
        "import sys, jax, lora_jax as lora\n"
        "from tests.helpers import zoo\n"
        "model = zoo.ZOO['mlp']()\n"
        "adapter, config = lora.load(sys.argv[1], model.params)\n"
        "other = jax.tree.map(lambda x: x + 1, adapter)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    lora.save(sys.argv[1], other, config); lora.save(sys.argv[1], adapter, config)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
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


def stack_of(model, config, shape):
    """As ``vmap`` over ``init`` makes it, once for each axis."""
    init = lambda key: lora.init(key, model.fn, model.params, config, model.x)
    for _ in shape:
        init = jax.vmap(init)
    return init(jax.random.split(jax.random.key(0), shape))


@pytest.mark.parametrize("shape", slow.after(1, [((2, 3),), ((3,),), ((1,),), ((2, 1, 2),)]))
@pytest.mark.parametrize("name", ["mlp", "experts"])
def test_a_stack_of_adapters(tmp_path, shape, name):
    model = zoo.ZOO[name]()
    fields = {} if name == "experts" else {"train": ("head",), "targets": ("up", "down")}
    config = lora.LoRAConfig(rank=2, **fields)
    stacked = stack_of(model, config, shape)
    lora.save(tmp_path, stacked, config)
    assert json.loads((tmp_path / "adapter.json").read_text())["stacked"] == list(shape)
    loaded, _ = lora.load(tmp_path, model.params)
    assert jax.tree.structure(loaded) == jax.tree.structure(stacked)
    jax.tree.map(np.testing.assert_array_equal, loaded, stacked)
    for use in (lora.bind, lora.merge):
        with pytest.raises(ValueError, match=r"stack with leading axes .*jax.vmap"):
            use(model.params, loaded)
    one = jax.tree.map(lambda x: x[(0,) * len(shape)], loaded)
    lora.merge(model.params, one)
    # A file that says otherwise is damaged; one from before the axes were noted is read.
    edit(tmp_path, lambda about: about.update(stacked=[9]))
    with pytest.raises(ValueError, match=r"says a stack of \[9\]"):
        lora.load(tmp_path, model.params)
    edit(tmp_path, lambda about: about.pop("stacked"))
    jax.tree.map(np.testing.assert_array_equal, lora.load(tmp_path, model.params)[0], stacked)


def test_a_stack_of_what_is_trained_in_full_alone(tmp_path):
    model = zoo.ZOO["mlp"]()
    config = lora.LoRAConfig(targets=(), train=("head",))
    stacked = stack_of(model, config, (4,))
    lora.save(tmp_path, stacked, config)
    loaded, _ = lora.load(tmp_path, model.params)
    jax.tree.map(np.testing.assert_array_equal, loaded, stacked)


def test_a_stack_of_several_alphas(tmp_path, saved):
    params, adapter, config = saved
    of = lambda s: lambda x: dataclasses.replace(x, scale=jnp.float32(s)) if is_lora(x) else x
    each = [jax.tree.map(of(s), adapter, is_leaf=is_lora) for s in (0.5, 2.0)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *each)
    lora.save(tmp_path, stacked, config)
    loaded, _ = lora.load(tmp_path, params)
    assert loaded["params"]["up"]["kernel"].scale.tolist() == [0.5, 2.0]
    jax.tree.map(np.testing.assert_array_equal, loaded, stacked)


is_lora = lambda x: isinstance(x, LowRank)
UNSAVEABLE = {
    "a stack of one kernel alone": lambda n: dataclasses.replace(n, a=n.a[None], b=n.b[None]),
    "another rank": lambda n: dataclasses.replace(n, b=jnp.concatenate([n.b, n.b])),
    "b of a stack": lambda n: dataclasses.replace(n, b=n.b[None]),
    "a scale with an axis": lambda n: dataclasses.replace(n, scale=jnp.ones(3)),
    "axes of another kernel": lambda n: dataclasses.replace(n, axes="bio"),
    "shapes only": lambda n: dataclasses.replace(n, a=jax.ShapeDtypeStruct(n.a.shape, n.a.dtype)),
    "a label": lambda n: dataclasses.replace(n, a="trainable"),
    "a key": lambda n: jax.random.key(0),
    "text": lambda n: np.array(["text"]),
    "an object": lambda n: np.array([None]),
    "a number without a dtype": lambda n: 3.0,
}


@pytest.mark.parametrize("change", UNSAVEABLE.values(), ids=UNSAVEABLE)
def test_what_could_not_be_read_is_not_saved(saved, directory, change):
    params, adapter, config = saved
    before = lora.load(directory, params)[0]
    wrong = jax.tree.map(lambda x: x, adapter)
    wrong["params"]["up"]["kernel"] = change(wrong["params"]["up"]["kernel"])
    with pytest.raises(ValueError, match=r"not saved: .*params/up/kernel"):
        lora.save(directory, wrong, config)
    jax.tree.map(np.testing.assert_array_equal, lora.load(directory, params)[0], before)


def test_a_bound_tree_is_not_saved(saved, tmp_path):
    params, adapter, config = saved
    with pytest.raises(ValueError, match="already bound.*Pass the adapter itself"):
        lora.save(tmp_path, lora.bind(params, adapter), config)
    assert not list(tmp_path.iterdir())


DTYPES = [
    "bfloat16", "float16", "float32", "int8", "int16", "int32", "uint8", "uint16", "uint32", "bool",
    "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3",
    "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu", "complex64",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back(tmp_path, dtype):
    params = {"w": jnp.ones((8, 6)), "v": jnp.ones((3, 5), dtype), "s": jnp.ones((), dtype)}
    config = lora.LoRAConfig(rank=2, targets=("w",))
    adapter = lora.init(
        jax.random.key(0), lambda p, x: x @ p["w"], params, config, jnp.ones((1, 8))
    )
    values = np.arange(15).reshape(3, 5) % 2 + (dtype == "float8_e8m0fnu")  # it has no zero
    adapter |= {"v": jnp.asarray(values).astype(dtype), "s": jnp.ones((), dtype)}
    lora.save(tmp_path, adapter, config)
    first = (tmp_path / "adapter.json").read_bytes()
    loaded, _ = lora.load(tmp_path, params)
    assert loaded["v"].dtype == jnp.dtype(dtype) and loaded["s"].shape == ()
    for name in "vs":
        assert np.asarray(loaded[name]).tobytes() == np.asarray(adapter[name]).tobytes()
    lora.save(tmp_path, loaded, config)
    assert (tmp_path / "adapter.json").read_bytes() == first


@pytest.mark.parametrize("dtype", [n for n in DTYPES if n.startswith(("float8", "bfloat16"))][1:-1])
def test_factors_of_few_bits(tmp_path, dtype):
    """Saved, merged and lifted; beside the product of the values in float32."""
    params, x = {"w": jnp.ones((8, 6))}, jnp.ones((1, 8))
    fn = lambda p, x: x @ p["w"]
    config = lora.LoRAConfig(rank=2, alpha=3.0)
    adapter = lora.init(jax.random.key(0), fn, params, config, x)
    adapter = jax.tree.map(lambda x: (x + 0.5).astype(dtype), adapter)
    lora.save(tmp_path, adapter, config)
    loaded, _ = lora.load(tmp_path, params)
    assert loaded["w"].a.dtype == jnp.dtype(dtype)
    a, b = (np.asarray(x).astype(np.float32) for x in (adapter["w"].a, adapter["w"].b))
    want = np.asarray(params["w"]) + 1.5 * a @ b
    np.testing.assert_allclose(lora.merge(params, loaded)["w"], want, rtol=1e-5)
    got = lora.lift(fn, strict=True)(lora.bind(params, loaded), x)
    np.testing.assert_allclose(got, np.asarray(x) @ want, rtol=1e-4)


def test_bytes_that_are_none_of_the_noted_dtype(tmp_path):
    params = {"w": jnp.ones((8, 6)), "v": jnp.ones(4, "float8_e3m4")}
    config = lora.LoRAConfig(targets=(), train=("v",))
    lora.save(tmp_path, {"v": params["v"]}, config)
    for noted in ("int32", "float32", "nonsense", 3, ["uint16"]):
        edit(tmp_path, lambda about, noted=noted: about.update(dtypes={"v": noted}))
        with pytest.raises(ValueError, match="tensor v holds no"):
            lora.load(tmp_path, params)


def test_the_scale_comes_back_as_the_number_that_it_was(tmp_path):
    """Also where float32, in which it is stored, rounds it: the structure is that of the original."""
    params, x = {"w": jnp.ones((8, 6)), "v": jnp.ones((6, 4))}, jnp.ones((1, 8))
    fn = lambda p, x: x @ p["w"] @ p["v"]
    config = lora.LoRAConfig(rank=3, alpha=7.0, alpha_pattern={"v": 0.1}, rank_stabilized=True)
    adapter = lora.init(jax.random.key(0), fn, params, config, x)
    lora.save(tmp_path, adapter, config)
    stored = read_safetensors(next(tmp_path.glob("*.safetensors")).read_bytes())
    assert stored["w/scale"].dtype == np.float32 and stored["w/scale"].shape == ()
    loaded, _ = lora.load(tmp_path, params)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
    other = {"w": dataclasses.replace(adapter["w"], scale=0.3)}  # that no config says
    lora.save(tmp_path, other, config)
    assert lora.load(tmp_path, params)[0]["w"].scale == float(np.float32(0.3))


def test_names_that_clash_are_not_saved(tmp_path):
    params = {"w": jnp.ones((8, 6)), "w/a": jnp.ones(6)}
    config = lora.LoRAConfig(rank=2, targets=("re:w",), train=("re:w/a",))
    fn = lambda p, x: x @ p["w"] + p["w/a"][None]
    adapter = lora.init(jax.random.key(0), fn, params, config, jnp.ones((1, 8)))
    with pytest.raises(ValueError, match="two tensors would be called 'w/a'"):
        lora.save(tmp_path, adapter, config)
