"""PEFT's directories as others leave them: without copies, with full embeddings, of other programs."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import peft
from lora_jax.peft import config, directory_files, load_peft, misfits, producers, save_peft
from tests.helpers import places, torch_like

GOLDENS = places.GOLDENS / "peft"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
WTE, HEAD = f"{PREFIX}transformer.wte.weight", f"{PREFIX}lm_head.weight"
COPY = f"{PREFIX}lm_head.base_layer.weight"


def base(*, tied=False):
    """The table and the parameters of the golden GPT-2, with a head of its own or without."""
    table = torch_like.gpt2_names(tied=tied)
    return table, torch_like.load(GOLDENS / "gpt2" / "base" / "model.safetensors", table)


@pytest.fixture(scope="module")
def untied():
    return base()


@pytest.fixture(scope="module")
def bert():
    _, table = torch_like.bert_model(GOLDENS / "bert" / "base")
    return table, torch_like.load(GOLDENS / "bert" / "base" / "model.safetensors", table)


def copy(tmp_path, source, change=lambda tensors: tensors, **words):
    """A golden directory with other tensors and words."""
    out = shutil.copytree(GOLDENS / source, tmp_path / "adapter", dirs_exist_ok=True)
    about = json.loads((out / CONFIG).read_text()) | words
    (out / CONFIG).write_text(json.dumps(about))
    tensors = change(dict(safetensors.numpy.load_file(out / WEIGHTS)))
    safetensors.numpy.save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    return out


def load(directory, base):
    table, params = base
    return adapters.nodes(load_peft(directory, params, names=table)[0])


def assert_same(one, other):
    assert list(one) == list(other)
    for name, node in one.items():
        for field in ("a", "b"):
            np.testing.assert_array_equal(getattr(node, field), getattr(other[name], field))


def rename(**new):
    """A change of names: each word for another."""

    def change(tensors):
        for old, text in new.items():
            tensors = {n.replace(old, text): x for n, x in tensors.items()}
        return tensors

    return change


# Copies of frozen weights.


def without(name):
    return lambda tensors: {n: x for n, x in tensors.items() if n != name}


def rounded(dtype):
    return lambda tensors: tensors | {COPY: tensors[COPY].astype(dtype)}


@pytest.mark.parametrize(
    "change",
    [
        without(COPY),  # PEFT before 0.7, or save_embedding_layers=False
        rounded(np.float16),
        rounded(ml_dtypes.bfloat16),
        lambda t: without(COPY)(t) | {HEAD: t[COPY]},  # the name before PEFT 0.6
    ],
    ids=["absent", "float16", "bfloat16", "old name"],
)
def test_a_copy_of_the_frozen_head_may_be_absent_or_rounded(untied, change, tmp_path):
    whole = load(GOLDENS / "gpt2" / "tied_head", untied)
    assert_same(load(copy(tmp_path, "gpt2/tied_head", change), untied), whole)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_copy_that_differs_by_more_than_rounding_is_of_another_base(untied, dtype, tmp_path):
    def change(tensors):
        return tensors | {COPY: (tensors[COPY] * 1.02).astype(dtype)}

    with pytest.raises(ValueError, match="made for another base.*lm_head.base_layer.weight"):
        load(copy(tmp_path, "gpt2/tied_head", change), untied)


def test_a_copy_is_that_of_a_base_in_fewer_bits(untied, tmp_path):
    """The base was rounded when it was loaded, and the file has all digits."""
    table, params = untied
    narrow = params | {"lm_head": {"kernel": params["lm_head"]["kernel"].astype(jnp.bfloat16)}}
    load(GOLDENS / "gpt2" / "tied_head", (table, narrow))


# Embeddings and heads stored in full.


def values(params):
    return np.random.default_rng(0).normal(size=params["wte"]["embedding"].shape).astype(np.float32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", [WTE, HEAD])
def test_embeddings_in_full_replace_those_of_the_base(name, tied, tmp_path):
    """As PEFT, which loads every tensor whose name the model has; the words say nothing of them."""
    table, params = base(tied=tied)
    new = values(params)
    directory = copy(tmp_path, "gpt2/c_attn", lambda t: t | {name: new})
    adapter, settings = load_peft(directory, params, names=table)
    in_table = name == WTE or tied
    leaf = "wte/embedding" if in_table else "lm_head/kernel"
    nodes = adapters.nodes(adapter)
    np.testing.assert_array_equal(nodes.pop(leaf), new if in_table else new.T)
    assert_same(nodes, load(GOLDENS / "gpt2" / "c_attn", (table, params)))
    assert settings.train == (leaf.split("/")[0],)
    merged = lora.merge(params, adapter)
    np.testing.assert_array_equal(
        merged[leaf.split("/")[0]][leaf.split("/")[1]], adapters.nodes(adapter)[leaf]
    )
    if not tied:  # and it goes back as a module that is trained in full
        save_peft(tmp_path / "again", params, adapter, settings, names=table)
        words = json.loads((tmp_path / "again" / CONFIG).read_text())
        assert words["modules_to_save"] == [name.removeprefix(PREFIX).split(".")[-2]]
        tensors = safetensors.numpy.load_file(tmp_path / "again" / WEIGHTS)
        np.testing.assert_array_equal(tensors[name], new)


def test_embeddings_in_full_that_are_the_base_s_change_nothing(untied, tmp_path):
    """As save_embedding_layers=True writes them."""
    table, params = untied
    own = np.asarray(params["wte"]["embedding"])
    for value in (own, own.astype(ml_dtypes.bfloat16)):
        directory = copy(tmp_path, "gpt2/c_attn", lambda t, value=value: t | {WTE: value})
        assert_same(load(directory, untied), load(GOLDENS / "gpt2" / "c_attn", untied))


def test_two_names_of_a_tied_weight_must_agree(tmp_path):
    tied = base(tied=True)
    new = values(tied[1])
    directory = copy(tmp_path, "gpt2/c_attn", lambda t: t | {WTE: new, HEAD: new})
    np.testing.assert_array_equal(load(directory, tied)["wte/embedding"], new)
    directory = copy(tmp_path, "gpt2/c_attn", lambda t: t | {WTE: new, HEAD: new + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs from its other copy"):
        load(directory, tied)


@pytest.mark.parametrize(
    "saved, ties, given",
    [
        (["wte"], True, (WTE, HEAD)),
        (["lm_head"], True, (WTE, HEAD)),
        (["wte", "lm_head"], True, (WTE, HEAD)),
        (["wte", "lm_head"], False, (WTE, HEAD)),  # before PEFT could tie them
    ],
)
def test_a_tied_weight_that_is_replaced_in_all_its_uses(saved, ties, given, tmp_path):
    """With ensure_weight_tying PEFT trains one copy for all uses, and writes it under each name."""
    tied = base(tied=True)
    new = values(tied[1])
    words = dict(modules_to_save=saved, ensure_weight_tying=ties)
    add = lambda t: t | dict.fromkeys(given, new)
    adapter, settings = load_peft(
        copy(tmp_path, "gpt2/c_attn", add, **words), tied[1], names=tied[0]
    )
    np.testing.assert_array_equal(adapters.nodes(adapter)["wte/embedding"], new)
    save_peft(tmp_path / "again", tied[1], adapter, settings, names=tied[0])
    assert_same_tensors(tmp_path / "again", tmp_path / "adapter")
    fresh = dataclasses.replace(settings, origin={})
    save_peft(tmp_path / "fresh", tied[1], adapter, fresh, names=tied[0])
    about = json.loads((tmp_path / "fresh" / CONFIG).read_text())
    assert about["ensure_weight_tying"] and about["modules_to_save"] == ["lm_head", "wte"]
    assert_same_tensors(tmp_path / "fresh", tmp_path / "adapter")


def assert_same_tensors(one, other):
    one, other = (safetensors.numpy.load_file(x / WEIGHTS) for x in (one, other))
    assert set(one) == set(other)
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name])


@pytest.mark.parametrize(
    "words, tensors, says",
    [
        ({"modules_to_save": ["wte"]}, (WTE,), "replaces the use in transformer.wte.weight by"),
        ({"modules_to_save": ["lm_head"]}, (HEAD,), "tie_word_embeddings false and both"),
        ({"target_modules": ["c_attn", "wte"]}, (), "changes the use in transformer.wte.weight by"),
        (
            {"target_modules": ["c_attn", "wte"], "ensure_weight_tying": True},
            (),
            "factors that tied weights share are not read",
        ),
    ],
)
def test_a_tied_weight_of_which_one_use_is_changed(words, tensors, says, tmp_path):
    tied = base(tied=True)
    add = lambda t: t | dict.fromkeys(tensors, values(tied[1]))
    with pytest.raises(ValueError, match=says):
        load(copy(tmp_path, "gpt2/c_attn", add, **words), tied)


def test_ensure_weight_tying_without_tied_weights_changes_nothing(untied, tmp_path):
    directory = copy(tmp_path, "gpt2/c_attn", ensure_weight_tying=True)
    assert_same(load(directory, untied), load(GOLDENS / "gpt2" / "c_attn", untied))


def test_a_file_without_tensors_is_told_as_such(untied, tmp_path):
    with pytest.raises(ValueError, match="holds no tensor at all") as told:
        load(copy(tmp_path, "gpt2/c_attn", lambda t: {}), untied)
    assert "is missing" not in str(told.value)


def more_rows(name, axis):
    def change(tensors, params):
        value = tensors.get(name, np.asarray(params["wte"]["embedding"]))
        widths = [(0, 3 if k == axis else 0) for k in range(2)]
        return tensors | {name: np.pad(value, widths)}

    return change


@pytest.mark.parametrize(
    "source, name, axis",
    [
        ("c_attn", WTE, 0),
        ("c_attn", HEAD, 0),
        ("tied_head", COPY, 0),
        ("tied_head", f"{PREFIX}lm_head.lora_B.weight", 0),
        ("tied_embedding", f"{PREFIX}transformer.wte.lora_embedding_A", 1),
    ],
)
def test_a_resized_vocabulary_is_told_with_both_sizes(untied, source, name, axis, tmp_path):
    size = untied[1]["wte"]["embedding"].shape[0]
    change = lambda t: more_rows(name, axis)(t, untied[1])
    with pytest.raises(
        ValueError, match=rf"{size + 3} entries and that of the base {size}.*resize"
    ):
        load(copy(tmp_path, f"gpt2/{source}", change), untied)


def test_a_tensor_of_a_shard_that_was_not_gathered(untied, tmp_path):
    name = f"{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight"
    change = lambda t: t | {name: np.zeros((0,), np.float32)}
    with pytest.raises(ValueError, match="it is empty, as where shards"):
        load(copy(tmp_path, "gpt2/c_attn", change), untied)


def test_another_width_is_not_a_vocabulary(untied, tmp_path):
    change = lambda t: t | {COPY: np.pad(t[COPY], [(0, 0), (0, 1)])}
    with pytest.raises(ValueError, match="instead of") as told:
        load(copy(tmp_path, "gpt2/tied_head", change), untied)
    assert "vocabulary" not in str(told.value)


# Names.


@pytest.mark.parametrize(
    "changes, says",
    [
        ({PREFIX: f"{PREFIX}_orig_mod."}, "wrapper of torch.compile"),
        ({PREFIX: f"{PREFIX}_fsdp_wrapped_module."}, "wrapper of FSDP"),
        ({PREFIX: f"{PREFIX}module."}, "wrapper of DataParallel"),
        ({PREFIX: f"{PREFIX}{PREFIX}"}, "within a PEFT model"),
        ({f"{PREFIX}transformer.": PREFIX}, "a part of the model"),
        ({PREFIX: f"{PREFIX}language_model."}, "a part of the model"),
        ({PREFIX: ""}, "begin with ''"),
        ({PREFIX: "module."}, "begin with 'module.'"),
    ],
)
@pytest.mark.parametrize("source", ["gpt2/c_attn", "gpt2/all_linear"])
def test_names_off_by_a_prefix_are_shown_as_they_are(untied, changes, says, source, tmp_path):
    directory = copy(tmp_path, source, rename(**changes))
    found = safetensors.numpy.load_file(directory / WEIGHTS)
    with pytest.raises(ValueError, match="its names begin with") as told:
        load(directory, untied)
    assert says in str(told.value) and any(name in str(told.value) for name in found)
    assert "base_model.model.transformer.h.0" in str(told.value)  # and what is expected
    assert str(told.value).count(" is missing") == 1  # which need not be told of each


def test_many_missing_names_do_not_hide_what_the_file_has(untied, tmp_path):
    odd = {f"{PREFIX}odd.{k}.lora_A.weight": np.zeros((2, 2), np.float32) for k in range(50)}
    with pytest.raises(
        ValueError, match="odd.0.lora_A.weight is unexpected.*and so are 38 more"
    ) as told:
        load(copy(tmp_path, "gpt2/all_linear", lambda t: odd), untied)
    assert len(str(told.value)) < 10_000


@pytest.mark.parametrize("name", ["default", "my-adapter", "weight2"])
def test_the_adapter_s_name_in_the_names_of_a_state_dict(untied, bert, name, tmp_path):
    pairs = {"lora_A.weight": f"lora_A.{name}.weight", "lora_B.weight": f"lora_B.{name}.weight"}
    directory = copy(tmp_path, "gpt2/c_attn", rename(**pairs))
    assert_same(load(directory, untied), load(GOLDENS / "gpt2" / "c_attn", untied))
    assert peft.tensor_shapes(directory) == peft.tensor_shapes(GOLDENS / "gpt2" / "c_attn")
    shutil.rmtree(directory)
    pairs |= {"lora_embedding_A": f"lora_embedding_A.{name}"}
    pairs |= {"lora_embedding_B": f"lora_embedding_B.{name}"}
    directory = copy(tmp_path, "gpt2/tied_embedding", rename(**pairs))
    assert_same(load(directory, untied), load(GOLDENS / "gpt2" / "tied_embedding", untied))
    shutil.rmtree(directory)
    head = {f"{PREFIX}classifier.": f"{PREFIX}classifier.modules_to_save.{name}."}
    whole = load(GOLDENS / "bert" / "qv", bert)
    found = load(copy(tmp_path, "bert/qv", rename(**pairs, **head)), bert)
    assert list(found) == list(whole)
    np.testing.assert_array_equal(found["classifier/kernel"], whole["classifier/kernel"])


def test_two_adapters_in_one_file_are_refused(untied, tmp_path):
    def twice(tensors):
        both = {}
        for adapter in ("one", "two"):
            pairs = {f"lora_{x}.weight": f"lora_{x}.{adapter}.weight" for x in "AB"}
            both |= rename(**pairs)(tensors)
        return both

    with pytest.raises(ValueError, match="lora_A.one.weight is unexpected"):
        load(copy(tmp_path, "gpt2/c_attn", twice), untied)


@pytest.mark.parametrize("source", ["bert/bias_lora_only", "bert/bias_all"])
def test_names_of_biases_before_peft_had_base_layers(bert, source, tmp_path):
    found = load(copy(tmp_path, source, rename(**{".base_layer.bias": ".bias"})), bert)
    whole = load(GOLDENS / source, bert)
    assert list(found) == list(whole)
    for name, node in whole.items():
        if name.endswith("bias"):
            np.testing.assert_array_equal(found[name], node)


def test_a_task_for_which_the_base_has_no_head(untied, tmp_path):
    head = {f"{PREFIX}classifier.weight": np.ones((2, 8), np.float32)}
    directory = copy(tmp_path, "gpt2/c_attn", lambda t: t | head, task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="task_type is 'SEQ_CLS'.*this base has none"):
        load(directory, untied)


@pytest.mark.parametrize(
    "missing, extra, expected",
    [
        (["a.q", "a.k"], ["b.q", "b.k"], ("b.", "a.")),
        (["a.q", "a.k"], ["q", "k"], ("", "a.")),
        (["a.0.q", "a.1.q"], ["x.0.q", "x.1.q", "x.2.q"], ("x.", "a.")),
        (["a.q"], ["b.k"], None),
        (["a.q", "a.v"], ["b.q", "c.k", "c.v"], None),  # some, by chance
        ([], ["b.q"], None),
    ],
)
def test_prefixes(missing, extra, expected):
    factors = lambda modules: [f"{m}.lora_{x}.weight" for m in modules for x in "AB"]
    assert misfits.find_prefixes(factors(missing), factors(extra)) == expected
    assert misfits.find_prefixes(missing, extra) is None  # these are no factors


# Other programs.


LISTINGS = {
    "MLX": ["adapter_config.json", "adapters.safetensors", "0000100_adapters.safetensors"],
    "diffusers": ["README.md", "pytorch_lora_weights.safetensors"],
    "llama.cpp": ["my-lora-f16.gguf"],
    "torchtune": ["adapter_0.pt", "config.json", "adapter_config.json"],
    "NeMo": ["checkpoint.nemo"],
    "Megatron": ["iter_0000500", "latest_checkpointed_iteration.txt"],
    "AdapterHub": ["adapter_config.json", "pytorch_adapter.bin", "head_config.json"],
    "LitGPT": ["lit_model.pth.lora", "hyperparameters.yaml"],
    "mistral-finetune": ["lora.safetensors", "params.json"],
    "Keras": ["model.lora.h5"],
}


@pytest.mark.parametrize("producer", LISTINGS)
def test_directories_of_other_programs_are_known_by_their_files(producer, tmp_path):
    for name in LISTINGS[producer]:
        (tmp_path / name).write_text("{}")
    assert producer in peft.describe_files(tmp_path)
    assert not peft.describe_files(GOLDENS / "gpt2" / "c_attn")
    (tmp_path / CONFIG).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=producer):
        peft.read_words(tmp_path)


CONFIGS = {
    "MLX": {
        "adapter_path": "adapters", "batch_size": 4, "fine_tune_type": "lora", "iters": 1000,
        "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0}, "model": "mistral",
        "num_layers": 16,
    },
    "AdapterHub": {
        "config": {"architecture": "lora", "r": 8}, "config_id": "625403edad0bf919",
        "hidden_size": 768, "model_class": "BertModel", "name": "x",
    },
}  # fmt: skip


@pytest.mark.parametrize("producer", CONFIGS)
def test_words_of_other_programs(producer, tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps(CONFIGS[producer]))
    with pytest.raises(ValueError, match=f"{producer}.*not read here") as told:
        peft.read_words(tmp_path)
    assert "peft_type" not in str(told.value)


NAMES = {
    "Kohya": "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
    "sd-scripts": "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
    "diffusers": "unet.down_blocks.0.attentions.0.processor.to_q_lora.down.weight",
    "image model": "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight",
    "LyCORIS": "lycoris_layers_0_mlp.lokr_w1",
    "LoHa": "layers.0.mlp.hada_w1_a",
    "llama.cpp": "blk.0.attn_q.weight.lora_a",
    "torchtune": "layers.0.attn.q_proj.lora_a.weight",
    "MLX": "model.layers.0.self_attn.q_proj.lora_a",
    "NeMo": "module.decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight",
    "Megatron": "model.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_out.weight",
    "AdapterHub": "bert.encoder.layer.0.attention.self.query.loras.x.lora_A",
    "LitGPT": "transformer.h.0.attn.attn.lora_A",
    "mistral-finetune": "layers.0.attention.wq.lora_A.weight",
    "loralib": "transformer.h.0.attn.c_attn.lora_A",
}


@pytest.mark.parametrize("producer", [name for name in NAMES if name != "loralib"])
def test_tensors_of_other_programs(untied, producer, tmp_path):
    foreign = {NAMES[producer]: np.zeros((2, 2), np.float32)}
    with pytest.raises(ValueError, match=f"{producer}.*not read here") as told:
        load(copy(tmp_path, "gpt2/c_attn", lambda t: foreign), untied)
    assert NAMES[producer] in str(told.value)


def test_no_name_of_peft_s_is_taken_for_another_program_s():
    for path in GOLDENS.glob("*/*/adapter_model.safetensors"):
        names = list(safetensors.numpy.load_file(path))
        assert not producers.describe_tensors(names) and not peft.describe_files(path.parent)


# What lies beside the weights.


@pytest.mark.parametrize(
    "name, says",
    [
        ("new_embeddings.safetensors", "rows for new tokens"),
        ("non_lora_trainables.bin", "trained beside the factors"),
        ("trainable_params.bin", "trained beside the factors"),
        ("adapter_model.safetensors.index.json", "shards"),
    ],
)
def test_files_that_change_the_result_are_refused(untied, name, says, tmp_path):
    directory = copy(tmp_path, "gpt2/c_attn")
    (directory / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{name} .*{says}"):
        load(directory, untied)


def test_files_of_a_run_do_not_matter_and_unknown_ones_are_listed(untied, tmp_path):
    directory = copy(tmp_path, "gpt2/c_attn")
    for name in ("README.md", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (directory / name).write_bytes(b"x")
    load(directory, untied)
    assert peft.find_unknown(directory) == []
    (directory / "notes.txt").write_text("")
    (directory / "other").mkdir()
    (directory / "other" / CONFIG).write_text("{}")
    assert peft.find_unknown(directory) == ["notes.txt", "other/ (another adapter)"]
    treatment = directory_files.find_treatment("adapter_model-00001-of-00002.safetensors")
    assert treatment.treatment == directory_files.REFUSED


# Words.


SET = {"use_bdlora": True, "layer_replication": [[0, 1]], "alora_invocation_tokens": [1]}


@pytest.mark.parametrize("word", config.REFUSED)
def test_each_word_that_is_not_built_is_refused_with_what_it_is(word, untied, tmp_path):
    value = SET.get(word, {"x": 1})
    with pytest.raises(ValueError, match=word) as told:
        load(copy(tmp_path, "gpt2/c_attn", **{word: value}), untied)
    assert f"not supported ({config.REFUSED[word]})" in str(told.value)


@pytest.mark.parametrize("word", config.IGNORED)
def test_each_word_that_is_ignored_changes_nothing(word, untied, tmp_path):
    directory = copy(tmp_path, "gpt2/c_attn", **{word: {"x": 1}})
    assert_same(load(directory, untied), load(GOLDENS / "gpt2" / "c_attn", untied))


def test_every_word_of_peft_has_one_treatment():
    tables = [set(config.READ), set(config.IGNORED), set(config.REFUSED)]
    assert set(config.DEFAULTS) <= set.union(*tables)
    assert sum(map(len, tables)) == len(set.union(*tables))


@pytest.mark.parametrize(
    "words, says",
    [
        ({"revision": 3}, "revision: must be"),
        ({"revision": "../../x"}, "revision: must be"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path: must be"),
    ],
)
def test_a_base_that_is_no_name(untied, words, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        load(copy(tmp_path, "gpt2/c_attn", **words), untied)
