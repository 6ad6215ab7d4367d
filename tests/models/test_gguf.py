"""GGUF files: what is in them is read to the bit, and what is wrong with them is said."""

import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import ggml, gguf
from tests.helpers import gguf_files, places

GOLDEN = np.load(places.GOLDENS / "gguf" / "blocks.npz")
PACKED = [name for name in GOLDEN if " " not in name]


def write(tmp_path, metadata=None, tensors=None, **options):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_files.content(metadata or {}, tensors or {}, **options))
    return path


def one(tmp_path, kind, shape, data):
    return gguf.read_header(write(tmp_path, {}, {"x": (kind, shape, data)})).tensors["x"]


# Numbers.


@pytest.mark.parametrize("name", PACKED)
def test_packed_types_are_those_of_the_reference(name, tmp_path):
    """To the bit: the goldens are by the package of the format's authors."""
    blocks, values = GOLDEN[name], GOLDEN[f"{name} values"]
    shape = (2, values.size // 2)
    tensor = one(tmp_path, name, shape, blocks.tobytes())
    assert (tensor.shape, tensor.layout.name, tensor.dtype) == (shape, name, np.float32)
    np.testing.assert_array_equal(gguf.read_tensor(tensor), values.reshape(shape))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_types(kind, tmp_path):
    array = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    wanted = {"F32": array, "F16": array.astype(np.float16)}
    wanted["BF16"] = (array.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(jnp.bfloat16)
    found = gguf.read_tensor(one(tmp_path, *gguf_files.plain(array, kind)))
    np.testing.assert_array_equal(found, wanted[kind].astype(np.float32))


@pytest.mark.parametrize("name", [n for n in PACKED if n.endswith(("_0", "_1"))])
def test_codes_stand_for_the_same_numbers(name, tmp_path):
    blocks, values = GOLDEN[name], GOLDEN[f"{name} values"]
    tensor = one(tmp_path, name, (2, 64), blocks.tobytes())
    codes, scales, offsets, bits = gguf.read_codes(tensor)
    assert (codes.shape, scales.shape, scales.dtype) == ((2, 64), (2, 2), np.float16)
    assert bits == int(name[1]) and np.ptp(codes.astype(int)) < 2**bits
    numbers = codes.reshape(2, 2, 32) * scales.astype(np.float32)[..., None]
    if name.endswith("_1"):
        numbers = numbers + offsets.astype(np.float32)[..., None]
    else:
        assert offsets is None
    np.testing.assert_array_equal(numbers.reshape(2, 64), values.reshape(2, 64))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_packing_in_tests_is_close(kind, tmp_path):
    array = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    found = gguf.read_tensor(one(tmp_path, *gguf_files.packed(array, kind)))
    step = {"Q4_0": 1 / 14, "Q4_1": 1 / 28, "Q8_0": 1 / 250}[kind] * 2 * np.abs(array).max()
    assert np.abs(found - array).max() <= step


def test_rows_are_decoded_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "_CHUNK", 150)
    blocks, values = GOLDEN["Q4_0"], GOLDEN["Q4_0 values"]
    tensor = one(tmp_path, "Q4_0", (4, 32), blocks.tobytes())
    assert [piece for piece, _ in gguf._pieces(tensor)] == [slice(0, 4)]
    monkeypatch.setattr(gguf, "_CHUNK", 100)
    assert [piece for piece, _ in gguf._pieces(tensor)] == [slice(0, 3), slice(3, 4)]
    np.testing.assert_array_equal(gguf.read_tensor(tensor), values)
    assert gguf.read_codes(tensor).codes.shape == (4, 32)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_heads_are_put_back(kind, tmp_path):
    """The file has them as convert_hf_to_gguf.py permutes them; a bias is a vector of rows."""
    heads, half = 3, 4
    rows = np.random.default_rng(0).normal(size=(heads * 2 * half, 32)).astype(np.float32)
    there = rows.reshape(heads, 2, half, 32).swapaxes(1, 2).reshape(rows.shape)
    tensor = one(tmp_path, *gguf_files.packed(there, kind))
    stored = gguf.read_tensor(tensor)
    turned = gguf.read_tensor(tensor._replace(heads=heads))
    np.testing.assert_array_equal(np.sort(stored[:, 0]), np.sort(turned[:, 0]))
    np.testing.assert_allclose(turned, rows, atol=0 if kind == "F32" else 0.03)
    if kind == "Q8_0":
        codes = gguf.read_codes(tensor._replace(heads=heads))
        numbers = codes.codes * codes.scales.astype(np.float32)
        np.testing.assert_array_equal(numbers, turned)
    else:
        bias = one(tmp_path, *gguf_files.plain(there[:, 0]))._replace(heads=heads)
        np.testing.assert_array_equal(gguf.read_tensor(bias), rows[:, 0])


def test_a_shift_is_taken_off(tmp_path):
    scale = np.array([1.5, 0.25], np.float32)
    tensor = one(tmp_path, *gguf_files.plain(1 + scale))._replace(shift=1.0)
    np.testing.assert_array_equal(gguf.read_tensor(tensor), scale)


def test_plain_numbers_are_no_codes(tmp_path):
    with pytest.raises(ValueError, match=r"tensor \(2, 3\) of type F32 can't be had as codes"):
        gguf.read_codes(one(tmp_path, *gguf_files.plain(np.ones((2, 3)))))


# Headers.

METADATA = {
    "a.bool": True, "a.int": 7, "a.float": 0.5, "a.text": "zwölf", "a.words": ["x", "", "ß"],
    "a.long": np.int64(-(2**40)), "a.double": np.float64(0.1), "a.array": np.arange(3, dtype="<i4"),
    "a.floats": np.array([0.5, -1], "<f4"), "a.byte": np.uint8(200), "a.none": np.zeros(0, "<u2"),
}  # fmt: skip


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("step", [8, 32, 4096])
def test_headers(version, step, tmp_path):
    tensors = {f"t{k}": gguf_files.plain(np.full((k, 3), k, np.float32)) for k in range(1, 4)}
    about = METADATA | {"general.alignment": step}
    found = gguf.read_header(write(tmp_path, about, tensors, version=version, step=step))
    assert found.metadata.keys() == about.keys()
    for key, wanted in about.items():
        np.testing.assert_array_equal(found.metadata[key], wanted)
    for k in range(1, 4):
        values = gguf.read_tensor(found.tensors[f"t{k}"])
        np.testing.assert_array_equal(values, np.full((k, 3), k))


VECTOR = gguf_files.plain(np.ones(2))
NESTED = struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 4, 0)


