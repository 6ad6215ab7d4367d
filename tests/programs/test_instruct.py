"""Fine-tuning on conversations and talking to the result, as a user does both."""

import json

import numpy as np
import pytest

import lora_jax as lora
from lora_jax import peft
from lora_jax.data import chat_template
from lora_jax.models import checkpoints
from lora_jax.tasks import chat, instruction_tuning, language_model
from tests.helpers import programs, tiny_llama
from tests.helpers.places import ROOT

pytestmark = pytest.mark.xdist_group("instruct")


PATTERN = "a (colour|number|animal)"
run = programs.succeed


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("instruct")
    tiny_llama.checkpoint(root / "model")
    tiny_llama.data(root / "data.jsonl")
    flags = [f"--config.{name}={value}" for name, value in tiny_llama.overrides(root).items()]
    flags += ["--config.eval_at_start=True", f"--config.replies.pattern={PATTERN}"]
    arguments = ("--config=configs/instruct_llama.py", f"--workdir={root / 'run'}", *flags)
    done = programs.start("instruct", *arguments)
    assert done.returncode == 0, done.stderr
    return root, done.stdout


def test_training_learns_and_reports(finished):
    root, said = finished
    assert "trainable params:" in said and "94 conversations" in said
    assert f'python -m experiments.chat --adapter={root}/run/adapter "Who are you?"' in said
    lines = [json.loads(x) for x in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(losses) == 9
    assert min(losses) < 0.2 < 0.5 < losses[0]  # 0.37: an answer to no question in particular
    assert max(line["eval_accuracy"] for line in lines if "eval_loss" in line) > 0.99


def test_losses_and_replies_before_and_after(finished):
    root, said = finished
    lines = [json.loads(x) for x in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    (before,) = (x["eval_loss"] for x in lines if x["step"] == 0)
    assert f"validation loss before training {before:.4f}, best validation loss 0." in said
    found = [json.loads(x) for x in (root / "run" / "replies.jsonl").read_text().splitlines()]
    assert f"replies that match {PATTERN!r}: 0 of 6 before, 6 of 6 after" in said
    for row in found:
        (asked,) = row["messages"]
        word = asked["content"].removeprefix("what is ").removesuffix("?")
        assert row["after"] == tiny_llama.answer(word)["content"] != row["before"]


def test_questions_and_both_replies(finished):
    root, _ = finished
    adapter = f"--adapter={root / 'run' / 'adapter'}"
    asked = ["--ask=what is red?", "--ask=what is two?", "--max_new_tokens=9"]
    assert (
        run("chat", adapter, *asked) == "> what is red?\na colour\n\n> what is two?\na number\n\n"
    )
    said = run("chat", adapter, *asked, "--compare", env={"COLUMNS": "60"})
    base = run("chat", f"--model={root / 'model'}", *asked)
    for answer, block in zip(["a colour", "a number"], said.split("\n\n"), strict=False):
        question, heads, _, *rows = block.splitlines()
        assert heads.split(" | ") == [f"{'without the adapter':28}", "with the adapter"]
        left, right = zip(*((f"{row:31}"[:28], row[31:]) for row in rows), strict=True)
        assert " ".join(right).strip() == answer
        assert f"{question}\n{' '.join(' '.join(left).split())}\n" in base


@pytest.mark.slow
def test_experts_are_trained_exported_and_talked_to(tmp_path):
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    tiny_llama.checkpoint(tmp_path / "model", architectures=["MixtralForCausalLM"], **experts)
    tiny_llama.data(tmp_path / "data.jsonl")
    fields = tiny_llama.overrides(tmp_path) | {"lora.targets": '("q_proj", "experts")', "epochs": 4}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    said = run(
        "instruct", "--config=configs/instruct_llama.py", f"--workdir={tmp_path / 'run'}", *flags
    )
    assert "mlp/experts/gate_up_proj/kernel" in said
    adapter = f"--adapter={tmp_path / 'run' / 'adapter'}"
    run("export", adapter, f"--out={tmp_path / 'peft'}", "--peft")
    words = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert words["target_parameters"] == ["down_proj", "gate_up_proj"]
    run("export", adapter, f"--out={tmp_path / 'merged'}", "--merged")
    talk = lambda *model: run("chat", *model, "--ask=what is red?", "--max_new_tokens=9")
    replies = [
        talk(*x)
        for x in ([adapter], [f"--adapter={tmp_path / 'peft'}"], [f"--model={tmp_path / 'merged'}"])
    ]
    assert "colour" in replies[0] and len(set(replies)) == 1


@pytest.mark.parametrize("flags, message", [
    (["--ask=a", "b"], "'b' is another: add --ask"),
    (["--compare", "--ask=a"], "give --ask=QUESTION and --adapter"),
])  # fmt: skip
def test_flags_of_chat_that_do_not_go_together(flags, message):
    done = programs.run("chat", "--model=nothing", *flags)
    assert done.returncode == 2 and message in done.stderr


def test_evaluation_alone_is_the_logged_loss(finished):
    root, _ = finished
    flags = [f"--config.{name}={value}" for name, value in tiny_llama.overrides(root).items()]
    workdir = root / "run"
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    said = run(
        "instruct",
        "--config=configs/instruct_llama.py",
        f"--workdir={workdir}",
        "--eval_only",
        *flags,
    )
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before
    found = json.loads(said.splitlines()[-1])
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = {x["step"]: x["eval_loss"] for x in lines if "eval_loss" in x}
    assert found["loss"] == losses[found["step"]] == min(losses.values())


def test_it_answers(finished):
    root, _ = finished
    asked = "what is red?\n\nwhat is two?\n"
    said = run("chat", f"--adapter={root / 'run' / 'adapter'}", stdin=asked)
    assert said == "a colour\na number\n"


@pytest.mark.slow
def test_the_adapter_in_the_format_of_peft_answers_too(finished, tmp_path):
    root, _ = finished
    out = tmp_path / "peft"
    run("export", f"--adapter={root / 'run' / 'adapter'}", f"--out={out}", "--peft")
    assert peft.read_words(out)["task_type"] == "CAUSAL_LM"
    assert run("chat", f"--adapter={out}", "--max_new_tokens=9", "what is horse?") == "a animal\n"


def test_merged_weights_and_the_chat_template_are_saved(finished, tmp_path):
    root, _ = finished
    found = language_model.load(root / "run" / "adapter")
    assert found.loaded.model.scan_layers
    ours = lora.merge(found.loaded.params, found.adapter)
    checkpoints.save_hf(tmp_path, ours, found.loaded.checkpoint, head="causal-lm")
    merged = checkpoints.load(tmp_path, head="causal-lm").params["params"]["model"]
    stacked = ours["params"]["model"]["layers"]["self_attn"]["q_proj"]["kernel"][1]
    np.testing.assert_array_equal(stacked, merged["layers_1"]["self_attn"]["q_proj"]["kernel"])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_bytes() == (root / "model" / file).read_bytes()


def test_a_model_without_an_adapter_talks_too(finished):
    root, _ = finished
    speaker = chat.load(None, model=str(root / "model"), max_new_tokens=4)
    said = chat.reply(speaker, [tiny_llama.question("dog")])
    assert said != "a animal" and set(said.split()) <= set(tiny_llama.WORDS)
    with pytest.raises(ValueError, match="an adapter or a model"):
        chat.load(None, max_new_tokens=4)


def test_stop_tokens_are_all_that_the_files_name(tmp_path):
    folder = tiny_llama.checkpoint(tmp_path / "model", eos_token_id=[1, 3])
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    checkpoint = checkpoints.resolve(folder)
    template = chat_template.find(checkpoint)
    stop = chat.stop_tokens(checkpoint, template, tiny_llama.tokenizer())
    # <unk> and </s> by the config, 7 by the other, and the end of a turn in the template.
    assert stop == (1, 3, tiny_llama.WORDS.index("<|im_end|>"), 7)
    for text, message in (('{"eos_token_id": "3"}', "must be a token's number"), ("[", "damaged")):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=f"generation_config.json .*{message}"):
            chat.stop_tokens(checkpoint, template, tiny_llama.tokenizer())


def test_all_mistakes_of_a_config_are_told(tmp_path):
    wrong = {"model.name": "", "data.train": "", "data.validation": "x", "data.date": "May"}
    wrong |= {"replies.pattern": "(", "replies.batch_size": 0}
    with pytest.raises(ValueError) as error:
        instruction_tuning.check(
            tiny_llama.config(tmp_path, **wrong, **{"data.max_length": 1, "batch_size": 0})
        )
    fields = (
        "model.name",
        "data.train",
        "data.validation",
        "data.date",
        "max_length",
        "batch_size",
        "replies.pattern",
        "replies.batch_size",
    )
    assert all(field in str(error.value) for field in fields)


def test_mistakes_found_with_the_data(tmp_path):
    tiny_llama.checkpoint(tmp_path / "model")
    tiny_llama.data(tmp_path / "data.jsonl", count=6)
    with pytest.raises(ValueError, match="holdout 6 leaves nothing of the 6 conversations"):
        instruction_tuning.make_task(tiny_llama.config(tmp_path))
    with pytest.raises(ValueError, match="max_length 65 goes beyond the 64 positions"):
        instruction_tuning.make_task(tiny_llama.config(tmp_path, **{"data.max_length": 65}))
    golden = ROOT / "tests" / "goldens" / "gpt2" / "plain"  # scripts/make_gpt2_goldens.py
    with pytest.raises(ValueError, match="is a GPT2LMHeadModel.*data.packing"):
        instruction_tuning.make_task(
            tiny_llama.config(tmp_path, **{"model.name": golden, "data.max_length": 8})
        )


def test_a_file_for_validation_and_no_packing(tmp_path):
    tiny_llama.checkpoint(tmp_path / "model")
    tiny_llama.data(tmp_path / "data.jsonl", count=12)
    tiny_llama.data(tmp_path / "other.jsonl", count=6)
    changes = {"data.holdout": 0, "data.validation": tmp_path / "other.jsonl"}
    task, settings = instruction_tuning.make_task(
        tiny_llama.config(tmp_path, **changes, **{"data.packing": False})
    )
    batches = list(task.eval_batches())
    assert sum(b["weights"].sum() for b in batches) == 6
    assert all("segment_ids" not in b for b in batches)
    assert set(settings.targets) >= {"q_proj", "down_proj"}
    packed, _ = instruction_tuning.make_task(tiny_llama.config(tmp_path, **changes))
    assert packed.steps_per_epoch < task.steps_per_epoch
    assert any("cut" in note for note in instruction_tuning.make_task(
        tiny_llama.config(tmp_path, **changes, **{"data.max_length": 14}))[0].notes)  # fmt: skip
