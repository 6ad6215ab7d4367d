"""Tokens that a run adds: trained with its adapter, and there in chat and in both exports."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax.models import checkpoints
from lora_jax.tasks import added_tokens, chat, instruction_tuning, language_model, text_files
from tests.helpers import programs, tiny_llama

TOKENS = ("<tool>", "<|im_end|>", "<|done|>")
SIZE = len(tiny_llama.WORDS)
IDS = {"<tool>": SIZE, "<|done|>": SIZE + 1}
TEMPLATE = tiny_llama.CHATML.replace("<|im_end|>", "<|done|><|im_end|>")


def make(root, tied, **changes):
    tiny_llama.checkpoint(root / "model", tie_word_embeddings=tied)
    if tied:  # it has drawn the head by itself
        file = root / "model" / "model.safetensors"
        tensors = safetensors.numpy.load_file(file)
        tensors.pop("lm_head.weight", None)
        safetensors.numpy.save_file(tensors, file)
    tiny_llama.data(root / "data.jsonl", count=12)
    (root / "template").write_text(TEMPLATE)
    changes = {"model.scan_layers": False, "data.add_tokens": TOKENS} | changes
    changes = {"data.chat_template": root / "template"} | changes
    return tiny_llama.config(root, **changes)


def draw(root, tied):
    """An adapter as a run has it at its start, on disk, with noise."""
    task, settings = instruction_tuning.make_task(make(root, tied))
    batch = task.train_batch(0)
    adapter = lora.init(jax.random.key(0), task.apply, task.base, settings, batch, None)
    adapter = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), adapter
    )
    lora.save(root / "adapter", adapter, settings, base=task.base_id, metadata=task.metadata)
    return task, settings, adapter


def of_tokens(adapter):
    return {n: x for n, x in adapters.nodes(adapter).items() if hasattr(x, "ids")}


UNTIED = pytest.param(False, marks=pytest.mark.slow, id="untied")


@pytest.fixture(scope="module", params=[pytest.param(True, id="tied"), UNTIED])
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("added")
    return root, request.param, *draw(root, request.param)


def test_a_run_trains_them(made):
    root, tied, task, settings, adapter = made
    tables = {"params/model/embed_tokens/embedding"} | {"params/lm_head/kernel"}
    tables -= {"params/lm_head/kernel"} if tied else set()
    ids = (SIZE, tiny_llama.WORDS.index("<|im_end|>"), SIZE + 1)
    assert set(settings.train_tokens) == tables
    assert {x.ids for x in of_tokens(adapter).values()} == set(settings.train_tokens.values())
    assert set(settings.train_tokens["params/model/embed_tokens/embedding"]) == set(ids)
    assert any("added tokens: <tool> <|im_end|> <|done|>" in x for x in task.notes)
    assert any(f"2 rows added to the embedding, which has {SIZE + 2}" in x for x in task.notes)
    # What the template writes is special, and left out of replies.
    assert task.metadata["added_tokens"] == {"<tool>": False, "<|im_end|>": True, "<|done|>": True}


def test_chat_has_them(made):
    root, _, _, _, adapter = made
    model = chat.load(root / "adapter", max_new_tokens=1)
    assert model.table.rows == SIZE + 2
    assert [model.tokenizer.token_to_id(x) for x in IDS] == [*IDS.values()]
    assert chat._decode(model, [SIZE, tiny_llama.WORDS.index("dog"), SIZE + 1]) == "<tool> dog"
    got = model.params["params"]["model"]["embed_tokens"]["embedding"]
    node = of_tokens(adapter)["params/model/embed_tokens/embedding"]
    np.testing.assert_array_equal(got[np.array(node.ids)], node.rows)


@pytest.mark.slow
def test_exports_have_them(made, tmp_path):
    root, tied, *_ = made
    out = tmp_path / "peft"
    said = programs.succeed("export", f"--adapter={root / 'adapter'}", f"--out={out}", "--peft")
    assert f"base.resize_token_embeddings({SIZE + 2})" in said
    words = json.loads((out / "adapter_config.json").read_text())
    assert set(words["trainable_token_indices"]) == {"embed_tokens"} | (
        {"lm_head"} if not tied else set()
    )
    # The directory is one that chat and export take, with the base as it is.
    again = language_model.load(out)
    assert again.loaded.model.config.vocab_size == SIZE + 2
    files = text_files.find(out, again.loaded.checkpoint)
    assert text_files.load_tokenizer(files).token_to_id("<|done|>") == SIZE + 1
    first = language_model.load(root / "adapter")
    want, got = (lora.merge(x.loaded.params, x.adapter) for x in (first, again))
    jax.tree.map(np.testing.assert_array_equal, got, want)

    out = tmp_path / "merged"
    programs.succeed("export", f"--adapter={root / 'adapter'}", f"--out={out}", "--merged")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == SIZE + 2
    merged = checkpoints.load(out, head="causal-lm")
    jax.tree.map(np.testing.assert_array_equal, merged.params, want)
    assert checkpoints.load_tokenizer(merged.checkpoint).token_to_id("<tool>") == SIZE
    assert (out / "chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.slow
def test_an_adapter_that_brings_some_rows_only(made, tmp_path):
    """As transformers leaves it where the head is not tied and only the embedding is trained."""
    root, tied, *_ = made
    out = tmp_path / "peft"
    programs.succeed("export", f"--adapter={root / 'adapter'}", f"--out={out}", "--peft")
    words = json.loads((out / "adapter_config.json").read_text())
    if tied:
        ids = words["trainable_token_indices"]["embed_tokens"]
        words["trainable_token_indices"]["embed_tokens"] = [
            SIZE + 5 if k == SIZE else k for k in ids
        ]
    else:
        del words["trainable_token_indices"]["lm_head"]
        tensors = safetensors.numpy.load_file(out / "adapter_model.safetensors")
        tensors = {n: x for n, x in tensors.items() if "lm_head" not in n}
        safetensors.numpy.save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match="does not bring all that they need.*resize_token_emb"):
        language_model.load(out)


@pytest.mark.parametrize("tokens", [("<a>", "<a>"), ("",), (" ",), (3,)])
def test_a_config_refuses(tokens, tmp_path):
    config = tiny_llama.config(tmp_path, **{"data.add_tokens": tokens})
    with pytest.raises(ValueError, match=r"data.add_tokens must hold different texts.*got \("):
        instruction_tuning.check(config)


def test_both_settings_at_once(tmp_path):
    config = make(tmp_path, True)
    with config.unlocked():
        config.lora.train_tokens = {"embed_tokens": (3,)}
    with pytest.raises(ValueError, match="data.add_tokens sets it: leave one of them out"):
        instruction_tuning.make_task(config)


@pytest.mark.slow
def test_going_on_keeps_the_tokens(made, tmp_path):
    root, tied, *_ = made
    shutil.copytree(root / "adapter", tmp_path / "start")
    config = make(tmp_path, tied, adapter=str(tmp_path / "start"), **{"data.add_tokens": ()})
    task, settings = instruction_tuning.make_task(config)
    assert of_tokens(task.adapter) and settings.train_tokens
    assert task.metadata["added_tokens"] == {"<tool>": False, "<|im_end|>": True, "<|done|>": True}
    with config.unlocked():
        config.data.add_tokens = ("<other>",)
    with pytest.raises(ValueError, match="an adapter keeps the tokens that it was made with"):
        instruction_tuning.make_task(config)


def test_damaged_metadata(tmp_path, made):
    root, *_ = made
    shutil.copytree(root / "adapter", tmp_path / "a")
    about = json.loads((tmp_path / "a" / "adapter.json").read_text())
    about["metadata"]["added_tokens"] = ["<tool>"]
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="is damaged: added_tokens is"):
        added_tokens.read(tmp_path / "a")


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    """Trained, resumed from its end, talked to."""
    make(tmp_path, True)
    flags = [f"--config.{name}={value}" for name, value in tiny_llama.overrides(tmp_path).items()]
    flags += [
        "--config.data.add_tokens=<tool>,<|done|>",
        "--config.epochs=1",
        "--config.eval_every=50",
    ]
    arguments = ("--config=configs/instruct_llama.py", f"--workdir={tmp_path / 'run'}", *flags)
    said = programs.succeed("instruct", *arguments)
    assert "added tokens: <tool> <|done|>" in said
    adapter, _ = lora.load(
        tmp_path / "run" / "adapter",
        language_model.load(tmp_path / "run" / "adapter").loaded.params,
    )
    assert of_tokens(adapter)
    said = programs.succeed("chat", f"--adapter={tmp_path / 'run' / 'adapter'}", "what is <tool>?")
    assert said.strip()
