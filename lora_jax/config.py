"""``LoRAConfig``: which leaves are adapted or trained, and with which hyperparameters."""

import dataclasses
import functools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self, TypeVar

from lora_jax import hints, paths
from lora_jax.methods import METHODS, RANK_OFFSETS, unused_fields
from lora_jax.methods.initial_values import INITS

ALL_LINEAR = "all-linear"
C = TypeVar("C")


def _refuse_unknown_fields(cls: type[C]) -> type[C]:
    """Makes the error for an unknown keyword name the field that is meant."""
    fields: Any = dataclasses.fields
    init, known = vars(cls)["__init__"], [f.name for f in fields(cls)]

    @functools.wraps(init)
    def check_and_init(self: Any, *args: Any, **fields: Any) -> None:
        if unknown := [name for name in fields if name not in known]:
            raise TypeError(hints.unknown_fields(unknown, known))
        init(self, *args, **fields)

    setattr(cls, "__init__", check_and_init)  # noqa: B010  type checkers know the fields
    return cls


@_refuse_unknown_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What to adapt and how; it is checked when it is made, and survives a trip through JSON.

    With rank ``r`` a kernel becomes ``W + s·BA`` with ``s = alpha / r`` (Hu et al. 2021, eq. 3), or
    ``s = alpha / sqrt(r)`` when ``rank_stabilized`` (Kalajdzievski 2023, eq. 2).

    Attributes:
      rank: number of columns of ``a`` and rows of ``b``; at least 1.
      alpha: numerator of the scale; positive.
      targets: kernels to adapt. Each entry is a module name or path ("query", "attention/query"), a
        regular expression matched in full ("re:.*/(query|value)/kernel"), or "all-linear": every
        kernel that the function contracts or convolves, except what ``train`` names.
      train: leaves to train (and save) in full, named in the same way: a new head, all biases.
      train_tokens: rows to train of the tables matching a pattern, by their numbers, such as
        ``{"embed_tokens": (2, 17)}``; of a head that no table is tied to, its outputs of these
        numbers.
      adapt_bias: whether the bias beside each adapted kernel gets a trained term, too:
        ``bias + s·β``, with the scale of the kernel.
      method: what becomes of a kernel: one of :data:`lora_jax.methods.METHODS`.
      init: first values of the factors: one of :data:`lora_jax.methods.initial_values.INITS`, such
        as "pissa"; "lora_ga" is for :func:`lora_jax.init_from_gradients`.
      train_a: whether the factor ``a`` is trained; if not (LoRA-FA), it keeps its first values.
      projection_seed: seed of the projections that the kernels of VeRA share.
      dropout: rate in [0, 1) of the dropout on the input of the low-rank branch, while
        :func:`lora_jax.lift` is given a key.
      rank_stabilized: divide alpha by the square root of the rank.
      rank_pattern: rank of the kernels matching a pattern; the first pattern that matches wins.
      alpha_pattern: alpha of the kernels matching a pattern; the first pattern that matches wins.
      roles: roles of the axes of the leaves matching a pattern, one letter an axis: "i" (input),
        "o" (output), "b" (batch: every entry is a kernel of its own). They are for leaves whose use
        can't be seen, or whose roles are to be others than those of their use; the first pattern
        that matches wins.
      origin: further content of a file in another format, in JSON types, which is kept for writing
        that format again; it means nothing here and makes no difference to equality.

    Raises:
      TypeError: there is no such field; for another library's word the message names the field.
      ValueError: a value is out of its range; the message names the field.

    >>> config = LoRAConfig(rank=4, targets=("query", "value"), train=("classifier",))
    >>> LoRAConfig.from_json(config.to_json()) == config
    True
    >>> LoRAConfig(rank=0)
    Traceback (most recent call last):
    ...
    ValueError: rank must be a whole number of at least 1, got 0.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = (ALL_LINEAR,)
    train: Sequence[str] = ()
    method: str = "lora"
    init: str = "uniform"
    train_a: bool = True
    projection_seed: int = 0
    dropout: float = 0.0
    rank_stabilized: bool = False
    adapt_bias: bool = False
    # Hashed without the dictionaries: equal configs still have equal hashes.
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    train_tokens: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict, hash=False)
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # the dataclass is frozen
        put("rank", _check_whole("rank", self.rank))
        put("alpha", _check_positive("alpha", self.alpha))
        put("targets", _check_patterns("targets", self.targets))
        put("train", _check_patterns("train", self.train))
        put("method", _check_choice("method", self.method, METHODS))
        put("init", _check_choice("init", self.init, INITS))
        put("projection_seed", _check_seed("projection_seed", self.projection_seed))
        put("dropout", _check_number("dropout", self.dropout))
        put("rank_pattern", _check_by_pattern("rank_pattern", self.rank_pattern, _check_whole))
        put(
            "alpha_pattern", _check_by_pattern("alpha_pattern", self.alpha_pattern, _check_positive)
        )
        put("roles", _check_by_pattern("roles", self.roles, _check_roles))
        put("train_tokens", _check_tokens(self.train_tokens))
        put("origin", _copy_json_object("origin", self.origin))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}.")
        for name in ("rank_stabilized", "train_a", "adapt_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        self._check_method()
        if self.adapt_bias and not (self.targets and self.method == "lora"):
            raise ValueError(
                "adapt_bias is for kernels with method 'lora', and this config has "
                f"method {self.method!r} and targets {self.targets}: leave it out."
            )
        if not (self.targets or self.train or self.train_tokens):
            raise ValueError(
                "targets, train and train_tokens are all empty: there would be nothing to train."
            )
        both = sorted(set(self.targets) & set(self.train))
        if both:
            raise ValueError(
                f"targets and train overlap in {both}: a leaf is either adapted or trained in full."
            )

    def _check_method(self) -> None:
        """Refuses fields that have no meaning for the method.

        Raises:
          ValueError: such a field has another value than its default.
        """
        fields = {f.name: f for f in dataclasses.fields(self)}
        for name in unused_fields(self.method):
            is_pattern = fields[name].default is dataclasses.MISSING
            default, value = {} if is_pattern else fields[name].default, getattr(self, name)
            if value != default:
                raise ValueError(
                    f"{name} is {value!r}, and method {self.method!r} has no use for it. Leave it "
                    f"at {default!r}, or choose another method."
                )

    def kernel_rank(self, name: str) -> int:
        """Returns the rank for the kernel called ``name``."""
        return _first_match(self.rank_pattern, name, self.rank)

    def kernel_scale(self, name: str, rank: int | None = None) -> float:
        """Returns the scale ``s`` for the kernel called ``name``, at its own or the given rank."""
        rank = self.kernel_rank(name) if rank is None else rank
        alpha = _first_match(self.alpha_pattern, name, self.alpha)
        divisor = rank + RANK_OFFSETS.get(self.method, 0)
        return alpha / math.sqrt(divisor) if self.rank_stabilized else alpha / divisor

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON types."""
        fields = dataclasses.asdict(self)
        defaults = {"origin": {}, "roles": {}, "method": "lora", "init": "uniform", "train_a": True}
        defaults |= {"projection_seed": 0, "train_tokens": {}, "adapt_bias": False}
        for name, default in defaults.items():  # files without them stay as they were
            if fields[name] == default:
                del fields[name]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def to_json(self) -> str:
        """Returns the fields as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Inverts :meth:`to_dict`; an unknown field is an error.

        Raises:
          ValueError: a field is unknown, or a value is out of its range.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(map(str, fields)) - set(known))
        if unknown:
            raise ValueError(hints.unknown_fields(unknown, known))
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverts :meth:`to_json`.

        Raises:
          ValueError: not a JSON object, an unknown field, or a value out of its range.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"A LoRAConfig is a JSON object, got {type(fields).__name__}.")
        return cls.from_dict(fields)


