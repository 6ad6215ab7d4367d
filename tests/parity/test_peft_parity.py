"""The same training and the same files as PEFT, live.

In float64 on both sides only the mathematics can differ, so the tolerances there are those of
float64 rounding over 200 steps. jax runs this in a process of its own, with 64 bits enabled.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax import paths
from lora_jax.lowrank import LowRank
from lora_jax.models import bert, checkpoints
from lora_jax.peft import load_peft, save_peft
from lora_jax.tasks import classifier
from lora_jax.training import optimizer
from tests.helpers.places import ROOT

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# Threads cost tiny models more than they give, the more so where tests run side by side.
torch.set_num_threads(1)

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
STEPS, BATCH, LENGTH = 200, 4, 10
RATE, DECAY, CLIP = 2e-3, 0.01, 1.0
SIZES = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 12, "num_labels": 3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def quiet(fn, *args, **kwargs):
    """PEFT and transformers warn of what is none of our business; what is, is asserted on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fn(*args, **kwargs)


@functools.cache
def tiny_config():
    return transformers.BertConfig(**SIZES)


def draw(parameters, generator, *, scale=0.3):
    with torch.no_grad():
        for name, p in parameters:
            one = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64) + one)


def torch_base(dtype=torch.float32, seed=0):
    model = transformers.BertForSequenceClassification(tiny_config()).to(dtype)
    draw(model.named_parameters(), torch.Generator().manual_seed(seed), scale=0.2)
    return model.eval()


def tiny_jax(model):
    """Our model, parameters and table for a torch model, without files, in its dtype."""
    config = bert.BertConfig.from_hf(model.config.to_dict() | {"model_type": "bert"})
    table = bert.names(config)
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    take = lambda row: state[row.hf].T if row.transpose else state[row.hf]
    params = paths.nest({row.flax: jnp.asarray(take(row)) for row in table})
    dtype = params["classifier"]["bias"].dtype
    ours = bert.BertForSequenceClassification(
        config, num_labels=model.config.num_labels, dtype=dtype
    )
    return (lambda p, ids, mask: ours.apply({"params": p}, ids, mask)), params, table


def batches(vocabulary, *, labels, steps=STEPS, batch=BATCH, length=LENGTH):
    rng = np.random.default_rng(7)
    for _ in range(steps):
        lengths = rng.integers(2, length + 1, batch)
        mask = (np.arange(length)[None, :] < lengths[:, None]).astype(np.int64)
        yield rng.integers(0, vocabulary, (batch, length)), mask, rng.integers(0, labels, batch)


def torch_losses(model, data):
    """PEFT's side: AdamW, clipping by the global norm, linear decay to zero.

    Torch adds 1e-6 to the norm when it clips, which is all that differs in float64: 1e-8 in the end.
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    rate = torch.optim.lr_scheduler.LambdaLR(tx, lambda step: 1 - step / STEPS)
    losses = []
    for ids, mask, labels in data:
        out = model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
            labels=torch.from_numpy(labels),
        )  # fmt: skip
        tx.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        tx.step()
        rate.step()
        losses.append(out.loss.item())
    return losses


def our_losses(fn, params, adapter, data):
    """This library's side, with the optimiser of the experiments."""
    settings = ConfigDict(
        {
            "learning_rate": RATE,
            "weight_decay": DECAY,
            "clip_norm": CLIP,
            "warmup": 0.0,
            "decay": "linear",
        }
    )
    tx = optimizer.make(settings, adapter, STEPS)

    @jax.jit
    def step(adapter, state, params, ids, mask, labels):
        def loss(adapter):
            logits = lora.lift(fn, strict=True)(lora.bind(params, adapter), ids, mask)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state, losses = tx.init(adapter), []
    for batch in data:
        adapter, state, value = step(adapter, state, params, *batch)
        losses.append(float(value))
    return losses, adapter


TRAINED = {
    "query and value": dict(target_modules=["query", "value"], r=4, lora_alpha=8),
    "query and value, rsLoRA": dict(target_modules=["query", "value"], r=4, lora_alpha=8, use_rslora=True),
    "all-linear": dict(target_modules="all-linear", r=4, lora_alpha=16),
    "all-linear, rsLoRA": dict(target_modules="all-linear", r=4, lora_alpha=16, use_rslora=True),
}  # fmt: skip


