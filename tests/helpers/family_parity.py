"""What every model family must do as transformers and PEFT do, live; see the tests beside this file.

A family says in a :class:`Case` how its tiny random models and inputs are made. Models are drawn
wide: transformers' own initial values give outputs so near zero that a wrong model would pass.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax import names, paths
from lora_jax.lowrank import LowRank
from lora_jax.models import checkpoints, generate, registry
from lora_jax.models.decoding import Decoding
from lora_jax.peft import load_peft, save_peft
from lora_jax.training import optimizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# Threads cost tiny models more than they give, the more so where tests run side by side.
torch.set_num_threads(1)

RATE, DECAY, CLIP = 2e-3, 0.01, 1.0
# Arguments that have another name here than in transformers.
RENAMED = {"position_ids": "positions"}
LABELS = ("no", "maybe", "yes")


class Case(NamedTuple):
    """How a family's tiny models are made.

    Attributes:
      head: "classifier", "causal-lm" or "seq2seq-lm".
      model: class of transformers.
      config: seed -> a random tiny config of transformers, without dropout; a classifier's has three
        labels.
      inputs: (config, seed) -> arrays by the argument names of transformers, and "labels": classes,
        or tokens of which -100 does not count.
      targets: what PEFT adapts.
      task_type: PEFT's word for the head.
      prepare: what is done to a new model before its values are drawn.
      scale: how wide they are drawn; where it is large, float32 itself is off by more than 1e-5.
      norm: what the scales of norms are near (Gemma stores them less one).
    """

    head: str
    model: Callable
    config: Callable[[int], Any]
    inputs: Callable[[Any, int], dict]
    targets: Any = ("query", "value")
    task_type: str | None = "SEQ_CLS"
    prepare: Callable = lambda model: None
    scale: float = 0.3
    norm: float = 1.0


def quiet(fn, *args, **kwargs):
    """PEFT and transformers warn of what is none of our business; what is, is asserted on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fn(*args, **kwargs)


# --- Random models and inputs


def draw(parameters, seed, *, scale=0.3, norm=1.0):
    """Wide values; the scales of norms, which alone are vectors called weight, are near ``norm``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in parameters:
            one = norm if p.ndim == 1 and name.endswith("weight") else 0.0
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64) + one)


def torch_model(case, seed, dtype=torch.float32):
    model = quiet(case.model, case.config(seed))
    case.prepare(model)
    model = model.to(dtype)
    draw(model.named_parameters(), seed, scale=case.scale, norm=case.norm)
    model.tie_weights()
    return model.eval()


def padded_ids(vocabulary, seed, *, length=9, batch=4, left=False, pad=None):
    """Token ids and their mask; one row is full, padding holds ``pad`` or other tokens."""
    rng = np.random.default_rng(seed)
    lengths = np.array([length, *rng.integers(1, length + 1, batch - 1)])
    mask = (np.arange(length)[None, :] < lengths[:, None]).astype(np.int64)
    mask = mask[:, ::-1].copy() if left else mask
    ids = rng.integers(0, vocabulary, (batch, length))
    return {
        "input_ids": ids if pad is None else np.where(mask > 0, ids, pad),
        "attention_mask": mask,
    }


def torch_logits(model, inputs):
    given = {k: torch.from_numpy(v) for k, v in inputs.items() if k != "labels"}
    with torch.no_grad():
        return model.eval()(**given).logits.numpy()


def our_logits(apply, params, inputs):
    return np.asarray(jax.jit(apply)(params, **our_inputs(inputs)))


def our_inputs(inputs):
    return {RENAMED.get(k, k): jnp.asarray(v) for k, v in inputs.items() if k != "labels"}


def assert_same_logits(ours, theirs, inputs, *, atol=1e-5):
    """Of a language model only where there is a token: elsewhere the two may differ, and do."""
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all() and np.abs(theirs).max() > 0.01
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"])
    if theirs.ndim == 3 and mask.shape == theirs.shape[:2]:
        ours, theirs = ours[mask > 0], theirs[mask > 0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def load(case, folder, **options):
    count = {"num_labels": len(LABELS)} if case.head == "classifier" else {}
    return checkpoints.load(folder, head=case.head, **count, **options)


# --- Logits


def check_logits(case, seed, folder, *, atol=1e-5, scan_layers=False):
    """transformers' directory, read here, gives its logits."""
    model = torch_model(case, seed)
    quiet(model.save_pretrained, folder)
    inputs = case.inputs(model.config, seed)
    loaded = load(case, folder, scan_layers=scan_layers)
    assert loaded.fresh == ()
    ours = our_logits(loaded.model.apply, loaded.params, inputs)
    assert_same_logits(ours, torch_logits(model, inputs), inputs, atol=atol)


# --- Training


