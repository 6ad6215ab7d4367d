"""Points of a sweep that Optuna proposes (Akiba et al. 2019), in batches.

A config file defines, beside ``get_config()``,

    def search(trial):
        rate = trial.suggest_float("optimizer.learning_rate", 1e-4, 1e-2, log=True)
        return {"optimizer.learning_rate": rate, "lora.alpha": 16.0}

which returns the fields of a run. Optuna is asked for a batch of points, these are trained together
(fields that are data to the compiled step share its program, as in any sweep), and their scores are
told. The study is in the sweep's directory. Each proposal depends on the seed, its own number and
the scores of the batches before, so that a search that was killed goes on to the same study.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from lora_jax.config import LoRAConfig
from lora_jax.extras import require
from lora_jax.sweeps import results, scheduler, sweep_dirs, trials
from lora_jax.sweeps.parallelism import Programs
from lora_jax.sweeps.trials import Trial
from lora_jax.training import config_files, mesh, run_names, workdirs
from lora_jax.training.task import Recipe, Task

if TYPE_CHECKING:
    import optuna

STUDY = "optuna.log"  # a journal, in the directory of the sweep
SAMPLERS = ("tpe", "random")
_FIELDS, _BATCH, _SETTINGS = "fields", "batch", "settings"  # attributes in the study


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A search for the best point.

    Attributes:
      propose: ``optuna.Trial -> values by field``.
      count: number of points.
      batch: number of points that are proposed at a time.
      sampler: one of :data:`SAMPLERS`.
      seed: seed of the sampler.
    """

    propose: Callable[["optuna.Trial"], Mapping[str, Any]]
    count: int
    batch: int = 8
    sampler: str = "tpe"
    seed: int = 0


def load_search(path: str | Path) -> Callable[["optuna.Trial"], Mapping[str, Any]]:
    """Loads the function ``search`` of a config file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file defines none, or something is wrong in it.
    """
    is_python = not str(path).endswith(".json")
    search = getattr(config_files.import_file(str(path)), "search", None) if is_python else None
    if not callable(search):
        raise ValueError(
            f"{path} defines no search: add a function search(trial) that returns the fields of a "
            "run, such as {'lora.rank': trial.suggest_int('lora.rank', 1, 64, log=True)}."
        )

    def propose(trial: "optuna.Trial") -> Mapping[str, Any]:
        try:
            values = search(trial)
            return json.loads(json.dumps(values)) if values else {}
        except Exception as error:
            raise ValueError(config_files.describe_error(error, str(path))) from error

    return propose


def run(
    search: Search, sweep: scheduler.Sweep, base: ConfigDict
) -> tuple[scheduler.Sweep, dict[str, int]]:
    """Proposes and trains what is left of a search.

    Args:
      search: the search.
      sweep: settings of the sweep, without runs.
      base: base config.

    Returns:
      The sweep with its runs, and how often each step was compiled.

    Raises:
      ValueError: the function proposes wrong fields, or the directory holds another search.
      Stopped, OSError: as :func:`scheduler.run`.
    """
    check(search, sweep, base)
    sweep = dataclasses.replace(sweep, recipe=_cache_task(sweep.recipe))
    programs = Programs(sweep.parallel)
    sweep_dirs.claim(sweep.workdir, base, 0)
    with sweep_dirs.lock(sweep.workdir, STUDY):
        study = _open_study(search, sweep)
        while True:
            _ask(study, search)
            runs = _make_runs(study, base, sweep.recipe)
            local = list({run.id: run for run in runs}.values())
            widest = _make_widest(study, base, sweep.recipe)
            sweep = dataclasses.replace(sweep, trials=[*local, *widest], local_trials=local)
            scheduler.run(sweep, base, programs)
            _tell(study, runs, sweep)
            sweep.say(_describe(study, search))
            if len(study.get_trials(deepcopy=False)) >= search.count:
                return dataclasses.replace(sweep, trials=local), programs.compilations()


def check(search: Search, sweep: scheduler.Sweep, base: ConfigDict) -> None:
    """Checks a search, by its first point, before anything is written.

    Raises:
      ModuleNotFoundError: Optuna is not installed.
      ValueError: numbers or sampler are wrong, or so is the first point.
    """
    require("a search for points", "optuna", "optuna")
    if search.count < 1 or search.batch < 1 or search.sampler not in SAMPLERS:
        raise ValueError(
            f"A search has at least 1 point, batches of at least 1, and a sampler of "
            f"{', '.join(SAMPLERS)}; got {search.count}, {search.batch} and {search.sampler!r}."
        )
    first = _propose(search, [], maximize=True)
    _make_run(json.loads(first.user_attrs[_FIELDS]), base, sweep.recipe)


def _cache_task(recipe: Recipe) -> Recipe:
    """Returns a recipe that loads model and data once for runs that share them."""
    last: dict[str, tuple[Task, LoRAConfig]] = {}

    def make_task(config: ConfigDict, *devices: mesh.Devices) -> tuple[Task, LoRAConfig]:
        key = trials.group_key(config)
        if key not in last:
            last.clear()  # one base at a time is in memory
            last[key] = recipe.make_task(config, *devices)
        return last[key]

    return recipe._replace(make_task=make_task)