def train_both(settings, folder, dtype):
    """The same start, by way of a file, and 200 steps of each."""
    torch.manual_seed(0)  # PEFT draws A
    config = peft.LoraConfig(task_type="SEQ_CLS", **settings)
    model = torch_base(dtype)
    fn, params, table = tiny_jax(model)
    wrapped = quiet(peft.get_peft_model, model, config)
    quiet(wrapped.save_pretrained, folder / "start")
    adapter, _ = load_peft(folder / "start", params, names=table)
    data = lambda: batches(SIZES["vocab_size"], labels=SIZES["num_labels"])
    theirs = torch_losses(wrapped, data())
    quiet(wrapped.save_pretrained, folder / "end")
    ours, adapter = our_losses(fn, params, adapter, data())
    expected, _ = load_peft(folder / "end", params, names=table)
    return np.array(ours), np.array(theirs), adapter, expected


def compare(ours, theirs, adapter, expected, *, rtol, atol):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=min(rtol, 1e-6))
    assert theirs.std() > 0.05  # it moves
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=0)
    leaves = jax.tree.leaves_with_path(adapter)
    for (path, x), y in zip(leaves, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=str(path))


@pytest.mark.parametrize("name", list(TRAINED))
def test_200_steps_in_float64(name, tmp_path):
    """Run as a program below, since jax's 64 bits are a setting of the whole process."""
    done = subprocess.run(
        [sys.executable, __file__, name, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)


def in_float64(name, folder):
    ours, theirs, adapter, expected = train_both(TRAINED[name], Path(folder), torch.float64)
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype("float64")}
    compare(ours, theirs, adapter, expected, rtol=1e-7, atol=1e-5)
    print(f"{name}: largest relative difference of the loss {np.abs(ours / theirs - 1).max():.1e}")


@pytest.mark.parametrize("name", list(TRAINED))
def test_200_steps_in_float32(name, tmp_path):
    ours, theirs, *_ = train_both(TRAINED[name], tmp_path, torch.float32)
    assert abs(ours[0] - theirs[0]) < 1e-6
    # Differences of float32 rounding grow as the two descend; they stay below a thousandth.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


# Files.


def random_settings(seed):
    """LoraConfig arguments over what the format can say."""
    rng = np.random.default_rng(seed)
    flip = lambda p=0.5: bool(rng.random() < p)
    modules = ["query", "key", "value", "dense", "output.dense", "word_embeddings", "pooler.dense"]
    settings = {
        "r": int(rng.integers(1, 5)),
        "lora_alpha": [3, 8, 1 / 3][rng.integers(3)],
        "use_rslora": flip(),
        "target_modules": list(rng.choice(modules, rng.integers(1, 5), replace=False)),
        "bias": str(rng.choice(["none", "all", "lora_only"])),
        "lora_dropout": float(rng.choice([0.0, 0.1])),
        "task_type": "SEQ_CLS" if flip() else None,
        "modules_to_save": ["classifier"] if flip() else None,
    }
    if flip(0.2):
        settings["target_modules"] = "all-linear"
    elif flip(0.25):
        settings["target_modules"] = (
            r".*\.layer\.\d\.(attention\.self\.(query|value)|output\.dense)"
        )
    elif flip(0.3):
        settings["layers_to_transform"] = [[0], [1], [0, 1]][rng.integers(3)]
    if "dense" in settings["target_modules"] and flip():
        settings["exclude_modules"] = ["pooler.dense"]
    wanted = settings["target_modules"]
    if isinstance(wanted, list) and "query" in wanted and flip():
        settings["rank_pattern"] = {"query": 1}
        settings["alpha_pattern"] = {r"layer\.\d\.attention\.self\.query": 5}
    return settings


def torch_logits(model, inputs):
    ids, mask = (torch.from_numpy(x) for x in inputs)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask).logits.numpy()


def some_inputs():
    ids, mask, _ = next(iter(batches(SIZES["vocab_size"], labels=3)))
    return ids, mask


