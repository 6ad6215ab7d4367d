"""PEFT's files of factors that started from the base: read against it, and written to open anywhere."""

import dataclasses
import functools
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import names, paths
from lora_jax.lowrank import LowRank
from lora_jax.methods.dora import DoRAOffset
from lora_jax.methods.offset import Offset, WithOffset
from lora_jax.models import checkpoints
from lora_jax.nodes import is_adapted
from lora_jax.peft import list_trained, load_peft, save_peft
from tests.helpers import slow
from tests.helpers.comparisons import perturbed
from tests.helpers.places import GOLDENS

# Made by scripts/make_initial_value_goldens.py.
FOLDER = GOLDENS / "initial_values"
HEADS = {"bert": "classifier", "gpt2": "causal-lm", "llama": "causal-lm"}
CASES = [
    ("gpt2", "pissa"), ("llama", "olora"), ("bert", "pissa"), ("bert", "olora"), ("llama", "pissa"),
    ("llama", "orthogonal"), ("llama", "dora_pissa"),
]  # fmt: skip
COMPUTED = [case for case in CASES if case[1] != "orthogonal"]
CONVERTED = [("gpt2", "pissa"), ("llama", "olora"), ("llama", "pissa")]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


@functools.cache
def base(model):
    labels = {"num_labels": 3} if model == "bert" else {}
    return checkpoints.load(FOLDER / model / "base", head=HEADS[model], **labels)


def read(directory, model, **options):
    """What `load_peft` gives, and what it warns of."""
    loaded = base(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = load_peft(directory, loaded.params, names=checkpoints.names(loaded), **options)
    return found, [str(w.message) for w in caught]


def write(directory, model, adapter, config, **options):
    loaded = base(model)
    table = checkpoints.names(loaded)
    save_peft(directory, loaded.params, adapter, config, names=table, **options)


def tensors(directory):
    return safetensors.numpy.load_file(directory / WEIGHTS)


def merged_weights(model, adapter, wanted):
    """Merged weights by their names in torch."""
    loaded = base(model)
    leaves = paths.named_leaves(lora.merge(loaded.params, adapter))
    weights = names.weights(checkpoints.names(loaded), leaves)
    return {
        w.hf: np.asarray(names.to_tensor(w, np.asarray(leaves[w.leaf])))
        for w in weights
        if w.hf in wanted
    }


@pytest.mark.parametrize(("model", "init"), CASES)
def test_merged_weights_are_peft_s(model, init):
    (adapter, config), said = read(FOLDER / model / init, model)
    with np.load(FOLDER / model / init / "io.npz") as io:
        want = {n.removeprefix("merged/"): io[n] for n in io if n.startswith("merged/")}
    got = merged_weights(model, adapter, want)
    assert set(got) == set(want)
    for name, value in want.items():
        # PEFT's decomposition is in float32, too, with another LAPACK on another processor: each of
        # the two is off by up to 1e-5 in a weight.
        np.testing.assert_allclose(got[name], value, rtol=0, atol=2e-5)
    is_computed, word = init != "orthogonal", init.removeprefix("dora_")
    assert config.init == (word if is_computed else "uniform")
    assert config.method == ("lora" if word == init else "dora")
    kinds = {type(x) for x in adapters.nodes(adapter).values() if is_adapted(x)}
    offset = Offset if word == init else DoRAOffset
    assert kinds == {offset if is_computed else LowRank}
    assert [word in line and "original one" in line for line in said] == [True] * is_computed


@pytest.mark.parametrize(("model", "init"), slow.after(1, CASES))
def test_logits_and_gradients_are_peft_s(model, init, tmp_path):
    (adapter, config), _ = read(FOLDER / model / init, model)
    loaded = base(model)
    with np.load(FOLDER / model / init / "io.npz") as io:
        golden = dict(io)

    @jax.jit
    def run(adapter, params, ids, probe):
        mask = [jnp.ones_like(ids)] if model == "bert" else []
        logits = lora.lift(loaded.model.apply, strict=True)(lora.bind(params, adapter), ids, *mask)
        return jnp.sum(logits * probe), logits

    grad = jax.grad(run, has_aux=True)
    grads, logits = grad(adapter, loaded.params, golden["input_ids"], golden["probe"])
    # A decomposition in float32 is off by up to 1e-5 in a weight, of which logits see more.
    atol = 2e-5 * np.abs(golden["logits"]).max()
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=atol)
    # A gradient has the layout of its factor: it is read by writing it as if it were one.
    plain = jax.tree.map(without_offset, grads, is_leaf=is_adapted)
    assert all(not np.any(x.a0) and not np.any(x.b0) for x in adapters.nodes(grads).values() if isinstance(x, WithOffset))  # fmt: skip
    want = {n.removeprefix("grad/"): golden[n] for n in golden if n.startswith("grad/")}
    got = written_tensors(tmp_path, model, plain, config)
    assert set(want) == set(got)
    largest = max(np.abs(x).max() for x in want.values())
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=3e-5 * largest)


