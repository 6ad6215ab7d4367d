"""GPTQ, AWQ and compressed-tensors: kernels of 4 and 8 bits with a scale for each group of inputs.

Packed here by the formulas of their documentation; compressed-tensors also by that package itself.
"""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from lora_jax.models import checkpoints, grouped_tensors
from lora_jax.quantized import decode
from tests.helpers.quantized_checkpoints import GOLDENS, NAME, load, quantized, read

N_OUT, N_IN, GROUP = 64, 128, 32  # of down_proj in the golden model
MODULE = NAME.removesuffix(".weight")


def pack_words(codes, bits, order=None):
    """Rows of codes to rows of words of 32 bits, the first code in the lowest bits."""
    per_word = 32 // bits
    parts = codes.reshape(len(codes), -1, per_word).astype(np.uint64)
    parts = parts if order is None else parts[..., list(order)]
    return (
        sum(parts[..., k] << np.uint64(bits * k) for k in range(per_word))
        .astype(np.uint32)
        .view(np.int32)
    )


def draw(bits=4, seed=0):
    """Codes ``(out, in)``, scales and zeros ``(out, groups)``, and what they stand for."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(2**bits, size=(N_OUT, N_IN))
    scales = rng.uniform(0.01, 0.02, (N_OUT, N_IN // GROUP)).astype(np.float16)
    zeros = rng.integers(1, 2**bits, size=scales.shape)
    wide = lambda x: np.repeat(x, GROUP, 1)
    return codes, scales, zeros, (codes - wide(zeros)) * wide(scales.astype(np.float32))


def gptq(bits, plus):
    codes, scales, zeros, w = draw(bits)
    tensors = {
        "qweight": pack_words(codes, bits).T, "scales": scales.T,
        "qzeros": pack_words(zeros.T - plus, bits),
        "g_idx": (np.arange(N_IN) // GROUP).astype(np.int32),
    }  # fmt: skip
    about = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False}
    return tensors, about | ({} if plus else {"checkpoint_format": "gptq_v2"}), w


def awq():
    codes, scales, zeros, w = draw()
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "qweight": pack_words(codes.T, 4, order), "scales": scales.T,
        "qzeros": pack_words(zeros.T, 4, order),
    }  # fmt: skip
    return tensors, {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}, w


def compressed(bits=4, symmetric=False):
    codes, scales, zeros, w = draw(bits)
    tensors = {
        "weight_packed": pack_words(codes, bits), "weight_scale": scales,
        "weight_shape": np.array([N_OUT, N_IN]),
        "weight_zero_point": pack_words(zeros.T, bits).T,
    }  # fmt: skip
    if symmetric:
        del tensors["weight_zero_point"]
        half = 2 ** (bits - 1)
        w = (codes - half) * np.repeat(scales.astype(np.float32), GROUP, 1)
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return tensors, {"quant_method": "compressed-tensors", "config_groups": groups}, w


MADE = {
    "gptq": lambda: gptq(4, 1), "gptq_v2": lambda: gptq(4, 0), "gptq_8": lambda: gptq(8, 1),
    "awq": awq, "compressed": compressed, "compressed_8": lambda: compressed(8),
    "symmetric": lambda: compressed(symmetric=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The golden model with plain numbers."""
    loaded = load(GOLDENS / "fp4")
    directory = tmp_path_factory.mktemp("plain")
    checkpoints.save_hf(
        directory, loaded.params, loaded.checkpoint, head="causal-lm", dtype="float32"
    )
    return directory


