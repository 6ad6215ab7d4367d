"""The model card of an export: its metadata as the Hub reads them, and what it leaves out."""

import dataclasses
import json
import re
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest

import lora_jax as lora
from configs import common, instruct_llama
from lora_jax.models import checkpoints
from lora_jax.tasks import adapter_files, classification, model_card
from lora_jax.training import workdirs
from tests.helpers import tiny_encoder, tiny_llama

METADATA = {"step": 12, "seed": 0, "max_length": 32, "accuracy": 0.91666, "loss": 0.25, "f1": 0.5}


def on_hub(loaded, name="org/base"):
    """The base as if it had come from the Hub."""
    checkpoint = loaded.checkpoint._replace(name=name, origin="Hub cache")
    return dataclasses.replace(loaded, checkpoint=checkpoint)


def make(loaded, root, config, lora_config, metadata=METADATA):
    """A finished run, as far as a card needs it."""
    run = root / "run"
    (run / "adapter").parent.mkdir(parents=True)
    params = loaded.params
    ids = np.ones((1, 3), np.int32)
    arguments = (ids, ids) if loaded.head == "classifier" else (ids,)
    fn = lambda params, *x: loaded.model.apply(params, *x)
    adapter = lora.init(jax.random.key(0), fn, params, lora_config, *arguments)
    lora.save(run / "adapter", adapter, lora_config, base=loaded.base_id, metadata=metadata)
    (run / "config.json").write_text(json.dumps(workdirs.to_json_types(config)))
    lines = [{"step": 0, "eval_accuracy": 0.5, "eval_loss": 0.75}, {"step": 12, "eval_loss": 0.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return model_card.Export(
        directory=root / "out", adapter_directory=run / "adapter", loaded=loaded, adapter=adapter,
        config=lora_config, labels=("negative", "positive"), program="sst2",
    )  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = tiny_encoder.checkpoint(tmp_path_factory.mktemp("model"))
    return classification.load_model(str(directory), num_labels=2, key=jax.random.key(0))


@pytest.fixture
def export(loaded, tmp_path):
    settings = lora.LoRAConfig(rank=3, alpha=6.0, targets=("query",), train=("classifier",))
    config = common.base_config()
    config.lora.rank = 3
    return make(on_hub(loaded), tmp_path, config, settings)


def with_data(export, **data):
    path = export.adapter_directory.parent / "config.json"
    config = json.loads(path.read_text())
    config["data"] |= data
    path.write_text(json.dumps(config))
    return export


def read(text):
    """The metadata as the Hub's own client reads them, and the text."""
    card = huggingface_hub.ModelCard(text)
    return card.data, card.text


def test_what_the_hub_reads(export):
    data, _ = read(
        model_card.make_text(dataclasses.replace(export, repo="someone/name", license="mit"))
    )
    assert data.base_model == "org/base" and data.library_name == "peft" and data.license == "mit"
    assert data.pipeline_tag == "text-classification" and data.tags == ["lora", "lora_jax"]
    assert data.datasets == ["nyu-mll/glue"] and data.metrics == ["accuracy", "f1"]
    results = {
        x.metric_type: (x.metric_value, x.dataset_type, x.dataset_name) for x in data.eval_results
    }
    assert results == {
        "accuracy": (0.9167, "nyu-mll/glue", "glue/sst2"),
        "f1": (0.5, "nyu-mll/glue", "glue/sst2"),
    }
    assert data.model_name == "name"


def test_what_people_read(export):
    text = read(model_card.make_text(dataclasses.replace(export, repo="someone/name")))[1]
    assert "# name\n" in text and "| base | `org/base` |" in text
    assert "(2 classes): `negative`, `positive` |" in text
    assert (
        "| method | LoRA, rank 3, alpha 6, dropout 0, 2 kernels: " in text
        and "trained in full: `" in text
    )
    assert lora.summary(export.loaded.params, export.adapter).split(" ||")[0] in text
    assert "| accuracy | 0.5000 | 0.9167 |" in text and "| loss | 0.7500 | 0.2500 |" in text
    assert "| f1 |  | 0.5000 |" in text and "| step 12 |" in text and "max_length |" not in text
    assert "python -m experiments.sst2 --config=config.json" in text
    config = json.loads(re.search(r"```json\n(.*?)\n```", text, re.DOTALL)[1])
    assert config["lora"]["rank"] == 3 and config["data"]["source"] == "tfds:glue/sst2"
    assert "AutoModelForSequenceClassification.from_pretrained('org/base', num_labels=2" in text
    assert "PeftModel.from_pretrained(base, 'someone/name')" in text
    assert (
        "hf download someone/name --local-dir name\npython -m experiments.predict --adapter=name "
        in text
    )
    assert "vLLM" not in text  # which serves no adapter with a head
    compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "card", "exec")


def test_what_is_not_known_is_left_out(export, loaded):
    local = dataclasses.replace(with_data(export, source="/home/me/secret/news.csv"), loaded=loaded)
    text = model_card.make_text(local)
    data, _ = read(text)
    about = data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "datasets", "model-index"} & set(
        about
    )
    assert "`news.csv` (local)" in text and "DIRECTORY_OF_THE_BASE" in text
    assert "/home" not in text and str(loaded.checkpoint.directory.parent) not in text
    (export.adapter_directory.parent / "config.json").unlink()
    text = model_card.make_text(export)
    assert "## Training" not in text and "| data |" not in text and "| accuracy | 0.9167 |" in text