def without_offset(node):
    """The node with its trained arrays alone, and ones where PEFT's DoRA wants no zeros."""
    if not is_adapted(node):
        return node
    cls = getattr(node, "plain", type(node))
    fields = {n: getattr(node, n) for n in cls.table} | {"scale": 1.0}
    fields |= {"norm": jnp.ones_like(node.norm)} if "norm" in fields else {}
    return cls(**fields, axes=node.axes)


def written_tensors(directory, model, adapter, config):
    new = dataclasses.replace(config, origin={}, rank_stabilized=False)
    write(directory, model, adapter, new, task_type="SEQ_CLS" if model == "bert" else None)
    return tensors(directory)


# ---- Written -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "init"), COMPUTED)
def test_written_under_their_word_byte_for_byte(model, init, tmp_path):
    source = FOLDER / model / init
    (adapter, config), _ = read(source, model)
    write(tmp_path, model, adapter, config, init=config.init)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize(("model", "init"), CONVERTED)
def test_written_as_plain_lora_of_twice_the_rank_as_peft_converts(model, init, tmp_path):
    (adapter, config), _ = read(FOLDER / model / init, model)
    write(tmp_path, model, adapter, config)
    words = json.loads((tmp_path / CONFIG).read_text())
    want = json.loads((FOLDER / model / init / "converted" / CONFIG).read_text())
    assert words["init_lora_weights"] is want["init_lora_weights"] is True
    assert words["r"] == want["r"] == 8
    assert words["lora_alpha"] == pytest.approx(want["lora_alpha"], rel=1e-12)
    assert words["use_rslora"] == want["use_rslora"]
    got, theirs = tensors(tmp_path), tensors(FOLDER / model / init / "converted")
    assert {n: x.shape for n, x in got.items()} == {n: x.shape for n, x in theirs.items()}
    for name in got:
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            product, want = got[other] @ got[name], theirs[other] @ theirs[name]
            np.testing.assert_allclose(product, want, rtol=0, atol=2e-5)
    (again, config_again), said = read(tmp_path, model)
    assert not said and config_again.init == "uniform"
    before, after = (
        paths.named_leaves(lora.merge(base(model).params, a)) for a in (adapter, again)
    )
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=0, atol=2e-6)


def test_dora_is_written_as_dora_of_twice_the_rank(tmp_path):
    """PEFT's conversion to plain LoRA leaves the magnitudes out."""
    (adapter, config), _ = read(FOLDER / "llama" / "dora_pissa", "llama")
    write(tmp_path, "llama", adapter, config)
    words = json.loads((tmp_path / CONFIG).read_text())
    assert words["use_dora"] is True and words["init_lora_weights"] is True and words["r"] == 8
    (again, config_again), said = read(tmp_path, "llama")
    assert not said and (config_again.method, config_again.init) == ("dora", "uniform")
    before, after = (
        paths.named_leaves(lora.merge(base("llama").params, a)) for a in (adapter, again)
    )
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=0, atol=2e-6)


