"""``modules_to_save`` of a weight with several uses: read if all uses stay one weight, else refused."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import adapter as adapters
from lora_jax.models import checkpoints
from lora_jax.peft import load_peft, save_peft
from tests.helpers import places

GOLDEN = places.GOLDENS / "tokens" / "llama_tied"  # made by scripts/make_token_goldens.py
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LEAF = "params/model/embed_tokens/embedding"


def write(directory, saved, tables, **words):
    """The golden's factors, with tables in place of its rows."""
    shutil.copytree(GOLDEN, directory, dirs_exist_ok=True)
    about = json.loads((GOLDEN / CONFIG).read_text())
    about |= {"trainable_token_indices": None, "modules_to_save": saved} | words
    (directory / CONFIG).write_text(json.dumps(about))
    tensors = safetensors.numpy.load_file(GOLDEN / WEIGHTS)
    tensors = {n: x for n, x in tensors.items() if "lora_" in n}
    tensors |= {PREFIX + n: x for n, x in tables.items()}
    safetensors.numpy.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def base():
    loaded = checkpoints.load(GOLDEN / "base", head="causal-lm")
    return loaded.params, checkpoints.names(loaded)


TABLE = np.random.default_rng(0).normal(size=(99, 32)).astype(np.float32)


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (["embed_tokens", "lm_head"], {}),
        (["embed_tokens"], {"ensure_weight_tying": True}),
        (["lm_head"], {"ensure_weight_tying": True}),
    ],
)
def test_all_uses_of_one_weight(saved, words, base, tmp_path):
    params, names = base
    directory = write(tmp_path / "a", saved, {EMBEDDING: TABLE, HEAD: TABLE}, **words)
    adapter, config = load_peft(directory, params, names=names)
    np.testing.assert_array_equal(adapters.nodes(adapter)[LEAF], TABLE)
    save_peft(tmp_path / "b", params, adapter, config, names=names)
    again, _ = load_peft(tmp_path / "b", params, names=names)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize(
    ("saved", "tables", "message"),
    [
        (["embed_tokens"], {EMBEDDING: TABLE}, "replaces the use in model.embed_tokens.weight by"),
        (["lm_head"], {HEAD: TABLE}, "replaces the use in lm_head.weight by itself"),
        (
            ["embed_tokens", "lm_head"], {EMBEDDING: TABLE, HEAD: TABLE + 1},
            "differs from its other copy",
        ),
    ],
)  # fmt: skip
def test_a_use_by_itself_is_refused(saved, tables, message, base, tmp_path):
    """In PEFT each use then has a weight of its own, which one leaf can't hold."""
    params, names = base
    with pytest.raises(ValueError, match=message):
        load_peft(write(tmp_path, saved, tables), params, names=names)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_factors_of_one_use_are_refused(target, base, tmp_path):
    params, names = base
    directory = write(tmp_path, None, {}, target_modules=["q_proj", target])
    with pytest.raises(ValueError, match="changes the use in"):
        load_peft(directory, params, names=names)
