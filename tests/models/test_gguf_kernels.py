"""Kernels of GGUF files keep their own codes, and stand for the numbers that ggml decodes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax.models import checkpoints
from lora_jax.paths import named_leaves
from lora_jax.quantized import as_array, decode, is_quantized
from lora_jax.schemes import encode
from tests.helpers import gguf_checkpoints, gguf_files, gguf_tokens, slow, tiny_llama
from tests.helpers.comparisons import assert_close, perturbed
from tests.helpers.quantized_checkpoints import GOLDENS, load, quantized

KERNELS = 7  # of a layer, of which there are three
FOUR = ("Q4_0", "Q4_1", "Q4_0")
ANY = ("Q4_1", "Q8_0", "Q5_0")


def by_layer(kinds):
    """Types of the layers' kernels; embeddings and head are of the first."""
    return lambda name: kinds[int(name.split(".")[1]) if name.startswith("blk.") else 0]


def make(tmp_path, *kinds, **options):
    types = by_layer(kinds * (4 - len(kinds)))
    return gguf_checkpoints.make(tmp_path, "llama", types, **options)[1]


def assert_same_bits(got, want, name):
    """Equal, zeros of either sign included."""
    as_bits = lambda x: np.asarray(x, np.float32).view(np.uint32)
    np.testing.assert_array_equal(as_bits(got), as_bits(want), err_msg=name)


@pytest.mark.parametrize("scan", slow.after(1, [True, False]), ids=["scanned", "unrolled"])
@pytest.mark.parametrize("kinds", [["Q4_0"], ["Q4_1"], ["Q8_0"], FOUR, ANY], ids="-".join)
def test_numbers_are_those_that_are_decoded(kinds, scan, tmp_path, caplog):
    """Of rows of q and k, too, which the file has in another order."""
    path = make(tmp_path, *kinds)
    kept = named_leaves(load(path, scan_layers=scan).params)
    plain = named_leaves(load(path, scan_layers=scan, quantize="none").params)
    assert sum(map(is_quantized, kept.values())) == (KERNELS if scan else 3 * KERNELS)
    assert not any(is_quantized(kept[n]) for n in kept if "embed" in n or "lm_head" in n)
    numbers = jax.jit(lambda leaves: {n: as_array(x) for n, x in leaves.items()})(kept)
    assert not quantized(plain) and not caplog.records
    has_zeros = any(np.signbit(x[x == 0]).any() for x in map(np.asarray, plain.values()))
    assert has_zeros or kinds == ["Q4_1"]
    for name, x in plain.items():
        assert kept[name].shape == x.shape and kept[name].dtype == x.dtype
        assert_same_bits(numbers[name], x, name)


@pytest.mark.parametrize(
    "kinds, code, parts, bits",
    [
        (["Q4_0"], "uint4", {"codes", "scales"}, 4.5),
        (["Q4_1"], "uint4", {"codes", "scales", "shifts"}, 5),
        (["Q8_0"], "int8", {"codes", "scales"}, 8.5),
        (FOUR, "uint4", {"codes", "scales", "shifts", "zeros"}, 5.25),
        (ANY, "int8", {"codes", "scales", "shifts"}, 9),
    ],
)
def test_what_is_stored(kinds, code, parts, bits, tmp_path):
    for leaf in quantized(load(make(tmp_path, *kinds), scan_layers=True).params).values():
        stored = lora.quantized.parts(leaf)
        assert (leaf.code, set(stored), leaf.tile) == (code, parts, (32, 1))
        assert 8 * sum(x.nbytes for x in stored.values()) == bits * leaf.size


@pytest.mark.parametrize("scan", slow.after(1, [True, False]), ids=["scanned", "unrolled"])
def test_lift_over_codes_is_merge(scan, tmp_path):
    loaded = load(make(tmp_path, *FOUR), scan_layers=scan)
    ids = np.random.default_rng(0).integers(0, 64, (2, 9))
    settings = lora.LoRAConfig(rank=2, targets=loaded.family.targets)
    adapter = lora.init(jax.random.key(0), loaded.model.apply, loaded.params, settings, ids)
    adapter = perturbed(adapter)
    lifted = lora.lift(loaded.model.apply, strict=True)
    found = jax.jit(lifted)(lora.bind(loaded.params, adapter), ids)
    merged = lora.merge(loaded.params, adapter)
    assert_close(found, jax.jit(loaded.model.apply)(merged, ids), rtol=1e-5, atol=1e-5)


