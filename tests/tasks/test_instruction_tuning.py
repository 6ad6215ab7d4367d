"""What a config says of conversations: the part held out, formats, and a template of one's own."""

import json

import jax
import numpy as np
import pytest

import lora_jax as lora
from configs import chat_quickstart, instruct_llama
from lora_jax.data import chat_template
from lora_jax.models import checkpoints
from lora_jax.tasks import chat, instruction_tuning, templates
from tests.helpers import programs, talks, tiny_llama

OWN = tiny_llama.CHATML.replace("{% for", "{{ bos_token }}horse {% for", 1)


def resolved(**fields):
    config = instruct_llama.get_config()
    config.update_from_flattened_dict({"model.name": "m", "data.train": "a.jsonl"} | fields)
    return instruction_tuning.resolve(config)


@pytest.mark.parametrize("fields, holdout", [
    ({}, "5%"), ({"data.validation": "b.jsonl"}, 0), ({"data.holdout": 7}, 7), ({"data.holdout": "10%"}, "10%"),
    ({"data.holdout": 0, "data.validation": "b.jsonl"}, 0),
])  # fmt: skip
def test_what_is_evaluated(fields, holdout):
    config = resolved(**fields)
    assert config.data.holdout == holdout
    instruction_tuning.check(config)
    assert instruction_tuning.resolve(config).data.holdout == holdout  # a second time


@pytest.mark.parametrize("fields, message", [
    ({"data.validation": "b.jsonl", "data.holdout": "5%"}, "data.validation 'b.jsonl' and data.holdout '5%' both say"),
    ({"data.validation": "b.jsonl", "data.holdout": 9}, "data.validation 'b.jsonl' and data.holdout 9 both say"),
    ({"data.holdout": 0}, "there is nothing to evaluate on: set data.validation"),
    ({"data.holdout": "5 percent"}, 'data.holdout must be a number of examples, or a part such as "5%", got \'5 percent\''),
    ({"data.holdout": -1}, "data.holdout must be a number of examples"),
    ({"data.format": "chatml"}, "data.format must be one of auto, messages, sharegpt, alpaca, prompt_completion, got 'chatml'"),
])  # fmt: skip
def test_configs_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        instruction_tuning.check(resolved(**fields))


def test_the_quickstart_is_evaluated_on_its_file():
    config = instruction_tuning.resolve(chat_quickstart.get_config())
    instruction_tuning.check(config)
    training, evaluation = instruction_tuning.load_conversations(config)
    assert (len(training), len(evaluation)) == (100, 50)


def test_a_part_is_held_out(tmp_path):
    rows = [{"instruction": f"question {k}", "output": "x", "id": k} for k in range(40)]
    path = talks.rows(tmp_path / "rows.jsonl", *rows)
    fields = {"data.train": str(path), "data.format": "alpaca", "data.ignore": ("id",)}
    training, evaluation = instruction_tuning.load_conversations(resolved(**fields))
    assert (len(training), len(evaluation)) == (38, 2)
    asked = [talk.messages[0]["content"] for talk in (*training, *evaluation)]
    assert sorted(asked) == sorted(row["instruction"] for row in rows)
    other = instruction_tuning.load_conversations(resolved(**fields | {"data.seed": 1}))[1]
    assert [talk.place for talk in other] != [talk.place for talk in evaluation]
    with pytest.raises(ValueError, match="rows.jsonl:1: 'id' is not read.*data.ignore"):
        instruction_tuning.load_conversations(resolved(**fields | {"data.ignore": ()}))
    fields["data.holdout"] = 40
    with pytest.raises(
        ValueError,
        match="data.holdout 40 leaves nothing of the 40 conversations in .*rows.jsonl to train on",
    ):
        instruction_tuning.load_conversations(resolved(**fields))


# ---- A template of one's own ---------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return checkpoints.resolve(tiny_llama.checkpoint(tmp_path / "model"))


