"""Checkpoints that are quantized, and those that are quantized while they are loaded."""

import json
import shutil
from time import process_time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import names
from lora_jax.code_books import TABLES
from lora_jax.models import checkpoints, gpt2, hub
from lora_jax.paths import named_leaves
from lora_jax.quantized import as_array, decode, is_quantized
from lora_jax.schemes import encode
from tests.helpers import damaged_files, slow
from tests.helpers.comparisons import assert_close
from tests.helpers.quantized_checkpoints import GOLDENS, NAME, changed, load, quantized

GOLDEN = np.load(GOLDENS / "golden.npz")
KINDS = ("nf4_double", "fp4", "int8")
KERNELS = 14  # of two layers


def logits(loaded, params=None):
    run = lambda params, ids: lora.lift(loaded.model.apply)(params, ids)
    return jax.jit(run)(loaded.params if params is None else params, GOLDEN["ids"])


# ---- bitsandbytes, and PEFT over it ---------------------------------------------------------------


@pytest.mark.parametrize("scan", slow.after(1, [True, False]), ids=["scanned", "unrolled"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, scan):
    loaded = load(GOLDENS / kind, scan_layers=scan)
    leaves = quantized(loaded.params)
    assert len(leaves) == (KERNELS // 2 if scan else KERNELS)
    assert all(x.dtype == jnp.float32 and isinstance(x.codes, jax.Array) for x in leaves.values())
    assert not any("embed" in name or "lm_head" in name for name in leaves)
    assert_close(logits(loaded), GOLDEN[f"{kind}/logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan", slow.after(1, [True, False]), ids=["scanned", "unrolled"])
def test_gradients_are_those_of_peft(scan):
    loaded = load(GOLDENS / "nf4_double", scan_layers=scan)
    adapter, config = lora.peft.load_peft(
        GOLDENS / "adapter", loaded.params, names=checkpoints.names(loaded)
    )

    def loss(adapter, params, ids):
        bound = lora.bind(params, adapter)
        scores = lora.lift(loaded.model.apply)(bound, ids)[:, :-1]
        each = jax.nn.log_softmax(scores)
        return -jnp.take_along_axis(each, ids[:, 1:, None], axis=-1).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(adapter, loaded.params, GOLDEN["ids"])
    np.testing.assert_allclose(value, GOLDEN["loss"], rtol=1e-6)
    tensors = peft_tensors(grads, loaded)
    want = {n.removeprefix("gradient/"): GOLDEN[n] for n in GOLDEN.files if "gradient" in n}
    assert len(want) == len(tensors) == 12
    for name, gradient in want.items():
        error = np.abs(tensors[name] - gradient).max() / np.abs(gradient).max()
        assert error < 1e-5, name


def peft_tensors(grads, loaded):
    """The gradients by PEFT's names."""
    nodes, found = adapters.nodes(grads), {}
    for weight in names.weights(checkpoints.names(loaded), named_leaves(loaded.params)):
        if weight.leaf in nodes:
            for side in "ab":
                x = getattr(nodes[weight.leaf], side)
                x = x if weight.layer is None else x[weight.layer]
                key = f"{names.module(weight.hf)}.lora_{side.upper()}.weight"
                found[key] = np.asarray(x).T
    return found


# ---- Other files ----------------------------------------------------------------------------------


def state_of(tensors, name=NAME):
    return json.loads(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())


def with_state(**changes):
    def change(tensors):
        about = {k: v for k, v in (state_of(tensors) | changes).items() if v is not None}
        data = np.frombuffer(json.dumps(about).encode(), np.uint8)
        tensors[f"{NAME}.quant_state.bitsandbytes__nf4"] = data

    return change


def with_tensor(suffix, make):
    return lambda tensors: tensors.update({f"{NAME}{suffix}": make(tensors[f"{NAME}{suffix}"])})


def spoiled(x):
    return np.where(np.arange(x.size) == 0, np.float32(np.nan), x)


@pytest.mark.parametrize(
    "kind, change, says",
    [
        ("nf4_double", with_tensor("", lambda x: x[:-1]), "has 4095 bytes, .* need 4096"),
        (
            "nf4_double",
            with_tensor(".absmax", lambda x: x[:64]),
            r"absmax of shape \(64,\), and 128",
        ),
        ("nf4_double", with_tensor(".absmax", lambda x: x.astype(np.float32)), "unlike its quant"),
        ("nf4_double", with_tensor(".nested_absmax", lambda x: x[:0]), "nested_absmax of shape"),
        ("nf4_double", with_tensor(".nested_absmax", spoiled), "NaN or infinity in its nested"),
        ("nf4_double", with_tensor(".quant_map", lambda x: x[::-1].copy()), "not that of 'nf4'"),
        ("nf4_double", with_tensor(".nested_quant_map", lambda x: x * 2), "not known"),
        ("nf4_double", with_state(blocksize=128), r"absmax of shape \(128,\), and 64 are needed"),
        ("nf4_double", with_state(blocksize=48), "not understood: {'blocksize': 48}"),
        ("nf4_double", with_state(quant_type="nf8"), "not understood: {'quant_type': 'nf8'}"),
        ("nf4_double", with_state(nested_blocksize=128), "'nested_blocksize': 128"),
        ("nf4_double", with_state(dtype="int8"), "not understood: {'dtype': 'int8'}"),
        ("nf4_double", with_state(shape=[64, 2**40]), "not understood: {'shape'"),
        (
            "nf4_double",
            with_state(shape=[128, 64]),
            r"has shape \(128, 64\) instead of \(64, 128\)",
        ),
        ("nf4_double", with_state(extra=1), "fields .*'extra'.*, which are not known"),
        ("nf4_double", with_state(nested_offset=None), "which are not known"),
        (
            "int8",
            lambda t: t.update({NAME.replace("weight", "SCB"): np.ones(3, np.float32)}),
            "SCB has",
        ),
        ("int8", lambda t: t.update({NAME.replace("weight", "SCB"): spoiled(np.ones(64))}), "NaN"),
        (
            "int8",
            lambda t: t.update({NAME.replace("weight", "weight_format"): np.array(2, np.uint8)}),
            "weight_format other than 0",
        ),
        (
            "int8",
            lambda t: t.pop(NAME.replace("weight", "SCB")),
            "way that is not read|no floating",
        ),
    ],
)
def test_damaged_files(tmp_path, kind, change, says):
    with pytest.raises(ValueError, match=says) as error:
        load(changed(tmp_path, kind, change))
    assert "down_proj.weight" in str(error.value)


OTHERS = """aqlm auto-round bitnet eetq exl2 fouroversix fp_quant gemma higgs hqq metal mxfp4 mxfp8 nvfp4
quanto quark sinq spqr torchao vptq""".split()


@pytest.mark.parametrize("method", OTHERS)
def test_other_schemes_are_refused_by_name(tmp_path, method):
    directory = shutil.copytree(GOLDENS / "fp4", tmp_path / "x")
    about = json.loads((directory / "config.json").read_text())
    about["quantization_config"] = {"quant_method": method, "bits": 4}
    (directory / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"is quantized with '{method}'"):
        load(directory)


@pytest.mark.parametrize(
    "words, says",
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "is quantized with 'mlx'"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "is quantized with 'mlx'"),
        ({"quantization_config": {"odd": 1}}, "is quantized with {'odd': 1}"),
        ({"quantization_config": "awq-like"}, "is quantized with 'awq-like'"),
        ({"quantization_config": {"load_in_4bit": True}}, "stored, or quantized, .*'U32'"),
    ],
)
def test_schemes_are_named_before_files_are_opened(tmp_path, words, says):
    """They have dtypes that numpy has not, which is no damage."""
    directory = shutil.copytree(GOLDENS / "fp4", tmp_path / "x")
    about = json.loads((directory / "config.json").read_text())
    del about["quantization_config"]
    (directory / "config.json").write_text(json.dumps(about | words))
    header = json.dumps({NAME: {"dtype": "U32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (directory / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=f"{says}.*Take the original model") as told:
        load(directory)
    assert not {"damaged", "again"} & set(str(told.value).split())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_bytes_that_are_kept_as_floats(tmp_path, dtype):
    """As trainers want them that split a model into pieces of one dtype."""
    directory = changed(
        tmp_path, "nf4_double", with_tensor("", lambda x: x.reshape(-1).view(dtype)[:, None])
    )
    got, want = (quantized(load(d).params) for d in (directory, GOLDENS / "nf4_double"))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_older_tables_of_scales(tmp_path):
    """Scales whose table differs in the last digits are decoded by it."""
    nudge = with_tensor(".nested_quant_map", lambda x: np.nextafter(x, np.float32(1)))
    got = quantized(load(changed(tmp_path, "nf4_double", nudge)).params)
    want = quantized(load(GOLDENS / "nf4_double").params)
    name = next(n for n in got if "layers_1" in n.replace("/", "_") and "down" in n)
    assert got[name].nested is None and got[name].scales.dtype == jnp.float32
    np.testing.assert_allclose(decode(got[name]), decode(want[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scales", ["tensor", "rows", "column", "blocks"])
def test_float8(tmp_path, scales):
    rng = np.random.default_rng(0)
    shape = (64, 128)
    counts = {"tensor": (), "rows": (64,), "column": (64, 1), "blocks": (1, 1)}[scales]
    scale = rng.uniform(0.5, 1, counts) / 100
    scale = np.asarray(scale, np.float32)
    codes = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    suffix = "_scale_inv" if scales == "blocks" else "_scale"

    def change(tensors):
        for name in [n for n in tensors if n.startswith(NAME)]:
            del tensors[name]
        tensors |= {NAME: codes, f"{NAME}{suffix}": scale}
        tensors[NAME.replace("weight", "input_scale")] = np.ones((), np.float32)

    loaded = load(changed(tmp_path, "nf4_double", change))
    name = next(n for n, x in quantized(loaded.params).items() if hasattr(x, "tile"))
    want = codes.astype(np.float32) * scale.reshape(counts if scales != "rows" else (64, 1))
    np.testing.assert_array_equal(np.asarray(decode(quantized(loaded.params)[name])), want.T)
    with pytest.raises(ValueError, match="way in some layers than in others.*scan_layers=False"):
        load(tmp_path / "changed", scan_layers=True)
    with pytest.raises(
        ValueError, match="down_proj.weight has dtype float8_e4m3fn, and there are no"
    ):
        scales = (f"{NAME}{suffix}", NAME.replace("weight", "input_scale"))
        drop = lambda t: (change(t), [t.pop(name) for name in scales])
        shutil.rmtree(tmp_path / "changed")
        load(changed(tmp_path, "nf4_double", drop))


def test_transposed_layers_of_gpt2(tmp_path):
    """Their kernels are quantized the other way round than they are stored plain."""
    about = {
        "model_type": "gpt2", "vocab_size": 20, "n_embd": 64, "n_layer": 1, "n_head": 2,
        "n_positions": 8, "architectures": ["GPT2LMHeadModel"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(about))
    config = gpt2.GPT2Config.from_hf(about)
    model = gpt2.GPT2LMHeadModel(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng, tensors, kernels = np.random.default_rng(0), {}, {}
    for weight in names.weights(gpt2.names(config, head="causal-lm"), named_leaves(shapes)):
        w = rng.normal(size=weight.shape).astype(np.float32)
        if weight.hf in weight.row.tied:
            continue
        if names.kind(weight) != names.LINEAR:
            tensors[weight.hf] = np.ascontiguousarray(names.to_tensor(weight, w))
            continue
        leaf = kernels[weight.leaf] = encode(jnp.asarray(w), "nf4")
        n_out, n_in = w.shape[::-1]
        state = dict(quant_type="nf4", blocksize=64, dtype="float16", shape=[n_out, n_in])
        tensors |= {
            weight.hf: np.ascontiguousarray(leaf.codes.T).reshape(-1, 1),
            f"{weight.hf}.absmax": np.ascontiguousarray(leaf.scales.T).reshape(-1),
            f"{weight.hf}.quant_map": TABLES["nf4"],
            f"{weight.hf}.quant_state.bitsandbytes__nf4": np.frombuffer(
                json.dumps(state).encode(), np.uint8
            ),
        }
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    got = quantized(load(tmp_path).params)
    assert len(got) == len(kernels) == 4
    for name, leaf in kernels.items():
        np.testing.assert_array_equal(decode(got[name]), decode(leaf))


# ---- Quantized while it is loaded -----------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The golden model with plain numbers."""
    loaded = load(GOLDENS / "fp4")
    directory = tmp_path_factory.mktemp("plain")
    checkpoints.save_hf(
        directory, loaded.params, loaded.checkpoint, head="causal-lm", dtype="float32"
    )
    return directory


def test_merged_checkpoints_are_plain(plain):
    about = json.loads((plain / "config.json").read_text())
    assert "quantization_config" not in about and about["torch_dtype"] == "float32"
    assert not quantized(load(plain).params)
    assert_close(logits(load(plain)), GOLDEN["fp4/logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan", slow.after(1, [True, False]), ids=["scanned", "unrolled"])
@pytest.mark.parametrize("scheme", ["nf4_double", "int8", "float8_e4m3_blocks"])
def test_quantized_while_loaded(plain, scheme, scan):
    """The same as if it is loaded first; what has codes already keeps them."""
    loaded = load(plain, scan_layers=scan, quantize=scheme, param_dtype=jnp.bfloat16)
    first = load(plain, scan_layers=scan)
    roles = {"kernel": "bio" if scan else "io"}
    targets = ("re:.*_proj/kernel",)
    want = lora.quantize(
        first.params, scheme, like=roles, targets=targets, dtype=jnp.bfloat16
    ) if not scan else None  # fmt: skip
    got = quantized(loaded.params)
    assert len(got) == (KERNELS // 2 if scan else KERNELS)
    assert all(x.dtype == jnp.bfloat16 for x in got.values())
    if want is not None:
        jax.tree.map(np.testing.assert_array_equal, got, quantized(want))
    again = load(GOLDENS / "int8", quantize=scheme)
    assert all(hasattr(x, "tile") for x in quantized(again.params).values())
    assert loaded.base_id == first.base_id == hub.base_id(loaded.checkpoint)


def test_scheme_that_does_not_exist(plain):
    with pytest.raises(ValueError, match="no scheme 'int3'"):
        load(plain, quantize="int3")


@pytest.mark.slow
def test_merge_of_a_loaded_model(plain, tmp_path):
    loaded = load(GOLDENS / "nf4_double", scan_layers=True)
    adapter, _ = lora.peft.load_peft(
        GOLDENS / "adapter", loaded.params, names=checkpoints.names(loaded)
    )
    merged = lora.merge(loaded.params, adapter)
    assert not quantized(merged)
    checkpoints.save_hf(tmp_path, merged, loaded.checkpoint, head="causal-lm", dtype="float32")
    want = logits(loaded, lora.bind(loaded.params, adapter))
    assert_close(logits(load(tmp_path)), want, rtol=1e-5, atol=1e-5)
    plain_base = jax.tree.map(as_array, loaded.params, is_leaf=is_quantized)
    assert_close(lora.merge(plain_base, adapter), merged, rtol=1e-6, atol=1e-6)


# ---- Any damage -----------------------------------------------------------------------------------


def damaged_tensor(x, rng):
    """Another shape, dtype or content, or none."""
    flat = x.reshape(-1)
    how = rng.integers(7)
    if how == 0:
        return None
    if how == 1:
        return flat[: rng.integers(flat.size + 1)]
    if how == 2:
        return np.concatenate([flat, flat[: rng.integers(flat.size + 1)]])
    if how == 3:
        return x.astype(rng.choice([np.uint8, np.int8, np.float16, np.float32, np.int64]))
    if how == 4:
        data = bytearray(x.tobytes())
        for k in rng.integers(len(data), size=rng.integers(1, 9)):
            data[k] ^= 1 << rng.integers(8)
        return np.frombuffer(bytes(data), x.dtype).reshape(x.shape)
    if how == 5 and np.issubdtype(x.dtype, np.floating):
        return np.where(rng.random(x.shape) < 0.1, rng.choice([np.nan, np.inf, -1e38]), x)
    return np.ascontiguousarray(x.reshape(-1, 1) if x.ndim < 2 else x.T)


def damage(tensors, rng):
    belongs = [n for n in tensors if n.startswith("model.layers") and "norm" not in n]
    name = belongs[rng.integers(len(belongs))]
    if "quant_state" in name and rng.random() < 0.8:
        change = list(damaged_files.OF_JSON.values())[rng.integers(len(damaged_files.OF_JSON))]
        tensors[name] = np.frombuffer(change(tensors[name].tobytes(), rng), np.uint8)
        return
    new = damaged_tensor(tensors.pop(name), rng)
    if new is not None:
        tensors[name] = new


@pytest.mark.parametrize("count", [40, pytest.param(700, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", slow.after(1, KINDS))
def test_damage_is_told_or_harmless(tmp_path, kind, count):
    """A clear error, or a model of the same shapes and of finite numbers, in little time."""
    wanted = {n: (x.shape, x.dtype) for n, x in named_leaves(load(GOLDENS / kind).params).items()}
    for seed in range(count):
        rng = np.random.default_rng([KINDS.index(kind), seed])
        directory, begun = (
            changed(tmp_path, kind, lambda t, rng=rng: damage(t, rng)),
            process_time(),
        )
        try:
            leaves = named_leaves(load(directory).params)
        except ValueError as error:
            assert str(error).startswith("The checkpoint"), (seed, error)
        else:
            assert {n: (x.shape, x.dtype) for n, x in leaves.items()} == wanted, seed
            assert all(np.isfinite(as_array(x)).all() for x in leaves.values()), seed
        assert process_time() - begun < 10
        shutil.rmtree(directory)
