"""Fields of configs: unknown ones and wrong types, wherever they are set, and what is said of them."""

import json
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import chat_quickstart, common, e2e_tiny, instruct_llama, quickstart
from experiments import recipes
from lora_jax.config import LoRAConfig
from lora_jax.sweeps import trials
from lora_jax.training import config_fields, config_files, workdirs

KNOWN = config_fields.field_names(common.base_config())
INSTRUCT = config_fields.field_names(instruct_llama.get_config())


@pytest.mark.parametrize("recipe", recipes.RECIPES.values(), ids=recipes.RECIPES)
def test_every_program_says_which_fields_it_has(recipe):
    base = recipe.base_config()
    assert not config_fields.conform(recipe.base_config(), base)
    names = {name.partition(".")[2] for name in config_fields.field_names(base) if "lora." in name}
    assert names | {"roles", "origin"} == set(LoRAConfig.__dataclass_fields__)


@pytest.mark.parametrize("module, program", [
    (quickstart, "glue"), (e2e_tiny, "e2e_nlg"), (chat_quickstart, "instruct"),
])  # fmt: skip
def test_what_a_run_writes_is_its_config(module, program, tmp_path):
    """Tuples, floats and durations come back, and so does what an adapter brings."""
    config, base = module.get_config(), recipes.RECIPES[program].base_config()
    workdirs.claim(tmp_path, config)
    path = str(tmp_path / workdirs.CONFIG)
    again = config_files.load(path)
    config_files.check(again, base, path)
    plain = config.copy_and_resolve_references()
    assert again.to_json(sort_keys=True) == plain.to_json(sort_keys=True)
    assert isinstance(again.lora.targets, tuple) and again.get_type("steps") is object
    workdirs.check(tmp_path, again)
    stored = json.loads((tmp_path / workdirs.CONFIG).read_text())
    stored["lora"]["roles"] = {"query": "io"}
    assert not config_fields.conform(ConfigDict(stored), base)


def test_the_config_of_an_older_run_gets_what_was_done_then(tmp_path):
    stored = workdirs.to_json_types(quickstart.get_config())
    del stored["eval_at_start"], stored["model"]["attention"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = config_files.load(str(tmp_path / "config.json"))
    config_files.check(config, common.base_config(), "", added=workdirs.ADDED)
    assert config.eval_at_start is False and config.model.attention == "auto"
    workdirs.check(tmp_path, config)


@pytest.mark.parametrize("get", [common.base_config, instruct_llama.get_config])
def test_a_run_goes_on_whose_config_lacks_what_was_added_since(get, tmp_path):
    """Each field alone, and all of them: the values are those of the base config."""
    config = get().unlock()
    config.eval_at_start = False  # the one that stands for something else
    config.model.scan_layers = False  # language models have had it always, with either value
    whole = workdirs.to_json_types(config)
    present = [name for name in workdirs.ADDED if _remove(json.loads(json.dumps(whole)), name)]
    assert len(present) >= len(workdirs.ADDED) - 1
    for names in ([name] for name in present), [present]:
        for chosen in names:
            stored = json.loads(json.dumps(whole))
            for name in chosen:
                _remove(stored, name)
            assert not [*workdirs.differences(stored, whole)], chosen


def _remove(tree, name):
    """Removes a field of JSON types; tells whether it was there."""
    *sections, last = name.split(".")
    for section in sections:
        tree = tree.get(section, {})
    return tree.pop(last, None) is not None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "optimizer.orthogonality",
            0.9,
            r"orthogonality is 0.9, and acts with lora.method='adalora'",
        ),
        ("optimizer.budget.target_rank", 4, r"target_rank is 4, and acts with .*Leave it at 0\."),
        ("optimizer.budget.begin", "9 steps", r"begin is '9 steps', and acts with lora.method"),
        ("init_batches", 3, r"init_batches is 3, and acts with lora.init='lora_ga' or 'eva' alone"),
    ],
)
def test_a_field_that_would_change_nothing_is_refused(field, value, message):
    recipe = recipes.RECIPES["glue"]
    config = common.base_config()
    recipe.check(recipe.resolve(config))
    section, name = config_fields.get_section(config, field)
    section[name] = value
    with pytest.raises(ValueError, match=message):
        recipe.check(recipe.resolve(config))
    config.lora.update({"init": "eva"} if field == "init_batches" else {"method": "adalora"})
    recipe.check(recipe.resolve(config))


