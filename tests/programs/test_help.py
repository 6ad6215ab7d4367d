"""``--help``: what it shows, and what it need not import for that."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from experiments import base_configs, field_comments, lazy
from lora_jax import peft
from lora_jax.models.shards import DTYPES
from lora_jax.sweeps import search
from tests.helpers import programs
from tests.helpers.places import ROOT

WITH_CONFIG = ("sst2", "glue", "classify", "e2e_nlg", "instruct", "pretrain", "sweep")
PROGRAMS = (*WITH_CONFIG, "chat", "predict", "export", "report")
OWN = {
    "sweep": "--halving=N",
    "chat": "--temperature=X",
    "export": "--dtype=bfloat16|float16",
    "e2e_nlg": "--evaluate",
}
BASES = {
    name: value for name, value in vars(base_configs).items() if name.isupper() and callable(value)
}


@pytest.mark.parametrize("module", PROGRAMS)
def test_every_program_shows_its_own_flags(module):
    done = programs.run(module, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    shown = re.findall(r"^  --(\w+)", done.stdout, re.MULTILINE)
    assert ("workdir" in shown) == ("config" in shown) == (module in WITH_CONFIG)
    assert "compilation_cache" in shown and "verbosity" not in shown and "pdb" not in shown
    assert OWN.get(module, "") in done.stdout
    assert f"python -m experiments.{module}" in done.stdout


def test_choices_are_those_of_the_library():
    """Which a flag's definition names, since it does not import the library."""
    shown = programs.run("export", "--help").stdout
    assert f"--dtype={'|'.join(DTYPES)}\n" in shown
    assert f"--init={'|'.join(peft.COMPUTED)} " in shown
    assert f"--sampler={'|'.join(search.SAMPLERS)} " in programs.run("sweep", "--help").stdout


def test_absl_s_list_of_all_flags():
    done = programs.run("sst2", "--helpfull")
    assert (
        done.returncode == 0 and "--[no]eval_only" in done.stdout and "--verbosity" in done.stdout
    )


HEAVY = "jax flax lora_jax orbax matplotlib tensorboardX tensorflow torch tensorflow_datasets transformers scipy tqdm"
# One process forks for each program, as a shell would start it.
HARNESS = """
import json, os, runpy, sys
heavy, programs = sys.argv[1].split(), sys.argv[2:]
for name in programs:
    sys.stdout.flush()
    if not os.fork():
        sys.argv = [name, *(["--help"] if name[0] != "!" else ["--no_such_flag"])]
        out, sys.stdout, status = sys.stdout, open(os.devnull, "w"), None
        try:
            runpy.run_module("experiments." + name.strip("!"), run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
        print(json.dumps([name, status, [x for x in heavy if x in sys.modules]]), file=out, flush=True)
        os._exit(0)
    os.wait()
"""


def test_help_and_mistakes_need_no_import_of_what_is_large():
    names = [*PROGRAMS, "!chat", "!export"]
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, HEAVY, *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [[name, 2 if "!" in name else 0, []] for name in names], done.stderr


def _fields(config, prefix=""):
    for name, value in config.items():
        yield f"{prefix}{name}"
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")


@pytest.mark.parametrize("name", BASES)
def test_every_field_has_a_comment(name):
    comments, fields = field_comments.read(BASES[name]), set(_fields(BASES[name]()))
    assert set(comments) == fields and all(len(text) > 3 for text in comments.values())


def first():
    c = ConfigDict()
    # The first of all,
    # in two lines.
    c.x, c.y = 1, 2
    c.gone = 3  # not for long

    c.s = ConfigDict()  # a section
    c.s.z = 4  # within
    return c


def second():
    c = first()
    del c.gone
    c.y = 5  # another one
    c.s.z = c.s.v = "# no comment"
    return c


def test_comments_are_those_of_the_function_and_of_the_one_it_starts_from():
    both = "The first of all, in two lines."
    assert field_comments.read(first) == {
        "x": both,
        "y": both,
        "gone": "not for long",
        "s": "a section",
        "s.z": "within",
    }
    assert field_comments.read(second) == {
        "x": both,
        "y": "another one",
        "s": "a section",
        "s.z": "within",
    }


@pytest.mark.parametrize("module, config", [
    ("sst2", "configs/quickstart.py"), ("glue", "configs/roberta_base_glue.py:rte"),
    ("classify", "configs/classify.py"), ("e2e_nlg", "configs/e2e_tiny.py"),
    ("instruct", "configs/chat_quickstart.py"), ("pretrain", "configs/e2e_tiny_base.py"),
    ("sweep", "configs/quickstart_sweep.py"),
])  # fmt: skip
def test_fields_are_shown_as_the_command_line_takes_them(module, config):
    shown = programs.run(module, f"--config={config}", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    fields = shlex.split(" ".join(re.findall(r"^  (--config\..*)$", shown.stdout, re.MULTILINE)))
    assert len(fields) > 50
    again = programs.run(module, f"--config={config}", *fields, "--help")
    assert (again.returncode, again.stdout) == (0, shown.stdout)


def test_what_the_command_line_sets_is_shown_with_the_default():
    done = programs.run("sst2", "--config=configs/quickstart.py", "--config.lora.rank=3", "-h")
    assert "--config.lora.rank=3\n" in done.stdout and "(default: 8)" in done.stdout
    done = programs.run("sweep", "--program=classify", "--config=configs/classify.py", "--help")
    assert "--config.data.delimiter=''" in done.stdout


def test_the_config_of_a_run_is_shown(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 77}))
    done = programs.run("sst2", f"--workdir={tmp_path}", "--help")
    assert done.returncode == 0 and "--config.epochs=77\n" in done.stdout


@pytest.mark.parametrize("argument, says", [
    ("--config=configs/quikstart.py", "did you mean configs/quickstart.py?"),
    ("--config.lora.rnk=3", "did you mean lora.rank?"), ("--config.epochs=many", "epochs must be a whole number"),
])  # fmt: skip
def test_help_with_a_mistake(argument, says):
    done = programs.run("sst2", "--config=configs/quickstart.py", argument, "--help")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr
    assert "--eval_only" in done.stdout


def test_help_behind_the_end_of_options_is_a_text(tmp_path):
    done = programs.run("predict", f"--adapter={tmp_path / 'none'}", "--", "--help")
    assert done.returncode == 2 and "flags:" not in done.stdout


def test_late_imports():
    before = set(sys.modules)
    with lazy.imports():
        import colorsys
        from wsgiref import util
    assert not {"colorsys", "wsgiref.util"} & (set(sys.modules) - before)
    assert colorsys.rgb_to_hsv(0, 0, 0) == (0.0, 0.0, 0) and util.guess_scheme({}) == "http"
    with pytest.raises(ImportError, match="a module is `import x` or"), lazy.imports():
        import wsgiref.headers  # noqa: F401
