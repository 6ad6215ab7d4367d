"""Selects modules by PEFT's words and rules, and finds the shortest words for a selection."""

import functools
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax import names
from lora_jax.names import Weight

_LINEAR_HEADS = ("classifier", "score")  # heads that "all-linear" leaves out in a SEQ_CLS model
OUTPUTS = ("lm_head", "embed_out", "output_layer")  # the same in a language model
_MAX_REPEATS, _MAX_UNBOUNDED, _MAX_LENGTH = 16, 6, 10_000
_MAX_SECONDS = 10.0
_Selector = Callable[[str], bool]
_Match = Callable[[str], re.Match | None]


class Model(NamedTuple):
    """A torch model as far as its tensors tell.

    Attributes:
      weights: tensors by name.
      kernels: weight of each module that PEFT can adapt as one.
      modules: names of all modules, also of those that only contain others; parents come first.
    """

    weights: dict[str, Weight]
    kernels: dict[str, Weight]
    modules: list[str]


def make_model(weights: Iterable[Weight]) -> Model:
    """Derives the modules from the tensors."""
    by_name = {w.hf: w for w in weights}
    kernels = {
        names.module(n): w for n, w in by_name.items() if names.kind(w) and not names.is_bare(w)
    }
    modules: dict[str, None] = {}
    for name in by_name:
        parts = names.module(name).split(".")
        modules |= dict.fromkeys(".".join(parts[: k + 1]) for k in range(len(parts)))
    return Model(by_name, kernels, list(modules))


def select_adapted(words: Mapping[str, Any], model: Model) -> list[str]:
    """Selects the modules that PEFT would adapt.

    An entry of a list selects the module of this name and modules whose name ends in a dot and this
    name; a string is a regular expression for whole names, or "all-linear". Excluded modules are
    removed first, then those that are trained in full, then those of other layers.

    Raises:
      ValueError: a regular expression is malformed, or could take forever.
    """
    is_excluded = _make_selector(words["exclude_modules"] or [], "exclude_modules")
    saved_parts = [f".{entry}." for entry in words["modules_to_save"] or []]
    is_target = _target_selector(words, model)
    is_in_layers = _layer_selector(words)
    targets = words["target_modules"]
    exact = set(targets) if isinstance(targets, list) else set()
    return [
        m
        for m in model.modules
        if is_target(m)
        and not is_excluded(m)
        and not any(entry in f".{m}." for entry in saved_parts)
        # A full name is not subject to the choice of layers.
        and (m in exact or is_in_layers(m))
    ]


def _target_selector(words: Mapping[str, Any], model: Model) -> _Selector:
    targets = words["target_modules"]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        linear = {m for m, w in model.kernels.items() if names.kind(w) == names.LINEAR}
        heads = _LINEAR_HEADS if words["task_type"] == "SEQ_CLS" else ()
        spared = [m for m in (*OUTPUTS, *heads) if m in linear][:1]
        return (linear - set(spared)).__contains__
    return _make_selector(targets or [], "target_modules")


def _make_selector(entries: str | Sequence[str], what: str) -> _Selector:
    if isinstance(entries, str):
        match = _limit_time([compile_safely(entries, what).fullmatch], what)[0]
        return lambda m: match(m) is not None
    known_entries = set(entries)
    return lambda m: not known_entries.isdisjoint(suffixes(m))


def suffixes(module: str) -> list[str]:
    """Returns the names that select the module, the shortest first.

    >>> suffixes("layer.0.query")
    ['query', '0.query', 'layer.0.query']
    """
    parts = module.split(".")
    return [".".join(parts[k:]) for k in range(len(parts) - 1, -1, -1)]


def _layer_selector(words: Mapping[str, Any]) -> _Selector:
    layers, patterns = words["layers_to_transform"], words["layers_pattern"]
    if layers is None or layers == []:
        return lambda m: True
    chosen = {layers} if isinstance(layers, int) else set(layers)
    # The first number with a name before it; without a pattern, one more name must come before.
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.)(?:{p})\.(?P<idx>\d+)\." for p in patterns or []]
    expressions = expressions or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    compiled = [compile_safely(e, "layers_pattern").match for e in expressions]
    matchers = _limit_time(compiled, "layers_pattern")

    def is_in_layers(m: str) -> bool:
        match = next((hit for e in matchers if (hit := e(m))), None)
        return match is not None and int(match["idx"]) in chosen

    return is_in_layers


def select_saved(entries: Iterable[str], model: Model) -> list[str]:
    """Selects the modules that PEFT would train in full: names that end in an entry."""
    entries = tuple(entries)
    hits = [m for m in model.modules if entries and m.endswith(entries)]
    return [m for m in hits if not any(m.startswith(f"{other}.") for other in hits)]


