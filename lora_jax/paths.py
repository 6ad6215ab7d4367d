"""Names of leaves in a parameter tree, and matching of names against patterns.

A leaf's *name* is its path with the components joined by ``/``: ``params/encoder/query/kernel``.
Leaves of dictionaries, lists, NamedTuples, dataclasses and NNX states all get names in the same
way, so that all other files use names and know nothing of containers.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax

from lora_jax.quantized import is_quantized

PyTree = Any
T = TypeVar("T")

REGEX = "re:"  # prefix of a pattern that is a regular expression, matched in full


def named_leaves(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves of ``tree`` by name, in the order of ``jax.tree.leaves``.

    A leaf that is stored in fewer bits is one leaf; see :mod:`lora_jax.quantized`.

    Raises:
      ValueError: two leaves have the same name (by the keys ``1`` and ``"1"``, or by the key
        ``"a/b"`` and ``b`` in ``a``); a key is empty; or ``tree`` is a bare array without a name.

    >>> named_leaves({"dense": {"kernel": 1, "bias": 2}, "layers": [3, 4]})
    {'dense/bias': 2, 'dense/kernel': 1, 'layers/0': 3, 'layers/1': 4}
    """
    with_paths = _flatten_with_paths(tree, is_leaf)
    named: dict[str, Any] = {}
    names = _make_names([path for path, _ in with_paths])
    for name, (_, leaf) in zip(names, with_paths, strict=True):
        if not name and any(path for path, _ in with_paths):
            raise ValueError("A leaf of the tree has an empty key; name it.")
        if not name:
            raise ValueError(
                "The parameters must be a container of arrays (a dict, a list, a dataclass, an NNX "
                f"state, ...) so that each array has a path; got a bare {type(leaf).__name__}."
            )
        if name in named:
            raise ValueError(f"Two leaves of the tree share the path {name!r}; rename one of them.")
        named[name] = leaf
    return named


def _flatten_with_paths(tree: PyTree, is_leaf: Callable[[Any], bool] | None) -> list[tuple]:
    stops = lambda x: is_quantized(x) or (is_leaf is not None and is_leaf(x))
    try:
        return jax.tree_util.tree_flatten_with_path(tree, is_leaf=stops)[0]
    except ValueError as error:
        if "sorting pytree dictionary keys" not in str(error):
            raise
        raise ValueError(
            "A dictionary of the tree has keys that cannot be sorted, such as 1 and 'a': JAX takes "
            "keys of one type in each dictionary. Make them all strings."
        ) from error


def _make_names(paths: list[tuple]) -> list[str]:
    """Makes names of key paths, without the ``.value`` of a boxed leaf (NNX variable, Linen box).

    Boxes put one more component behind every leaf, which is noise to a reader, and would make the
    pattern "value" (an attention layer's usual name) match everything.
    """
    children: dict[tuple, int] = {}
    for path in paths:
        children[path[:-1]] = children.get(path[:-1], 0) + 1

    def name(path: tuple) -> str:
        last: Any = path[-1] if path else None
        is_boxed = isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value"
        if is_boxed and len(path) > 1 and children[path[:-1]] == 1:
            path = path[:-1]
        return jax.tree_util.keystr(path, simple=True, separator="/")

    return [name(path) for path in paths]


def matches(pattern: str, name: str) -> bool:
    """Tells whether ``pattern`` selects the leaf called ``name``.

    A plain pattern is a module or leaf name, or several joined by ``/``; it selects every leaf at
    or below a path that ends in it. Only whole components count: ``"query"`` does not select
    ``query_norm``. A ``*`` stands for any characters within a component, as in what
    :func:`listing` shows. ``"re:..."`` is a regular expression that must match the whole name.

    >>> matches("query", "layer_0/attention/query/kernel")
    True
    >>> matches("layer_*/attention", "layer_0/attention/query/kernel")
    True
    >>> matches("attention/query", "layer_0/attention/query/kernel")
    True
    >>> matches("query", "layer_0/attention/query_norm/scale")
    False
    >>> matches("re:.*/bias", "layer_0/attention/query/bias")
    True
    """
    if pattern.startswith(REGEX):
        return re.fullmatch(pattern.removeprefix(REGEX), name) is not None
    if "*" in pattern:
        within = re.escape(pattern.strip("/")).replace(r"\*", "[^/]*")
        return re.search(f"(?:^|/){within}(?:/|$)", name) is not None
    # Bounded by separators on both sides, a substring is a run of whole components.
    return f"/{pattern.strip('/')}/" in f"/{name}/"