def checkpoint(plain, tmp_path, made, **changes):
    """The model with one kernel that is quantized."""
    tensors, about, _ = made
    directory = shutil.copytree(plain, tmp_path / "x")
    whole = read(plain / "model.safetensors")
    del whole[NAME]
    more = {f"{MODULE}.{n}": np.ascontiguousarray(x) for n, x in {**tensors, **changes}.items()}
    safetensors.numpy.save_file(whole | more, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    return directory


@pytest.mark.parametrize("kind", MADE)
def test_kernels_are_what_the_formula_says(plain, tmp_path, kind):
    made = MADE[kind]()
    ((_, leaf),) = quantized(load(checkpoint(plain, tmp_path, made)).params).items()
    assert isinstance(leaf.codes, jax.Array) and leaf.codes.dtype == np.uint8
    assert leaf.codes.size == N_IN * N_OUT // (1 if "8" in kind else 2)
    np.testing.assert_allclose(decode(leaf).T, made[2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "kind, changes, says",
    [
        ("gptq", {"scales": np.ones((4, 60), np.float16)}, "which do not fit"),
        ("gptq", {"scales": np.ones((5, 64), np.float16)}, "which do not fit"),
        ("gptq", {"scales": np.full((4, 64), np.nan, np.float16)}, "NaN or infinity in its scales"),
        ("gptq", {"qzeros": np.zeros((4, 7), np.int32)}, "which do not fit"),
        ("gptq", {"g_idx": np.arange(128, dtype=np.int32)[::-1] // 32}, "desc_act"),
        ("gptq", {"qweight": np.zeros((15, 64), np.int32)}, r"shape \(64, 120\) instead of"),
        ("awq", {"qweight": np.zeros(5, np.int32)}, "parts that are no matrices"),
        ("compressed", {"weight_shape": np.array([64, 130])}, "weight_shape|words a row"),
        ("compressed", {"weight_shape": np.array([63, 128])}, "weight_shape"),
    ],
)
def test_damaged_parts(plain, tmp_path, kind, changes, says):
    with pytest.raises(ValueError, match=says):
        load(checkpoint(plain, tmp_path, MADE[kind](), **changes))


def test_groups_that_are_no_neighbours(plain, tmp_path):
    """They are not damage: another copy of the files would not help."""
    order = np.arange(128, dtype=np.int32)[::-1] // 32
    with pytest.raises(ValueError, match=r"desc_act.*Take the original model") as told:
        load(checkpoint(plain, tmp_path, MADE["gptq"](), g_idx=order))
    assert "again" not in str(told.value)


def test_missing_parts(plain, tmp_path):
    tensors, about, _ = MADE["awq"]()
    del tensors["qzeros"]
    with pytest.raises(ValueError, match="lacks .*qzeros"):
        load(checkpoint(plain, tmp_path, (tensors, about, None)))


@pytest.mark.parametrize(
    "about, says",
    [
        ({"quant_method": "gptq", "bits": 3}, "'gptq' in 3 bits"),
        (
            {"quant_method": "awq", "bits": 4, "version": "gemv"},
            "in the layout 'gemv', which is not read",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "in 0 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "layout 'marlin'"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "'nvfp4-pack-"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "layout 'marlin-24'"),
        (
            {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}},
            "several numbers of bits",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt' in 'NVFP4'"),
    ],
)
def test_kinds_that_are_not_read(plain, tmp_path, about, says):
    tensors, _, _ = MADE["gptq"]()
    with pytest.raises(ValueError, match=f"is quantized with .*{says}.*Take the original model"):
        load(checkpoint(plain, tmp_path, (tensors, about, None)))


@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_what_compressed_tensors_writes(kind):
    """Kernels (24, 96) with groups of 32, by the package itself."""
    golden = np.load(GOLDENS / "compressed_tensors.npz")
    part = lambda name: golden[f"{kind}/{name}"]
    names = {"codes": "weight_packed", "scales": "weight_scale", "zeros": "weight_zero_point"}
    values = {k: part(n) for k, n in names.items() if f"{kind}/{n}" in golden.files}
    shape = tuple(map(int, part("weight_shape")))
    about = grouped_tensors.Settings("compressed-tensors", 4)
    cls, fields = grouped_tensors.read(values, shape, about)
    leaf = cls(axes="oi", sizes=shape, dtype=np.dtype(np.float32), **fields)
    np.testing.assert_allclose(decode(leaf), part("decoded"), rtol=1e-6, atol=1e-7)
