"""A sweep on the command line: its values, what is refused, and how it goes on."""

import json
import re

import pytest

from configs import common, instruct_llama
from experiments import sweep_flag
from lora_jax.sweeps import sweep_dirs
from tests.helpers import programs, tiny_encoder


@pytest.mark.parametrize("text, values", [
    ("lora.rank=1,4,16", [1, 4, 16]), ("seed=3", [3]), ("lora.alpha=1,2.5", [1.0, 2.5]),
    ("optimizer.learning_rate=1e-3, 5e-4", [1e-3, 5e-4]), ("lora.train_a=False,true", [False, True]),
    ("model.quantize=,nf4_double", ["", "nf4_double"]), ("lora.method=lora,dora", ["lora", "dora"]),
    ("lora.targets=[query],[query,value]", [("query",), ("query", "value")]),
    ("lora.targets=('a','b'),('re:x{1,2}',),()", [("a", "b"), ("re:x{1,2}",), ()]),
    ("data.buckets=[8,16],[16]", [(8, 16), (16,)]), ("eval_every=1 epoch,20%,5", ["1 epoch", "20%", 5]),
    ("optimizer.warmup=0.1,100 steps", [0.1, "100 steps"]),
    ("lora.rank_pattern={'query': 4},{'query': 8, 'key': 2}", [{"query": 4}, {"query": 8, "key": 2}]),
])  # fmt: skip
def test_values_have_the_type_of_the_field(text, values):
    (found,) = sweep_flag.read([text], common.base_config()).values()
    assert found == values and [type(x) for x in found] == [type(x) for x in values]


@pytest.mark.parametrize("texts, says", [
    (["lora.rank"], "give a field and its values, such as --sweep=lora.rank=1,4,16"),
    (["lora.rnk=1"], "unknown config field 'lora.rnk' (did you mean lora.rank?)"),
    (["lr=1"], "did you mean optimizer.learning_rate?"), (["lora=1"], "it is a section, with lora."),
    (["lora.rank=1,x"], "lora.rank must be a whole number, got 'x'"), (["lora.rank=1,"], "whole number, got ''"),
    (["lora.rank=1.5"], "lora.rank must be a whole number, got 1.5"), (["lora.rank=4,1,4"], "4 is there twice"),
    (["lora.targets=query,value"], "query is a single entry, and each value is a list: put it in brackets"),
    (["seed=1", "seed=2"], "--sweep=seed=2: seed is there twice"), (["lora.rank_pattern=4"], "must be a dictionary"),
    (["guard.patience=8,16"], "runs that differ in guard.patience alone are one run"),
])  # fmt: skip
def test_what_is_refused(texts, says):
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        sweep_flag.read(texts, common.base_config())
    assert str(caught.value).startswith(f"--sweep={texts[-1]}: ")


def test_a_field_that_another_program_has():
    with pytest.raises(ValueError, match="unknown config field 'data.max_length'"):
        sweep_flag.read(["data.max_length=8"], common.e2e_config())
    assert sweep_flag.read(["data.max_length=8,16"], instruct_llama.get_config())


@pytest.fixture
def check(tmp_path):
    """Takes the directory for a grid, or for a sweep of a file, after the check."""
    return lambda axes: sweep_dirs.claim(tmp_path / "s", common.base_config(), 0, axes)


@pytest.mark.parametrize("first, then, says", [
    ({"lora.rank": [1, 4]}, {"lora.rank": [1, 8]}, "sweep.lora.rank is [1, 4] there and [1, 8] here"),
    ({"lora.rank": [1, 4]}, {"lora.rank": [1]}, "sweep.lora.rank is [1, 4] there"), ({"seed": [1]}, {}, "sweep is"),
    ({"seed": [1]}, {"seed": [1], "lora.rank": [1]}, "sweep.lora.rank is None there and [1] here"), ({}, {"seed": [1]}, "sweep is None"),
])  # fmt: skip
def test_a_directory_is_of_one_grid(check, tmp_path, first, then, says):
    check(first), check(first)
    with pytest.raises(ValueError, match=re.escape(says)):
        check(then)
    check(first)


