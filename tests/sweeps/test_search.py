"""Points that Optuna proposes: the same study however often a search is interrupted."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from configs import quickstart_search
from experiments import recipes
from lora_jax.sweeps import scheduler, search, sweep_dirs
from tests.helpers import programs, tiny_encoder
from tests.helpers.places import ROOT

optuna = pytest.importorskip("optuna", reason="pip install 'lora_jax[optuna]'")
BASE = quickstart_search.get_config()


def settings(**changes):
    return search.Search(
        **dict(propose=quickstart_search.search, count=5, batch=2, seed=0) | changes
    )


def sweep_in(workdir, recipe=recipes.GLUE):
    return scheduler.Sweep(trials=[], local_trials=[], recipe=recipe, workdir=workdir)


def score(run):
    """What a run is said to have reached; the best learning rate is 1e-3."""
    return round(1 - abs(np.log10(run.config.optimizer.learning_rate) + 3) / 4, 6)


def finish(workdir, runs):
    for run in runs:
        folder = sweep_dirs.run_dir(workdir, run)
        folder.mkdir(parents=True, exist_ok=True)
        values = {"status": "finished", "best_accuracy": score(run), "best_loss": 0.5}
        sweep_dirs.finish(workdir, run, values)


def go_on(workdir, some_settings, stop_at=None):
    """Does a search with results made up; ``stop_at`` are points in the study to stop at."""
    sweep = sweep_in(workdir)
    while True:
        study = search._open_study(some_settings, sweep)
        if stop_at is not None:
            add = study.add_trial
            limit = stop_at.pop(0) if stop_at else None

            def add_trial(trial):
                if len(study.get_trials()) == limit:
                    raise InterruptedError
                add(trial)

            study.add_trial = add_trial
        try:
            search._ask(study, some_settings)
        except InterruptedError:
            continue
        runs = search._make_runs(study, BASE, recipes.GLUE)
        finish(workdir, runs)
        search._tell(study, runs, sweep)
        if len(study.get_trials()) >= some_settings.count:
            return study, runs


def points(study):
    return [
        (t.number, t.params, t.value, t.user_attrs["batch"], t.state.name) for t in study.trials
    ]


@pytest.mark.parametrize("sampler", search.SAMPLERS)
def test_an_interrupted_search_has_the_same_points(tmp_path, sampler):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, runs = go_on(tmp_path / "whole", settings(sampler=sampler))
    parts, _ = go_on(tmp_path / "parts", settings(sampler=sampler), stop_at=[0, 1, 3])
    assert points(whole) == points(parts)
    assert [batch for *_, batch, _ in points(whole)] == [0, 0, 1, 1, 2]
    assert len({str(params) for _, params, *_ in points(whole)}) == 5
    # The scores that were told are those of the results.
    told = [trial.value for trial in whole.trials]
    assert told == [
        sweep_dirs.best_score(sweep_dirs.read_result(tmp_path / "whole", r))[1] for r in runs
    ]
    before = points(whole)
    longer, _ = go_on(tmp_path / "whole", settings(sampler=sampler, count=6))
    assert points(longer)[:5] == before and len(points(longer)) == 6


def test_names_and_fields_of_the_runs(tmp_path):
    study, runs = go_on(tmp_path, settings(count=2))
    values = json.loads(study.trials[0].user_attrs["fields"])
    assert runs[0].config.lora.rank == values["lora.rank"]
    assert runs[0].name.startswith(f"rank{values['lora.rank']}-alpha")
    widest = search._make_widest(study, BASE, recipes.GLUE)
    assert {run.config.lora.rank for run in widest} == {8}
    assert {run.config.optimizer.learning_rate for run in widest} == {1e-2}


def test_a_run_without_a_score_is_told_as_failed(tmp_path):
    sweep, some_settings = sweep_in(tmp_path), settings(count=1)
    study = search._open_study(some_settings, sweep)
    search._ask(study, some_settings)
    (run,) = search._make_runs(study, BASE, recipes.GLUE)
    sweep_dirs.run_dir(tmp_path, run).mkdir(parents=True)
    values = {"status": "diverged", "best_accuracy": None, "best_loss": None}
    sweep_dirs.finish(tmp_path, run, values)
    search._tell(study, [run], sweep)
    assert [trial.state.name for trial in study.trials] == ["FAIL"]


MISTAKES = {
    "fields": (dict(propose=lambda trial: {"lora.rnk": 3}), "did you mean.*lora.rank"),
    "count": (dict(count=0), "at least 1 point"),
    "sampler": (dict(sampler="grid"), "tpe, random"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path, name):
    changes, says = MISTAKES[name]
    with pytest.raises(ValueError, match=says):
        search.run(settings(**changes), sweep_in(tmp_path / "sweep"), BASE)
    assert not (tmp_path / "sweep").exists()


def test_another_search_and_another_direction_are_refused(tmp_path):
    go_on(tmp_path, settings(count=1))
    with pytest.raises(ValueError, match="holds another search: batch is 2 there and 4 here"):
        search._open_study(settings(batch=4), sweep_in(tmp_path))


def test_the_function_is_found_in_a_file(tmp_path):
    with pytest.raises(ValueError, match="defines no search"):
        search.load_search(ROOT / "configs" / "quickstart.py")
    path = tmp_path / "bad.py"
    path.write_text("def search(trial):\n    return {'seed': trial.suggest(1)}\n")
    study = optuna.create_study()
    with pytest.raises(ValueError, match=r"bad.py.*suggest"):
        search.load_search(path)(study.ask())


CONFIG = """
from configs import sst2_minilm
get_config = sst2_minilm.get_config
def search(trial):
    return {
        "lora.rank": trial.suggest_int("lora.rank", 1, 4),
        "optimizer.learning_rate": trial.suggest_float("optimizer.learning_rate", 1e-4, 1e-1, log=True),
    }
"""
KILLED = """
import os, signal, sys
from lora_jax.sweeps import sweep_dirs
left, finish = int(sys.argv.pop(1)), sweep_dirs.finish
def counted(*arguments):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(*arguments)
sweep_dirs.finish = counted
from experiments import cli, sweep
cli.run(sweep.main)
"""


@pytest.mark.slow
def test_a_search_that_is_killed_is_the_search_left_alone(tmp_path):
    """By the program, with runs that are trained: one compilation, and the same study."""
    tiny_encoder.checkpoint(tmp_path / "model")
    tiny_encoder.data(tmp_path / "data", n=80)
    (tmp_path / "search.py").write_text(CONFIG)
    fields = tiny_encoder.overrides(tmp_path) | {"epochs": 1}
    del fields["lora.rank"]
    arguments = [f"--config={tmp_path / 'search.py'}", "--points=4", "--batch=2", "--parallel=1"]
    arguments += [f"--config.{k}={v}" for k, v in fields.items()]
    out = programs.succeed("sweep", *arguments, f"--workdir={tmp_path / 'whole'}")
    assert "4 points of 4; best score" in out and "train 1" in out
    killed = [sys.executable, "-c", KILLED, "3", *arguments, f"--workdir={tmp_path / 'killed'}"]
    done = subprocess.run(
        killed, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    programs.succeed("sweep", *arguments, f"--workdir={tmp_path / 'killed'}")
    studies = [
        search._open_study(settings(batch=2), sweep_in(tmp_path / name))
        for name in ("whole", "killed")
    ]
    assert points(studies[0]) == points(studies[1]) and len(points(studies[0])) == 4
    refused = programs.run("sweep", *arguments, f"--workdir={tmp_path / 'killed'}", "--halving=3")
    assert refused.returncode == 2 and "--points goes without --halving" in refused.stderr
