"""What is saved is rounded once, in shards as transformers writes them, with the memory of a tensor."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import files
from lora_jax.models import checkpoints, hub, save_checkpoint, shards
from lora_jax.paths import named_leaves
from lora_jax.tasks import language_model
from tests.helpers import programs, slow, tiny_llama
from tests.helpers.comparisons import assert_close, perturbed
from tests.helpers.quantized_checkpoints import GOLDENS, load, quantized, read

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.checkpoint(tmp_path_factory.mktemp("model") / "base")


def adapted(directory, *, scan=False, **options):
    """The model, and an adapter of all its kernels, the norms trained in full."""
    loaded = load(directory, scan_layers=scan, **options)
    settings = lora.LoRAConfig(rank=2, targets=loaded.family.targets, train=("re:.*norm.*",))
    ids = np.ones((1, 3), np.int32)
    adapter = lora.init(jax.random.key(0), loaded.model.apply, loaded.params, settings, ids)
    return loaded, perturbed(adapter), settings


def save(directory, loaded, **options):
    checkpoints.save_hf(directory, loaded.params, loaded.checkpoint, head="causal-lm", **options)
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("scan", slow.after(1, [True, False]), ids=["scanned", "unrolled"])
def test_the_sum_is_rounded_once(scan, dtype, folder, tmp_path):
    """From float32, also over a base in bfloat16."""
    loaded, adapter, _ = adapted(folder, scan=scan, param_dtype=jnp.bfloat16)
    assert save(tmp_path, loaded, adapter=adapter, dtype=dtype)["torch_dtype"] == dtype
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), loaded.params)
    merged = lora.merge(wide, adapter)
    wanted = jax.tree.map(lambda x: np.asarray(x).astype(DTYPES[dtype]), merged)
    stored = read(tmp_path / hub.WEIGHTS)
    assert {x.dtype for x in stored.values()} == {np.dtype(DTYPES[dtype])}
    found = load(tmp_path, scan_layers=scan, param_dtype=DTYPES[dtype]).params
    if scan:  # products of a stack and of its layers differ in the last digit of float32
        ulp = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 1e-5}[dtype]
        assert_close(found, wanted, rtol=ulp, atol=1e-6)
        same = [
            np.mean(x == y) for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True)
        ]
        assert dtype == "float32" or min(same) > 0.95
    else:
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.slow
def test_quantized_bases_are_decoded_to_float32(tmp_path):
    """Kernels without an adapter, too, whatever dtype their leaves stand for."""
    loaded, adapter, _ = adapted(GOLDENS / "nf4_double", scan=True, param_dtype=jnp.bfloat16)
    save(tmp_path, loaded, adapter=adapter, dtype="float32")
    wide = load(GOLDENS / "nf4_double", scan_layers=True)
    wanted = lora.merge(wide.params, adapter)
    found = named_leaves(load(tmp_path, scan_layers=True).params)
    kernels = quantized(wide.params)
    for name, x in named_leaves(wanted).items():
        if name in kernels:
            np.testing.assert_allclose(found[name], x, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    "about, dtype",
    [
        ({}, "float32"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "auto"}, "float32"),
    ],
)
def test_dtype_by_default(about, dtype, tmp_path):
    loaded = load(tiny_llama.checkpoint(tmp_path / "base", **about))
    found = save(tmp_path / "out", loaded)
    assert (found["torch_dtype"], "dtype" in found) == (dtype, False)
    stored = read(tmp_path / "out" / hub.WEIGHTS).values()
    assert {x.dtype for x in stored} == {np.dtype(DTYPES[dtype])}


def test_dtype_by_default_of_quantized_checkpoints(tmp_path):
    assert save(tmp_path, load(GOLDENS / "fp4"))["torch_dtype"] == "bfloat16"


def test_numbers_that_a_dtype_can_not_hold(folder, tmp_path):
    loaded = load(folder)
    norm = loaded.params["params"]["model"]["norm"]
    norm["scale"] = norm["scale"].at[3].set(70_000.0)
    says = r"model.norm.weight holds numbers of up to 7e\+04, which float16 can't: .*=bfloat16"
    with pytest.raises(ValueError, match=f"Nothing is saved.*{says}"):
        save(tmp_path / "out", loaded, dtype="float16")
    norm["scale"] = norm["scale"].at[3].set(jnp.nan)
    with pytest.raises(ValueError, match="model/norm/scale holds NaN or infinity"):
        save(tmp_path / "out", loaded, dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, says",
    [
        ({"dtype": "float64"}, r"dtype must be one of \['bfloat16', 'float16', 'float32'\], got"),
        ({"shard_size": "5GiB"}, "must be a number of bytes, or .* KB, MB, GB, TB, .* got '5GiB'"),
        ({"shard_size": 0}, "must be a number of bytes"),
        ({"shard_size": "0.1KB", "dtype": "x"}, "got 'x'"),
        ({"adapter": {"params": {"x": np.ones(1)}}}, "does not fit the parameters: .*params/x"),
    ],
)
def test_options_that_are_refused(options, says, folder, tmp_path):
    with pytest.raises(ValueError, match=says):
        save(tmp_path / "out", load(folder), **options)
    with pytest.raises(TypeError, match="shard"):
        save(tmp_path / "out", load(folder), shard="5GB")
    assert not (tmp_path / "out").exists()


def test_shards(folder, tmp_path):
    """Each file holds what fits, in the order of the tensors; the index names the file of each."""
    loaded = load(folder)
    save(tmp_path, loaded)
    whole = read(tmp_path / hub.WEIGHTS)
    save(tmp_path, loaded, shard_size="12KB")
    index = json.loads((tmp_path / hub.INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [
        f"model-{k + 1:05d}-of-{len(names):05d}.safetensors" for k in range(len(names))
    ]
    assert len(names) > 3 and not (tmp_path / hub.WEIGHTS).exists()
    stored = {name: read(tmp_path / name) for name in names}
    assert {n: file for file, arrays in stored.items() for n in arrays} == index["weight_map"]
    sizes = [sum(x.nbytes for x in arrays.values()) for arrays in stored.values()]
    assert max(sizes) <= 12_000 < sum(sizes) == index["metadata"]["total_size"]
    count = sum(x.size for x in whole.values())
    assert index["metadata"]["total_parameters"] == count
    for arrays in stored.values():
        for name, x in arrays.items():
            np.testing.assert_array_equal(x, whole.pop(name))
    assert not whole
    again = load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    save(tmp_path, loaded)  # onto shards of before
    assert sorted(p.name for p in tmp_path.glob("*.safetensors*")) == [hub.WEIGHTS]


def test_a_tensor_larger_than_a_shard_has_its_own():
    shapes = {"a": (2,), "b": (9,), "c": (1,), "d": (4,), "e": (3,)}
    plan = shards.plan_shards(shapes, np.dtype(np.float32), 16)
    assert [*plan.files.values()] == [("b",), ("a", "c"), ("d",), ("e",)]
    assert (
        shards.parse_size(" 2 mb ") == 2_000_000
        and shards.parse_size("7") == shards.parse_size(7) == 7
    )


@pytest.mark.slow
def test_memory_holds_one_tensor(tmp_path, monkeypatch):
    """Nothing of the size of the model, or of a stack, is made while kernels are merged."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12}
    folder = tiny_llama.checkpoint(tmp_path / "base", **sizes, torch_dtype="bfloat16")
    loaded, adapter, _ = adapted(folder, scan=True, param_dtype=jnp.bfloat16)
    alive = lambda: sum(x.nbytes for x in jax.live_arrays())
    before, most = alive(), []
    merge_leaf = save_checkpoint.adapters.merge_leaf

    def merge_and_count(*args, **options):
        merged = merge_leaf(*args, **options)
        most.append(alive() - before)
        return merged

    monkeypatch.setattr(save_checkpoint.adapters, "merge_leaf", merge_and_count)
    save(tmp_path / "warm", loaded, adapter=adapter)
    tracemalloc.start()
    try:
        save(tmp_path / "out", loaded, adapter=adapter, shard_size="500KB")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    tensor, model = 4 * 128 * 512, sum(x.nbytes for x in jax.tree.leaves(loaded.params))
    # JAX has the last one and the next; numpy a rounded one, its transposed copy and bytes.
    assert max(most) <= 2 * tensor < 4 * tensor + 500_000 < model
    assert peak <= 3 * tensor + 500_000


