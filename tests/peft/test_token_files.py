"""Trained tokens in PEFT's files, against what PEFT computes with the same files."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax.methods.tokens import TiedRows, TrainedOutputs, TrainedRows
from lora_jax.models import checkpoints
from lora_jax.peft import load_peft, save_peft
from tests.helpers import places

# Made by scripts/make_token_goldens.py.
GOLDENS = places.GOLDENS / "tokens"
CASES = ("gpt2", "llama", "llama_tied")
IDS = {"gpt2": (2, 17), "llama": (2, 17, 60), "llama_tied": (60, 2, 17)}
CLASSES = {"gpt2": TiedRows, "llama": TrainedRows, "llama_tied": TiedRows}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROWS = ".token_adapter.trainable_tokens_delta"
every = pytest.mark.parametrize("case", CASES)


@functools.cache
def base(case):
    loaded = checkpoints.load(GOLDENS / case / "base", head="causal-lm")
    return loaded, checkpoints.names(loaded)


@functools.cache
def golden(case):
    with np.load(GOLDENS / case / "io.npz") as file:
        return dict(file)


def read(case, directory=None):
    loaded, names = base(case)
    return load_peft(directory or GOLDENS / case, loaded.params, names=names)


def find(adapter):
    ((name, node),) = [(n, x) for n, x in adapters.nodes(adapter).items() if not hasattr(x, "a")]
    return name, node


@functools.cache
def run(case):
    loaded, _ = base(case)
    fn = lora.lift(loaded.model.apply, strict=True)
    return jax.jit(lambda p, a, ids: fn(lora.bind(p, a), ids))


@every
def test_reads_rows_of_peft(case):
    adapter, config = read(case)
    name, node = find(adapter)
    assert type(node) is CLASSES[case] and node.ids == IDS[case]
    assert list(config.train_tokens.values()) == [IDS[case]]
    tensors = safetensors.numpy.load_file(GOLDENS / case / WEIGHTS)
    (key,) = [n for n in tensors if n.endswith(ROWS)]
    np.testing.assert_array_equal(node.rows, tensors[key])
    # The config chooses the same leaves again.
    loaded, _ = base(case)
    ids = golden(case)["input_ids"]
    made = lora.init(jax.random.key(0), loaded.model.apply, loaded.params, config, ids)
    assert jax.tree.structure(made) == jax.tree.structure(adapter)


@every
def test_logits_and_merged_weights_are_those_of_peft(case):
    (loaded, _), values = base(case), golden(case)
    adapter, _ = read(case)
    logits = run(case)(loaded.params, adapter, values["input_ids"])
    np.testing.assert_allclose(logits, values["logits"], rtol=0, atol=1e-5)
    merged = lora.merge(loaded.params, adapter)
    logits = jax.jit(loaded.model.apply)(merged, values["input_ids"])
    np.testing.assert_allclose(logits, values["logits"], rtol=0, atol=1e-5)
    name, node = find(adapter)
    want = next(x for n, x in values.items() if n.startswith("merged/") and x.shape[0] == 99)
    leaf = adapters.nodes(merged)[name]
    np.testing.assert_array_equal(leaf, want)
    np.testing.assert_array_equal(leaf[jnp.array(node.ids)], node.rows)


@every
def test_gradients_are_those_of_peft(case):
    (loaded, _), values = base(case), golden(case)
    adapter, _ = read(case)
    loss = lambda a: jnp.sum(values["probe"] * run(case)(loaded.params, a, values["input_ids"]))
    _, grads = find(jax.grad(loss)(adapter))
    (key,) = [n for n in values if n.startswith("grad/") and n.endswith(ROWS)]
    want = values[key]
    np.testing.assert_allclose(grads.rows, want, rtol=0, atol=1e-5 * np.abs(want).max())


@every
def test_written_byte_for_byte(case, tmp_path):
    loaded, names = base(case)
    adapter, config = read(case)
    save_peft(tmp_path, loaded.params, adapter, config, names=names)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / file).read_bytes() == (GOLDENS / case / file).read_bytes(), file


@every
def test_written_without_the_words_that_it_came_with(case, tmp_path):
    loaded, names = base(case)
    adapter, config = read(case)
    config = lora.LoRAConfig(rank=config.rank, alpha=config.alpha, targets=config.targets)
    save_peft(tmp_path, loaded.params, adapter, config, names=names, task_type="CAUSAL_LM")
    words = json.loads((tmp_path / CONFIG).read_text())
    table = "wte" if case == "gpt2" else "embed_tokens"
    assert words["trainable_token_indices"] == {table: [*IDS[case]]}
    assert (tmp_path / WEIGHTS).read_bytes() == (GOLDENS / case / WEIGHTS).read_bytes()
    again, _ = read(case, tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)


# ---- What others write, and mistakes -------------------------------------------------------------


def edited(case, directory, words=lambda words: None, tensors=lambda tensors: None):
    """A copy of a golden with other words or tensors."""
    shutil.copytree(GOLDENS / case, directory, dirs_exist_ok=True)
    about = json.loads((directory / CONFIG).read_text())
    words(about)
    (directory / CONFIG).write_text(json.dumps(about))
    stored = safetensors.numpy.load_file(directory / WEIGHTS)
    tensors(stored)
    safetensors.numpy.save_file(stored, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def with_word(value):
    return lambda words: words.update(trainable_token_indices=value)


def test_rows_of_an_untied_head(tmp_path):
    """PEFT takes the head by name, too."""
    loaded, names = base("llama")
    rows = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    directory = edited(
        "llama", tmp_path / "a", with_word({"embed_tokens": [2, 17, 60], "lm_head": [5, 3]}),
        lambda tensors: tensors.update({f"base_model.model.lm_head{ROWS}": rows}),
    )  # fmt: skip
    adapter, config = read("llama", directory)
    node = adapters.nodes(adapter)["params/lm_head/kernel"]
    assert type(node) is TrainedOutputs and node.ids == (5, 3)
    np.testing.assert_array_equal(node.columns, rows.T)
    save_peft(tmp_path / "b", loaded.params, adapter, config, names=names)
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (directory / WEIGHTS).read_bytes()


def test_a_tied_head_may_be_named_beside_the_embedding(tmp_path):
    both = {"embed_tokens": [60, 2, 17], "lm_head": [60, 2, 17]}
    adapter, _ = read("llama_tied", edited("llama_tied", tmp_path, with_word(both)))
    assert find(adapter)[1].ids == (60, 2, 17)


def test_copies_of_a_resized_base(tmp_path):
    """PEFT puts them into the file where the vocabulary was resized."""
    loaded, _ = base("llama_tied")
    table = np.asarray(loaded.params["params"]["model"]["embed_tokens"]["embedding"])
    name = "base_model.model.model.embed_tokens.token_adapter.base_layer.weight"
    add = lambda tensors: tensors.update({name: table})
    adapter, _ = read("llama_tied", edited("llama_tied", tmp_path / "a", tensors=add))
    assert find(adapter)[1].ids == (60, 2, 17)
    add = lambda tensors: tensors.update({name: table + 1})
    with pytest.raises(ValueError, match="made for another base: its copy of the frozen"):
        read("llama_tied", edited("llama_tied", tmp_path / "b", tensors=add))


@pytest.mark.parametrize(
    ("case", "words", "message"),
    [
        ("llama", with_word([2, 17, 2]), "each once, or an object.*got"),  # PEFT takes the last
        ("llama", with_word([-1, 17, 60]), "ids from 0 on.*got"),  # PEFT: an error much later
        ("llama", with_word([]), "ids from 0 on"),
        ("llama", with_word({"embed_tokens": 3}), "ids from 0 on"),
        ("llama", with_word([2, 17, 99]), r"\[99\] are none of its 99 tokens.*resize_token_emb"),
        ("llama", with_word([2, 17]), r"shape \(3, 32\) instead of \(2, 32\)"),
        ("llama", with_word(None), "is unexpected.*trainable_token_indices does not name"),
        ("llama", with_word({"embed": [1]}), "entry 'embed' selects no module"),
        ("llama", with_word({"q_proj": [1]}), "q_proj, which is adapted as well"),
        ("llama", with_word({"norm": [1]}), "which is no table of tokens"),
        ("llama_tied", with_word({"lm_head": [60, 2, 17]}), "use in lm_head by itself"),
        (
            "llama_tied", with_word({"embed_tokens": [60, 2, 17], "lm_head": [1, 2, 17]}),
            "use in lm_head by itself",
        ),
        (
            "llama", lambda words: words.update(modules_to_save=["embed_tokens"]),
            "embed_tokens, which is trained in full as well",
        ),
        (
            "llama", lambda words: words.update(target_modules=["q_proj", "embed_tokens"]),
            "embed_tokens, which is adapted as well",
        ),
    ],
)  # fmt: skip
def test_refuses(case, words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(case, edited(case, tmp_path, words))


def test_a_list_needs_one_input_embedding(tmp_path):
    """Of models with other names it can't be told which embedding is the input's."""
    loaded, names = base("llama")
    renamed = [row._replace(hf=row.hf.replace("embed_tokens", "tok")) for row in names]
    with pytest.raises(ValueError, match="names no module, and the model has none that could be"):
        load_peft(GOLDENS / "llama", loaded.params, names=renamed)


def test_can_not_be_written(tmp_path):
    loaded, names = base("llama")
    adapter, config = read("llama")
    wrong = jax.tree.map(lambda x: x * jnp.nan, adapter)
    with pytest.raises(ValueError, match="NaN or infinity"):
        save_peft(tmp_path, loaded.params, wrong, config, names=names)
    alone = {"params": {"model": {"embed_tokens": adapter["params"]["model"]["embed_tokens"]}}}
    with pytest.raises(ValueError, match="no kernel is adapted, and PEFT has no adapter without"):
        save_peft(tmp_path, loaded.params, alone, config, names=names)
