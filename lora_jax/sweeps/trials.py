"""The runs of a sweep: a base config, and the fields that each run sets in it.

A sweep is defined beside its base config, in one file: ``get_config()`` and

    def sweep(add):
        add(**{"lora.rank": 4, "lora.alpha": 16.0, "seed": 0})

``configs.common.product`` makes grids.
"""

import copy
import difflib
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lora_jax.training import workdirs
from lora_jax.training.task import Recipe

# Fields whose values are data to the compiled step: runs that differ in nothing else share it.
DATA_FIELDS = (
    "seed", "lora.rank", "lora.alpha", "lora.dropout", "lora.rank_stabilized",
    "lora.rank_pattern", "lora.alpha_pattern", "optimizer.learning_rate", "optimizer.warmup",
    "optimizer.weight_decay", "optimizer.clip_norm",
)  # fmt: skip
_MOST = 10  # problems shown in one message


class Point(NamedTuple):
    """One run of a sweep.

    Attributes:
      id: a hash of the whole config, the name of the run's directory.
      values: the fields that the sweep sets.
      config: the base config with these values.
    """

    id: str
    values: dict[str, Any]
    config: ConfigDict


def load_sweep(path: str | Path) -> Callable:
    """The function ``sweep`` of a config file.

    Raises:
      ValueError: the file defines none.
    """
    spec = importlib.util.spec_from_file_location(f"sweep_of_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "sweep", None)):
        raise ValueError(
            f"{path} defines no sweep: add a function sweep(add) that calls add(**{{'lora.rank': "
            "4, ...}) for each run, as configs/quickstart_sweep.py does."
        )
    return module.sweep


def points(base: ConfigDict, sweep: Callable, recipe: Recipe) -> list[Point]:
    """The runs that ``sweep`` adds to ``base``, in its order; what is added twice is one run.

    Raises:
      ValueError: it adds none, or some with unknown fields or wrong values (all in one message).
    """
    added: list[dict[str, Any]] = []
    sweep(lambda **values: added.append(values))
    found, problems = {}, []
    for values in added:
        try:
            point = _point(base, values, recipe)
            found.setdefault(point.id, point)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problems.append(f"add({_shown(values)}): {error}")
    if problems:
        more = f"; and {len(problems) - _MOST} more" if len(problems) > _MOST else ""
        raise ValueError(
            f"{len(problems)} of the sweep's {len(added)} runs are wrong: "
            f"{'; '.join(problems[:_MOST])}{more}"
        )
    if not found:
        raise ValueError("The sweep adds no run: its sweep(add) must call add(**fields).")
    return list(found.values())


def _point(base: ConfigDict, values: dict[str, Any], recipe: Recipe) -> Point:
    config = copy.deepcopy(base)
    known = fields(config)
    for field, value in values.items():
        if field not in known:
            near = difflib.get_close_matches(field, known, n=3)
            hint = f" (did you mean {', '.join(near)}?)" if near else ""
            raise ValueError(
                f"unknown config field {field!r}{hint}; configs/common.py lists all, with a dot "
                "between section and name"
            )
        _set(config, field, value.item() if isinstance(value, np.generic) else value)
    config = recipe.resolve(config)
    recipe.check(config)
    _check_alone(config)
    if config.adapter:
        raise ValueError(
            f"adapter is {config.adapter!r}: the runs of a sweep start from fresh adapters, since "
            "rank and alpha are theirs; leave it empty"
        )
    if config.pmap or any(size != 1 for size in config.mesh.values()):
        raise ValueError(
            f"mesh is {config.mesh.to_dict()} and pmap {config.pmap}: a sweep spreads its runs "
            "over the devices, each on one, so leave all sizes at 1 and pmap at False"
        )
    return Point(_identity(config), values, config)


def _check_alone(config: ConfigDict) -> None:
    """Refuses what a run can only do by itself, not in step with others."""
    found = []
    if config.early_stopping.patience:
        found.append(
            f"early_stopping.patience is {config.early_stopping.patience}: the runs of a sweep go "
            "in step to the end, or are dropped by --halving; set it to 0"
        )
    if config.guard.action != "stop" or config.guard.spike:
        found.append(
            f"guard is {config.guard.to_dict()}: a run of a sweep whose loss is not finite ends as "
            "diverged, and the others go on; leave guard.action at stop and guard.spike at 0"
        )
    if found:
        raise ValueError("; ".join(found))


def _set(config: ConfigDict, field: str, value: Any) -> None:
    *sections, name = field.split(".")
    for section in sections:
        config = config[section]
    config[name] = ConfigDict(value) if isinstance(value, dict) else value


def fields(config: ConfigDict) -> list[str]:
    """The names of all fields, sections joined to them by dots; patterns count as one field."""
    found = []
    for name, value in config.items():
        nested = isinstance(value, ConfigDict) and not name.endswith("_pattern")
        found += [f"{name}.{n}" for n in fields(value)] if nested else [name]
    return found


def value_of(config: ConfigDict, field: str) -> Any:
    """The value of a field by its dotted name."""
    for name in field.split("."):
        config = config[name]
    return config


def _identity(config: ConfigDict) -> str:
    fixed = {n: x for n, x in workdirs.plain(config).items() if n not in workdirs.MAY_CHANGE}
    return _digest(fixed)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _shown(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def label(point: Point, swept: Sequence[str]) -> str:
    """The run in words: the fields that the sweep varies, without their sections."""
    values = (f"{f.split('.')[-1]} {_number(value_of(point.config, f))}" for f in swept)
    return ", ".join(values) or "the only run"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def swept(configs: Iterable[ConfigDict]) -> list[str]:
    """The fields that are not the same in all configs: rank and alpha first, the seed last."""
    configs = list(configs)
    differ = lambda f: len({json.dumps(_plain_value(c, f)) for c in configs}) > 1
    found = [field for field in fields(configs[0]) if differ(field)]
    return sorted(found, key=lambda f: (f == "seed", f != "lora.rank", f != "lora.alpha"))


def _plain_value(config: ConfigDict, field: str) -> Any:
    value = value_of(config, field)
    return value.to_dict() if isinstance(value, ConfigDict) else value


def groups(found: Sequence[Point]) -> list[list[Point]]:
    """Runs that share base, data and shapes: those that differ in :data:`DATA_FIELDS` alone."""
    by_rest: dict[str, list[Point]] = {}
    for point in found:
        by_rest.setdefault(signature(point.config), []).append(point)
    return list(by_rest.values())


def signature(config: ConfigDict) -> str:
    """A text that is the same for the configs of one group."""
    names = [field for field in fields(config) if field not in DATA_FIELDS]
    return json.dumps({name: _plain_value(config, name) for name in names}, sort_keys=True)


def only(found: Sequence[Point], filters: Iterable[str]) -> list[Point]:
    """The runs whose fields have one of the given values: ``lora.rank=1,4``.

    Raises:
      ValueError: a filter that can't be read or leaves nothing.
    """
    found = list(found)
    for text in filters:
        field, equals, values = text.partition("=")
        known = fields(found[0].config)
        if not equals or field not in known:
            raise ValueError(
                f"--only={text}: give a config field and its values, such as --only=lora.rank=1,4; "
                f"the fields are {', '.join(known)}."
            )
        wanted = {v.strip() for v in values.split(",")}
        there = {p.id: _number(value_of(p.config, field)) for p in found}
        missing = sorted(wanted - set(there.values()))
        if missing:
            raise ValueError(
                f"--only={text}: no run has {field} {', '.join(missing)}; there are "
                f"{', '.join(sorted(set(there.values())))}."
            )
        found = [p for p in found if there[p.id] in wanted]
    return found


def shard(found: Sequence[Point], text: str) -> list[Point]:
    """Every n-th run, for ``i/n`` beginning with the i-th: shards of one sweep share no run.

    Raises:
      ValueError: not of the form i/n with 1 <= i <= n.

    >>> shard("abcde", "2/3")
    ['b', 'e']
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = (int(x) for x in match.groups()) if match else (0, 0)
    if not 1 <= index <= count:
        raise ValueError(f"--shard={text}: give i/n with i from 1 to n, such as --shard=1/4.")
    return list(found)[index - 1 :: count]
