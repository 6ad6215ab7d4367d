"""RoBERTa, XLM-R and DistilBERT: values of transformers (goldens), tables, configs, checkpoints."""

import doctest
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import paths
from lora_jax.models import checkpoints, distilbert, encoder, families, hub, registry, roberta
from tests.helpers import places, slow

# Made by scripts/make_encoder_goldens.py.
GOLDENS = places.GOLDENS
CASES = [
    "roberta/base", "roberta/pad_3_types_2", "roberta/xlm", "distilbert/base", "distilbert/three_labels",
]  # fmt: skip
CONFIGS = {
    "roberta": roberta.RobertaConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=10,
    ),
    "distilbert": distilbert.DistilBertConfig(
        vocab_size=30, dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=10
    ),
}  # fmt: skip


def golden(case):
    with np.load(GOLDENS / case / "golden.npz") as file:
        values = dict(file)
    return {k: v for k, v in values.items() if k not in ("logits", "hidden")}, values


def load(case, **options):
    labels = golden(case)[1]["logits"].shape[1]
    return checkpoints.load(
        GOLDENS / case, **({"head": "classifier", "num_labels": labels} | options)
    )


# Whole programs: operation by operation, compiling takes ten times as long.
@functools.partial(jax.jit, static_argnums=0, static_argnames="deterministic")
def run(model, params, inputs, **options):
    return model.apply(params, **inputs, **options)


