"""LoRA+, VeRA and AdaLoRA: 20 steps beside PEFT in float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from configs import common
from lora_jax import adapter as adapters
from lora_jax.peft import load_peft, save_peft
from lora_jax.training import gradients, optimizer
from tests.helpers import family_parity, method_goldens

torch, transformers, peft = family_parity.torch, family_parity.transformers, family_parity.peft
quiet = family_parity.quiet

from peft.optimizers import create_loraplus_optimizer  # noqa: E402

pytestmark = pytest.mark.parity

STEPS, RATIO, EMBEDDING = 20, 16.0, 0.25
CLASSES = {
    "bert": "BertForSequenceClassification",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
}
TARGETS = {
    "bert": ["query", "intermediate.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "down_proj"],
}
bases = pytest.mark.parametrize("name", CLASSES)


def task_type(name):
    return "SEQ_CLS" if name == "bert" else "CAUSAL_LM"


def make_torch(name, config):
    folder = method_goldens.METHODS / "base" / name
    model = quiet(getattr(transformers, CLASSES[name]).from_pretrained, folder)
    torch.manual_seed(0)
    return quiet(peft.get_peft_model, model, config).double().train()


def batches(name):
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        ids = rng.integers(0, 99, (4, 7))
        yield ids, rng.integers(0, 3, 4) if name == "bert" else ids


def torch_loss(logits, labels):
    """transformers' own loss of a language model is in float32."""
    if logits.ndim == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels)


def torch_penalty(model):
    """What PEFT's model of AdaLoRA adds to a loss that it computes itself."""
    config = model.peft_config["default"]
    if config.peft_type != "ADALORA":
        return 0.0
    named = [(n, p) for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    products = [p @ p.T if "lora_A" in n else p.T @ p for n, p in named]
    norms = [torch.norm(x - torch.eye(len(x), dtype=x.dtype), p="fro") for x in products]
    return config.orth_reg_weight * sum(norms) / len(norms)


def train_torch(name, model, rule, *, clip, after=lambda step: None):
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 1 - step / STEPS)
    losses = []
    for step, (ids, labels) in enumerate(batches(name)):
        ids = torch.from_numpy(ids)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        loss = torch_loss(logits, torch.from_numpy(labels)) + torch_penalty(model)
        rule.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        rule.step()
        rate.step()
        after(step)
        losses.append(loss.item())
    return np.array(losses)


def train_jax(name, directory, **fields):
    """The same with the optimizer of the experiments, from the start that PEFT has saved."""
    fn, params, table = method_goldens.base(name, dtype="float64")
    adapter, _ = load_peft(directory, params, names=table)
    adapter = adapters.as_data(adapter)
    config = common.base_config().optimizer
    config.update(fields)
    tx = optimizer.make(config, adapter, STEPS)
    head = "classifier" if name == "bert" else "causal-lm"

    def compute_loss(adapter, params, ids, labels):
        logits = lora.lift(fn, strict=True)(lora.bind(params, adapter), ids)
        return family_parity.our_loss(logits, labels, head)

    @jax.jit
    def step(adapter, state, params, ids, labels):
        loss, grads = jax.value_and_grad(compute_loss)(adapter, params, ids, labels)
        penalized = gradients.add_penalty(grads, adapter, config.orthogonality)
        if penalized is not grads:
            loss = loss + gradients.compute_penalty(adapter, config.orthogonality)
        updates, state = tx.update(penalized, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    state, losses = tx.init(adapter), []
    for ids, labels in batches(name):
        adapter, state, loss = step(adapter, state, params, ids, labels)
        losses.append(float(loss))
    return np.array(losses), adapter


def compare(name, folder, model, rule, *, clip=1.0, after=lambda step: None, atol=1e-7, **fields):
    """Losses, and the adapters at the end."""
    quiet(model.save_pretrained, folder / "start")
    theirs = train_torch(name, model, rule, clip=clip, after=after)
    quiet(model.save_pretrained, folder / "end")
    with jax.enable_x64(True):
        ours, adapter = train_jax(name, folder / "start", clip_norm=clip, **fields)
        _, params, table = method_goldens.base(name, dtype="float64")
        expected, _ = load_peft(folder / "end", params, names=table)
        expected = adapters.as_data(expected)
    assert theirs.std() > 0.01  # it moves
    np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=0)
    return adapter, expected


