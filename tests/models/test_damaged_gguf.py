"""GGUF files damaged at random: a clean error or numbers, in bounded time and memory."""

import struct

import numpy as np
import pytest

from lora_jax import paths
from lora_jax.data import chat_template
from lora_jax.models import checkpoints, gguf, gguf_models
from lora_jax.quantized import as_array
from tests.helpers import damaged_files, gguf_files, gguf_tokens, limits, slow, tiny_llama

pytestmark = pytest.mark.usefixtures("quiet")
KINDS = ("F32", "Q4_0", "Q4_1", "Q8_0")
SIZES = {
    "rms_norm_eps": 1e-5, "head_dim": 8, "rope_theta": 500.0, "intermediate_size": 64,
    "num_hidden_layers": 1, "vocab_size": 261, "tie_word_embeddings": False,
}  # fmt: skip


def header_end(data):
    """Where the numbers begin, by the last name of a tensor."""
    return data.rfind(b".weight") + 40


def in_header(change):
    """The same change, but only in what stands before the numbers."""

    def mutate(data, rng):
        end = header_end(data)
        return change(data[:end], rng) + data[end:]

    mutate.__name__ = f"header_{change.__name__}"
    return mutate


def lying_number(data, rng):
    """Some eight bytes, of whatever meaning, become a number that is absurd."""
    at = int(rng.integers(4, header_end(data)))
    number = int(rng.choice(np.array([0, 1, 2**16, 2**24, 2**31, 2**40, 2**63, 2**64 - 1], object)))
    return data[:at] + struct.pack("<Q", number) + data[at + 8 :]


def other_count(data, rng):
    """Of tensors or of keys."""
    at = int(rng.choice([8, 16]))
    number = int(rng.choice(np.array([0, 1, 5, 60, 10_000, 2**17, 2**32, 2**63], object)))
    return data[:at] + struct.pack("<Q", number) + data[at + 8 :]


def other_type(data, rng):
    """The word after a key or a tensor's name becomes another small number."""
    names = [b"attention.head_count", b"tokens", b"scores", b"token_type", b"merges", b"pre"]
    names += [
        b"attn_q.weight",
        b"token_embd.weight",
        b"block_count",
        b"freq_base",
        b"chat_template",
    ]
    at = data.find(names[rng.integers(len(names))])
    at = at + int(rng.integers(4, 40)) if at > 0 else 30
    return data[:at] + struct.pack("<I", int(rng.integers(0, 45))) + data[at + 4 :]


def other_name(data, rng):
    names = [b"blk.0", b"llama.", b"tokenizer.ggml", b"weight", b"general", b"attn_k", b"ffn_up"]
    name = names[rng.integers(len(names))]
    return data.replace(name, rng.bytes(len(name)) if rng.random() < 0.5 else name[::-1], 1)


def not_finite(data, rng):
    """Halves and floats of the numbers."""
    at = int(rng.integers(header_end(data), len(data) - 8))
    bad = [b"\x00\x7e" * 4, b"\x00\x00\xc0\x7f" * 2, b"\x00\x7c" * 4, b"\xff" * 8]
    return data[:at] + bad[rng.integers(4)] + data[at + 8 :]


def zeros(data, rng):
    at = int(rng.integers(len(data)))
    return data[:at] + bytes(len(data) - at)


MUTATIONS = [
    damaged_files.truncated, damaged_files.extended, damaged_files.flipped_bits, damaged_files.random_block,
    in_header(damaged_files.flipped_bits), in_header(damaged_files.random_block), damaged_files.not_utf8,
    in_header(damaged_files.truncated), in_header(damaged_files.extended), lying_number, other_count, other_type, other_name, not_finite, zeros,
]  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A file with merges of bytes and one with pieces, each in several types."""
    root, found = tmp_path_factory.mktemp("gguf"), []
    merges = gguf_tokens.words(gguf_tokens.bpe(size=261))
    pieces = gguf_tokens.pieces()
    for k, (words, kind) in enumerate(zip((merges, pieces) * 2, KINDS, strict=True)):
        size = len(words["tokenizer.ggml.tokens"])
        folder = tiny_llama.checkpoint(root / str(k), **SIZES | {"vocab_size": size})
        path = gguf_files.convert(folder, root / f"{k}.gguf", kind, words=words)
        loaded = checkpoints.load(path, head="causal-lm")
        shapes = {n: x.shape for n, x in paths.named_leaves(loaded.params).items()}
        found.append((path.read_bytes(), shapes))
    return found


def everything(path):
    """All that is ever read of a file."""
    checkpoint = checkpoints.resolve(path)
    for tensor in gguf_models.open_tensors(path).values():
        if tensor.layout.split is not None and len(tensor.shape) == 2:
            gguf.read_codes(tensor)
    return checkpoint, checkpoints.load(path, head="causal-lm")


def words(path):
    checkpoint = checkpoints.resolve(path)
    tokenizer = checkpoints.load_tokenizer(checkpoint)
    assert tokenizer.encode("what is 12?\n<s>é").ids
    template = chat_template.find(checkpoint)
    return tokenizer, template


@pytest.mark.parametrize("count", [10, pytest.param(140, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mutate", slow.after(1, MUTATIONS), ids=lambda f: f.__name__)
def test_damaged_files(originals, tmp_path, mutate, count):
    """What loads has the shapes of the model, and is finite."""
    path, refusals = tmp_path / "m.gguf", 0
    for seed in range(count):
        rng = np.random.default_rng([MUTATIONS.index(mutate), seed])
        original, shapes = originals[seed % len(originals)]
        data = mutate(original, rng)
        path.write_bytes(data)
        header, _ = limits.refused(lambda: gguf.read_header(path), len(data))
        assert header is None or isinstance(header, ValueError)
        error, found = limits.refused(lambda: everything(path), len(data))
        assert error is None or isinstance(error, ValueError)
        limits.refused(lambda: words(path), len(data))
        refusals += error is not None
        if found:
            leaves = paths.named_leaves(found[1].params)
            assert {n: x.shape for n, x in leaves.items()} == shapes
            assert all(np.isfinite(as_array(x)).all() for x in leaves.values())
    assert refusals or mutate in (damaged_files.extended, damaged_files.random_block)


def test_an_array_of_empty_words(tmp_path):
    """Each is eight bytes in the file, and little more in memory."""
    body = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_files.string("a")
    data = body + struct.pack("<IIQ", 9, 8, 200_000) + bytes(8 * 200_000)
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with limits.bounded(len(data)):
        assert gguf.read_header(path).metadata["a"] == [""] * 200_000