MEANT = {
    "optimizer.lr": "optimizer.learning_rate",
    "lr": "optimizer.learning_rate",
    "optimizer.learnig_rate": "optimizer.learning_rate",
    "optimiser.learning_rate": "optimizer.learning_rate",
    "learning_rate": "optimizer.learning_rate",
    "optimizer.rate": "optimizer.learning_rate",
    "lora.r": "lora.rank",
    "lora.rnak": "lora.rank",
    "rank": "lora.rank",
    "lora.lora_alpha": "lora.alpha",
    "lora.target_modules": "lora.targets",
    "lora.modules_to_save": "lora.train",
    "epoch": "epochs",
    "num_train_epochs": "epochs",
    "batchsize": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "data.max_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "model.model_name": "model.name",
    "data.bucket": "data.buckets",
    "warmup_ratio": "optimizer.warmup",
    "gradient_accumulation_steps": "accumulate",
    "max-steps": "steps",
}


@pytest.mark.parametrize("field", MEANT)
def test_the_field_that_is_meant(field):
    assert config_fields.suggest(field, KNOWN)[0] == MEANT[field]
    assert f"did you mean {MEANT[field]}" in config_fields.unknown(field, KNOWN)


def test_what_is_said_of_other_unknown_fields():
    assert "it is a section, with lora.adapt_bias, lora.alpha" in config_fields.unknown(
        "lora", KNOWN
    )
    assert "did you mean the section optimizer?" in config_fields.unknown("optimiser", KNOWN)
    assert "the fields of lora are lora.adapt_bias, lora.alpha" in config_fields.unknown(
        "lora.zzz", KNOWN
    )
    assert config_fields.suggest("data.train_file", INSTRUCT) == ["data.train"]
    assert config_fields.unknown("zzz", KNOWN).count(",") > 8


START = "from configs import common\n\ndef get_config():\n    c = common.base_config()\n    "
NOTHING = (
    "from ml_collections import ConfigDict\n\ndef get_config():\n    c = ConfigDict()\n"
    "    c.optimizer, c.lora, c.data = ConfigDict(), ConfigDict(), ConfigDict()\n    "
)
WRONG = {  # a line of a config file, and what is said of it
    "c.optimizer.lr = 1e-3": "unknown config field 'optimizer.lr' (did you mean optimizer.learning_",
    "c.lora.rnak = 4": "unknown config field 'lora.rnak' (did you mean lora.rank?)",
    "c.epoch = 3": "unknown config field 'epoch' (did you mean epochs?)",
    "c.lora.rank = '8'": r"rank must be a whole number, got '8'",
    "c.lora.rank = 8.0": "rank must be a whole number, got 8.0",
    "c.optimizer.learning_rate = '1e-3'": "learning_rate must be a number, got '1e-3'",
    "c.data.buckets = 32": "buckets must be a tuple",
    "c.data.buckets = ('a',)": "data.buckets must be a tuple such as (32, 64, 128), got ('a',)",
    "c.lora.targets = 'query'": "targets must be a tuple",
    "c.pmap = 'yes'": "pmap must be True or False, got 'yes'",
    "c.epochs = None": "epochs must be a whole number, got None",
    "c.task = 3": "task must be a string, got 3",
    "c.seed = {'a': 1}": "seed ",
    "c.lora = 8": "lora ",
    "x = y": "NameError: name 'y' is not defined",
    "raise ValueError('no such recipe')": "no such recipe",
    "c.lora.rank = (": "was never closed",
    " c.epochs = 3": "unexpected indent",
}