def test_outputs_that_would_be_nan_in_peft_are_not_written(tmp_path):
    """Their factors are not zero, but cancel, until such an output is learned."""
    loaded, name = base("llama"), "params/model/layers_0/self_attn/q_proj/kernel"
    table, ids = checkpoints.names(loaded), jnp.zeros((1, 3), int)
    leaves = paths.named_leaves(loaded.params)
    params = paths.nest(leaves | {name: leaves[name].at[:, 3].set(0)})
    config = lora.LoRAConfig(rank=2, targets=(name,), method="dora", init="pissa")
    adapter = lora.init(jax.random.key(0), loaded.model.apply, params, config, ids)
    for init in ("", "pissa"):
        with pytest.raises(ValueError, match="q_proj/kernel has 1 outputs that are zero"):
            save_peft(tmp_path, params, adapter, config, names=table, init=init)
    save_peft(tmp_path, params, perturbed(adapter), config, names=table)


@pytest.mark.parametrize("stabilized", [False, True])
def test_plain_lora_keeps_scales_with_patterns(stabilized, tmp_path):
    """PEFT refuses to convert patterns with rank-stabilised scales; here each kernel has its own."""
    loaded = base("gpt2")
    config = lora.LoRAConfig(
        rank=4, alpha=6.0, targets=("attn", "mlp"), init="olora", rank_stabilized=stabilized,
        rank_pattern={"h_0/attn": 2}, alpha_pattern={"mlp": 5.0},
    )  # fmt: skip
    ids = jnp.zeros((1, 3), int)
    fn = loaded.model.apply
    adapter = perturbed(lora.init(jax.random.key(0), fn, loaded.params, config, ids))
    write(tmp_path, "gpt2", adapter, config)
    (again, _), _ = read(tmp_path, "gpt2")
    nodes, found = adapters.nodes(adapter), adapters.nodes(again)
    assert set(nodes) == set(found)
    for name, node in nodes.items():
        assert np.float32(found[name].scale) == np.float32(node.scale)
        assert found[name].a.shape[-1] == 2 * node.a.shape[-1]
        zeros = jnp.zeros(base_leaf("gpt2", name).shape)
        np.testing.assert_allclose(found[name].merge(zeros), node.merge(zeros), atol=1e-5)


def base_leaf(model, name):
    return paths.named_leaves(base(model).params)[name]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_our_own_are_written_under_their_word_and_read_again(init, tmp_path):
    loaded = base("llama")
    config = lora.LoRAConfig(rank=3, alpha=5.0, targets=("q_proj", "down_proj"), init=init)
    ids = jnp.zeros((1, 3), int)
    fn = loaded.model.apply
    adapter = perturbed(lora.init(jax.random.key(0), fn, loaded.params, config, ids))
    write(tmp_path, "llama", adapter, config, init=init)
    words = json.loads((tmp_path / CONFIG).read_text())
    assert words["init_lora_weights"] == init and words["r"] == 3
    (again, config_again), said = read(tmp_path, "llama")
    assert len(said) == 1 and config_again.init == init
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), again, adapter)


def test_what_did_not_start_so_is_not_written_under_the_word(tmp_path):
    loaded = base("llama")
    ids, fn = jnp.zeros((1, 3), int), loaded.model.apply
    make = lambda init: lora.init(jax.random.key(0), fn, loaded.params, configs[init], ids)
    inits = ("uniform", "pissa_niter_4", "olora")
    configs = {i: lora.LoRAConfig(rank=2, targets=("q_proj",), init=i) for i in inits}
    for init in inits:
        with pytest.raises(ValueError, match="q_proj/kernel did not start from what init='pissa'.*init=''"):  # fmt: skip
            write(tmp_path, "llama", make(init), configs[init], init="pissa")
    with pytest.raises(ValueError, match="init must be one of pissa, olora, or '' .*'corda'"):
        write(tmp_path, "llama", make("olora"), configs["olora"], init="corda")
    write(tmp_path, "llama", make("pissa_niter_4"), configs["pissa_niter_4"])  # opens anywhere


