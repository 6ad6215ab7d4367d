"""Files damaged at random: a clean error or the right values, in bounded time and memory.

Adapters in the native format, base checkpoints, and checkpoints of a run; PEFT's directories are in
``tests/peft``. By default a sample; with ``-m slow`` ten thousand files.
"""

import contextlib
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import paths
from lora_jax.adapter import as_data
from lora_jax.models import checkpoints
from lora_jax.training import checkpointing, metric_writer, workdirs
from tests.helpers import damaged_files, limits, tiny_encoder, tiny_llama, tiny_t5, tiny_task

SAMPLE, MANY = 3, 140  # files for each case


pytestmark = pytest.mark.usefixtures("quiet")


def amounts(count=MANY):
    return [SAMPLE, pytest.param(count, marks=pytest.mark.slow)]


# Adapters in the native format.

BASE = {
    "block": {"query": {"kernel": np.ones((6, 2, 4), np.float32)}, "bias": np.ones(5, np.float32)},
    "out": {"kernel": np.ones((8, 3), np.float32)},
}
CONFIG = lora.LoRAConfig(rank=2, targets=("query", "out"), train=("block/bias",))


def apply(params, x):
    return (
        jnp.einsum("bi,ihd->bhd", x, params["block"]["query"]["kernel"]).reshape(-1, 8)
        @ (params["out"]["kernel"])
    )


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    directory = tmp_path_factory.mktemp("native")
    adapter = lora.init(jax.random.key(0), apply, BASE, CONFIG, np.ones((1, 6), np.float32))
    lora.save(directory, adapter, CONFIG, base="sha256:x", metadata={"labels": ["a", "b"], "n": 3})
    (weights,) = directory.glob("*.safetensors")
    return (directory / "adapter.json").read_bytes(), weights.name, weights.read_bytes()


def told(about, data):
    """The description, with the SHA-256 of other weights."""
    words = json.loads(about)
    words["weights"]["sha256"] = hashlib.sha256(data).hexdigest()
    return json.dumps(words).encode()


NATIVE = [("weights", f.__name__, f) for f in damaged_files.OF_WEIGHTS]
NATIVE += [("known weights", f.__name__, f) for f in damaged_files.OF_WEIGHTS]
NATIVE += [("adapter.json", name, f) for name, f in damaged_files.OF_JSON.items()]
name_of = lambda case: f"{case[0]}-{case[1]}"


@pytest.mark.parametrize("count", amounts())
@pytest.mark.parametrize("case", NATIVE, ids=name_of)
def test_damaged_adapters(native, tmp_path, case, count):
    """What loads can be merged, and then it is what the file holds."""
    file, name, mutate = case
    for seed in range(count):
        rng = np.random.default_rng([NATIVE.index(case), seed])
        about, weights, data = native
        if file == "adapter.json":
            about = mutate(about, rng)
        else:
            data = mutate(data, rng)
            about = told(about, data) if file == "known weights" else about
        (tmp_path / "adapter.json").write_bytes(about)
        (tmp_path / weights).write_bytes(data)
        size = len(about) + len(data)
        error, found = limits.refused(lambda: lora.load(tmp_path, BASE, base="sha256:x"), size)
        assert error is None or name != "padded" or file == "weights"
        if found:
            merged = lora.merge(BASE, found[0])
            assert jax.tree.map(np.shape, merged) == jax.tree.map(np.shape, BASE)
            header, body = damaged_files.split(data)
            count_in_file = sum(x != "__metadata__" for x in header)
            assert len(jax.tree.leaves(as_data(found[0]))) == count_in_file
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(found[0]))


# Base checkpoints.

