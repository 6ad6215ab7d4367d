"""The lines that `export --peft` prints open the adapter as printed, and it computes the same."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import lora_jax as lora  # noqa: E402
from lora_jax.models import checkpoints, hub  # noqa: E402
from lora_jax.tasks import classification  # noqa: E402
from tests.helpers import programs, tiny_encoder, tiny_llama  # noqa: E402
from tests.helpers.comparisons import perturbed  # noqa: E402
from tests.helpers.places import ROOT  # noqa: E402

IDS = np.random.default_rng(0).integers(6, 18, (2, 7))
RUN = f"""
import torch
model.eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor({IDS.tolist()})).logits
print([float(x) for x in logits.float().flatten()])
"""


def adapt(loaded, **fields):
    """An adapter of numbers that are not zero, and its settings."""
    settings = lora.LoRAConfig(rank=2, targets=loaded.family.targets, **fields)
    inputs = loaded.family.inputs(loaded.head)
    adapter = lora.init(jax.random.key(0), loaded.model.apply, loaded.params, settings, *inputs)
    return perturbed(adapter, size=0.1), settings


def export(adapter, out):
    """The lines that the program prints, run in the folder that it was run in."""
    printed = programs.succeed("export", f"--adapter={adapter}", f"--out={out}", "--peft")
    code = printed.partition("\n\n")[2] + RUN
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("count, head", [(1, 0), (3, 2), (7, 0)])
def test_a_classifier_of_any_number_of_labels(count, head, tmp_path):
    """Also over a base that has a head of another size, of which nothing is taken."""
    base = tiny_encoder.checkpoint(tmp_path / "base")
    if head:
        loaded = classification.load_model(str(base), num_labels=head)
        labels = [f"label {k}" for k in range(head)]
        checkpoints.save_hf(
            tmp_path / "headed", loaded.params, loaded.checkpoint, head="classifier", labels=labels
        )
        base = tmp_path / "headed"
    loaded = classification.load_model(str(base), num_labels=count)
    adapter, settings = adapt(loaded, train=("classifier", "pooler"))
    about = {
        "task": "text-classification", "max_length": 8, "buckets": [8], "seed": 0,
        "model": {"name": str(base), "dtype": "float32", "labels": [str(k) for k in range(count)]},
    }  # fmt: skip
    lora.save(tmp_path / "adapter", adapter, settings, base=loaded.base_id, metadata=about)
    theirs = export(tmp_path / "adapter", tmp_path / "it's out")
    mask = np.ones_like(IDS)
    ours = loaded.model.apply(lora.merge(loaded.params, adapter), IDS, mask)
    np.testing.assert_allclose(theirs, np.ravel(ours), rtol=0, atol=2e-5)


def test_a_language_model_with_a_tokenizer_of_its_own(tmp_path):
    base = tiny_llama.checkpoint(tmp_path / "base")
    loaded = checkpoints.load(base, head="causal-lm")
    adapter, settings = adapt(loaded)
    about = {"task": "language-modelling", "model": {"name": str(base)}}
    lora.save(tmp_path / "adapter", adapter, settings, base=loaded.base_id, metadata=about)
    for name in hub.TOKENIZER_FILES:
        if (base / name).is_file():
            (tmp_path / "adapter" / name).write_bytes((base / name).read_bytes())
    theirs = export(tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    ours = loaded.model.apply(lora.merge(loaded.params, adapter), IDS, np.ones_like(IDS))
    np.testing.assert_allclose(theirs, np.ravel(ours), rtol=0, atol=2e-5)