def select(patterns: Iterable[str], names: Iterable[str], *, what: str) -> dict[str, list[str]]:
    """Returns for each pattern the names that it matches.

    Args:
      patterns: patterns as in :func:`matches`.
      names: names to choose from.
      what: name of the patterns in the error, for example "targets".

    Raises:
      ValueError: some patterns match nothing; the message lists them all, and what exists.
    """
    names = list(names)
    matched = {pattern: [n for n in names if matches(pattern, n)] for pattern in patterns}
    missing = [pattern for pattern, hits in matched.items() if not hits]
    if missing:
        raise ValueError(f"{describe_misses(missing, names, what=what)}.")
    return matched


def describe_misses(missing: Iterable[str], names: Iterable[str], *, what: str) -> str:
    """Says which patterns matched nothing, with near misses and the names that exist."""
    names = list(names)
    words = sorted({part for name in names for part in name.split("/") if not part.isdigit()})
    lines = []
    for pattern in missing:
        hint = _expression_hint(pattern, names)
        near = difflib.get_close_matches(pattern.split("/")[-1], words, n=3)
        if near and not hint:
            hint = f"did you mean {', '.join(map(repr, near))}?"
        lines.append(f"{what} entry {pattern!r} matches no parameter{hint and f' ({hint})'}")
    return "; ".join(lines) + f". Parameters here: {listing(names)}"


def _expression_hint(pattern: str, names: Iterable[str]) -> str:
    """Says what to write instead of a regular expression in another library's convention."""
    is_expression, path = pattern.startswith(REGEX), pattern.replace(".", "/")
    is_dotted = path != pattern and "*" not in path
    if is_dotted and any(matches(path, name) for name in names):
        return f"the parts of a path are joined by '/': {path!r}"
    text = pattern.removeprefix(REGEX)
    if not is_expression and not re.search(r"[\\*+?\[\](){}|^$]|\.", text):
        return ""
    slashes = re.sub(r"\\\.|\.(?![*+?{])", "/", text).strip("^$")
    forms = [text, text.strip("^$"), slashes, text.replace("*", ".*")]
    tries = [(form, form) for form in forms] if not is_expression else []
    tries += [(form, new) for form in forms for new in (f"{form}/[^/]*", f".*{form}.*")]
    right = next((new for _, new in tries if _has_match(new, names)), None)
    if is_expression:
        rule = "a regular expression must match the whole path of a leaf, joined by '/'"
    else:
        rule = f"a regular expression begins with {REGEX!r}, and matches whole paths, joined by '/'"
    return rule + (f": {REGEX + right!r} does" if right else "")


def _has_match(expression: str, names: Iterable[str]) -> bool:
    try:
        return any(re.fullmatch(expression, name) for name in names)
    except re.error:
        return False


def listing(names: Iterable[str], most: int = 40) -> str:
    """Joins names by commas; repeated layers are shown once, with ``*`` for their numbers.

    >>> listing(["layer_0/kernel", "layer_1/kernel", "head"])
    'layer_*/kernel, head'
    """
    short = list(dict.fromkeys(map(fold_layers, names)))
    tail = f", ... ({len(short) - most} more)" if len(short) > most else ""
    return (", ".join(short[:most]) + tail) or "none"


def fold_layers(name: str) -> str:
    """Puts ``*`` in place of the numbers of layers in a name.

    >>> fold_layers("layer_0/mlp/1/kernel")
    'layer_*/mlp/*/kernel'
    """
    return re.sub(r"(^|[/_])\d+(?=/|$)", r"\1*", name)


def fold_alike(named: Mapping[str, T]) -> list[tuple[str, int, T]]:
    """Makes one row of leaves whose names differ in numbers of layers alone, and which are equal.

    Returns:
      For each row a name, the number of its leaves, and what they are.

    >>> fold_alike({"layer_0/kernel": 8, "layer_1/kernel": 8, "layer_2/kernel": 4})
    [('layer_*/kernel', 2, 8), ('layer_2/kernel', 1, 4)]
    """
    alike: dict[tuple[str, T], list[str]] = {}
    for name, value in named.items():
        alike.setdefault((fold_layers(name), value), []).append(name)
    return [
        (folded if names[1:] else names[0], len(names), value)
        for (folded, value), names in alike.items()
    ]


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the nested dictionary whose leaves have the given names.

    If one name begins with another (because a key has a ``/`` in it), the rest of the longer name
    becomes one key beside the shorter name.

    >>> nest({"dense/kernel": 1, "dense/bias": 2})
    {'dense': {'kernel': 1, 'bias': 2}}
    >>> nest({"w": 1, "w/extra/bias": 2})
    {'w': 1, 'w/extra/bias': 2}
    """
    tree: dict[str, Any] = {}
    for name, value in named.items():
        parts = name.split("/")
        ends = ["/".join(parts[: k + 1]) for k in range(len(parts))]
        depth = next(k for k, end in enumerate(ends) if end in named)
        node = tree
        for part in parts[:depth]:
            node = node.setdefault(part, {})
        node["/".join(parts[depth:])] = value
    return tree