def in_jax(case, model, *, scan_layers=False):
    """Function, parameters and table of a torch model, without files, in its dtype."""
    about = model.config.to_dict()
    family = registry.find(about)
    config = family.config.from_hf(about)
    table = family.names(config, head=case.head, scan_layers=scan_layers)
    dtype = jnp.dtype(str(model.dtype).removeprefix("torch."))
    labels = {"num_labels": model.config.num_labels} if case.head == "classifier" else {}
    ours = family.models[case.head](config, dtype=dtype, scan_layers=scan_layers, **labels)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), *family.inputs(case.head))["params"]
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    leaves: dict[str, Any] = {}
    for weight in names.weights(table, paths.named_leaves(shapes)):
        value = names.from_tensor(weight, state[weight.hf])
        leaves.setdefault(weight.leaf, {})[weight.layer] = value
    stack = lambda parts: parts[None] if None in parts else np.stack(list(parts.values()))
    params = {"params": paths.nest({n: jnp.asarray(stack(x)) for n, x in leaves.items()})}
    return ours.apply, params, table


def torch_losses(model, data, head):
    """PEFT's side: AdamW, clipping by the global norm, linear decay to zero.

    Torch adds 1e-6 to the norm when it clips, which is all that differs in float64: 1e-8 in the end.
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    rate = torch.optim.lr_scheduler.LambdaLR(tx, lambda step: 1 - step / len(data))
    losses = []
    for batch in data:
        given = {k: torch.from_numpy(v) for k, v in batch.items()}
        labels = given.pop("labels")
        logits = model(**given).logits
        if head == "causal-lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100
        )
        tx.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        tx.step()
        rate.step()
        losses.append(loss.item())
    return np.array(losses)


def our_loss(logits, labels, head):
    if head == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    counts = labels != -100
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, labels, 0))
    return (losses * counts).sum() / counts.sum()


def our_losses(apply, params, adapter, data, head, *, strict=True):
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
    tx = optimizer.make(settings, adapter, len(data))

    @jax.jit
    def step(adapter, state, params, inputs, labels):
        def loss(adapter):
            logits = lora.lift(apply, strict=strict)(lora.bind(params, adapter), **inputs)
            return our_loss(logits, labels, head)

        value, grads = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state, losses = tx.init(adapter), []
    for batch in data:
        adapter, state, value = step(adapter, state, params, our_inputs(batch), batch["labels"])
        losses.append(float(value))
    return np.array(losses), adapter


def check_training(
    case, folder, *, steps=50, rtol=1e-7, scan_layers=False, strict=True, **settings
):
    """The same losses as PEFT's from the same factors, in float64 on both sides."""
    torch.manual_seed(0)  # PEFT draws A
    with jax.enable_x64(True):
        model = torch_model(case, 0, torch.float64)
        apply, params, table = in_jax(case, model, scan_layers=scan_layers)
        data = [case.inputs(model.config, k) for k in range(steps)]
        wrapped = peft_model(case, model, **settings)
        quiet(wrapped.save_pretrained, folder)
        adapter, _ = load_peft(folder, params, names=table)
        theirs = torch_losses(wrapped, data, case.head)
        ours, adapter = our_losses(apply, params, adapter, data, case.head, strict=strict)
        assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype("float64")}
    assert theirs.std() > 0.02  # it moves
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=0)
    return float(np.abs(ours / theirs - 1).max())


# --- PEFT's files


def peft_model(case, model, **settings):
    targets = case.targets if isinstance(case.targets, str) else list(case.targets)
    about = {"target_modules": targets, "r": 4, "lora_alpha": 8, "task_type": case.task_type}
    return quiet(peft.get_peft_model, model, peft.LoraConfig(**(about | settings)))


def opened_by_peft(base, directory):
    """The PEFT model of a directory; a tensor that PEFT misses is a warning, and so an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, directory)
    # Of patterns for bare parameters it says that they match nothing, and applies them.
    said = [str(w.message) for w in caught if "_pattern keys did not match" not in str(w.message)]
    wrong = [m for m in said if "missing" in m or "Unexpected" in m or "did not match" in m]
    assert not wrong, said
    return model


def check_peft(case, seed, folder, *, atol=1e-5, scan_layers=False, **settings):
    """PEFT's file gives its logits here, and what is written here gives ours there."""
    wrapped = peft_model(case, torch_model(case, seed), **settings)
    trained = [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad]
    draw(trained, seed + 1)
    quiet(wrapped.save_pretrained, folder / "theirs")
    inputs = case.inputs(wrapped.config if case.task_type is None else wrapped.model.config, seed)
    expected = torch_logits(wrapped, inputs)
    apply, params, table = in_jax(case, torch_model(case, seed), scan_layers=scan_layers)
    assert np.abs(our_logits(apply, params, inputs) - expected).max() > 0.01
    adapter, config = load_peft(folder / "theirs", params, names=table)
    ours = our_logits(lora.lift(apply), lora.bind(params, adapter), inputs)
    assert_same_logits(ours, expected, inputs, atol=atol)
    new = lora.LoRAConfig.from_dict(config.to_dict() | {"origin": {}})
    for out, some in (("same", config), ("new", new)):  # with PEFT's words, and with fresh ones
        save_peft(
            folder / out, params, adapter, some, names=table,
            **({} if some is config else {"task_type": case.task_type}),
        )  # fmt: skip
        opened = opened_by_peft(torch_model(case, seed), folder / out)
        assert_same_logits(ours, torch_logits(opened, inputs), inputs, atol=atol)