# ---- Refused -------------------------------------------------------------------------------------


def copy(tmp_path, source, **words):
    out = tmp_path / "copy"
    shutil.copytree(source, out)
    config = json.loads((out / CONFIG).read_text()) | words
    (out / CONFIG).write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("init", ["pissa_niter_16", "lora_ga", "corda", "loftq", "mica", "PiSSA"])
def test_what_no_file_says_is_refused_with_what_to_do(init, tmp_path):
    """PEFT reads the first four in silence, and computes something else."""
    out = copy(tmp_path, FOLDER / "gpt2" / "pissa", init_lora_weights=init)
    with pytest.raises(ValueError, match=f"path_initial_model_for_weight_conversion.*got '{init}'"):
        read(out, "gpt2")


@pytest.mark.parametrize("word", ["lora_ga_config", "corda_config"])
def test_a_converted_adapter_keeps_words_that_mean_nothing_any_more(word, tmp_path):
    out = copy(tmp_path, FOLDER / "gpt2" / "pissa" / "converted", **{word: {"direction": "ArB2r"}})
    (adapter, _), said = read(out, "gpt2")
    assert not said and all(isinstance(x, LowRank) for x in adapters.nodes(adapter).values())


def test_a_base_without_its_own_numbers_is_refused(tmp_path):
    loaded = base("gpt2")
    table, source = checkpoints.names(loaded), FOLDER / "gpt2" / "pissa"
    shapes = jax.eval_shape(lambda p: p, loaded.params)
    with pytest.raises(ValueError, match="c_attn/kernel is given by its shape, and init_lora_weights 'pissa'"):  # fmt: skip
        load_peft(source, shapes, names=table)
    quantized = lora.quantize(loaded.params, "int8", like={"re:.*c_attn/kernel": "io"}, targets=("c_attn",))  # fmt: skip
    with pytest.raises(ValueError, match="c_attn/kernel is quantized, and .* give the plain base"):
        load_peft(source, quantized, names=table)
    write(tmp_path, "gpt2", *read(source, "gpt2")[0])
    load_peft(tmp_path, quantized, names=table)  # as the message says


def test_leaves_that_are_trained_in_full_are_listed_without_the_base():
    loaded = base("bert")
    shapes = jax.eval_shape(lambda p: p, loaded.params)
    found = list_trained(FOLDER / "bert" / "pissa", shapes, names=checkpoints.names(loaded))
    assert found == ["params/classifier/bias", "params/classifier/kernel"]


def test_peft_leaves_embeddings_to_plain_lora(tmp_path):
    """For them it passes over "pissa" in silence, so that nothing was taken from the base."""
    source = copy(tmp_path, FOLDER / "gpt2" / "pissa", target_modules=["wte", "c_attn", "mlp.c_proj"])  # fmt: skip
    found = tensors(source)
    rng = np.random.default_rng(0)
    for letter, shape in (("A", (4, 99)), ("B", (32, 4))):
        name = f"{PREFIX}transformer.wte.lora_embedding_{letter}"
        found[name] = rng.normal(size=shape).astype(np.float32)
    safetensors.numpy.save_file(found, source / WEIGHTS, metadata={"format": "pt"})
    loaded = base("gpt2")
    untied = [dataclasses.replace(r, tied=()) if dataclasses.is_dataclass(r) else r._replace(tied=()) for r in checkpoints.names(loaded)]  # fmt: skip
    with pytest.warns(UserWarning, match="original one"):
        adapter, _ = load_peft(source, loaded.params, names=untied)
    kinds = {n.rpartition("/")[2]: type(x) for n, x in adapters.nodes(adapter).items()}
    assert kinds["embedding"] is LowRank and kinds["kernel"] is Offset