def refused(tmp_path, data, says):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"model.gguf can't be read as a GGUF file: .*(?:{says})"):
        gguf.read_header(path)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"magic": b"GGML"}, "begins with b'GGML' instead of b'GGUF'"),
        ({"version": 1}, r"of version 1; versions \(2, 3\), little-endian, are read"),
        ({"version": 4}, "of version 4"),
        ({"version": 3 << 24}, "big-endian"),
        ({"metadata": {"general.alignment": 12}}, "alignment must be a power of two of .* 12"),
        ({"metadata": {"general.alignment": "x"}}, "alignment must be a power of two of .* 'x'"),
        ({"metadata": {b"\xff": 1}}, "utf-8"),
        ({"metadata": {"a": b"\xff"}}, "utf-8"),
        ({"tensors": {"x": (23, (2, 256), bytes(272))}}, "type IQ4_XS are not .* 'x' is one"),
        ({"tensors": {"x": (15, (2, 256), bytes(584))}}, "type Q8_K are not read here; .* Q6_K"),
        ({"tensors": {"x": (99, (2,), bytes(8))}}, "type of number 99 are not read here"),
        ({"tensors": {"x": ("Q4_K", (2, 128), bytes(144))}}, "Q4_K the first must be a multiple"),
        ({"tensors": {"x": ("F32", (0,), b"")}}, "all at least 1"),
        ({"tensors": {"x": ("F32", (), bytes(4))}}, "0 axes; GGUF has 1 to 4"),
        ({"tensors": {"x": ("F32", (1,) * 5, bytes(4))}}, "5 axes"),
        ({"tensors": {"x": ("F32", (2**40, 2**40), bytes(4))}}, "ends at byte .* the file at"),
        ({"tensors": {"x": ("F32", (9,), bytes(4)), "y": VECTOR}}, "'x' and 'y' overlap"),
    ],
)
def test_headers_that_are_refused(changes, says, tmp_path):
    options = {"metadata": {}, "tensors": {}} | changes
    refused(tmp_path, gguf_files.content(**options), says)


def test_what_is_there_twice(tmp_path):
    key = gguf_files.string("a") + gguf_files.value(1)
    refused(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * key, "key 'a' is there twice")
    whole = gguf_files.header({}, {"x": VECTOR})
    entry = whole[24:]
    twice = b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + 2 * entry
    refused(tmp_path, twice, "tensor 'x' is there twice")


@pytest.mark.parametrize(
    "value, says",
    [
        (struct.pack("<I", 13), "type 13, which GGUF has not"),
        (NESTED, "elements of type 9"),
        (struct.pack("<IIQ", 9, 4, 2**60), "claims .* elements of a"),
        (struct.pack("<IIQ", 9, 12, 60), "claims 480 bytes of a"),
        (struct.pack("<IIQ", 9, 8, 20), "within its header"),
        (struct.pack("<IQ", 8, 2**63), "claims a string of 9223372036854775808 bytes"),
        (struct.pack("<I", 8), "within its header"),
    ],
)
def test_values_that_are_refused(value, says, tmp_path):
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_files.string("a")
    refused(tmp_path, start + value + bytes(64 if "within" not in says else 2), says)


@pytest.mark.parametrize("at", [4, 8, 16])
def test_absurd_counts(at, tmp_path):
    data = bytearray(gguf_files.content(METADATA, {"x": VECTOR}))
    data[at : at + 4] = b"\xff\xff\xff\x7f"
    refused(tmp_path, bytes(data), "claims 2147483647|of version 2147483647")


def test_tensors_off_the_grid(tmp_path):
    data = gguf_files.header({}, {"x": VECTOR})
    off = data[:-8] + struct.pack("<Q", 4) + bytes(100)
    refused(tmp_path, off, "'x' does not begin at a multiple of 32 bytes")


def test_a_truncated_file_at_every_byte(tmp_path):
    data = gguf_files.content(METADATA, {"x": gguf_files.plain(np.ones(8))})
    for end in range(len(data)):
        refused(tmp_path, data[:end], "")


def test_a_file_that_shrinks_is_noticed(tmp_path):
    tensor = one(tmp_path, *gguf_files.plain(np.ones(8)))
    tensor.path.write_bytes(tensor.path.read_bytes()[:-8])
    with pytest.raises(OSError, match="has become shorter"):
        gguf.read_tensor(tensor)


def test_names():
    assert gguf.is_gguf("a/b.GGUF") and not gguf.is_gguf("a.gguf/b")
    assert ggml.layout(8).name == "Q8_0" and sys.byteorder == "little"
