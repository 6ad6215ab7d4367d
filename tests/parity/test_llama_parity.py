"""The Llama family against transformers and PEFT, live."""

import json

import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax.peft import load_peft
from tests.helpers import family_parity

transformers = family_parity.transformers

pytestmark = pytest.mark.parity

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
PLAIN = {"rope_type": "default", "rope_theta": 300.0}


def sizes(rng):
    """What the configs of all model types have."""
    groups, each = int(rng.integers(1, 4)), int(rng.integers(2, 4))
    head_dim = 2 * int(rng.integers(2, 5))
    return {
        "vocab_size": int(rng.integers(20, 60)),
        # transformers wants a multiple of the heads, whatever head_dim is.
        "hidden_size": groups * each * int(rng.integers(3, 7)),
        "intermediate_size": int(rng.integers(5, 40)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": groups * each,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "max_position_embeddings": 32,
        "rms_norm_eps": float(rng.choice([1e-6, 1e-2])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "initializer_range": 0.02,
    }


def llama(rng, seed):
    rope = (PLAIN, LLAMA3, LINEAR)[seed % 3]
    biases = {name: bool(rng.integers(2)) for name in ("attention_bias", "mlp_bias")}
    return transformers.LlamaConfig(**sizes(rng), **biases, rope_parameters=rope)


def mistral(rng, seed):
    window = None if seed % 3 == 2 else int(rng.integers(1, 5))
    return transformers.MistralConfig(**sizes(rng), sliding_window=window)


def qwen(cls):
    def make(rng, seed):
        return cls(
            **sizes(rng),
            use_sliding_window=seed % 2 == 0,
            sliding_window=int(rng.integers(1, 5)),
            max_window_layers=int(rng.integers(0, 3)),
            hidden_act=str(rng.choice(["silu", "gelu"])),
        )

    return make


def mixtral(rng, seed):
    experts, about = int(rng.integers(2, 6)), sizes(rng)
    # torch's grouped products want rows of 16 bytes, and have no float64.
    about |= {name: 4 * about[name] for name in ("hidden_size", "intermediate_size")}
    return transformers.MixtralConfig(
        **about | {"num_hidden_layers": 2},
        experts_implementation="eager",
        num_local_experts=experts,
        num_experts_per_tok=int(rng.integers(1, experts + 1)),
        sliding_window=int(rng.integers(1, 5)) if seed % 3 == 1 else None,
        hidden_act=str(rng.choice(["silu", "gelu"])),
    )


def gemma2(rng, seed):
    return transformers.Gemma2Config(
        **sizes(rng),
        sliding_window=int(rng.integers(1, 5)),
        attention_bias=bool(rng.integers(2)),
        query_pre_attn_scalar=int(rng.integers(3, 20)),
        attn_logit_softcapping=None if seed % 3 == 2 else float(rng.uniform(1, 5)),
        final_logit_softcapping=None if seed % 3 == 1 else float(rng.uniform(3, 9)),
    )


def gemma3(rng, seed):
    about = sizes(rng) | {"num_hidden_layers": 3}
    return transformers.Gemma3TextConfig(
        **about,
        sliding_window=int(rng.integers(1, 5)),
        sliding_window_pattern=int(rng.integers(2, 5)),
        query_pre_attn_scalar=int(rng.integers(3, 20)),
        final_logit_softcapping=4.0 if seed % 3 == 1 else None,
        rope_parameters={
            "full_attention": (PLAIN, LINEAR, LLAMA3)[seed % 3],
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    )


def inputs(config, seed):
    """Padding left or right; the loss counts real tokens that come after one."""
    given = family_parity.padded_ids(config.vocab_size, seed, left=seed % 2 == 1)
    real = given["attention_mask"] > 0
    real[:, 1:] &= real[:, :-1]
    labels = np.where(real, given["input_ids"], -100)
    return given | {"labels": labels}


def unpadded(config, seed):
    """Rows that are full."""
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (4, 9))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}


def case(model, make, norm=1.0, scale=0.3):
    return family_parity.Case(
        head="causal-lm",
        model=model,
        config=lambda seed: make(np.random.default_rng(seed), seed),
        inputs=inputs,
        targets=("q_proj", "v_proj"),
        task_type="CAUSAL_LM",
        norm=norm,
        scale=scale,
    )


ROWS = {
    "Llama": case(transformers.LlamaForCausalLM, llama),
    "Mistral": case(transformers.MistralForCausalLM, mistral),
    "Mixtral": case(transformers.MixtralForCausalLM, mixtral, scale=0.1),
    "Qwen2": case(transformers.Qwen2ForCausalLM, qwen(transformers.Qwen2Config)),
    "Qwen3": case(transformers.Qwen3ForCausalLM, qwen(transformers.Qwen3Config)),
    "Gemma 2": case(transformers.Gemma2ForCausalLM, gemma2, norm=0.0),
    "Gemma 3": case(transformers.Gemma3ForCausalLM, gemma3, norm=0.0),
}


def rows(column):
    """Every model of the family, each marked with what it supports."""
    marked = lambda row: pytest.param(row, marks=pytest.mark.supports(row, column), id=row)
    return pytest.mark.parametrize("row", [marked(row) for row in ROWS])


@rows("logits")
@pytest.mark.parametrize("seed", range(4))
def test_logits_of_random_models(row, seed, tmp_path):
    family_parity.check_logits(ROWS[row], seed, tmp_path, scan_layers=seed == 3)


@rows("training")
def test_50_steps(row, tmp_path):
    # transformers computes norms and rotations in float32, whatever the model's dtype is.
    targets = "all-linear" if row in ("Llama", "Mixtral", "Gemma 2") else ("q_proj", "v_proj")
    tiny = ROWS[row]._replace(targets=targets)
    if row == "Gemma 2":
        # In float64 its attention there gives NaN where a query sees no key: the mask's lowest
        # float64 is minus infinity in the softmax's float32.
        tiny = tiny._replace(inputs=unpadded)
    scan = row in ("Qwen3", "Gemma 2")
    more = {"target_parameters": EXPERTS} if row == "Mixtral" else {}
    family_parity.check_training(tiny, tmp_path, rtol=1e-4, scan_layers=scan, **more)


@rows("PEFT round trip")
@pytest.mark.parametrize("scan_layers", [False, True])
def test_peft_round_trip(row, scan_layers, tmp_path):
    targets = "all-linear" if scan_layers else ("q_proj", "v_proj")
    tiny = ROWS[row]._replace(targets=targets)
    # A scale of a half: with drawn factors, more would be far beyond what training does.
    more = {"target_parameters": EXPERTS} if row == "Mixtral" else {}
    seed = 1 + scan_layers
    family_parity.check_peft(tiny, seed, tmp_path, scan_layers=scan_layers, lora_alpha=2, **more)


@rows("merged export")
def test_transformers_opens_merged_weights(row, tmp_path):
    auto = transformers.AutoModelForCausalLM
    scan = row in ("Mistral", "Gemma 3")
    family_parity.check_merged_export(ROWS[row], 2, tmp_path, auto=auto, scan_layers=scan)


@rows("generation")
@pytest.mark.parametrize("seed", range(2))
def test_greedy_text(row, seed, tmp_path):
    left = lambda config, seed: family_parity.padded_ids(config.vocab_size, seed, left=True)
    tiny = ROWS[row]._replace(inputs=left)
    family_parity.check_generation(tiny, seed, tmp_path, family_parity.causal_text)


def test_factors_of_single_experts_are_peft_s(tmp_path):
    """A file of PEFT on transformers 4, which PEFT converts on 5 as it is read here."""
    row = ROWS["Mixtral"]
    model = family_parity.torch_model(row, 0)
    settings = {"target_modules": ["q_proj", "w1", "w2", "w3"]}
    wrapped = family_parity.peft_model(row, model, **settings)
    trained = [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad]
    family_parity.draw(trained, 1)
    family_parity.quiet(wrapped.save_pretrained, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"]  # converted, and so saved otherwise than transformers 4 did
    config |= settings | {"target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    old = {n: x for n, x in tensors.items() if "experts" not in n}
    rng = np.random.default_rng(0)
    hidden, width = model.config.hidden_size, model.config.intermediate_size
    for k in range(model.config.num_hidden_layers):
        for e in range(model.config.num_local_experts):
            expert = f"base_model.model.model.layers.{k}.block_sparse_moe.experts.{e}"
            for name in ("w1", "w2", "w3"):
                n_in, n_out = (width, hidden) if name == "w2" else (hidden, width)
                a, b = 0.1 * rng.normal(size=(4, n_in)), 0.1 * rng.normal(size=(n_out, 4))
                for side, x in (("A", a), ("B", b)):
                    old[f"{expert}.{name}.lora_{side}.weight"] = x.astype(np.float32)
    safetensors.numpy.save_file(old, file, metadata={"format": "pt"})
    opened = family_parity.opened_by_peft(family_parity.torch_model(row, 0), tmp_path)
    inputs = row.inputs(model.config, 0)
    apply, params, table = family_parity.in_jax(row, family_parity.torch_model(row, 0))
    adapter, _ = load_peft(tmp_path, params, names=table)
    ours = family_parity.our_logits(lora.lift(apply), lora.bind(params, adapter), inputs)
    family_parity.assert_same_logits(ours, family_parity.torch_logits(opened, inputs), inputs)
    base = family_parity.our_logits(apply, params, inputs)
    assert np.abs(ours - base).max() > 0.01