def _check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
    return value


def _check_number(name: str, value: Any) -> float:
    # A bool is an int to Python, but `alpha=True` is a mistake.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:  # also for an int beyond every float
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    return float(value)


def _check_positive(name: str, value: Any) -> float:
    if _check_number(name, value) <= 0:
        raise ValueError(f"{name} must be positive, got {value!r}.")
    return float(value)


def _check_whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    return int(value)


def _check_seed(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= value < 2**63:
        raise ValueError(f"{name} must be a whole number from 0 to 2**63 - 1, got {value!r}.")
    return int(value)


def _check_roles(name: str, value: Any) -> str:
    if not isinstance(value, str) or set(value) - set("iob") or not {"i", "o"} <= set(value):
        raise ValueError(
            f"{name} must hold one letter for each axis, i (input), o (output) or b (batch), with "
            f"an input and an output among them; got {value!r}."
        )
    return value


def _check_patterns(name: str, value: Any) -> tuple[str, ...]:
    entries = (value,) if isinstance(value, str) else tuple(value)
    for entry in entries:
        _check_pattern(name, entry)
        if name == "train" and entry == ALL_LINEAR:
            raise ValueError(f"train cannot be {ALL_LINEAR!r}; that is a value of targets.")
    return entries


def _check_by_pattern(name: str, values: Any, check: Callable[[str, Any], Any]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must map patterns to values, got {values!r}.")
    for pattern in values:
        _check_pattern(name, pattern)
    return {pattern: check(f"{name}[{pattern!r}]", v) for pattern, v in values.items()}


def _check_tokens(value: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, Mapping):
        raise ValueError(
            "train_tokens must map patterns of tables to numbers of rows, such as "
            f'{{"embed_tokens": (2, 17)}}; got {value!r}.'
        )
    return _check_by_pattern("train_tokens", value, _check_ids)


def _check_ids(name: str, value: Any) -> tuple[int, ...]:
    entries = () if isinstance(value, str | Mapping) or not hasattr(value, "__iter__") else [*value]
    is_whole = lambda k: not isinstance(k, bool) and hasattr(k, "__index__")
    if not entries or not all(map(is_whole, entries)) or min(entries) < 0:
        raise ValueError(
            f"{name} must hold numbers of rows, from 0 on, such as (2, 17) or (2,); got {value!r}."
        )
    ids = tuple(map(int, entries))
    if twice := sorted({k for k, n in Counter(ids).items() if n > 1}):
        raise ValueError(f"{name} has {twice} more than once: a row is trained once.")
    return ids


def _copy_json_object(name: str, value: Any) -> dict[str, Any]:
    try:
        copy = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must hold JSON types only: {error}") from error
    if not isinstance(copy, dict):
        raise ValueError(f"{name} must be a mapping, got {value!r}.")
    return copy


def _check_pattern(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str) or not pattern.strip("/"):
        raise ValueError(f"{name} must hold non-empty strings, got {pattern!r}.")
    if pattern.startswith(paths.REGEX):
        try:
            re.compile(pattern.removeprefix(paths.REGEX))
        except re.error as error:
            raise ValueError(
                f"{name} entry {pattern!r} is no regular expression: {error}"
            ) from error


def _first_match(by_pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((v for pattern, v in by_pattern.items() if paths.matches(pattern, name)), default)