def peft_directory(settings, folder, seed):
    """As PEFT writes it, with everything trainable drawn wide; also the logits."""
    wrapped = quiet(peft.get_peft_model, torch_base(), peft.LoraConfig(**settings))
    trained = [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad]
    draw(trained, torch.Generator().manual_seed(seed))
    quiet(wrapped.save_pretrained, folder)
    return torch_logits(wrapped, some_inputs())


def opened_by_peft(directory, base):
    """The PEFT model of a directory; a tensor that PEFT misses is a warning, and so an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, directory)
    said = [str(w.message) for w in caught]
    assert not [m for m in said if "missing" in m or "Unexpected" in m or "did not match" in m], (
        said
    )
    return model


@pytest.mark.parametrize("seed", range(24))
def test_files_of_random_adapters(seed, tmp_path):
    """PEFT -> here -> PEFT, with the old words and with new ones."""
    settings = random_settings(seed)
    expected = peft_directory(settings, tmp_path / "peft", seed)
    fn, params, table = tiny_jax(torch_base())
    adapter, config = load_peft(tmp_path / "peft", params, names=table)
    merged = fn(lora.merge(params, adapter), *some_inputs())
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-5)
    save_peft(tmp_path / "same", params, adapter, config, names=table)
    save_peft(
        tmp_path / "new", params, adapter, dataclasses.replace(config, origin={}), names=table
    )
    weights = [
        (tmp_path / d / "adapter_model.safetensors").read_bytes() for d in ("peft", "same", "new")
    ]
    assert weights[0] == weights[1]
    words = [
        json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("peft", "same")
    ]
    saved = words[0]["modules_to_save"]
    assert words[1] == words[0] | {"modules_to_save": saved and list(dict.fromkeys(saved))}
    if set(saved or []) != {"classifier", "score"} or settings["bias"] != "all":
        assert weights[0] == weights[2]
    for directory in ("same", "new"):
        opened = opened_by_peft(tmp_path / directory, torch_base())
        np.testing.assert_allclose(torch_logits(opened, some_inputs()), expected, rtol=0, atol=1e-5)
        quiet(opened.save_pretrained, tmp_path / "resaved")
        resaved = (tmp_path / "resaved" / "adapter_model.safetensors").read_bytes()
        assert resaved == (tmp_path / directory / "adapter_model.safetensors").read_bytes()


OURS = {
    "query and value": dict(rank=2, targets=("query", "value"), train=("classifier",)),
    "everything": dict(rank=2, alpha=7.5, targets=("all-linear",), train=("classifier", "LayerNorm")),
    "uneven": dict(
        rank=2, alpha=1 / 3, targets=("query", "output"), rank_stabilized=True,
        rank_pattern={"layer_1/attention/query": 3, "re:.*/attention/output/.*": 1},
        alpha_pattern={"layer_0": 0.7},
    ),
    "biases": dict(rank=1, targets=("re:.*/kernel", "word_embeddings"), train=("bias",)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OURS))
def test_peft_opens_what_is_made_here(name, tmp_path):
    fn, params, table = tiny_jax(torch_base())
    config = lora.LoRAConfig(**OURS[name])
    adapter = lora.init(jax.random.key(0), fn, params, config, *some_inputs())
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [
        0.3 * jax.random.normal(k, x.shape) if x.ndim else x
        for k, x in zip(keys, leaves, strict=True)
    ]
    adapter = treedef.unflatten(drawn)
    task = "SEQ_CLS" if "classifier" in config.train else None
    save_peft(tmp_path, params, adapter, config, names=table, task_type=task)
    expected = lora.lift(fn)(lora.bind(params, adapter), *some_inputs())
    opened = opened_by_peft(tmp_path, torch_base())
    np.testing.assert_allclose(torch_logits(opened, some_inputs()), expected, rtol=0, atol=1e-5)
    # and merged by PEFT
    plain = quiet(opened.merge_and_unload)
    np.testing.assert_allclose(torch_logits(plain, some_inputs()), expected, rtol=0, atol=1e-5)


def module(path):
    """A file of tests/ or scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("kind", ["gpt2", "gpt2, stacked", "conv"])
