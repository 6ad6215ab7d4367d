"""A base whose kernels are quantized, through the programs that train on it."""

import numpy as np
import pytest

import lora_jax as lora
from configs import instruct_llama
from lora_jax.models import checkpoints
from lora_jax.paths import named_leaves
from lora_jax.quantized import is_quantized
from lora_jax.tasks import from_config, instruction_tuning, language_model
from lora_jax.training.train import train
from tests.helpers import tiny_llama


def config(root, **changes):
    made = instruct_llama.get_config()
    made.update_from_flattened_dict(
        {
            "model.name": str(root / "model"), "model.dtype": "float32", "batch_size": 4,
            "data.train": str(root / "data.jsonl"), "data.holdout": 6, "data.max_length": 48,
            "eval_batch_size": 2, "epochs": 2, "lora.rank": 8, "lora.alpha": 16.0,
            "optimizer.learning_rate": 0.01, "model.quantize": "nf4_double", **changes,
        }
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("quantized")
    tiny_llama.checkpoint(made / "model")
    tiny_llama.data(made / "data.jsonl")
    return made


@pytest.mark.slow
def test_a_run_learns_and_is_loaded_again(root):
    c = config(root)
    task, settings = instruction_tuning.make_task(c)
    train(task, c, settings, root / "run")
    found = language_model.load(root / "run" / "adapter")
    leaves = {n: x for n, x in named_leaves(found.loaded.params).items() if is_quantized(x)}
    assert len(leaves) == 7 and not any("embed" in name or "lm_head" in name for name in leaves)
    merged = lora.merge(found.loaded.params, found.adapter)
    batch = next(iter(task.eval_batches()))
    inputs = {name: x for name, x in batch.items() if name != "index"}
    lifted = lora.lift(task.apply, dropout=0.0)
    bound = lora.bind(found.loaded.params, found.adapter)
    losses = lifted(bound, inputs, None).loss, task.apply(merged, inputs, None).loss
    np.testing.assert_allclose(*losses, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("scheme", ["nf5", 4])
def test_schemes_that_do_not_exist(root, scheme):
    with pytest.raises(ValueError, match=r"model.quantize must be one of \['nf4'"):
        from_config.dtypes({"quantize": scheme})


def test_widening_keeps_codes(root):
    loaded = checkpoints.load(
        root / "model", head="causal-lm", quantize="int8", param_dtype="bfloat16"
    )
    wide = language_model.adapter_files.widen(loaded)
    for name, x in named_leaves(wide.params).items():
        assert x.dtype == np.float32, name
        before = named_leaves(loaded.params)[name]
        assert not is_quantized(x) or x.codes is before.codes