@pytest.mark.parametrize("start", [START, NOTHING], ids=["from common", "from nothing"])
@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_in_a_file_is_one_line(tmp_path, line, start):
    path = tmp_path / "own.py"
    path.write_text(f"{start}{line}\n    return c\n")
    with pytest.raises(ValueError) as error:
        config = config_files.load(str(path))
        config_files.check(config, common.base_config(), str(path))
    number = f"{start}{line}".count("\n") + 1
    assert str(error.value).startswith(f"{path}:{number}: ") and "\n" not in str(error.value)
    assert WRONG[line] in str(error.value)


def test_a_config_from_nothing_gets_the_defaults_and_their_types(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        f"{NOTHING}c.optimizer.learning_rate = 1\n    c.lora.targets = ['query']\n"
        "    c.eval_every = '1 epoch'\n    c.lora.rank_pattern = {'key': 2}\n    return c\n"
    )
    config = config_files.load(str(path))
    config_files.check(config, common.base_config(), str(path))
    assert config.optimizer.learning_rate == 1.0 and config.lora.targets == ("query",)
    assert type(config.optimizer.learning_rate) is float and config.epochs == 3
    config.eval_every = 5  # a duration is a text or a number
    assert config.lora.rank_pattern.key == 2
    recipes.GLUE.check(config)


FILES = {
    "a.py": ("", "defines no get_config()"),
    "b.py": ("def get_config():\n    pass\n", "returns None, and no ConfigDict"),
    "c.py": ("import nowhere_at_all\n", "c.py:1: ModuleNotFoundError"),
    "d.json": ("{", "d.json is damaged"),
    "e.json": ("[1]", "holds no config: it is list"),
    "f.json": ('{"a.b": 1}', "f.json holds no config"),
    "g.txt": ("epochs: 3", "is a file of Python, or the config.json of a run"),
    "h.py": ("def get_config():\n    return 3\n", "returns 3"),
    "i.py": ("def get_config(task):\n    return 3\n", "i.py takes an argument: give it as in"),
    "j.py:rte": ("def get_config():\n    return 3\n", "takes no argument: leave out ':rte'"),
    "k.py": ("raise SystemExit(3)\n", "k.py:1: SystemExit: 3"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_configs(tmp_path, name):
    text, says = FILES[name]
    (tmp_path / name.partition(":")[0]).write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)):
        config_files.load(str(tmp_path / name))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean configs/quickstart.py"):
        config_files.load("configs/quikstart.py")
    with pytest.raises(FileNotFoundError, match="is a directory, and no config: give a file"):
        config_files.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"did you mean --config=.*config\.json"):
        config_files.load(str(tmp_path))


def made(**values):
    base = quickstart.get_config()
    return trials.make_trials(base, lambda add: add(**values), recipes.GLUE)


@pytest.mark.parametrize("field, value, says", [
    ("optimizer.lr", 1e-3, "did you mean optimizer.learning_rate"),
    ("lora.rank", "4", "lora.rank must be a whole number, got '4'"),
    ("data.buckets", 32, "data.buckets must be a tuple such as"),
    ("lora.targets", ("query", 3), "lora.targets must be a tuple such as"),
    ("seed", True, "seed must be a whole number, got True"),
    ("lora.rank_pattern", 4, "lora.rank_pattern must be a dictionary, got 4"),
    ("seed", {"a": 1}, "seed must be a whole number"),
])  # fmt: skip
def test_points_of_a_sweep(field, value, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        made(**{field: value})


def test_values_that_a_point_may_have():
    (run,) = made(**{"lora.alpha": 4, "seed": np.int64(3), "lora.targets": ["query"]})
    assert (run.config.lora.alpha, run.config.seed) == (4.0, 3)
    assert type(run.config.seed) is int and run.config.lora.targets == ("query",)
    assert trials.find_replaced([run], ["seed", "epochs"]) == ["seed"]


def test_an_error_in_a_sweep_has_its_line(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(f"{START}return c\n\ndef sweep(add):\n    add(1)\n")
    with pytest.raises(ValueError, match=r"own\.py:8: TypeError: "):
        trials.make_trials(quickstart.get_config(), trials.load_sweep(path), recipes.GLUE)
