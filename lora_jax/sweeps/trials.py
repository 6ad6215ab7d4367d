"""The runs of a sweep: a base config, and the fields that each run sets in it.

A sweep is defined beside its base config, in one file: ``get_config()`` and

    def sweep(add):
        add(**{"lora.rank": 4, "lora.alpha": 16.0, "seed": 0})

``configs.common.product`` makes grids.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lora_jax.methods.initial_values import PLAIN
from lora_jax.training import config_fields, config_files, run_names, workdirs
from lora_jax.training.config_fields import field_names
from lora_jax.training.task import Recipe

# Fields whose values are data to the compiled step: runs that differ in nothing else share it.
DATA_FIELDS = (
    "seed", "lora.rank", "lora.alpha", "lora.dropout", "lora.rank_stabilized",
    "lora.rank_pattern", "lora.alpha_pattern", "optimizer.learning_rate", "optimizer.warmup",
    "optimizer.weight_decay", "optimizer.clip_norm", "optimizer.b_rate", "optimizer.embedding_rate",
)  # fmt: skip
_MAX_PROBLEMS = 10  # in one message


class Trial(NamedTuple):
    """One run of a sweep.

    Attributes:
      id: hash of the whole config, and name of the run's directory.
      values: values of the fields that the sweep sets.
      config: base config with these values.
      name: what sets the run apart from the others, as rank4-lr1e-3-seed0; "" if there are none.
    """

    id: str
    values: dict[str, Any]
    config: ConfigDict
    name: str = ""


def load_sweep(path: str | Path) -> Callable[[Callable[..., None]], None]:
    """Loads the function ``sweep`` of a config file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file defines none, or something is wrong in it.
    """
    sweep = _find_sweep(path)
    if sweep is None:
        raise ValueError(
            f"{path} defines no sweep: add a function sweep(add) that calls add(**{{'lora.rank': "
            "4, ...}) for each run, as configs/quickstart_sweep.py does; or give the values on the "
            "command line, as in --sweep=lora.rank=1,4,16."
        )

    def call(add: Callable[..., None]) -> None:
        try:
            sweep(add)
        except Exception as error:
            raise ValueError(config_files.describe_error(error, str(path))) from error

    return call


def has_sweep(path: str | Path) -> bool:
    """Returns whether a config file defines a sweep.

    Raises:
      FileNotFoundError, ValueError: as :func:`load_sweep`, but for a file that defines none.
    """
    return _find_sweep(path) is not None


def _find_sweep(path: str | Path) -> Callable[[Callable[..., None]], object] | None:
    if str(path).endswith(".json"):
        return None
    sweep = getattr(config_files.import_file(str(path)), "sweep", None)
    return sweep if callable(sweep) else None


def make_trials(
    base: ConfigDict, sweep: Callable[[Callable[..., None]], None], recipe: Recipe
) -> list[Trial]:
    """Makes the runs that a sweep adds, in its order; what is added twice is one run.

    Args:
      base: base config.
      sweep: calls its argument with the fields of each run.
      recipe: recipe of the program.

    Raises:
      ValueError: the sweep adds no run, or some have unknown fields or wrong values; the message
        has all of them.
    """
    added: list[dict[str, Any]] = []
    sweep(lambda **values: added.append(values))
    trials: dict[str, Trial] = {}
    problems: list[str] = []
    for values in added:
        try:
            trial = _make_trial(base, values, recipe)
            trials.setdefault(trial.id, trial)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problems.append(f"add({_format_values(values)}): {error}")
    if problems:
        more = (
            f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        )
        raise ValueError(
            f"{len(problems)} of the sweep's {len(added)} runs are wrong: "
            f"{'; '.join(problems[:_MAX_PROBLEMS])}{more}"
        )
    if not trials:
        raise ValueError("The sweep adds no run: its sweep(add) must call add(**fields).")
    return name_trials(list(trials.values()))


def name_trials(trials: Sequence[Trial], fields: Sequence[str] | None = None) -> list[Trial]:
    """Names runs by some fields, by default by those that differ between them."""
    if fields is None:
        fields = varied_fields([trial.config for trial in trials])
    name = lambda trial: run_names.name_values(trial.config, fields) if fields else ""
    return [trial._replace(name=name(trial)) for trial in trials]


def _make_trial(base: ConfigDict, values: dict[str, Any], recipe: Recipe) -> Trial:
    config = copy.deepcopy(base)
    known = field_names(config)
    if missing := [field for field in values if field not in known]:
        raise ValueError("; ".join(config_fields.unknown(field, known) for field in missing))
    for field, value in values.items():
        _set(config, field, value)
    config = recipe.resolve(config)
    recipe.check(config)
    _check_lockstep(config)
    if config.adapter:
        raise ValueError(
            f"adapter is {config.adapter!r}: the runs of a sweep start from fresh adapters, since "
            "each has its own rank and alpha; leave it empty"
        )
    if config.pmap or any(size != 1 for size in config.mesh.values()):
        raise ValueError(
            f"mesh is {config.mesh.to_dict()} and pmap {config.pmap}: a sweep spreads its runs "
            "over the devices, each on one, so leave all sizes at 1 and pmap at False"
        )
    return Trial(_hash_config(config), values, config)


def _check_lockstep(config: ConfigDict) -> None:
    """Refuses settings that only a run by itself can have, and none in step with others."""
    problems = []
    if config.early_stopping.patience:
        problems.append(
            f"early_stopping.patience is {config.early_stopping.patience}: the runs of a sweep go "
            "in step to the end, or are dropped by --halving; set it to 0"
        )
    if config.guard.action != "stop" or config.guard.spike:
        problems.append(
            f"guard is {config.guard.to_dict()}: a run of a sweep whose loss is not finite ends as "
            "diverged, and the others go on; leave guard.action at stop and guard.spike at 0"
        )
    if problems:
        raise ValueError("; ".join(problems))


def _set(config: ConfigDict, field: str, value: Any) -> None:
    section, name = config_fields.get_section(config, field)
    if isinstance(section[name], ConfigDict) and isinstance(value, dict):
        section[name] = ConfigDict(value)
    else:
        section[name] = config_fields.convert(field, value, like=section)


def find_replaced(trials: Sequence[Trial], fields: Iterable[str]) -> list[str]:
    """Returns those of the fields that every run of a sweep sets itself."""
    return [field for field in fields if all(field in trial.values for trial in trials)]


def get_value(config: ConfigDict, field: str) -> Any:
    """Returns the value of a field by its dotted name."""
    for name in field.split("."):
        config = config[name]
    return config


def _hash_config(config: ConfigDict) -> str:
    fields = workdirs.to_json_types(config)
    fixed = {name: x for name, x in fields.items() if name not in workdirs.MAY_CHANGE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]


def _format_values(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def describe(trial: Trial, varied: Sequence[str]) -> str:
    """Describes a run by the fields that the sweep varies, without their sections."""
    values = (f"{f.split('.')[-1]} {_format(get_value(trial.config, f))}" for f in varied)
    return ", ".join(values) or "the only run"


def _format(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def varied_fields(configs: Iterable[ConfigDict]) -> list[str]:
    """Returns the fields that differ between configs: rank and alpha first, the seed last."""
    configs = list(configs)
    is_varied = lambda f: len({json.dumps(_plain_value(c, f)) for c in configs}) > 1
    names = [field for field in field_names(configs[0]) if is_varied(field)]
    return sorted(names, key=lambda f: (f == "seed", f != "lora.rank", f != "lora.alpha"))


def _plain_value(config: ConfigDict, field: str) -> Any:
    value = get_value(config, field)
    return value.to_dict() if isinstance(value, ConfigDict) else value


def group(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Groups runs that share base, data and shapes, and differ in :data:`DATA_FIELDS` alone."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(group_key(trial.config), []).append(trial)
    return list(groups.values())


def group_key(config: ConfigDict) -> str:
    """Returns a text that is the same for the configs of one group."""
    names = [field for field in field_names(config) if field not in DATA_FIELDS]
    values = {name: _plain_value(config, name) for name in names}
    if "lora.init" in values:  # of which the class of nodes alone is more than data
        values["lora.init"] = values["lora.init"] in PLAIN
    return json.dumps(values, sort_keys=True)


def select(trials: Sequence[Trial], filters: Iterable[str]) -> list[Trial]:
    """Selects runs whose fields have one of the given values, by filters like ``lora.rank=1,4``.

    Raises:
      ValueError: a filter can't be read, or no run has one of its values.
    """
    trials = list(trials)
    for text in filters:
        field, equals, values = text.partition("=")
        known = field_names(trials[0].config)
        if not equals or field not in known:
            raise ValueError(
                f"--only={text}: give a config field and its values, such as --only=lora.rank=1,4; "
                f"the fields are {', '.join(known)}."
            )
        present = {t.id: _format(get_value(t.config, field)) for t in trials}
        by_number = {_to_number(value): value for value in present.values()}
        wanted = {by_number.get(_to_number(v), v) for v in map(str.strip, values.split(","))}
        missing = sorted(wanted - set(present.values()))
        if missing:
            raise ValueError(
                f"--only={text}: no run has {field} {', '.join(missing)}; there are "
                f"{', '.join(sorted(set(present.values())))}."
            )
        trials = [t for t in trials if present[t.id] in wanted]
    return trials


def _to_number(text: str) -> float | str:
    """Returns the number that a text stands for, so that 1.0 is 1; or the text."""
    try:
        return float(text)
    except ValueError:
        return text


def shard(trials: Sequence[Trial], text: str) -> list[Trial]:
    """Selects every n-th run, for ``i/n`` from the i-th on; shards of one sweep share no run.

    Raises:
      ValueError: the text is not of the form i/n with 1 <= i <= n.

    >>> shard("abcde", "2/3")
    ['b', 'e']
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = (int(x) for x in match.groups()) if match else (0, 0)
    if not 1 <= index <= count:
        raise ValueError(f"--shard={text}: give i/n with i from 1 to n, such as --shard=1/4.")
    return list(trials)[index - 1 :: count]