def test_peft_opens_other_layouts(kind, tmp_path):
    """Conv1D, look-ups, convolutions, scanned layers: drawn here, opened by PEFT."""
    torch_like = module(ROOT / "tests" / "helpers" / "torch_like.py")
    goldens = quiet(module, ROOT / "scripts" / "make_peft_goldens.py")
    name = kind.split(",")[0]
    base, inputs = quiet(goldens.base, name)
    table = torch_like.conv_names()
    if name == "gpt2":
        table = torch_like.gpt2_names(stacked="stacked" in kind, tied=False)
    fn = getattr(torch_like, name)
    state = {k: v.numpy() for k, v in base.state_dict().items()}
    safetensors.numpy.save_file(state, tmp_path / "base.safetensors")
    params = torch_like.load(tmp_path / "base.safetensors", table)
    targets = (
        ("c_attn/kernel", "c_proj/kernel", "wte")
        if name == "gpt2"
        else ("re:.*/(kernel|embedding)",)
    )
    config = lora.LoRAConfig(rank=2, alpha=3.0, targets=targets)
    adapter = lora.init(jax.random.key(0), fn, params, config, inputs["ids"])
    draw_b = lambda x: LowRank(
        x.a, 0.5 * jax.random.normal(jax.random.key(1), x.b.shape), x.scale, axes=x.axes
    )
    adapter = jax.tree.map(draw_b, adapter, is_leaf=lambda x: isinstance(x, LowRank))
    expected = fn(lora.merge(params, adapter), inputs["ids"])
    save_peft(tmp_path / "out", params, adapter, config, names=table)
    opened = opened_by_peft(tmp_path / "out", quiet(goldens.base, name)[0])
    found = goldens.logits(opened.eval(), inputs)
    assert np.abs(found - goldens.logits(base, inputs)).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_merged_export_of_a_peft_directory_opens_in_transformers(tmp_path):

    base = torch_base()
    base.save_pretrained(tmp_path / "base")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{k}" for k in range(25))]
    (tmp_path / "base" / "vocab.txt").write_text("\n".join(vocabulary))
    settings = dict(target_modules=["query", "dense"], task_type="SEQ_CLS", r=3)
    expected = peft_directory(settings, tmp_path / "peft", 5)
    model = classifier.load(tmp_path / "peft", model=str(tmp_path / "base"))
    assert model.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    merged = lora.merge(model.loaded.params, model.adapter)
    checkpoints.save_hf(
        tmp_path / "out", merged, model.loaded.checkpoint, head="classifier", labels=model.labels
    )
    opened, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(torch_logits(opened, some_inputs()), expected, rtol=0, atol=1e-5)


def test_minilm(tmp_path):
    """Real weights: the same file, the same logits, the same losses of a few steps."""
    try:
        loaded = checkpoints.load(MINILM, head="classifier", num_labels=3, key=jax.random.key(0))
    except FileNotFoundError as error:
        pytest.skip(str(error).splitlines()[0])
    checkpoints.save_hf(
        tmp_path / "base", loaded.params, loaded.checkpoint, head="classifier", labels="abc"
    )
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    quietly = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | quietly))
    base = lambda: transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base"
    )
    settings = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=4)
    torch.manual_seed(0)
    wrapped = quiet(peft.get_peft_model, base(), settings)
    quiet(wrapped.save_pretrained, tmp_path / "start")
    table = bert.names(loaded.model.config)
    adapter, _ = load_peft(tmp_path / "start", loaded.params, names=table)
    data = lambda: batches(30_000, labels=3, steps=8, batch=4, length=16)
    theirs = torch_losses(wrapped, data())
    fn = lambda params, ids, mask: loaded.model.apply(params, ids, mask)
    ours, adapter = our_losses(fn, loaded.params, adapter, data())
    assert abs(ours[0] - theirs[0]) < 1e-6
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    config = lora.LoRAConfig(rank=4, alpha=8.0, targets=("query", "value"), train=("classifier",))
    save_peft(tmp_path / "end", loaded.params, adapter, config, names=table, task_type="SEQ_CLS")
    ids, mask, _ = next(iter(data()))
    opened = opened_by_peft(tmp_path / "end", base())
    expected = fn(lora.merge(loaded.params, adapter), ids, mask)
    np.testing.assert_allclose(torch_logits(opened, (ids, mask)), expected, rtol=0, atol=1e-5)