def assert_same(adapter, expected, atol=1e-6):
    for (path, x), y in zip(
        jax.tree.leaves_with_path(adapter), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=str(path))


@bases
def test_lora_plus(name, tmp_path):
    targets = [*TARGETS[name], *(["embed_tokens"] if name == "llama" else [])]
    config = peft.LoraConfig(target_modules=targets, r=4, lora_alpha=8)
    model = make_torch(name, config)
    rule = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=RATIO,
        loraplus_lr_embedding=1e-3 * EMBEDDING, loraplus_weight_decay=0.0,
    )  # fmt: skip
    rates = {"b_rate": RATIO} | ({"embedding_rate": EMBEDDING} if name == "llama" else {})
    # Without a limit of the norm: torch adds 1e-6 to it, which sixteen times the rate shows.
    fields = {"learning_rate": 1e-3, "weight_decay": 0.0, "clip": 1e9, **rates}
    assert_same(*compare(name, tmp_path, model, rule, **fields))


@bases
def test_vera(name, tmp_path):
    config = peft.VeraConfig(
        target_modules=TARGETS[name], r=4, projection_prng_key=3, task_type=task_type(name)
    )
    model = make_torch(name, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    rule = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0.01)
    fields = {"learning_rate": 2e-2, "weight_decay": 0.01}
    assert_same(*compare(name, tmp_path, model, rule, **fields))


@bases
@pytest.mark.parametrize("every", [1, 3])
def test_adalora(name, every, tmp_path):
    """Losses with the penalty, and at the end the same triplets with the same values."""
    config = peft.AdaLoraConfig(
        target_modules=TARGETS[name], init_r=4, target_r=2, lora_alpha=8, total_step=STEPS,
        tinit=2, tfinal=5, deltaT=every, task_type=task_type(name),
    )  # fmt: skip
    model = make_torch(name, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    rule = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0.01)
    budget = {
        "target_rank": 2, "begin": "2 steps", "end": "5 steps", "every": every,
        "beta1": 0.85, "beta2": 0.85,
    }  # fmt: skip
    fields = {"learning_rate": 2e-2, "weight_decay": 0.01, "budget": budget}
    adapter, expected = compare(
        name, tmp_path, model, rule, after=model.base_model.update_and_allocate, **fields
    )
    ours, theirs = adapters.nodes(adapter), adapters.nodes(expected)
    n_kept = sum(np.count_nonzero(x.e) for x in ours.values() if hasattr(x, "e"))
    assert n_kept == 2 * sum(hasattr(x, "e") for x in ours.values())
    for key, node in ours.items():
        if not hasattr(node, "e"):
            np.testing.assert_allclose(node, theirs[key], rtol=0, atol=1e-6)
            continue
        is_kept = np.asarray(node.e) != 0
        np.testing.assert_array_equal(is_kept, np.asarray(theirs[key].e) != 0)
        np.testing.assert_allclose(node.e, theirs[key].e, rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.asarray(node.a) * is_kept, theirs[key].a, rtol=0, atol=1e-6)


@bases
def test_files_of_ours_open_in_peft(name, tmp_path):
    """Fresh and pruned; logits of the model that PEFT makes of them are ours."""
    ids = np.random.default_rng(0).integers(0, 99, (2, 7))
    fn, params, table = method_goldens.base(name)
    for method in ("vera", "adalora"):
        config = lora.LoRAConfig(
            rank=4, method=method, targets=["re:.*/(query|c_attn|q_proj)/kernel"]
        )
        adapter = lora.init(jax.random.key(0), fn, params, config, jnp.asarray(ids))
        move = lambda x: x.at[..., 1:].add(0.3)
        for pruned in (False, True):
            if pruned:
                adapter = jax.tree.map(
                    lambda x, is_trained: move(x) if is_trained else x, adapter, lora.mask(adapter)
                )
            folder = tmp_path / f"{method}-{pruned}"
            save_peft(folder, params, adapter, config, names=table, task_type=None)
            base = quiet(
                getattr(transformers, CLASSES[name]).from_pretrained,
                method_goldens.METHODS / "base" / name,
            )
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = peft.PeftModel.from_pretrained(base.eval(), folder)
            said = [str(w.message) for w in caught]
            assert not [m for m in said if "missing" in m or "Unexpected" in m], said
            given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            theirs = family_parity.torch_logits(model, given)
            ours = fn(lora.merge(params, adapter), jnp.asarray(ids))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
