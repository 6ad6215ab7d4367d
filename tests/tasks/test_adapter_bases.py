"""What an adapter's directory says beside its factors: its base, texts, labels; used or told."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants

import lora_jax as lora
from configs import quickstart
from lora_jax import paths
from lora_jax.models import checkpoints, hub
from lora_jax.tasks import (
    adapter_bases,
    adapter_files,
    chat,
    classification,
    classifier,
    glue,
    language_model,
    language_modeling,
    loading_code,
    task_file,
    text_files,
)
from lora_jax.tasks.text_task import LabelledTexts
from tests.helpers import tiny_encoder, tiny_llama

CONFIG = "adapter_config.json"
IDS = jax.ShapeDtypeStruct((1, 3), np.int32)
LABELS = ("sad", "so so", "glücklich")


def write_adapter(directory, loaded, *, base, **fields):
    """An adapter of small random numbers, in PEFT's format."""
    settings = lora.LoRAConfig(rank=2, targets=loaded.family.targets, **fields)
    inputs = loaded.family.inputs(loaded.head)
    adapter = lora.init(jax.random.key(0), loaded.model.apply, loaded.params, settings, *inputs)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    adapter_files.save_peft(directory, loaded, adapter, settings, base=base)
    return directory


def change(directory, **words):
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | words))
    return directory


def words_of(directory):
    return json.loads((directory / CONFIG).read_text())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base that chats, and an adapter of it."""
    root = tmp_path_factory.mktemp("llama")
    base = tiny_llama.checkpoint(root / "base")
    loaded = checkpoints.load(base, head="causal-lm")
    return base, write_adapter(root / "adapter", loaded, base=str(base))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A base without a head, and an adapter of three labels."""
    root = tmp_path_factory.mktemp("encoder")
    base = tiny_encoder.checkpoint(root / "base")
    loaded = classification.load_model(str(base), num_labels=3)
    train = ("classifier", "pooler")
    return base, write_adapter(root / "adapter", loaded, base=str(base), train=train)


@pytest.fixture
def adapter(llama, tmp_path):
    return shutil.copytree(llama[1], tmp_path / "adapter")


@pytest.fixture
def rater(encoder, tmp_path):
    return shutil.copytree(encoder[1], tmp_path / "rater")


# The base and its revision.