def test_a_grid_may_get_more_values(check, tmp_path):
    check({"lora.targets": [("query",)], "seed": [0]})
    check({"lora.targets": [("query",), ("key",)], "seed": [1, 0]})
    stored = json.loads((tmp_path / "s" / "sweep.json").read_text())["sweep"]
    assert stored == {"lora.targets": [["query"], ["key"]], "seed": [1, 0]}
    with pytest.raises(ValueError, match="holds a sweep of another kind"):
        check({"lora.targets": [("query",)], "seed": [0]})


QUICKSTART = ("--config=configs/quickstart.py", "--config.model.dtype=float32")


def test_a_grid_is_all_combinations(tmp_path):
    axes = ["--sweep", "lora.rank=1,4,16", "--sweep", "seed=0,1"]
    out = programs.succeed("sweep", *QUICKSTART, f"--workdir={tmp_path / 's'}", *axes, "--dry_run")
    assert out.startswith("a grid of 6 runs: 3 lora.rank x 2 seed\ngroup 1: 6 runs, 6 to do\n")
    runs = re.findall(r"  \w+  (rank \d+, seed \d): to do", out)
    assert runs == [f"rank {rank}, seed {seed}" for rank in (1, 4, 16) for seed in (0, 1)]
    one = programs.succeed(
        "sweep", *QUICKSTART, f"--workdir={tmp_path}/s", *axes, "--only=seed=1", "--dry_run"
    )
    assert "3 runs, 3 to do" in one


@pytest.mark.parametrize("arguments, says", [
    (["--config=configs/quickstart_sweep.py", "--sweep=lora.rank=2"], "has a sweep(add) of its own, and --sweep is"),
    ([*QUICKSTART, "--sweep=lora.rank=0,1"], "1 of the sweep's 2 runs are wrong: add(lora.rank=0): "),
    ([*QUICKSTART, "--sweep=seed=0,1", "--config.seed=3"], "--config.seed=3 would change nothing"),
    ([*QUICKSTART], "or give the values on the command line, as in --sweep=lora.rank=1,4,16."),
    ([*QUICKSTART, "--sweep=early_stopping.patience=1,2"], "set it to 0"),
])  # fmt: skip
def test_mistakes(tmp_path, arguments, says):
    done = programs.run("sweep", f"--workdir={tmp_path / 's'}", *arguments)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_grid_is_the_sweep_of_a_file_with_the_same_runs(tmp_path):
    tiny_encoder.checkpoint(tmp_path / "model")
    tiny_encoder.data(tmp_path / "data", n=40)
    fields = tiny_encoder.overrides(tmp_path) | {"steps": 4, "epochs": 1}
    del fields["lora.rank"]
    flags = [f"--config.{k}={v}" for k, v in fields.items()]
    file = tmp_path / "file.py"
    file.write_text(
        "from configs import common, sst2_minilm\nget_config = sst2_minilm.get_config\n"
        "def sweep(add):\n    [add(**x) for x in common.product({'lora.rank': (1, 2), 'seed': (0, 1)})]\n"
    )
    wanted = programs.succeed("sweep", f"--config={file}", f"--workdir={tmp_path / 'a'}", *flags)
    grid = [
        "--config=configs/sst2_minilm.py",
        f"--workdir={tmp_path / 'b'}",
        "--sweep=seed=0,1",
        *flags,
    ]
    found = programs.succeed("sweep", *grid, "--sweep=lora.rank=1")
    assert "2 runs finished" in found and "4 runs finished" in wanted
    found = programs.succeed("sweep", *grid, "--sweep=lora.rank=1,2")
    assert "group 1: 4 runs, 2 to do" in found and "4 runs finished" in found
    names = lambda letter: sorted(path.name for path in (tmp_path / letter / "runs").iterdir())
    assert names("a") == names("b")
    again = programs.run("sweep", *grid, "--sweep=lora.rank=1,3")
    assert (
        again.returncode == 2 and "sweep.lora.rank is [1, 2] there and [1, 3] here" in again.stderr
    )