# --- Merged weights


def random_adapter(apply, params, inputs, *, seed=0, **settings):
    """An adapter with drawn factors, as if trained."""
    given = our_inputs(inputs)
    fn = lambda params, *args: apply(params, **dict(zip(given, args, strict=True)))
    config = lora.LoRAConfig(**({"rank": 2, "alpha": 4.0} | settings))
    adapter = lora.init(jax.random.key(seed), fn, params, config, *given.values())

    def draw_b(x):
        if not isinstance(x, LowRank):
            return x
        b = 0.3 * jax.random.normal(jax.random.key(seed + 1), x.b.shape)
        return LowRank(x.a, b, x.scale, axes=x.axes)

    return jax.tree.map(draw_b, adapter, is_leaf=lambda x: isinstance(x, LowRank))


def check_merged_export(case, seed, folder, *, auto, atol=1e-5, scan_layers=False):
    """``auto``, a class of transformers, opens what is saved, and gives the lifted model's logits."""
    model = torch_model(case, seed)
    quiet(model.save_pretrained, folder / "base")
    inputs = case.inputs(model.config, seed)
    loaded = load(case, folder / "base", scan_layers=scan_layers)
    adapter = random_adapter(
        loaded.model.apply, loaded.params, inputs, targets=loaded.family.targets
    )
    lifted = our_logits(lora.lift(loaded.model.apply), lora.bind(loaded.params, adapter), inputs)
    labels = LABELS if case.head == "classifier" else ()
    merged = lora.merge(loaded.params, adapter)
    out = folder / "out"
    checkpoints.save_hf(out, merged, loaded.checkpoint, head=case.head, labels=labels)
    opened, info = quiet(auto.from_pretrained, out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(opened) is case.model and opened.dtype == torch.float32
    if labels:
        assert opened.config.id2label == dict(enumerate(LABELS))
    assert np.abs(lifted - torch_logits(model, inputs)).max() > 0.01
    assert_same_logits(lifted, torch_logits(opened, inputs), inputs, atol=atol)
    # What transformers writes of it, by its own names, is the same.
    ours = safetensors.numpy.load_file(out / "model.safetensors")
    for name, value in opened.state_dict().items():
        if name in ours:
            np.testing.assert_array_equal(value.numpy(), ours[name])


# --- Generation


def check_generation(case, seed, folder, generate, *, new_tokens=8):
    """Greedy tokens, of the merged and of the lifted model, are those of ``transformers.generate``.

    Args:
      case: of a causal or an encoder-decoder language model; its batch is padded on the left.
      seed: of model, inputs and adapter.
      folder: for files.
      generate: ``(loaded, params, inputs, new_tokens, lifted) -> new tokens (batch, new_tokens)``.
      new_tokens: all of them are made; no token stops.
    """
    model = torch_model(case, seed)
    quiet(model.save_pretrained, folder / "base")
    inputs = case.inputs(model.config, seed)
    loaded = load(case, folder / "base")
    adapter = random_adapter(
        loaded.model.apply, loaded.params, inputs, targets=loaded.family.targets
    )
    merged = lora.merge(loaded.params, adapter)
    checkpoints.save_hf(folder / "out", merged, loaded.checkpoint, head=case.head)
    opened = quiet(case.model.from_pretrained, folder / "out").eval()
    prompt = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    opened.generation_config.eos_token_id = None
    theirs = quiet(
        opened.generate, **{k: torch.from_numpy(v) for k, v in prompt.items()},
        do_sample=False, num_beams=1, min_new_tokens=new_tokens, max_new_tokens=new_tokens,
        pad_token_id=0,
    ).numpy()[:, -new_tokens:]  # fmt: skip
    assert len({tuple(row) for row in theirs}) > 1
    for lifted in (False, True):
        params = lora.bind(loaded.params, adapter) if lifted else merged
        ours = np.asarray(generate(loaded, params, prompt, new_tokens, lifted))
        np.testing.assert_array_equal(ours, theirs)


def causal_text(loaded, params, inputs, new_tokens, lifted):
    """For :func:`check_generation` of a decoder."""
    begin, step = generate.causal_lm(loaded.model, loaded.family.init_cache)
    step = lora.lift(step) if lifted else step
    return generate.generator(begin, step, Decoding(max_new_tokens=new_tokens))(
        params, inputs
    ).tokens
