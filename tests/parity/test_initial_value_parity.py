"""PiSSA and OLoRA beside PEFT, live: the same training from the same start, and files both ways."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.methods.offset import WithOffset
from lora_jax.peft import load_peft, save_peft
from tests.helpers import family_parity
from tests.helpers.comparisons import perturbed
from tests.helpers.family_parity import quiet, torch_logits, torch_model

torch, transformers, peft = family_parity.torch, family_parity.transformers, family_parity.peft

pytestmark = pytest.mark.parity
STEPS = 20
SIZES = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}


def bert_config(seed):
    return transformers.BertConfig(
        **SIZES, intermediate_size=20, max_position_embeddings=12, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def gpt2_config(seed):
    return transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=12, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip


def llama_config(seed):
    return transformers.LlamaConfig(
        **SIZES, intermediate_size=20, max_position_embeddings=12, num_key_value_heads=1,
        tie_word_embeddings=False, pad_token_id=None,
    )  # fmt: skip


def classes(config, seed):
    inputs = family_parity.padded_ids(config.vocab_size, seed)
    return inputs | {"labels": np.random.default_rng(seed).integers(0, 3, 4)}


def tokens(config, seed):
    inputs = family_parity.padded_ids(config.vocab_size, seed)
    return inputs | {"labels": np.where(inputs["attention_mask"] > 0, inputs["input_ids"], -100)}


CASES = {
    "bert": family_parity.Case(
        "classifier", transformers.BertForSequenceClassification, bert_config, classes
    ),
    "gpt2": family_parity.Case(
        "causal-lm", transformers.GPT2LMHeadModel, gpt2_config, tokens,
        targets=("c_attn", "c_proj"), task_type="CAUSAL_LM",
    ),
    "llama": family_parity.Case(
        "causal-lm", transformers.LlamaForCausalLM, llama_config, tokens,
        targets=("q_proj", "down_proj"), task_type="CAUSAL_LM",
    ),
}  # fmt: skip
is_offset = lambda x: isinstance(x, WithOffset)


def read(directory, params, table):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The adapter in .* original one", UserWarning)
        return load_peft(directory, params, names=table)


def original_base(case, wrapped):
    """The model whose weights are those that PEFT has left, and in float64 what it took of them."""
    model = torch_model(case, 0, torch.float64)
    state = {n.removeprefix("base_model.model."): p for n, p in wrapped.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            module = name.removesuffix(".weight")
            if f"{module}.base_layer.weight" in state:
                a, b = (state[f"{module}.lora_{x}.default.weight"] for x in "AB")
                taken = 2.0 * b @ a  # alpha 8 / rank 4
                is_conv1d = "GPT2" in type(model).__name__
                p.copy_(state[f"{module}.base_layer.weight"] + (taken.T if is_conv1d else taken))
    return model


# transformers computes the norms of Llama, and its angles, in float32.
TRAINED = [("bert", "pissa", 1e-7), ("bert", "olora", 1e-7), ("gpt2", "pissa", 1e-7), ("llama", "pissa", 1e-4), ("llama", "olora", 1e-4)]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "init", "rtol", "words"),
    [*((*case, {}) for case in TRAINED), ("gpt2", "pissa", 1e-7, {"use_dora": True})],
)
def test_20_steps(family, init, rtol, words, tmp_path):
    """The base that PEFT has changed, and ours with a frozen offset, in float64."""
    case = CASES[family]
    torch.manual_seed(0)
    with jax.enable_x64(True):
        # PEFT starts in float32 alone: what it has made there goes on in float64.
        wrapped = family_parity.peft_model(
            case, torch_model(case, 0), init_lora_weights=init, **words
        )
        wrapped = wrapped.double()
        apply, params, table = family_parity.in_jax(case, original_base(case, wrapped))
        quiet(wrapped.save_pretrained, tmp_path)
        adapter, _ = read(tmp_path, params, table)
        copy = lambda x: jnp.array(x, copy=True)
        start = lambda x: dataclasses.replace(x, a0=copy(x.a), b0=copy(x.b)) if is_offset(x) else x
        adapter = jax.tree.map(start, adapter, is_leaf=is_offset)
        assert any(map(is_offset, jax.tree.leaves(adapter, is_leaf=is_offset)))
        data = [case.inputs(wrapped.model.config, k) for k in range(STEPS)]
        theirs = family_parity.torch_losses(wrapped, data, case.head)
        ours, _ = family_parity.our_losses(apply, params, adapter, data, case.head)
    assert theirs.std() > 0.02  # it moves
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    ("method", "stabilized"), [("lora", False), ("lora", True), ("dora", False)]
)
@pytest.mark.parametrize(("family", "init"), [t[:2] for t in TRAINED])
def test_what_is_written_here_computes_the_same_in_peft(family, init, method, stabilized, tmp_path):
    case = CASES[family]
    model = torch_model(case, 1)
    apply, params, table = family_parity.in_jax(case, model)
    inputs = case.inputs(model.config, 1)
    given = family_parity.our_inputs(inputs)
    fn = lambda params, *args: apply(params, **dict(zip(given, args, strict=True)))
    config = lora.LoRAConfig(
        rank=3, alpha=4.0, targets=case.targets if family != "gpt2" else ("c_attn",), init=init,
        method=method, rank_stabilized=stabilized, train=("classifier",) if family == "bert" else (),
    )  # fmt: skip
    made = lora.init(jax.random.key(0), fn, params, config, *given.values())
    adapter = perturbed(made)
    ours = family_parity.our_logits(lora.lift(apply), lora.bind(params, adapter), inputs)
    for word in ("", init):
        out = tmp_path / (word or "plain")
        save_peft(out, params, adapter, config, names=table, init=word, task_type=case.task_type)
        opened = quiet(family_parity.opened_by_peft, torch_model(case, 1), out)
        # Under its word PEFT decomposes the base again, in float32.
        atol = 1e-5 * max(1, np.abs(ours).max()) * (5 if word else 1)
        family_parity.assert_same_logits(ours, torch_logits(opened, inputs), inputs, atol=atol)


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_a_kernel_with_inputs_first_is_not_taken_for_its_transpose(init, tmp_path):
    """PEFT's OLoRA takes the rows of GPT-2's weights for outputs, so that its first call fails."""
    case = CASES["gpt2"]._replace(targets=("c_attn",))
    model = torch_model(case, 2)
    apply, params, _ = family_parity.in_jax(case, model)
    inputs = case.inputs(model.config, 2)
    given = family_parity.our_inputs(inputs)
    fn = lambda params, *args: apply(params, **dict(zip(given, args, strict=True)))
    config = lora.LoRAConfig(rank=3, targets=("c_attn",), init=init)
    adapter = lora.init(jax.random.key(0), fn, params, config, *given.values())
    logits = family_parity.our_logits(lora.lift(apply), lora.bind(params, adapter), inputs)
    family_parity.assert_same_logits(logits, torch_logits(model, inputs), inputs)
    if init == "olora":
        wrapped = family_parity.peft_model(case, model, init_lora_weights=init)
        with pytest.raises(RuntimeError):
            torch_logits(wrapped, inputs)