def test_export_of_an_adapter(folder, tmp_path):
    """The base is read in the dtype that it has, and merged kernel by kernel."""
    loaded, _, _ = adapted(folder)
    base = tmp_path / "base"
    save(base, loaded, dtype="bfloat16")
    loaded, adapter, settings = adapted(base)
    about = {"task": language_model.TASK, "model": {"name": str(base), "scan_layers": True}}
    stacked, adapter, settings = adapted(base, scan=True)
    lora.save(tmp_path / "a", adapter, settings, base=loaded.base_id, metadata=about)
    found = language_model.load(tmp_path / "a", wide=False)
    assert {x.dtype for x in jax.tree.leaves(found.loaded.params)} == {np.dtype(jnp.bfloat16)}
    run = ["export", f"--adapter={tmp_path / 'a'}", f"--out={tmp_path / 'out'}"]
    programs.succeed(*run, "--merged", "--dtype=float32", "--shard_size=20KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    wanted = lora.merge(stacked.params, adapter)
    assert_close(load(tmp_path / "out", scan_layers=True).params, wanted, rtol=1e-5, atol=1e-6)
    run[-1] = f"--out={tmp_path / 'half'}"
    programs.succeed(*run, "--merged")
    stored = read(tmp_path / "half" / hub.WEIGHTS)
    assert {x.dtype for x in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    for flag in ("--dtype=float16", "--shard_size=1GB"):
        done = programs.run(*run, "--peft", flag)
        assert done.returncode == 2 and "are for --merged" in done.stderr
    done = programs.run(*run[:-1], f"--out={tmp_path / 'x'}", "--merged", "--shard_size=5GiB")
    assert done.returncode == 2 and "The size of a shard must be" in done.stderr


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_pieces_of_a_file(dtype, tmp_path):
    arrays = {"a": np.arange(6).reshape(2, 3).astype(dtype), "b": np.zeros((0, 2), dtype)}
    shapes = {name: x.shape for name, x in arrays.items()}
    pieces = files.safetensors_pieces(shapes, arrays.values(), {}, dtype=dtype)
    files.write_atomically(tmp_path / "x.safetensors", pieces)
    for name, x in read(tmp_path / "x.safetensors").items():
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, arrays[name])
