"""LoRAConfig, names of leaves, and what is said about a mistake in either."""

import ast
import copy
import dataclasses
import inspect
import json
import pickle
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import freeze

import lora_jax as lora
from lora_jax import paths


def test_survives_json():
    config = lora.LoRAConfig(
        rank=3, alpha=5, targets=["query", "re:.*value/kernel"], train="head", dropout=0.25,
        rank_stabilized=True, rank_pattern={"query": 2}, alpha_pattern={"re:.*": 1.5},
    )  # fmt: skip
    again = lora.LoRAConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)
    assert config.targets == ("query", "re:.*value/kernel") and config.train == ("head",)
    assert json.loads(config.to_json())["rank_pattern"] == {"query": 2}


def test_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        lora.LoRAConfig().rank = 3
    with pytest.raises(TypeError):
        lora.LoRAConfig(8)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(rank=0), "rank must be a whole number of at least 1, got 0"),
        (dict(rank=-2), "rank must be"),
        (dict(rank=1.5), "rank must be"),
        (dict(rank=True), "rank must be"),
        (dict(alpha=0), "alpha must be positive, got 0"),
        (dict(alpha=-1.0), "alpha must be positive"),
        (dict(alpha=float("nan")), "alpha must be a finite number"),
        (dict(alpha="16"), "alpha must be a finite number"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (dict(dropout=-0.1), "dropout must be in"),
        (dict(targets=("query",), train=("query",)), "targets and train overlap in \\['query'\\]"),
        (dict(targets=(), train=()), "all empty"),
        (dict(train_a=0), "train_a must be True or False, got 0"),
        (dict(targets=("",)), "non-empty strings"),
        (dict(targets=(3,)), "non-empty strings"),
        (dict(targets=("re:(",)), "no regular expression"),
        (dict(train=("all-linear",)), "train cannot be 'all-linear'"),
        (dict(rank_pattern={"query": 0}), r"rank_pattern\['query'\] must be a whole number"),
        (dict(alpha_pattern={"query": -1}), r"alpha_pattern\['query'\] must be positive"),
        (dict(rank_pattern=[("query", 1)]), "rank_pattern must map"),
        (dict(rank_stabilized="yes"), "rank_stabilized must be True or False"),
    ],
)
def test_refuses(fields, says):
    with pytest.raises(ValueError, match=says):
        lora.LoRAConfig(**fields)


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match=r"Unknown LoRAConfig fields \['rnk'\]; the fields are"):
        lora.LoRAConfig.from_dict({"rnk": 4})
    with pytest.raises(ValueError, match="JSON object"):
        lora.LoRAConfig.from_json("[1]")


@pytest.mark.parametrize(
    "word, says",
    [
        ("r", "rank is this library's name for r"),
        ("lora_alpha", "alpha is this library's name for lora_alpha"),
        ("lora_dropout", "dropout is this library's name"),
        ("target_modules", "targets is this library's name"),
        ("module_path", "targets is this library's name"),  # qwix
        ("lora_attn_modules", "targets is this library's name"),  # torchtune
        ("lora_rank", "rank is this library's name"),
        ("use_rslora", "rank_stabilized is this library's name"),
        ("modules_to_save", "train is this library's name"),
        ("bias", r'use train, for example train=\("re:.\*/bias",\)'),
        ("task_type", "save_peft takes a task_type"),
        ("exclude_modules", "a regular expression in targets"),
        ("layers_to_transform", "a regular expression in targets"),
        ("fan_in_fan_out", "read off the function"),
        ("use_dora", 'DoRA is method="dora"'),
        ("rnk", r"Did you mean rank for rnk\?"),
        ("nonsense", r"Unknown LoRAConfig fields \['nonsense'\]; the fields are \['rank'"),
    ],
)
def test_words_of_other_libraries(word, says):
    for error, make in (
        (TypeError, lambda fields: lora.LoRAConfig(**fields)),
        (TypeError, lambda fields: dataclasses.replace(lora.LoRAConfig(), **fields)),
        (ValueError, lora.LoRAConfig.from_dict),
        (ValueError, lambda fields: lora.LoRAConfig.from_json(json.dumps(fields))),
    ):
        with pytest.raises(error, match=says):
            make({"rank": 4, word: 8})