def _open_study(search: Search, sweep: scheduler.Sweep) -> "optuna.Study":
    """Opens the study of the directory, or makes it.

    Raises:
      ValueError: it was made with other settings.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    path = sweep.workdir / STUDY
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))),
        study_name=sweep.workdir.resolve().name or "search",
        direction="maximize" if sweep.recipe.higher_is_better else "minimize",
        load_if_exists=True,
    )
    settings = {"sampler": search.sampler, "seed": search.seed, "batch": search.batch}
    stored = study.user_attrs.get(_SETTINGS, settings)
    if changes := list(workdirs.differences(stored, settings)):
        raise ValueError(
            f"{path} holds another search: {'; '.join(changes)}. Points may be added to a search, "
            "but these stay: use a new workdir."
        )
    study.set_user_attr(_SETTINGS, settings)
    return study


def _ask(study: "optuna.Study", search: Search) -> None:
    """Fills up the batch under way, or begins the next one.

    A point is stored in one piece, with all of its values, so that a kill leaves whole points.
    """
    known = study.get_trials(deepcopy=False)
    batch = known[-1].user_attrs[_BATCH] if known else 0
    are_told = [t.state.is_finished() for t in known if t.user_attrs[_BATCH] == batch]
    if are_told and all(are_told):
        batch, are_told = batch + 1, []
    if any(are_told):  # it was whole when the first of its scores was told
        return
    count = min(len(known) + search.batch - len(are_told), search.count)
    maximize = study.direction.name == "MAXIMIZE"
    for _ in range(len(known), count):
        trial = _propose(search, study.get_trials(deepcopy=False), maximize=maximize)
        trial.set_user_attr(_BATCH, batch)
        study.add_trial(trial)


def _propose(
    search: Search, known: Sequence["optuna.trial.FrozenTrial"], *, maximize: bool
) -> "optuna.trial.FrozenTrial":
    """Proposes a point, in a copy of the study in memory; returns it as one under way."""
    import optuna

    seed = int(np.random.SeedSequence([search.seed, len(known)]).generate_state(1)[0])
    with warnings.catch_warnings():  # of options that Optuna calls experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
        if search.sampler == "tpe":  # the points of a batch under way keep the next ones away
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study = optuna.create_study(
        storage=optuna.storages.InMemoryStorage(),
        sampler=sampler,
        direction="maximize" if maximize else "minimize",
        study_name="copy",
    )
    study.add_trials(known)
    trial = study.ask()
    fields = search.propose(trial)
    asked = study.get_trials(deepcopy=False)[-1]
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.RUNNING,
        params=asked.params,
        distributions=asked.distributions,
        user_attrs={_FIELDS: json.dumps(dict(fields))},
        system_attrs=asked.system_attrs,
    )


def _make_run(values: Mapping[str, Any], base: ConfigDict, recipe: Recipe) -> Trial:
    return trials.make_trials(base, lambda add: add(**values), recipe)[0]


def _make_runs(study: "optuna.Study", base: ConfigDict, recipe: Recipe) -> list[Trial]:
    """Makes the run of each point, in their order."""
    points = [json.loads(t.user_attrs[_FIELDS]) for t in study.get_trials(deepcopy=False)]
    runs = [_make_run(values, base, recipe) for values in points]
    return trials.name_trials(runs, list(dict.fromkeys(f for values in points for f in values)))


def _make_widest(study: "optuna.Study", base: ConfigDict, recipe: Recipe) -> list[Trial]:
    """Makes runs that are never trained, and whose shapes have room for points to come.

    They have the largest values that may be proposed for the fields that are data to a step, so
    that a rank of a later batch compiles nothing. Parameters are known by the names of fields.
    """
    runs = []
    for trial in study.get_trials(deepcopy=False):
        values = json.loads(trial.user_attrs[_FIELDS])
        wide = {
            field: max(values[field], _find_largest(distribution, values[field]))
            for field, distribution in trial.distributions.items()
            if field in trials.DATA_FIELDS and field in values and results.is_number(values[field])
        }
        runs.append(_make_run(values | wide, base, recipe))
    return list({run.id: run for run in runs}.values())


def _find_largest(distribution: Any, value: float) -> float:
    """Returns the largest number of a distribution, as a number of the value's type."""
    choices = getattr(distribution, "choices", None)
    high = max(filter(results.is_number, choices), default=value) if choices else distribution.high
    return type(value)(high)


def _tell(study: "optuna.Study", runs: Sequence[Trial], sweep: scheduler.Sweep) -> None:
    """Tells the scores of the runs that are done: those of the results, or that there is none.

    Raises:
      ValueError: the program's scores are the better the other way round.
    """
    import optuna

    for trial, run in zip(study.get_trials(deepcopy=False), runs, strict=True):
        if trial.state.is_finished():
            continue
        result = sweep_dirs.read_result(sweep.workdir, run)
        if result is None:
            raise ValueError(f"The run {run.id} has no result.")
        score, value = sweep_dirs.best_score(result)
        if score.higher_is_better != sweep.recipe.higher_is_better:
            raise ValueError(f"{score.name} is better the other way round than the study has it.")
        if result["status"] == sweep_dirs.FINISHED and value is not None:
            study.tell(trial.number, value)
        else:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


def _describe(study: "optuna.Study", search: Search) -> str:
    points = study.get_trials(deepcopy=False)
    scored = [trial for trial in points if trial.value is not None]
    text = f"{len(points)} points of {search.count}"
    if not scored:
        return text
    fields = json.loads(study.best_trial.user_attrs[_FIELDS])
    values = ", ".join(f"{name} {run_names.format_value(x)}" for name, x in fields.items())
    return f"{text}; best score {study.best_value:.4f}: {values}"