def adapter(path, **metadata):
    params = {"kernel": np.ones((4, 4), np.float32)}
    fn = lambda params, x: x @ params["kernel"]
    config = lora.LoRAConfig(rank=1, targets=("kernel",))
    made = lora.init(jax.random.key(0), fn, params, config, np.ones((1, 4), np.float32))
    lora.save(path, made, config, metadata=metadata)
    return path


def test_a_template_is_the_files_or_the_adapters_or_the_models(tmp_path, model):
    (tmp_path / "own.jinja").write_text(OWN)
    plain = adapter(tmp_path / "plain", task="language-modelling")
    own = adapter(tmp_path / "own", chat_template="of the adapter")
    beside = adapter(tmp_path / "beside")
    (beside / chat_template.FILE).write_text("beside the adapter")
    found = templates.find(model, file=tmp_path / "own.jinja", adapter=own)
    assert found.source == OWN and found.tokens["bos_token"] == "<s>"
    assert templates.find(model, adapter=own).source == "of the adapter"
    assert templates.find(model, adapter=own).tokens == found.tokens
    assert templates.find(model, adapter=beside).source == "beside the adapter"
    for directory in (plain, None, ""):
        assert templates.find(model, adapter=directory).source == tiny_llama.CHATML
    (tmp_path / "out").mkdir()
    templates.copy(plain, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())
    templates.copy(own, tmp_path / "out")
    assert (tmp_path / "out" / chat_template.FILE).read_text() == "of the adapter"
    with pytest.raises(ValueError, match="odd is damaged: chat_template is 3"):
        templates.read(adapter(tmp_path / "odd", chat_template=3))


@pytest.mark.parametrize("content, message", [
    (None, "data.chat_template names .*own.jinja, which is no file"), (b" \n", "own.jinja is empty"),
    (b"\xff", "own.jinja is not UTF-8 at byte 0"),
])  # fmt: skip
def test_templates_that_can_not_be_read(content, message, tmp_path, model):
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        templates.find(model, file=tmp_path / "own.jinja")


def test_a_model_may_have_a_template_for_tools(tmp_path, model):
    settings = model.directory / "tokenizer_config.json"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    settings.write_text(json.dumps({"chat_template": named}))
    found = templates.find(model)
    assert (found.source, found.with_tools) == ("plain", "tools")
    assert [chat_template.choose(found, tools) for tools in (None, [], [{"a": 1}])] == ["plain", "plain", "tools"]  # fmt: skip
    (model.directory / chat_template.FILE).write_text("of a file")
    assert (templates.find(model).source, templates.find(model).with_tools) == ("of a file", None)
    (model.directory / "additional_chat_templates").mkdir()
    (model.directory / "additional_chat_templates" / "tool_use.jinja").write_text("beside it")
    assert templates.find(model).with_tools == "beside it"


@pytest.mark.slow
def test_a_run_keeps_its_template(tmp_path):
    tiny_llama.checkpoint(tmp_path / "model")
    tiny_llama.data(tmp_path / "data.jsonl", count=12)
    (tmp_path / "own.jinja").write_text(OWN)
    fields = tiny_llama.overrides(tmp_path) | {
        "data.chat_template": tmp_path / "own.jinja",
        "steps": 2,
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    said = programs.succeed(
        "instruct", "--config=configs/instruct_llama.py", f"--workdir={tmp_path / 'run'}", *flags
    )
    assert f"chat template: {tmp_path / 'own.jinja'}" in said
    trained = tmp_path / "run" / "adapter"
    assert chat.load(trained, max_new_tokens=4).template.source == OWN
    out = tmp_path / "merged"
    programs.succeed("export", f"--adapter={trained}", f"--out={out}", "--merged")
    assert (out / chat_template.FILE).read_text() == OWN
    # A run that goes on from the adapter has its template, too.
    config = tiny_llama.config(tmp_path, adapter=str(trained))
    task, _ = instruction_tuning.make_task(config)
    assert task.metadata["chat_template"] == OWN
    assert any("chat template: of the adapter" in note for note in task.notes)
