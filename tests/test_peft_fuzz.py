"""Adapter directories damaged at random: a clean error or the right adapter, never anything else.

What a loaded adapter must be is worked out here from the mutated files themselves: wherever the
loader accepts, its factors and scales are compared with an own reading of the bytes.
"""

import json
import math
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch_like

from lora_jax import adapter as adapters
from lora_jax.lowrank import LowRank
from lora_jax.peft import load_peft

GOLDENS = Path(__file__).parent / "goldens" / "peft"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SOURCES = {
    "bert": ["qv", "rslora_patterns", "bias_all", "embeddings", "bfloat16", "layers"],
    "conv": ["everything", "saved"],
}
CLEAN = (ValueError, OSError)  # FileNotFoundError is an OSError
DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


def split(data):
    """Header and body of a safetensors file."""
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def join(header, body, *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + body


# Mutations of the weights: bytes and a random generator to bytes.


def truncated(data, rng):
    return data[: rng.integers(len(data))]


def extended(data, rng):
    return data + rng.bytes(int(rng.integers(1, 50)))


def flipped_bits(data, rng):
    out = bytearray(data)
    for at in rng.integers(len(data), size=rng.integers(1, 4)):
        out[at] ^= 1 << int(rng.integers(8))
    return bytes(out)


def flipped_header_bits(data, rng):
    (n,) = struct.unpack("<Q", data[:8])
    out = bytearray(data)
    out[int(rng.integers(8 + n))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def random_block(data, rng):
    at, size = int(rng.integers(len(data))), int(rng.integers(1, 64))
    return data[:at] + rng.bytes(size) + data[at + size :]


def renamed(data, rng):
    header, body = split(data)
    name = str(rng.choice([n for n in header if n != "__metadata__"]))
    new = str(rng.choice([name + "x", name[1:], name.replace("lora", "LORA"), name.upper(), "",
                          name.replace("base_model.model.", ""), name.replace("layer.0", "layer.7"),
                          "../" + name, "\x00"]))  # fmt: skip
    return join({new if n == name else n: x for n, x in header.items()}, body)


def swapped(data, rng):
    """Two tensors of one shape change names: nothing is wrong with the file, so it is read as it is."""
    header, body = split(data)
    names = [n for n in header if n != "__metadata__"]
    one, two = (str(n) for n in rng.choice(names, 2))
    header[one], header[two] = header[two], header[one]
    return join(header, body)


def dropped(data, rng):
    header, body = split(data)
    del header[str(rng.choice([n for n in header if n != "__metadata__"]))]
    return join(header, body)


def lying_entry(data, rng):
    header, body = split(data)
    entry = header[str(rng.choice([n for n in header if n != "__metadata__"]))]
    begin, end = entry["data_offsets"]
    huge = int(rng.choice([2**31, 2**40, 2**53, 2**62]))
    choice = int(rng.integers(9))
    if choice == 0:
        entry["shape"] = [huge, huge]
    elif choice == 1:
        entry["data_offsets"] = [begin, huge]
    elif choice == 2:
        entry["data_offsets"] = [end, begin]
    elif choice == 3:
        entry["data_offsets"] = [0, end - begin]
    elif choice == 4:
        entry["shape"] = entry["shape"][::-1]
    elif choice == 5:
        entry["dtype"] = str(rng.choice(["F64", "F16", "I32", "U8", "F8_E4M3", "BOOL", "X", ""]))
    elif choice == 6:
        entry["shape"] = [-1, *entry["shape"]]
    elif choice == 7:
        entry["shape"] = entry["shape"] + [1]
    else:
        entry["shape"] = [1] * 10_000 + entry["shape"]
    return join(header, body)


def lying_length(data, rng):
    header, body = split(data)
    lengths = [0, 1, 7, len(data), len(data) * 2, 2**24, 2**27, 2**32, 2**63, 2**64 - 1]
    return join(header, body, length=int(rng.choice(np.array(lengths, object))))


def deep_header(data, rng):
    _, body = split(data)
    depth = int(rng.choice([10, 1000, 100_000]))
    opening = rng.choice(['{"a":', "[", '{"__metadata__":{"a":'])
    return join(str(opening).encode() * depth, body)


def many_entries(data, rng):
    header, body = split(data)
    end = len(body)
    more = {f"t{k}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for k in range(500)}
    return join(header | more, body)


def not_finite(data, rng):
    header, body = split(data)
    entry = header[str(rng.choice([n for n in header if n != "__metadata__"]))]
    at = entry["data_offsets"][0]
    bad = {"F32": b"\x00\x00\xc0\x7f", "BF16": b"\xc0\x7f"}[entry["dtype"]]
    return join(header, body[:at] + bad + body[at + len(bad) :])


def padded(data, rng):
    """Neutral: other white space, another order of the header's keys, no metadata."""
    header, body = split(data)
    header.pop("__metadata__", None)
    names = list(header)
    rng.shuffle(names)
    return join({n: header[n] for n in names}, body)


# Mutations of the config.


def _words(change):
    return lambda data, rng: json.dumps(change(json.loads(data), rng)).encode()


def _other_value(words, rng):
    values = [None, True, False, 0, 1, -1, 2**70, 1.5, 1e308, "", "x", "query", [], ["query"], [3], {},
              {"query": 2}, {"q": -1}, {"": 1}, {"(": 1}, ["query"] * 1000, "(a+)+$", "all-linear", ".*"]  # fmt: skip
    name = str(rng.choice(list(words)))
    return words | {name: values[int(rng.integers(len(values)))]}


def _without(words, rng):
    gone = str(rng.choice(list(words)))
    return {n: x for n, x in words.items() if n != gone}


def _unknown(words, rng):
    return words | {
        f"new_{rng.integers(99)}": [None, False, True, 0, 3, "on", {}, [1]][rng.integers(8)]
    }


def _other_ranks(words, rng):
    return words | {"r": int(rng.integers(-1, 9)), "rank_pattern": {"0": int(rng.integers(-1, 4))}}


def deep_config(data, rng):
    depth = int(rng.choice([10, 1000, 200_000]))
    return b'{"peft_type":' + (b"[" if rng.random() < 0.5 else b'{"a":') * depth


def big_config(data, rng):
    return data[:-1] + b', "x": "' + b"y" * int(rng.choice([10, 10_000, 6 << 20])) + b'"}'


OF_WEIGHTS = [
    truncated, extended, flipped_bits, flipped_header_bits, random_block, renamed, swapped, dropped,
    lying_entry, lying_length, deep_header, many_entries, not_finite, padded,
]  # fmt: skip
OF_CONFIG = {
    "truncated": truncated, "flipped_bits": flipped_bits, "random_block": random_block,
    "other_value": _words(_other_value), "without": _words(_without), "unknown": _words(_unknown),
    "other_ranks": _words(_other_ranks), "deep": deep_config, "big": big_config,
}  # fmt: skip
MUTATIONS = [(WEIGHTS, f.__name__, f) for f in OF_WEIGHTS]
MUTATIONS += [(CONFIG, name, f) for name, f in OF_CONFIG.items()]
PER_CASE = 12  # for each of 8 directories and 23 mutations: 2208 directories


@pytest.fixture(scope="module")
def bases():
    fn, table = torch_like.bert_model(GOLDENS / "bert" / "base")
    found = {"bert": table, "conv": torch_like.conv_names()}
    load = lambda name: torch_like.load(GOLDENS / name / "base" / "model.safetensors", found[name])
    return {name: (table, load(name)) for name, table in found.items()}


@pytest.mark.parametrize(
    "file, name, mutate", MUTATIONS, ids=[f"{f[8:13]}-{n}" for f, n, _ in MUTATIONS]
)
def test_damaged_directories(bases, file, name, mutate, tmp_path):
    number = next(k for k, m in enumerate(MUTATIONS) if m[:2] == (file, name))
    loaded = total = 0
    for base, cases in SOURCES.items():
        table, params = bases[base]
        for case in cases:
            source = GOLDENS / base / case
            for seed in range(PER_CASE):
                rng = np.random.default_rng([number, total, seed])
                total += 1
                files = {f: (source / f).read_bytes() for f in (WEIGHTS, CONFIG)}
                files[file] = mutate(files[file], rng)
                for f, data in files.items():
                    (tmp_path / f).write_bytes(data)
                loaded += checked(tmp_path, params, table, files)
    assert total == 96
    if name == "padded":
        assert loaded == total


def checked(directory, params, table, files):
    """1 if the directory loads (and then it loads right), 0 if it is refused."""
    begun = time.process_time()
    tracemalloc.start()
    try:
        adapter, config = load_peft(directory, params, names=table)
    except CLEAN as error:
        assert str(error) and len(str(error)) < 20_000
        return 0
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100e6  # the largest file here has 6 MB; its objects take a few times that
        assert time.process_time() - begun < 20  # some hundredths, without the tracing
    verify(adapter, config, files)
    return 1


def verify(adapter, config, files):
    """Compares what was loaded with the bytes: every tensor is used, and none is made up."""
    header, body = split(files[WEIGHTS])
    header.pop("__metadata__", None)
    values = [read(entry, body) for entry in header.values()]
    sums = sorted(float(np.abs(x).sum()) for x in values)
    words = json.loads(files[CONFIG])
    nodes = adapters.nodes(adapter)
    kernels = [x for x in nodes.values() if isinstance(x, LowRank)]
    factors = [f for n, x in header.items() if "lora_" in n for f in [read(x, body)]]
    ours = [np.asarray(f, np.float64) for x in kernels for f in (x.a, x.b)]
    assert len(ours) == len(factors) and len(nodes) <= len(sums)
    mass = lambda arrays: sorted(float(np.abs(x).sum()) for x in arrays)
    np.testing.assert_allclose(mass(ours), mass(factors), rtol=1e-6)
    full = [np.asarray(x, np.float64) for x in nodes.values() if not isinstance(x, LowRank)]
    in_file = mass(x for n, x in zip(header, values, strict=True) if "lora_" not in n)
    for total in mass(full):
        assert min(abs(total - other) for other in in_file) <= 1e-5 * max(total, 1)
    if not words.get("rank_pattern") and not words.get("alpha_pattern"):
        rank, alpha = words.get("r", 8), words.get("lora_alpha", 8)
        scale = alpha / (math.sqrt(rank) if words.get("use_rslora") else rank)
        assert {float(x.scale) for x in kernels} == {float(np.float32(scale))}
    assert config.dropout == words.get("lora_dropout", 0.0)


def read(entry, body):
    begin, end = entry["data_offsets"]
    raw = body[begin:end]
    if entry["dtype"] == "BF16":  # the upper half of a float32
        bits = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(entry["shape"]).astype(np.float64)
    return np.frombuffer(raw, DTYPES[entry["dtype"]]).reshape(entry["shape"]).astype(np.float64)