BASES = {
    "bert": (lambda d: tiny_encoder.checkpoint(d), "classifier"),
    "roberta": (lambda d: tiny_encoder.checkpoint(d, kind="roberta"), "classifier"),
    "distilbert": (lambda d: tiny_encoder.checkpoint(d, kind="distilbert"), "classifier"),
    "llama": (tiny_llama.checkpoint, "causal-lm"),
    "t5": (tiny_t5.checkpoint, "seq2seq-lm"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}
    for kind, (make, head) in BASES.items():
        directory = make(tmp_path_factory.mktemp(kind) / "model")
        loaded = checkpoints.load(directory, head=head)
        made[kind] = directory, head, paths.named_leaves(loaded.params)
    return made


BASE_CASES = [("model.safetensors", f.__name__, f) for f in damaged_files.OF_WEIGHTS]
BASE_CASES += [("config.json", name, f) for name, f in damaged_files.OF_JSON.items()]


@pytest.mark.parametrize("count", [1, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", BASE_CASES, ids=name_of)
def test_damaged_bases(bases, tmp_path, case, count):
    file, name, mutate = case
    for number in range(count * (1 if count == 1 else len(BASES))):
        rng = np.random.default_rng([BASE_CASES.index(case), number, 1])
        kind = list(BASES)[(number + BASE_CASES.index(case)) % len(BASES)]
        source, head, wanted = bases[kind]
        directory = tmp_path / str(number)
        shutil.copytree(source, directory)
        path = directory / file
        path.write_bytes(mutate(path.read_bytes(), rng))
        size = sum(p.stat().st_size for p in directory.iterdir())
        error, found = limits.refused(lambda: checkpoints.load(directory, head=head), size)
        if found:
            leaves = paths.named_leaves(found.params)
            if file == "model.safetensors":
                assert {n: x.shape for n, x in leaves.items()} == {
                    n: x.shape for n, x in wanted.items()
                }
            assert all(np.isfinite(x).all() for x in leaves.values())
        shutil.rmtree(directory)


@pytest.mark.parametrize("count", amounts(20))
@pytest.mark.parametrize("name", damaged_files.OF_JSON)
def test_damaged_indices(bases, tmp_path, name, count):
    """Of a checkpoint in two shards: nothing outside its directory is ever read."""
    source, head, _ = bases["llama"]
    directory = tmp_path / "model"
    shutil.copytree(source, directory)
    data = (directory / "model.safetensors").read_bytes()
    header, body = damaged_files.split(data)
    names = sorted(n for n in header if n != "__metadata__")
    for k, some in enumerate((names[::2], names[1::2])):
        (directory / f"model-{k}.safetensors").write_bytes(part(header, body, some))
    (directory / "model.safetensors").rename(tmp_path / "outside.safetensors")
    about = {"weight_map": {n: f"model-{k % 2}.safetensors" for k, n in enumerate(names)}}
    for seed in range(count):
        rng = np.random.default_rng([list(damaged_files.OF_JSON).index(name), seed, 2])
        text = damaged_files.OF_JSON[name](json.dumps(about).encode(), rng)
        (directory / "model.safetensors.index.json").write_bytes(text)
        _, found = limits.refused(
            lambda: checkpoints.load(directory, head=head), len(data) + len(text)
        )
        assert found is None or all(p.parent == directory for p in found.checkpoint.weights)


def part(header, body, some):
    tensors, pieces, at = {}, [], 0
    for name in some:
        begin, end = header[name]["data_offsets"]
        tensors[name] = header[name] | {"data_offsets": [at, at + end - begin]}
        pieces.append(body[begin:end])
        at += end - begin
    return damaged_files.join(tensors, b"".join(pieces))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "{root}/outside", ".."])
def test_shards_that_lead_elsewhere(bases, tmp_path, name):
    source, head, _ = bases["llama"]
    directory = tmp_path / "model"
    shutil.copytree(source, directory)
    (directory / "model.safetensors").rename(tmp_path / "outside.safetensors")
    about = {"weight_map": {"model.norm.weight": name.format(root=tmp_path)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="lacks the shards"):
        checkpoints.load(directory, head=head)


@pytest.mark.parametrize(
    "kind, changes, says",
    [
        ("bert", {"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, .* hold 39 tensors"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000"),
        ("t5", {"relative_attention_max_distance": 10**9}, "max_distance must be at most 1048576"),
        ("bert", {"vocab_size": 10**400}, "vocab_size must be below 2.*31, got one of 1329 bits"),
        ("bert", {"layer_norm_eps": 10**400}, "layer_norm_eps must be a positive number below"),
        ("bert", {"hidden_act": ["gelu"]}, "hidden_act .* is not one of"),
        ("llama", {"model_type": {}}, "model_type is {} in this config"),
    ],
)
def test_absurd_configs(bases, tmp_path, kind, changes, says):
    """Each was found by damage at random, and took all memory or raised another error."""
    source, head, _ = bases[kind]
    shutil.copytree(source, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=says), limits.bounded(10_000):
        checkpoints.load(tmp_path / "model", head=head)


# Checkpoints of a run.

PROGRESS = {"best_step": 3, "best_score": 0.1, "pending": [[0.5, 1.0, 2.0]], "seconds": 1 / 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    state = jax.tree.map(lambda x: jnp.asarray(x) + 1, tiny_task.state())
    with checkpointing.manager(directory) as manager:
        checkpointing.save(manager, 7, state, PROGRESS)
    return directory, state


OF_BYTES = [
    damaged_files.truncated, damaged_files.extended, damaged_files.flipped_bits, damaged_files.random_block,
    damaged_files.deep_json, damaged_files.not_utf8,
]  # fmt: skip


@pytest.mark.parametrize("count", amounts(170))
@pytest.mark.parametrize("mutate", OF_BYTES, ids=lambda f: f.__name__)
def test_damaged_checkpoints(saved, tmp_path, mutate, count):
    """It is refused, or what comes back is what was saved, to the bit."""
    source, state = saved
    files = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
    size = sum((source / p).stat().st_size for p in files)
    wanted = [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]
    refusals = 0
    for seed in range(count):
        rng = np.random.default_rng([OF_BYTES.index(mutate), seed, 3])
        directory = tmp_path / str(seed)
        shutil.copytree(source, directory)
        path = directory / files[rng.integers(len(files))]
        if data := path.read_bytes():
            path.write_bytes(mutate(data, rng))
        error, found = limits.refused(lambda: restored(directory), size, traced=False)
        refusals += error is not None
        if found:
            assert [np.asarray(x).tobytes() for x in jax.tree.leaves(found[0])] == wanted
            assert found[1] == PROGRESS
        else:
            assert "No checkpoint" in str(error)
        shutil.rmtree(directory)
    assert refusals or count == SAMPLE


@pytest.mark.parametrize("count", amounts(80))
@pytest.mark.parametrize("name", damaged_files.OF_JSON)
def test_damaged_descriptions(saved, tmp_path, name, count):
    """Also with the SHA-256 that they would have to have: then they are of another state."""
    source, state = saved
    about = tmp_path / "run" / "7" / "about" / "metadata"
    for seed in range(count):
        rng = np.random.default_rng([list(damaged_files.OF_JSON).index(name), seed, 4])
        shutil.copytree(source, tmp_path / "run")
        data = about.read_bytes()
        if seed % 2:
            words = json.loads(data)
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                content = json.dumps(words["content"]).encode()
                words["content"] = json.loads(damaged_files.OF_JSON[name](content, rng))
            words["sha256"] = checkpointing._json_sha256(words["content"])
            about.write_text(json.dumps(words))
        else:
            about.write_bytes(damaged_files.OF_JSON[name](data, rng))
        error, found = limits.refused(lambda: restored(tmp_path / "run"), 0, traced=False)
        if found:
            tiny_task.same(found[0], state)
            assert seed % 2 or found[1] == PROGRESS
        shutil.rmtree(tmp_path / "run")


def restored(directory):
    with checkpointing.manager(directory) as manager:
        return checkpointing.restore(manager, tiny_task.state(), say=lambda text: None)


# Files of a run.


@pytest.mark.parametrize("count", amounts(100))
@pytest.mark.parametrize("name", damaged_files.OF_JSON)
def test_damaged_files_of_a_run(tmp_path, name, count):
    config = tiny_task.config()
    lines = [json.dumps({"step": k, "loss": 0.5}).encode() for k in range(1, 5)]
    for seed in range(count):
        rng = np.random.default_rng([list(damaged_files.OF_JSON).index(name), seed, 5])
        (tmp_path / "config.json").unlink(missing_ok=True)
        workdirs.claim(tmp_path, config)
        data = (tmp_path / "config.json").read_bytes()
        (tmp_path / "config.json").write_bytes(damaged_files.OF_JSON[name](data, rng))
        limits.refused(lambda: workdirs.check(tmp_path, config), 2_000_000)
        at = int(rng.integers(len(lines)))
        damaged = [*lines[:at], damaged_files.OF_JSON[name](lines[at], rng), *lines[at + 1 :]]
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(damaged) + b"\n")
        _, found = limits.refused(lambda: metric_writer.read(tmp_path / "metrics.jsonl"), 2_000_000)
        assert [json.dumps(x).encode() for x in found[:at]] == lines[:at]


def test_too_much_memory_would_be_noticed():
    with pytest.raises(MemoryError), limits.bounded(10):
        np.zeros(2 * limits.ROOM, np.uint8)
    with pytest.raises(AssertionError), limits.bounded(10):
        bytearray(30_000_000)
