"""Adapters of PEFT's whose base is quantized lead to it, or to a message that says what to give."""

import json
import shutil

import pytest

from lora_jax import peft
from lora_jax.models import checkpoints
from lora_jax.paths import named_leaves
from lora_jax.quantized import is_quantized
from lora_jax.tasks import language_model
from tests.helpers.quantized_checkpoints import GOLDENS, load

NAME = "unsloth/llama-3-8b-bnb-4bit"
LOADED = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


def adapter(tmp_path, **words):
    """The golden adapter with other words."""
    directory = shutil.copytree(GOLDENS / "adapter", tmp_path / "adapter")
    path = directory / "adapter_config.json"
    about = {"base_model_name_or_path": NAME, "task_type": "CAUSAL_LM"}
    path.write_text(json.dumps(json.loads(path.read_text()) | about | words))
    return directory


@pytest.mark.parametrize("words", [{}, {"task_type": None}, LOADED, {"loftq_config": None}])
def test_a_base_that_is_not_here(words, tmp_path):
    directory = adapter(tmp_path, **words)
    says = "(?s)No checkpoint 'unsloth/llama.*Give --model=DIRECTORY of that checkpoint.*"
    with pytest.raises(FileNotFoundError, match=f"{says}'unsloth/llama-3-8b'") as told:
        language_model.is_language(directory) and language_model.load(directory)
    assert "damaged" not in str(told.value) and "config.model.quantize" in str(told.value)


def test_a_base_that_is_given(tmp_path):
    directory = adapter(tmp_path, **LOADED, loftq_config={"loftq_bits": 4})
    base = str(GOLDENS / "nf4_double")
    found = language_model.load(directory, model=base)
    assert sum(map(is_quantized, named_leaves(found.loaded.params).values())) == 14
    assert found.notes == (f"base {base}, from directory",)
    with pytest.raises(FileNotFoundError) as told:
        language_model.load(directory, model=str(tmp_path / "none"))
    assert "unsloth" not in str(told.value)


def test_a_plain_base_in_its_place(tmp_path):
    """As people do it; the difference is said."""
    loaded = load(GOLDENS / "fp4")
    checkpoints.save_hf(tmp_path / "x", loaded.params, loaded.checkpoint, head="causal-lm")
    found = language_model.load(adapter(tmp_path), model=str(tmp_path / "x"))
    assert found.notes[1:] == (
        "plain numbers of it, though the adapter's was quantized (bnb-4bit)",
    )


@pytest.mark.parametrize(
    "name, scheme, plain",
    [
        ("unsloth/Qwen2.5-7B-Instruct-unsloth-bnb-4bit", "unsloth-bnb-4bit", "unsloth/Qwen2.5-7B-Instruct"),
        ("TheBloke/Llama-2-7B-GPTQ", "GPTQ", "TheBloke/Llama-2-7B"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("a/b_AWQ", "AWQ", "a/b"),
        ("meta-llama/Llama-3.1-8B", "", "meta-llama/Llama-3.1-8B"),
        ("runs/8bit-games/model", "", "runs/8bit-games/model"),
        (None, "", ""),
    ],
)  # fmt: skip
def test_names_of_quantized_bases(name, scheme, plain):
    words = {"base_model_name_or_path": name}
    assert (peft.describe_quantization(words), peft.guess_plain_base(words)) == (scheme, plain)
    assert "load_in_4bit" in peft.describe_quantization({**LOADED, "base_model_name_or_path": "x"})