@pytest.mark.parametrize("source, dataset, told", [
    ("tfds:glue/rte", "nyu-mll/glue", "`glue/rte` (TensorFlow Datasets)"), ("reviews", "", "come with lora_jax"),
    ("datasets:ag_news", "ag_news", "`ag_news` (Hugging Face)"), ("datasets:a/b@c", "a/b", "`a/b@c` (Hugging Face)"),
    ("datasets:a/b@c:train", "a/b", "`a/b@c:train`"), ("tfds:other", "", "`other` (TensorFlow Datasets)"),
    ("news/train.csv", "", "`train.csv` (local)"), ("~/x.csv", "", "`x.csv` (local)"),
    ("a`b|c.csv", "", r"``a`b\|c.csv`` (local)"), ("größe.csv", "", "`größe.csv`"), ("datasets:../x", "", ""),
])  # fmt: skip
def test_data(export, source, dataset, told):
    text = model_card.make_text(with_data(export, source=source))
    assert (read(text)[0].datasets or [""]) == [dataset] and told in text


@pytest.mark.parametrize("labels", [
    ("<script>alert(1)</script>", "a|b"), ("`x`", "``"), ("---\nlicense: mit", "# head"), ("a\x00b", "\u202eabc"),
])  # fmt: skip
def test_texts_of_the_user_do_not_become_markdown_or_metadata(export, labels):
    strange = dataclasses.replace(export, labels=labels, directory=export.directory / "a *b* <i>")
    with_data(export, source="```\n</details>\n---")
    text = model_card.make_text(strange)
    data, body = read(text)
    assert data.license is None and "# a \\*b\\* \\<i\\>\n" in body
    table = [line for line in body.splitlines() if line.startswith("| task")]
    assert len(table) == 1 and len(re.findall(r"(?<!\\)\|", table[0])) == 3
    in_code = re.sub(
        r"(`+)(?!`).*?[^`]\1(?!`)", "", table[0]
    )  # what is left when code is taken out
    assert not set("<>#`\x00\u202e") & set(in_code)
    assert "````json\n" in body and not re.search(r"^# head", body, re.MULTILINE)


def test_names_that_are_short_on_the_hub(export, loaded):
    named = lambda name: model_card.find_hub_base(on_hub(loaded, name))
    assert named("bert-base-uncased") == "google-bert/bert-base-uncased"
    assert named("org/base@v2") == "org/base" and model_card.find_hub_base(loaded) == ""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tiny_llama.checkpoint(tmp_path_factory.mktemp("llama"))
    return on_hub(checkpoints.load(str(directory), head="causal-lm"), "org/llama")


@pytest.mark.parametrize("settings, command", [
    (dict(rank=9), "vllm serve org/llama --enable-lora --max-lora-rank 16 --lora-modules out=out"),
    (dict(rank=4), "--max-lora-rank 8 "), (dict(rank=2, rank_pattern={"re:.*q_proj.*": 12}), "--max-lora-rank 16 "),
    (dict(rank=4, method="dora"), ""), (dict(rank=4, train=("lm_head",)), ""), (dict(rank=4, adapt_bias=False), "8 "),
])  # fmt: skip
def test_vllm(llama, tmp_path, settings, command):
    config = lora.LoRAConfig(targets=("q_proj", "v_proj"), **settings)
    export = make(
        llama, tmp_path, instruct_llama.get_config(), config, {"step": 3, "loss": 1.5, "task": "x"}
    )
    export = dataclasses.replace(export, labels=(), program="instruct")
    adapter_files.save_peft(export.directory, llama, export.adapter, config, base="org/llama")
    model_card.write(export)
    text = Path(export.directory / "README.md").read_text()
    assert ("With vLLM" in text) == bool(command) and command in text
    data = read(text)[0]
    assert data.pipeline_tag == "text-generation" and "model-index" not in data.to_dict()
    assert data.tags == ["lora", "lora_jax", *(["dora"] if "method" in settings else [])]
    merged = model_card.make_text(
        dataclasses.replace(export, is_merged=True, repo="someone/merged")
    )
    assert "vllm serve someone/merged\n" in merged and "AutoModelForCausalLM" in merged
    about = read(merged)[0].to_dict()
    assert about["library_name"] == "transformers" and about["base_model_relation"] == "finetune"