@pytest.fixture
def cache(llama, tmp_path, monkeypatch):
    """The Hub's cache, with two revisions of one model, of which the second has other numbers."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "cache" / "models--org--base"
    for number, revision in enumerate(("main", "v2")):
        commit = str(number) * 40
        snapshot = shutil.copytree(llama[0], repo / "snapshots" / commit)
        path = snapshot / hub.WEIGHTS
        tensors = safetensors.numpy.load_file(path)
        safetensors.numpy.save_file({n: x + number for n, x in tensors.items()}, path)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
    return repo


def loaded_revision(directory, llama, **options):
    """By how much the numbers of the base are more than those of the first revision."""
    found = language_model.load(directory, **options)
    stored = safetensors.numpy.load_file(llama[0] / hub.WEIGHTS)["model.norm.weight"]
    leaf = paths.named_leaves(found.loaded.params)["params/model/norm/scale"]
    return round(float((np.asarray(leaf) - stored).mean())), found


@pytest.mark.parametrize(
    "revision, model, number, name",
    [
        ("v2", None, 1, "org/base@v2"),
        ("1" * 40, None, 1, f"org/base@{'1' * 40}"),
        ("main", None, 0, "org/base@main"),
        (None, None, 0, "org/base"),
        ("", None, 0, "org/base"),
        ("v2", "org/base", 1, "org/base@v2"),
        ("v2", "org/base@main", 0, "org/base@main"),
        (None, "org/base@v2", 1, "org/base@v2"),
    ],
)
def test_the_base_is_of_the_revision_that_the_adapter_names(
    cache, adapter, llama, revision, model, number, name, tmp_path
):
    change(adapter, base_model_name_or_path="org/base", revision=revision)
    found, made = loaded_revision(adapter, llama, model=model)
    assert (found, made.loaded.checkpoint.name) == (number, name)
    assert made.notes[0] == f"base {name}, from Hub cache"
    is_other = model == "org/base@main"
    assert any("revision 'v2' of org/base" in note for note in made.notes) == is_other
    # and it is written again as it was found
    adapter_files.save_peft(
        tmp_path / "again", made.loaded, made.adapter, made.config, base=made.loaded.checkpoint.name
    )
    words = words_of(tmp_path / "again")
    assert words["base_model_name_or_path"] == "org/base"
    assert words["revision"] == (name.partition("@")[2] or None)


def test_a_revision_that_is_not_here(cache, adapter):
    change(adapter, base_model_name_or_path="org/base", revision="v3")
    with pytest.raises(FileNotFoundError, match="'org/base@v3'.*(?s:.)*of the revision 'v3'"):
        language_model.load(adapter)


def test_a_revision_of_a_folder_cannot_be_checked_and_is_told(adapter, llama):
    change(adapter, revision="v2")
    notes = language_model.load(adapter).notes
    assert f"revision 'v2' of {llama[0]}" in notes[1] and "a path" in notes[1]
    change(adapter, base_model_name_or_path="org/base")
    notes = language_model.load(adapter, model=str(llama[0])).notes
    assert "revision 'v2' of org/base" in notes[1]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("org/base@v2", ("org/base", "v2")),
        ("bert-base-uncased@refs/pr/3", ("bert-base-uncased", "refs/pr/3")),
        ("org/base", ("org/base", None)),
        ("org/base@", ("org/base@", None)),
        ("./a@b", ("./a@b", None)),
        ("/runs/a@b/c", ("/runs/a@b/c", None)),
        ("a.gguf@v2", ("a.gguf@v2", None)),
    ],
)
def test_names_with_revisions(name, expected):
    assert hub.split_revision(name) == expected


def test_a_folder_whose_name_has_the_sign_of_a_revision(llama, tmp_path, monkeypatch):
    shutil.copytree(llama[0], tmp_path / "base@v2")
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("base@v2").origin == "directory"
    assert adapter_bases.make_absolute("base@v2") == str(tmp_path / "base@v2")


def test_a_relative_base_is_written_so_that_other_folders_find_it(llama, tmp_path, monkeypatch):
    shutil.copytree(llama[0], tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path / "models")
    loaded = checkpoints.load("base", head="causal-lm")
    write_adapter(tmp_path / "runs" / "peft", loaded, base="base")
    absolute = str(tmp_path / "models" / "base")
    assert words_of(tmp_path / "runs" / "peft")["base_model_name_or_path"] == absolute
    monkeypatch.chdir("/")
    assert language_model.load(tmp_path / "runs" / "peft").loaded.base_id == loaded.base_id
    # one that others wrote, from the adapter's folder on
    change(tmp_path / "runs" / "peft", base_model_name_or_path="../../models/base")
    made = language_model.load(tmp_path / "runs" / "peft")
    assert made.loaded.base_id == loaded.base_id
    again = made.loaded.checkpoint.name
    adapter_files.save_peft(tmp_path / "new", loaded, made.adapter, made.config, base=again)
    assert words_of(tmp_path / "new")["base_model_name_or_path"] == absolute


def test_this_library_s_format_has_absolute_paths_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_encoder.checkpoint(tmp_path / "model").parent)
    texts = LabelledTexts(task=glue.find("sst2"), training=None, evaluations=(), metadata={})
    for config, describe in (
        (tiny_llama.config(tmp_path), language_modeling.metadata),
        (
            quickstart.get_config().copy_and_resolve_references(),
            lambda c: classification.metadata(c, texts),
        ),
    ):
        with config.unlocked():
            config.model.name = "model"
        assert describe(config)["model"]["name"] == str(tmp_path / "model")
        with config.unlocked():
            config.model.name = "org/model"
        assert describe(config)["model"]["name"] == "org/model"


def test_embeddings_in_full_keep_their_digits_over_a_base_in_bfloat16(adapter, llama, tmp_path):
    """Where the base is loaded as it is stored, to be merged kernel by kernel."""
    base = shutil.copytree(llama[0], tmp_path / "base")
    stored = safetensors.numpy.load_file(base / hub.WEIGHTS)
    narrow = {name: x.astype(jnp.bfloat16) for name, x in stored.items()}
    safetensors.numpy.save_file(narrow, base / hub.WEIGHTS)
    path = adapter / "adapter_model.safetensors"
    name = "model.embed_tokens.weight"
    new = {f"base_model.model.{name}": stored[name] + np.float32(1 / 3)}
    safetensors.numpy.save_file(safetensors.numpy.load_file(path) | new, path)
    made = language_model.load(adapter, model=str(base), wide=False)
    leaves = paths.named_leaves(made.adapter)
    np.testing.assert_array_equal(
        leaves["params/model/embed_tokens/embedding"], new[f"base_model.model.{name}"]
    )
    kernel = paths.named_leaves(made.loaded.params)["params/lm_head/kernel"]
    assert kernel.dtype == jnp.bfloat16


# The task.


@pytest.mark.parametrize("task", ["SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_task_that_a_language_model_is_not_for(adapter, task):
    change(adapter, task_type=task)
    with pytest.raises(ValueError, match=f"task_type '{task}'.*type 'llama'.*CAUSAL_LM"):
        adapter_bases.find_base(adapter)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "TOKEN_CLS"])
def test_a_task_that_an_encoder_is_not_for(rater, task):
    change(rater, task_type=task)
    with pytest.raises(ValueError, match=f"task_type '{task}'.*type 'bert'.*SEQ_CLS"):
        classifier.load(rater)


def test_a_task_that_another_program_is_for(rater):
    change(rater, task_type="FEATURE_EXTRACTION", modules_to_save=["classifier", "pooler"])
    with pytest.raises(ValueError, match="FEATURE_EXTRACTION.*used here with the head"):
        classifier.load(rater)


# The texts.


def talk(directory, **options):
    return chat.load(directory, max_new_tokens=1, **options)


def add_word(llama, directory):
    """The tokenizer of the base with one more word."""
    made = tiny_llama.tokenizer()
    made.add_tokens(["zebra"])
    made.save(str(directory / "tokenizer.json"))


MARKED = tiny_llama.CHATML.replace("<|im_start|>", "<|im_start|>a ")


def test_the_adapter_s_own_files_about_texts_are_used(adapter, llama, tmp_path):
    add_word(llama, adapter)
    (adapter / "chat_template.jinja").write_text(MARKED)
    (adapter / "generation_config.json").write_text('{"eos_token_id": [6, 7]}')
    talker, own = talk(None, model=str(llama[0])), talk(adapter)
    assert own.tokenizer.token_to_id("zebra") == len(tiny_llama.WORDS)
    assert talker.tokenizer.token_to_id("zebra") is None
    assert own.template.source == MARKED != talker.template.source
    assert own.template.tokens == talker.template.tokens  # of the base: the adapter names none
    assert set(own.decoding.stop) == {6, 7, *talker.decoding.stop}
    note = "tokenizer and chat template and generation config (tokens that end a reply): the"
    assert any(note in line for line in own.notes)
    size = len(tiny_llama.WORDS)
    assert own.notes[-1].startswith(f"tokenizer: {size + 1} tokens, and the embedding of")
    assert f"has {size} rows; texts with a token beyond it are refused" in own.notes[-1]
    assert chat.load_pair(adapter, max_new_tokens=1)[0].notes == own.notes
    # and merged weights have them
    out = shutil.copytree(llama[0], tmp_path / "merged")
    checkpoint = checkpoints.resolve(llama[0])
    text_files.replace(out, text_files.find(adapter, checkpoint), checkpoint)
    merged = talk(None, model=str(out))
    assert merged.tokenizer.to_str() == own.tokenizer.to_str()
    assert merged.template.source == MARKED
    assert not (out / "tokenizer_config.json").exists()  # that of the base is of its tokenizer


@pytest.mark.parametrize(
    "name, text, parts",
    [
        ("chat_template.jinja", MARKED, "chat template"),
        ("tokenizer_config.json", json.dumps({"chat_template": MARKED}), "chat template"),
        ("generation_config.json", '{"eos_token_id": 6}', "generation config"),
    ],
)
def test_each_of_them_alone(adapter, llama, name, text, parts, tmp_path):
    (adapter / name).write_text(text)
    own, talker = talk(adapter), talk(None, model=str(llama[0]))
    assert any(line.startswith(parts) and "the adapter's own" in line for line in own.notes)
    assert own.tokenizer.to_str() == talker.tokenizer.to_str()
    assert (own.template.source == MARKED) == (parts == "chat template")
    out = shutil.copytree(llama[0], tmp_path / "merged")
    checkpoint = checkpoints.resolve(llama[0])
    text_files.replace(out, text_files.find(adapter, checkpoint), checkpoint)
    merged = talk(None, model=str(out))
    assert merged.template.source == own.template.source
    assert merged.template.tokens == own.template.tokens
    assert merged.decoding.stop == own.decoding.stop


def test_a_tokenizer_that_makes_none_here_is_told(adapter):
    (adapter / "added_tokens.json").write_text("{}")
    assert "added_tokens.json" in language_model.load(adapter).notes[-1]
    (adapter / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json is damaged"):
        language_model.load(adapter)


def test_what_nobody_knows_is_told(adapter, rater):
    for directory, load in ((adapter, language_model.load), (rater, classifier.load)):
        (directory / "README.md").write_text("# A model card")
        assert not any("not used" in note for note in load(directory).notes)
        (directory / "notes.txt").write_text("")
        (directory / "adapter.json").write_text("{}")
        note = next(note for note in load(directory).notes if "not used" in note)
        assert "notes.txt" in note and "adapter.json" in note


def test_another_program_s_adapter_is_told_by_name(tmp_path):
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    for load in (language_model.is_language, classifier.load, adapter_bases.is_peft):
        with pytest.raises(ValueError, match=r"adapters.safetensors is of MLX"):
            load(tmp_path)


# Labels and lengths.


ABOUT = {
    "labels": list(LABELS),
    "max_length": 12,
    "buckets": [4, 12],
    "pairs": False,
    "glue": "sst2",
    "columns": [],
}


def test_labels_and_lengths_come_back(rater):
    task_file.write(rater, ABOUT)
    assert task_file.read(rater) == ABOUT
    made = classifier.load(rater)
    assert (made.labels, made.max_length, made.buckets) == (LABELS, 12, (4, 12))
    assert made.pairs is False and classifier.describe_task(made) == ABOUT
    assert "labels sad, so so, glücklich (those of lora_jax.json)" in made.notes
    task_file.write(rater, ABOUT | {"max_length": 99})  # the base has 20 positions
    made = classifier.load(rater)
    assert (made.max_length, made.buckets) == (20, (4, 12, 20))


def test_labels_without_the_file_are_told(rater):
    made = classifier.load(rater)
    assert made.labels == ("LABEL_0", "LABEL_1", "LABEL_2") and made.pairs is None
    (rater / "config.json").write_text(json.dumps({"id2label": dict(enumerate(LABELS))}))
    made = classifier.load(rater)
    assert made.labels == LABELS
    assert f"labels {', '.join(LABELS)} (those of the config.json beside the adapter)" in made.notes
    (rater / "config.json").write_text(json.dumps({"id2label": {"0": "no", "1": "yes"}}))
    assert classifier.load(rater).labels[0] == "LABEL_0"


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "damaged"),
        ("[]", "holds no JSON object"),
        ({"format_version": 9}, "version 1"),
        ({"labels": ["a", "a", "b"]}, "labels must be a list of different names"),
        ({"labels": []}, "labels must be"),
        ({"max_length": 0}, "max_length must be a whole number"),
        ({"max_length": True}, "max_length must be"),
        ({"buckets": [9, 3]}, "buckets must be"),
        ({"pairs": "no"}, "pairs must be"),
        ({"colour": 1}, "colour is not known here"),
        ({"labels": ["a", "b"]}, "names 2 labels, and the head of the adapter has 3"),
    ],
)
def test_a_file_of_labels_that_is_wrong(rater, text, says):
    task_file.write(rater, ABOUT)
    path = rater / task_file.NAME
    if isinstance(text, dict):
        text = json.dumps(json.loads(path.read_text()) | text)
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        classifier.load(rater)


def test_a_file_of_labels_that_lacks_a_key(rater):
    task_file.write(rater, {name: x for name, x in ABOUT.items() if name != "buckets"})
    with pytest.raises(ValueError, match="buckets is missing"):
        task_file.read(rater)


# The lines that open it.


def test_lines_for_a_head_of_any_size(encoder):
    base = encoder[0]
    for count in (1, 3, 40):
        loaded = classification.load_model(str(base), num_labels=count)
        lines = loading_code.write_peft_lines("out dir/it's", loaded).splitlines()
        assert lines[2] == (
            f"base = AutoModelForSequenceClassification.from_pretrained({str(base)!r}, "
            f"num_labels={count}, ignore_mismatched_sizes=True)"
        )
        assert lines[3] == 'model = PeftModel.from_pretrained(base, "out dir/it\'s")'


def test_lines_for_a_revision(cache):
    loaded = checkpoints.load("org/base@v2", head="causal-lm")
    lines = loading_code.write_peft_lines("out", loaded)
    assert "AutoModelForCausalLM.from_pretrained('org/base', revision='v2')" in lines