# The start.


def test_initial_a_has_the_distribution_of_pefts():
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), by its moments; b is zero."""
    torch.manual_seed(0)
    d, rank = 400, 256
    layer = torch.nn.Sequential(torch.nn.Linear(d, d))
    wrapped = quiet(peft.get_peft_model, layer, peft.LoraConfig(r=rank, target_modules=["0"]))
    theirs = wrapped.base_model.model[0].lora_A["default"].weight.detach().numpy().T
    params = {"kernel": jnp.zeros((d, d))}
    config = lora.LoRAConfig(rank=rank, targets=("kernel",))
    node = lora.init(jax.random.key(0), lambda p, x: x @ p["kernel"], params, config, jnp.ones(d))[
        "kernel"
    ]
    assert not np.any(node.b)
    bound = d**-0.5
    for a in (np.asarray(node.a, np.float64), theirs.astype(np.float64)):
        assert a.shape == (d, rank) and np.abs(a).max() <= bound
        assert np.abs(a).max() > 0.999 * bound
        n = a.size
        # Standard errors of the moments of U(-1, 1): of the mean, of x^2 and of x^4; 5 of each.
        x = a / bound
        assert abs(x.mean()) < 5 * (1 / 3 / n) ** 0.5
        assert abs((x**2).mean() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
        assert abs((x**4).mean() - 1 / 5) < 5 * (16 / 225 / n) ** 0.5


COUNTS = [
    # PEFT's settings, ours, and what PEFT prints (trainable, all), from PEFT itself below
    (dict(r=8, task_type="SEQ_CLS"), dict(rank=8)),
    (dict(r=16, task_type="SEQ_CLS"), dict(rank=16)),
    (dict(r=8), dict(rank=8, train=())),
    (dict(r=16), dict(rank=16, train=())),
    (dict(r=8, task_type="SEQ_CLS", bias="all"),
     dict(rank=8, targets=("re:.*/(query|value)/kernel",), train=("classifier", "bias"))),
    (dict(r=8, task_type="SEQ_CLS", bias="lora_only"),
     dict(rank=8, targets=("re:.*/(query|value)/kernel",),
          train=("classifier", "re:.*/(query|value)/bias"))),
    (dict(r=8, task_type="SEQ_CLS", target_modules=["query", "key", "value"]),
     dict(rank=8, targets=("query", "key", "value"))),
    (dict(r=8, task_type="SEQ_CLS", modules_to_save=["pooler"]),
     dict(rank=8, train=("classifier", "pooler"))),
    (dict(r=8, task_type="SEQ_CLS", target_modules="all-linear"),
     dict(rank=8, targets=("all-linear",))),
]  # fmt: skip


@pytest.mark.parametrize("theirs, ours", COUNTS)
def test_counts_of_bert_base(theirs, ours):
    """Every row of PEFT's report but DoRA's, which is not in this library.

    The trained count is PEFT's; of all parameters PEFT counts what `modules_to_save` copies twice,
    and this library once.
    """
    theirs = {"target_modules": ["query", "value"]} | theirs
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2))
        wrapped = quiet(peft.get_peft_model, model, peft.LoraConfig(**theirs))
    trained, total = wrapped.get_nb_trainable_parameters()
    copied = sum(p.numel() for n, p in wrapped.named_parameters() if ".modules_to_save." in n)

    ours_model = bert.BertForSequenceClassification(bert.BertConfig())
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    # Zeros for shapes: leaves to train must have values, and these take no time.
    shapes = jax.eval_shape(ours_model.init, jax.random.key(0), ids, ids)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    config = lora.LoRAConfig(**({"targets": ("query", "value"), "train": ("classifier",)} | ours))
    adapter = jax.eval_shape(
        lambda p: lora.init(jax.random.key(0), ours_model.apply, p, config, ids, ids), params
    )
    assert lora.summary(params, adapter) == (
        f"trainable params: {trained:,d} || all params: {total - copied:,d} || "
        f"trainable%: {100 * trained / (total - copied):.4f}"
    )


if __name__ == "__main__":
    in_float64(*sys.argv[1:])
