"""The command line of a program with a config: fields, lists, and what is said of mistakes."""

import json
import re

import pytest

from configs import quickstart
from experiments import cli, config_flag
from lora_jax.training import workdirs
from tests.helpers import programs

QUICKSTART = "--config=configs/quickstart.py"


@pytest.mark.parametrize("text, values", [
    ("query,value", ("query", "value")), ("query", ("query",)), ("a, b ,c", ("a", "b", "c")),
    ("('a','b')", ("a", "b")), ("['a']", ("a",)), ("'a','b'", ("a", "b")), ("()", ()), ("", ()),
    ("8,16", (8, 16)), ("(8,)", (8,)), ("8", (8,)), ("very good,bad", ("very good", "bad")),
    ("re:.*/(query|value)/kernel", ("re:.*/(query|value)/kernel",)),
    ("re:layers_[0,1]/.{1,3},dense", ("re:layers_[0,1]/.{1,3}", "dense")), ("a,", ("a",)),
    ("größe,色", ("größe", "色")),
])  # fmt: skip
def test_lists(text, values):
    assert config_flag.parse_list(text) == values


@pytest.mark.parametrize("text", ["('a','b'", "'a", "[1,", "(a,b)"])
def test_what_begins_as_python_and_is_none(text):
    with pytest.raises(ValueError, match="no tuple of Python; leave out brackets and quotes"):
        config_flag.parse_list(text)


MISTAKES = {  # what is given beside --workdir, and what is said
    "epochs": ([QUICKSTART, "--epochs=3"], "--epochs=3 (did you mean --config.epochs=3?)"),
    "rank": ([QUICKSTART, "--lora.rank=4"], "did you mean --config.lora.rank=4?"),
    "rate": ([QUICKSTART, "--lr", "3"], "did you mean --config.optimizer.learning_rate?"),
    "model": ([QUICKSTART, "--model=x"], "did you mean --config.model.name=x?"),
    "flag": ([QUICKSTART, "--evalonly"], "did you mean --eval_only?"),
    "dashes": ([QUICKSTART, "--batch-size=3"], "did you mean --config.batch_size=3?"),
    "no flag at all": ([QUICKSTART, "--zzz=3"], "unknown flag --zzz=3; --helpshort lists"),
    "field": ([QUICKSTART, "--config.optimizer.lr=1"], "did you mean optimizer.learning_rate?"),
    "flag as a field": ([QUICKSTART, "--config.eval_only"], "did you mean --eval_only?"),
    "no value": ([QUICKSTART, "--config.epochs"], "--config.epochs lacks a value"),
    "no number": (
        [QUICKSTART, "--config.lora.rank=a"],
        "lora.rank must be a whole number, got 'a'",
    ),
    "no truth": ([QUICKSTART, "--config.pmap=maybe"], "pmap must be True or False, got 'maybe'"),
    "no list": ([QUICKSTART, "--config.data.buckets=a,b"], "data.buckets must be a tuple such as"),
    "no file": (["configs/quickstart.py"], "did you mean --config=configs/quickstart.py?"),
    "two files": ([QUICKSTART, "configs/common.py"], "Unexpected arguments ['configs/common.py']"),
    "no dashes": ([QUICKSTART, "config.epochs=3"], "did you mean --config.epochs=3?"),
    "long dashes": ([QUICKSTART, "\N{EM DASH}eval_only"], "did you mean --eval_only?"),
    "data": ([QUICKSTART, "--data=a.csv"], "did you mean --config.data.source=a.csv?"),
    "nothing": ([], "There is no --config, and no run in"),
    "typing error": (["--config=configs/quikstart.py"], "did you mean configs/quickstart.py?"),
}


@pytest.mark.parametrize("module, flag", [("classify", "workdir"), ("export", "adapter")])
def test_a_flag_that_must_be_given(module, flag):
    done = programs.run(module)
    assert done.returncode == 2 and f"error: There is no --{flag}: give --{flag}=" in done.stderr


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path, name):
    arguments, says = MISTAKES[name]
    done = programs.run("sst2", f"--workdir={tmp_path / 'run'}", *arguments)
    errors = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert errors[0].startswith("error: ") and says in errors[0]
    assert not (tmp_path / "run").exists()