def find_value(
    module: str, patterns: Sequence[tuple[_Match, Any]], default: Any
) -> tuple[Any, int]:
    """Finds the value for a module, and the number of the first pattern that fits (-1: none)."""
    for k, (match, value) in enumerate(patterns):
        if match(module):
            return value, k
    return default, -1


def compile_patterns(by_pattern: Mapping[str, Any] | None, what: str) -> list[tuple[_Match, Any]]:
    """Compiles the keys of rank_pattern or alpha_pattern, expressions for the ends of names."""
    by_pattern = by_pattern or {}
    matchers = [compile_safely(rf"(.*\.)?({key})$", what).match for key in by_pattern]
    return list(zip(_limit_time(matchers, what), by_pattern.values(), strict=True))


def _limit_time(matchers: Sequence[_Match], what: str) -> list[_Match]:
    """Returns the same matchers with a limit of the time that they take together."""
    spent = 0.0

    def run(match: _Match, text: str) -> re.Match | None:
        nonlocal spent
        begun = time.process_time()
        hit = match(text)
        spent += time.process_time() - begun
        if spent > _MAX_SECONDS:
            raise ValueError(f"{what}: its regular expressions take too long to match")
        return hit

    return [functools.partial(run, match) for match in matchers]


def compile_safely(pattern: str, what: str) -> re.Pattern:
    """Compiles a regular expression that is safe to run.

    Python's matcher backtracks, and on a hostile expression it runs for years. Repeated groups with
    a repetition or a choice inside, and many repetitions, are refused; no adapter needs them.

    Raises:
      ValueError: the expression is malformed or not safe; the message names the field.
    """
    if len(pattern) > _MAX_LENGTH or _is_explosive(pattern):
        raise ValueError(
            f"{what}: the regular expression {pattern[:100]!r} could take for ever to match; list "
            "the modules by name instead"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{what}: {pattern[:100]!r} is no regular expression: {error}") from error


_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?:\?[^)]?)?|\)|(?:[*+?]|\{\d*(?:,\d*)?\})[?+]?|\||.",
    re.DOTALL,
)


def _is_explosive(pattern: str) -> bool:
    """Tells whether matching may take more than polynomial time of a low degree."""
    busy = [False]  # for each open group, whether it has a repetition or a choice inside
    closed = False  # the same for the group that has just been closed
    repeats = unbounded = 0
    for token in _TOKEN.findall(pattern):
        repeat = token[0] in "*+?" or (token[0] == "{" and len(token) > 1)
        if repeat:
            many = token[0] != "?"
            if many and closed:
                return True
            repeats, unbounded = repeats + 1, unbounded + many
            busy[-1] = True
        elif token == "|":
            busy[-1] = True
        closed = False
        if token.startswith("("):
            busy.append(False)
        elif token == ")" and len(busy) > 1:
            closed = busy.pop()
            busy[-1] = busy[-1] or closed
    return repeats > _MAX_REPEATS or unbounded > _MAX_UNBOUNDED


def shortest_entries(
    wanted: Iterable[str], known: Iterable[str], indifferent: Iterable[str] = ()
) -> list[str]:
    """Returns the shortest entries, sorted, that select the wanted names and no other.

    A full name may still select more (``query`` selects ``x.query``), which the caller checks.

    Args:
      wanted: names of the modules or parameters to select.
      known: names of all that there are.
      indifferent: names of those that may be selected as well.
    """
    endings = _find_endings(wanted, known, indifferent)
    return sorted({entry or m for m, entry in endings.items()})


def shortest_patterns(values: Mapping[str, Any], model: Model, default: Any) -> dict[str, Any]:
    """Returns the shortest patterns that give each name a value that is not the default."""
    by_pattern = {}
    known = {*model.modules, *values}
    for value in {v for v in values.values() if v != default}:
        same = {m for m, v in values.items() if v == value}
        for m, entry in _find_endings(same, known, known - set(values)).items():
            by_pattern[re.escape(entry) if entry else f"^{re.escape(m)}"] = value
    return by_pattern


def _find_endings(
    wanted: Iterable[str], known: Iterable[str], indifferent: Iterable[str]
) -> dict[str, str | None]:
    """Finds for each name its shortest ending that no other name shares, or None."""
    wanted = set(wanted)
    others = set(known) - wanted - set(indifferent)
    taken = {ending for m in others for ending in suffixes(m)}
    return {m: next((s for s in suffixes(m) if s not in taken), None) for m in wanted}