def test_the_signature_is_still_that_of_the_fields():
    names = [f.name for f in dataclasses.fields(lora.LoRAConfig)]
    assert list(inspect.signature(lora.LoRAConfig).parameters) == names
    config = lora.LoRAConfig(rank=3)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


NAMES = [
    "params/layers/0/attn/query/kernel",
    "params/layers/1/attn/value/bias",
    "params/head/kernel",
]


@pytest.mark.parametrize(
    "pattern, says",
    [
        ("re:.*query", "must match the whole path of a leaf"),
        ("re:.*(query|value)", "'re:.*(query|value)/[^/]*' does"),
        ("re:query", "'re:.*query.*' does"),
        (".*query.*", "begins with 're:'"),
        (r".*layers\.\d+.*", "begins with 're:'"),
        (r"layers\.\d+", "joined by '/'"),
        ("^.*query$", "'re:.*query/[^/]*' does"),
        ("layers.0.attn.query", "joined by '/': 'layers/0/attn/query'"),
        ("re:.*nothing", "must match the whole path of a leaf"),
        ("qury", "did you mean 'query'?"),
    ],
)
def test_patterns_in_the_ways_of_other_libraries(pattern, says):
    with pytest.raises(ValueError) as error:
        paths.select([pattern], NAMES, what="targets")
    assert says in str(error.value)
    # What the message proposes selects something.
    for new in re.findall(r": ('re:[^']*') does|joined by '/': ('[^']*')\)", str(error.value)):
        assert paths.select([ast.literal_eval(new[0] or new[1])], NAMES, what="targets")


def test_scale_and_patterns():
    config = lora.LoRAConfig(
        rank=4, alpha=8, rank_pattern={"value": 16, "re:.*kernel": 2}, alpha_pattern={"query": 1.0}
    )
    assert config.kernel_rank("a/value/kernel") == 16  # the first match wins
    assert config.kernel_rank("a/query/kernel") == 2
    assert config.kernel_rank("a/query/embedding") == 4
    assert config.kernel_scale("a/value/kernel") == 0.5
    assert config.kernel_scale("a/query/kernel") == 0.5
    stabilized = dataclasses.replace(config, rank_stabilized=True)
    assert stabilized.kernel_scale("a/value/kernel") == 2.0


@pytest.mark.parametrize(
    ("pattern", "name", "hit"),
    [
        ("query", "enc/query/kernel", True),
        ("query", "query", True),
        ("query", "enc/query_norm/scale", False),
        ("query", "enc/my_query/kernel", False),
        ("enc/query", "enc/query/kernel", True),
        ("nc/query", "enc/query/kernel", False),
        ("query/kernel", "enc/query/kernel", True),
        ("query/bias", "enc/query/kernel", False),
        ("a.c", "abc/kernel", False),
        ("re:.*query.*", "enc/query/kernel", True),
        ("re:query", "enc/query/kernel", False),
    ],
)
def test_patterns_end_on_path_boundaries(pattern, name, hit):
    assert paths.matches(pattern, name) == hit


def test_names_in_every_container():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:
        kernel: int
        value: int

    tree = {"a": [1, (2, 3)], "b": freeze({"c": 4}), "d": Layer(5, 6)}
    assert paths.named_leaves(tree) == {
        "a/0": 1, "a/1/0": 2, "a/1/1": 3, "b/c": 4, "d/kernel": 5, "d/value": 6,
    }  # fmt: skip


def test_the_value_of_an_nnx_variable_is_no_part_of_its_name():
    module = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    names = list(paths.named_leaves(nnx.state(module, nnx.Param)))
    assert "value/kernel" in names and not any(name.endswith("/value") for name in names)


def test_trees_without_clear_names_are_refused():
    with pytest.raises(ValueError, match="share the path '1'"):
        paths.named_leaves(_Clash())
    with pytest.raises(ValueError, match="bare"):
        paths.named_leaves(jnp.zeros(3))


@jax.tree_util.register_pytree_with_keys_class
class _Clash:
    """Two leaves under keys that print alike."""

    def tree_flatten_with_keys(self):
        key = jax.tree_util.DictKey
        return [(key(1), 0), (key("1"), 0)], None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls()


def test_no_match_suggests_and_lists():
    with pytest.raises(ValueError, match=r"did you mean 'query'\?.*layer_\*/query/kernel"):
        paths.select(["qurey"], ["layer_0/query/kernel", "layer_1/query/kernel"], what="targets")