def test_fields_of_the_command_line_reach_the_run(tmp_path):
    """Checked by what is said of a config in which all else is right."""
    own = tmp_path / "own.py"
    own.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n"
    )
    flags = [
        "--config.lora.targets=query,qurey", "--config.lora.train=", "--noconfig.pmap",
        "--config.eval_at_start", "--config.lora.rank_pattern={'key': 2}", "--config.epochs", "0",
        "--config.model.labels=1,2", "--config.steps=1 epoch", "--config.data.buckets=8",
        "--config.data.buckets=16", "--config.data.max_length=16", "--config.eval_every=20%",
    ]  # fmt: skip
    for config in (QUICKSTART, f"--config={own}"):
        done = programs.run("sst2", f"--workdir={tmp_path / 'run'}", config, *flags)
        assert done.stderr == (
            "error: The config is wrong: epochs must be at least 1, got 0.\n"
        )  # and nothing else is


def test_the_config_of_a_run_stands_for_it(tmp_path):
    """In its directory it is found, elsewhere it is a config like another."""
    config = quickstart.get_config().unlock()
    config.model.name = "./nowhere"
    workdirs.claim(tmp_path / "run", config)
    alone = programs.run("sst2", f"--workdir={tmp_path / 'run'}")
    assert "No checkpoint './nowhere' was found" in alone.stderr
    file = f"--config={tmp_path / 'run' / 'config.json'}"
    elsewhere = programs.run("sst2", file, f"--workdir={tmp_path / 'x'}", "--config.epochs=0")
    assert "epochs must be at least 1, got 0" in elsewhere.stderr
    other = programs.run("sst2", f"--workdir={tmp_path / 'run'}", "--config.epochs=4")
    assert "epochs is 10 there and 4 here" in other.stderr
    scored = programs.run("sst2", f"--workdir={tmp_path / 'run'}", "--eval_only")
    assert "There is no adapter to evaluate" in scored.stderr
    sweep = programs.run("sweep", file, f"--workdir={tmp_path / 'y'}")
    assert "defines no sweep" in sweep.stderr


@pytest.mark.parametrize("module", ["predict", "chat", "sst2"])
def test_the_directory_of_a_run_in_place_of_its_adapter(tmp_path, module):
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter.json").write_text(json.dumps({}))
    more = ["x"] if module != "sst2" else [QUICKSTART, f"--workdir={tmp_path / 'x'}"]
    done = programs.run(module, f"--adapter={run}", *more)
    assert done.returncode == 2 and f"give --adapter={run / 'adapter'}" in done.stderr
    if module == "sst2":
        done = programs.run(module, f"--config.adapter={run}", *more)
        assert done.returncode == 2 and f"give --adapter={run / 'adapter'}" in done.stderr


@pytest.mark.parametrize(
    "file, says",
    [
        ("checkpoint-9/adapter_config.json", "is none itself: give --adapter={0}/checkpoint-9"),
        ("second/adapter.json", "is none itself: give --adapter={0}/second"),
        ("model.safetensors", "{0} is a whole model, and no adapter"),
    ],
)
def test_directories_that_are_no_adapters(tmp_path, file, says):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=re.escape(says.format(tmp_path))):
        cli.check_adapter(str(tmp_path))


def test_a_sweep_of_another_program_s_config(tmp_path):
    file = "--config=configs/classify.py"
    done = programs.run("sweep", file, f"--workdir={tmp_path / 'x'}")
    assert done.returncode == 2 and "did you mean --program=classify?" in done.stderr
    done = programs.run("sweep", file, "--config.lora.rnk=2", f"--workdir={tmp_path / 'x'}")
    assert done.returncode == 2 and "unknown config field" in done.stderr