@pytest.mark.parametrize("module", [roberta, distilbert])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("scan_layers", slow.after(1, [False, True]))
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, scan_layers):
    inputs, values = golden(case)
    loaded = load(case, scan_layers=scan_layers)
    assert loaded.fresh == ()
    assert np.abs(values["logits"]).max() > 0.1
    logits = run(loaded.model, loaded.params, inputs)
    np.testing.assert_allclose(logits, values["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_encoder_alone_equals_transformers(case, caplog):
    """From a classifier's file: its head is left out; RoBERTa's pooler, absent there, is made."""
    inputs, values = golden(case)
    loaded = load(case, head="encoder")
    pooler = ("pooler/dense/kernel", "pooler/dense/bias")
    assert loaded.fresh == (pooler if case.startswith("roberta") else ())
    hidden = run(loaded.model, loaded.params, inputs)
    hidden = hidden[0] if case.startswith("roberta") else hidden
    np.testing.assert_allclose(hidden, values["hidden"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["roberta/base", "distilbert/base"])
def test_bfloat16_computes_near_float32_and_keeps_parameters(case):
    inputs, values = golden(case)
    loaded = load(case, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.float32)}
    logits = run(loaded.model, loaded.params, inputs)
    assert logits.dtype == jnp.float32
    # bfloat16 has 8 bits; errors of 2^-8 on values of about 1 add up over a few layers.
    scale = np.abs(values["logits"]).max()
    np.testing.assert_allclose(logits, values["logits"], rtol=0, atol=0.05 * max(scale, 1.0))
    assert not np.array_equal(logits, values["logits"])


def shapes(config, head, **options):
    family = registry.find(config.to_hf())
    model = family.models[head](config, **options)
    return jax.eval_shape(model.init, jax.random.key(0), *family.inputs(head))["params"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # The counts of roberta-base and -large, and of distilbert-base-uncased, with two labels.
        (roberta.RobertaConfig(), 124_647_170),
        (
            roberta.RobertaConfig(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                intermediate_size=4096,
            ),
            355_361_794,
        ),
        (distilbert.DistilBertConfig(), 66_955_010),
    ],
)  # fmt: skip
def test_parameter_counts(config, expected):
    tree = shapes(config, "classifier", scan_layers=True)
    assert sum(x.size for x in jax.tree.leaves(tree)) == expected


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("head", ["classifier", "encoder"])
@pytest.mark.parametrize("name", CONFIGS)
def test_table_is_a_bijection_onto_the_tree(name, head, scan_layers):
    config = CONFIGS[name]
    leaves = paths.named_leaves(shapes(config, head, scan_layers=scan_layers))
    rows = registry.find(config.to_hf()).names(config, head=head, scan_layers=scan_layers)
    assert sorted(row.flax for row in rows) == sorted(leaves)
    assert len({row.hf for row in rows}) == len(rows)
    assert {row.flax for row in rows if row.transpose} == {n for n in leaves if "kernel" in n}


def test_positions_count_tokens_that_are_not_padding():
    ids = jnp.array([[1, 1, 7, 8], [5, 1, 6, 1]])  # left padding; a gap
    assert encoder.compute_position_ids(ids, 1).tolist() == [[1, 1, 2, 3], [2, 1, 3, 1]]


def test_every_position_of_roberta_is_used_and_no_more():
    loaded = load("roberta/base")
    assert loaded.model.config.positions == 12  # of 14: 0 and 1 belong to no token
    inputs = lambda n: {"input_ids": np.full((1, n), 5), "attention_mask": np.ones((1, n), int)}
    assert np.isfinite(run(loaded.model, loaded.params, inputs(12))).all()
    with pytest.raises(ValueError, match="13 tokens.*positions for 12"):
        run(loaded.model, loaded.params, inputs(13))


@pytest.mark.parametrize("case", ["roberta/base", "distilbert/base"])
def test_dropout_acts_while_training_only(case):
    inputs, _ = golden(case)
    loaded = load(case)
    train = lambda seed: run(
        loaded.model,
        loaded.params,
        inputs,
        deterministic=False,
        rngs={"dropout": jax.random.key(seed)},
    )
    assert np.abs(train(1) - train(2)).max() > 1e-3
    np.testing.assert_array_equal(train(1), train(1))


# --- Checkpoints of other heads


def pretrained(case, folder, extras, drop):
    """The files of a pretrained model: another head, and none for classes."""
    shutil.copytree(GOLDENS / case, folder)
    tensors = safetensors.numpy.load_file(folder / hub.WEIGHTS)
    tensors = {n: x for n, x in tensors.items() if not n.startswith(drop)}
    extra = {name: np.ones((2, 2), np.float32) for name in extras}
    safetensors.numpy.save_file(tensors | extra, folder / hub.WEIGHTS)
    return folder


MASKED_LM = {
    "roberta/base": (
        ("lm_head.dense.weight", "lm_head.bias", "roberta.pooler.dense.weight", "roberta.embeddings.position_ids"),
        ("classifier.",),
        [f"classifier/{n}/{x}" for n in ("dense", "out_proj") for x in ("kernel", "bias")],
    ),
    "distilbert/base": (
        ("vocab_transform.weight", "vocab_layer_norm.weight", "vocab_projector.bias"),
        ("classifier.", "pre_classifier."),
        [f"{n}/{x}" for n in ("pre_classifier", "classifier") for x in ("kernel", "bias")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MASKED_LM)
def test_a_pretrained_checkpoint_gets_a_fresh_head(case, tmp_path):
    extras, drop, fresh = MASKED_LM[case]
    loaded = checkpoints.load(pretrained(case, tmp_path / "m", extras, drop), head="classifier")
    assert list(loaded.fresh) == fresh
    expected = load(case).params["params"][case.partition("/")[0]]
    jax.tree.map(
        np.testing.assert_array_equal, loaded.params["params"][case.partition("/")[0]], expected
    )


def test_robertas_first_head_layer_stays_where_the_labels_differ():
    loaded = load("roberta/base", num_labels=5)
    assert loaded.fresh == ("classifier/out_proj/kernel", "classifier/out_proj/bias")
    same = load("roberta/base").params["params"]["classifier"]["dense"]
    jax.tree.map(
        np.testing.assert_array_equal, loaded.params["params"]["classifier"]["dense"], same
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_saved_directories_load_again_bit_for_bit(case, scan_layers, tmp_path):
    loaded = load(case, scan_layers=scan_layers)
    labels = [f"class {k}" for k in range(loaded.model.num_labels)]
    checkpoints.save_hf(
        tmp_path, loaded.params, loaded.checkpoint, head="classifier", labels=labels
    )
    theirs = safetensors.numpy.load_file(GOLDENS / case / hub.WEIGHTS)
    ours = safetensors.numpy.load_file(tmp_path / hub.WEIGHTS)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    about = json.loads((tmp_path / "config.json").read_text())
    base = json.loads((GOLDENS / case / "config.json").read_text())
    assert about["architectures"] == base["architectures"]
    assert about["id2label"] == {str(k): x for k, x in enumerate(labels)}


# --- Configs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "roberta", "position_embedding_type": "relative_key"}, "relative_key"),
        ({"model_type": "roberta", "is_decoder": True, "add_cross_attention": True}, "is_decoder is True.*add_cross_attention is True"),
        ({"model_type": "roberta", "pad_token_id": 60000}, "pad_token_id.*60000"),
        ({"model_type": "roberta", "pad_token_id": 513}, "pad_token_id.*513"),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id.*None"),
        ({"model_type": "camembert"}, "model_type is 'camembert'.*'roberta' or 'xlm-roberta'"),
        ({"model_type": "distilbert", "dim": 30}, "dim 30 does not divide into n_heads 12"),
        ({"model_type": "distilbert", "activation": "mish"}, "activation 'mish' is not one of"),
        ({"model_type": "distilbert", "dropout": 1.0}, r"dropout.*1\.0"),
        ({"model_type": "bert"}, "model_type is 'bert'.*only 'distilbert'"),
    ],
)  # fmt: skip
def test_bad_configs(config, message):
    distil = config["model_type"] in ("distilbert", "bert")
    cls = distilbert.DistilBertConfig if distil else roberta.RobertaConfig
    with pytest.raises(ValueError, match=message):
        cls.from_hf(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_round_trip(name):
    config = CONFIGS[name]
    assert type(config).from_hf(config.to_hf() | {"unknown": 1}) == config


def test_the_registry_knows_each_type_once():
    kinds = [kind for family in registry.FAMILIES for kind in family.model_type]
    assert len(kinds) == len(set(kinds)) and {
        "bert",
        "roberta",
        "xlm-roberta",
        "distilbert",
    } <= set(kinds)
    for family in registry.FAMILIES:
        assert set(family.models) == set(family.architectures)
        assert set(family.models) <= {
            families.CLASSIFIER, families.CAUSAL_LM, families.SEQ2SEQ_LM, families.ENCODER,
        }  # fmt: skip