def test_dtypes_of_the_model(tmp_path):
    path = make(tmp_path, *FOUR)
    kept = load(path, param_dtype=jnp.bfloat16).params
    plain = load(path, param_dtype=jnp.bfloat16, quantize="none").params
    for name, x in named_leaves(plain).items():
        leaf = named_leaves(kept)[name]
        assert leaf.dtype == x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(as_array(leaf), x, err_msg=name)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_layers_without_codes_are_decoded_and_said(scan, tmp_path, caplog):
    """In a stack all of them, since they can't be one leaf otherwise."""
    path = make(tmp_path, "Q4_0", "F16", "Q4_1")
    loaded = load(path, scan_layers=scan)
    assert len(quantized(loaded.params)) == (0 if scan else 2 * KERNELS)
    wanted = [f"{path}: 21 kernels are decoded, since not all of the types F16, Q4_0, Q4_1 can be"]
    assert [r.getMessage()[: len(wanted[0])] for r in caplog.records] == wanted * scan
    plain = load(path, scan_layers=scan, quantize="none").params
    numbers = jax.tree.map(as_array, loaded.params, is_leaf=is_quantized)
    jax.tree.map(np.testing.assert_array_equal, numbers, plain)


def test_k_quants_are_stored_as_asked(tmp_path, caplog):
    """They are decoded, and said to be, unless a scheme is given."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    folder = tiny_llama.checkpoint(tmp_path / "hf", **gguf_checkpoints.SIZES | sizes)
    about = json.loads((folder / "config.json").read_text())
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors, rng = gguf_files.tensors(about, arrays), np.random.default_rng(0)
    for name in [n for n in tensors if n.startswith("blk.") and "norm" not in n]:
        _, shape, _ = tensors[name]
        blocks = rng.integers(0, 256, (np.prod(shape) // 256, 144), np.uint8)
        blocks[:, :4] = np.array([1e-3, 1e-2], "<f2").view(np.uint8)
        tensors[name] = ("Q4_K", shape, blocks.tobytes())
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_files.content(gguf_files.metadata(about), tensors))
    plain = load(path).params
    assert not quantized(plain)
    assert f"{path}: 7 kernels are decoded, since not all of the types Q4_K can" in caplog.text
    caplog.clear()
    small = quantized(load(path, quantize="nf4").params)
    assert len(small) == KERNELS and not caplog.records
    for name, leaf in small.items():
        again = encode(named_leaves(plain)[name], "nf4", leaf.axes)
        jax.tree.map(np.testing.assert_array_equal, leaf, again)


def test_a_scheme_is_for_decoded_numbers(tmp_path):
    """Of what has codes, too: one scheme is asked for, and a file may be a mixture of types."""
    path = make(tmp_path, "Q4_1")
    plain = named_leaves(load(path, quantize="none").params)
    small = quantized(load(path, quantize="int8").params)
    assert len(small) == 3 * KERNELS
    for name, leaf in small.items():
        wanted = encode(plain[name], "int8", leaf.axes)
        jax.tree.map(np.testing.assert_array_equal, leaf, wanted)


@pytest.mark.slow
def test_other_codes_are_decoded_when_asked():
    """What bitsandbytes has stored, too."""
    golden = GOLDENS / "nf4_double"
    for scan in (False, True):
        kept = load(golden, scan_layers=scan).params
        plain = load(golden, scan_layers=scan, quantize="none").params
        assert quantized(kept) and not quantized(plain)
        numbers = jax.tree.map(as_array, kept, is_leaf=is_quantized)
        jax.tree.map(np.testing.assert_array_equal, numbers, plain)


def test_codes_on_a_mesh(tmp_path):
    path, mesh = make(tmp_path, *FOUR), jax.make_mesh((1, 1), ("fsdp", "tensor"))
    placed = quantized(load(path, scan_layers=True, mesh=mesh).params)
    for name, leaf in quantized(load(path, scan_layers=True).params).items():
        split = dataclasses.replace(placed[name], split=leaf.split)
        jax.tree.map(np.testing.assert_array_equal, split, leaf)
        np.testing.assert_array_equal(decode(split), decode(leaf))


def test_codes_of_a_wrong_shape(tmp_path):
    path = make(tmp_path, "Q4_0")
    data = path.read_bytes()
    name = gguf_files.string("blk.1.ffn_up.weight")
    at = data.index(name) + len(name) + 4
    sizes = np.frombuffer(data, "<u8", 2, at)
    path.write_bytes(data[:at] + sizes[::-1].tobytes() + data[at + 16 :])
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight has shape .32, 64. instead"):
        load(path)


def test_a_kernel_that_is_there_as_codes_is_saved_plain(tmp_path):
    made = gguf_tokens.bpe()
    options = {"words": gguf_tokens.words(made), "changes": {"vocab_size": made.get_vocab_size()}}
    loaded = load(make(tmp_path, *FOUR, **options), scan_layers=True)
    checkpoints.save_hf(tmp_path / "out", loaded.params, loaded.checkpoint, head="causal-lm")
    again = load(tmp_path / "out", scan_layers=True).params
    plain = jax.tree.map(as_array, loaded.params, is_leaf=is_quantized)
    jax.tree.map(np.testing.assert_array_equal, again, plain)
