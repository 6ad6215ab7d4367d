"""Adapter directories damaged at random: a clean error or the right adapter, never anything else.

What a loaded adapter must be is worked out here from the mutated files themselves: wherever the
loader accepts, its factors and scales are compared with an own reading of the bytes.
"""

import json
import math
import time
import tracemalloc

import numpy as np
import pytest

from lora_jax import adapter as adapters
from lora_jax.lowrank import LowRank
from lora_jax.peft import load_peft
from tests.helpers import places, slow, torch_like
from tests.helpers.damaged_files import OF_CONFIG, OF_WEIGHTS, split

GOLDENS = places.GOLDENS / "peft"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SOURCES = {
    "bert": ["qv", "rslora_patterns", "bias_all", "embeddings", "bfloat16", "layers"],
    "conv": ["everything", "saved"],
}
CLEAN = (ValueError, OSError)  # FileNotFoundError is an OSError
DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


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
    "file, name, mutate", slow.after(8, MUTATIONS), ids=[f"{f[8:13]}-{n}" for f, n, _ in MUTATIONS]
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
