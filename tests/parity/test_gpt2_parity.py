"""GPT-2 against transformers and PEFT, live; and generation, with GPT-2 as the model."""

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.models import generate
from lora_jax.models.decoding import Decoding
from lora_jax.models.tokenizer import read_tokenizer
from tests.helpers import family_parity, places

torch, transformers = family_parity.torch, family_parity.transformers

pytestmark = pytest.mark.parity


def random_config(seed):
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 4))
    return transformers.GPT2Config(
        vocab_size=int(rng.integers(20, 60)),
        n_positions=int(rng.integers(24, 30)),
        n_embd=heads * int(rng.integers(4, 9)),
        n_layer=int(rng.integers(1, 4)),
        n_head=heads,
        n_inner=None if seed % 2 else int(rng.integers(5, 40)),
        activation_function=str(rng.choice(["gelu_new", "gelu", "relu", "silu", "tanh"])),
        layer_norm_epsilon=float(rng.choice([1e-5, 1e-2])),
        scale_attn_weights=seed % 4 != 1,
        scale_attn_by_inverse_layer_idx=seed % 4 == 2,
        tie_word_embeddings=seed % 3 != 2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=None,
    )  # fmt: skip


def random_inputs(config, seed):
    """Padding on the left; the positions that transformers.generate would give."""
    inputs = family_parity.padded_ids(config.vocab_size, seed, left=True)
    mask = inputs["attention_mask"]
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    # Not the first token: what padding would say of it is nobody's business.
    labels = np.where(mask.cumsum(-1) > 1, inputs["input_ids"], -100)
    return inputs | {"position_ids": positions, "labels": labels}


CASE = family_parity.Case(
    head="causal-lm",
    model=transformers.GPT2LMHeadModel,
    config=random_config,
    inputs=random_inputs,
    targets=("c_attn",),
    task_type="CAUSAL_LM",
)


@pytest.mark.supports("GPT-2", "logits")
@pytest.mark.parametrize("seed", range(8))
def test_logits_of_random_models(seed, tmp_path):
    family_parity.check_logits(CASE, seed, tmp_path, scan_layers=seed > 4)


@pytest.mark.supports("GPT-2", "training")
@pytest.mark.parametrize("targets", [("c_attn",), "all-linear"])
def test_50_steps(targets, tmp_path):
    scan = targets == "all-linear"
    family_parity.check_training(CASE._replace(targets=targets), tmp_path, scan_layers=scan)


@pytest.mark.supports("GPT-2", "PEFT round trip")
@pytest.mark.parametrize("targets", [("c_attn",), "all-linear"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_peft_round_trip(targets, scan_layers, tmp_path):
    family_parity.check_peft(CASE._replace(targets=targets), 1, tmp_path, scan_layers=scan_layers)


@pytest.mark.supports("GPT-2", "merged export")
@pytest.mark.parametrize("scan_layers", [False, True])
def test_transformers_opens_merged_weights(scan_layers, tmp_path):
    auto = transformers.AutoModelForCausalLM
    family_parity.check_merged_export(CASE, 2, tmp_path, auto=auto, scan_layers=scan_layers)


@pytest.mark.supports("GPT-2", "generation")
@pytest.mark.parametrize("seed", range(4))
def test_greedy_text(seed, tmp_path):
    family_parity.check_generation(CASE, seed, tmp_path, family_parity.causal_text)


FILES = places.SHARED / "gpt2_tokenizer"


@pytest.mark.skipif(not FILES.is_dir(), reason="../shared/gpt2_tokenizer is not there")
def test_tokens_of_the_real_vocabulary():
    theirs = transformers.GPT2TokenizerFast.from_pretrained(FILES)
    ours = read_tokenizer(FILES)
    for text in (
        "name : Blue Spice | food : £20-25",
        " naïve 電影  \t 100%",
        "a<|endoftext|>b",
        "",
    ):
        assert ours.encode(text).ids == theirs(text)["input_ids"]


# --- Beam search, of which the family does not matter


class NoRepeat(transformers.LogitsProcessor):
    """The rule as a loop over the new tokens."""

    def __init__(self, prompt, size):
        self.prompt, self.size = prompt, size

    def __call__(self, input_ids, scores):
        for row, text in enumerate(input_ids[:, self.prompt :].tolist()):
            last = text[len(text) - self.size + 1 :]
            for k in range(len(text) - self.size + 1):
                if text[k : k + self.size - 1] == last:
                    scores[row, text[k + self.size - 1]] = -float("inf")
        return scores


def random_decoding(seed, vocab):
    rng = np.random.default_rng(100 + seed)
    return Decoding(
        max_new_tokens=int(rng.integers(6, 12)),
        beams=int(rng.integers(2, 5)),
        stop=tuple(rng.choice(vocab, size=seed % 4, replace=False).tolist()),
        pad_id=int(rng.integers(vocab)),
        length_penalty=float(rng.choice([-0.7, 0.0, 0.8, 1.0, 2.0])),
        early_stopping=[True, False, "never"][seed % 3],
        no_repeat_ngram=2 if seed % 5 == 0 else 0,
    )


def transformers_text(model, prompt, decoding):
    n = prompt["input_ids"].shape[1]
    rule = [NoRepeat(n, decoding.no_repeat_ngram)] if decoding.no_repeat_ngram else []
    made = family_parity.quiet(
        model.generate, **{k: torch.from_numpy(v) for k, v in prompt.items()}, do_sample=False,
        max_new_tokens=decoding.max_new_tokens, num_beams=decoding.beams,
        length_penalty=decoding.length_penalty, early_stopping=decoding.early_stopping,
        eos_token_id=list(decoding.stop) or None, pad_token_id=decoding.pad_id,
        logits_processor=transformers.LogitsProcessorList(rule),
    ).numpy()[:, n:]  # fmt: skip
    return [cut(row, decoding.stop) for row in made.tolist()]


def cut(row, stop):
    """Without what stands after the end."""
    ends = [k for k, token in enumerate(row) if token in stop]
    return row[: ends[0] + 1] if ends else row


@pytest.mark.parametrize("seed", range(15))
def test_beam_search(seed, tmp_path):
    model = family_parity.torch_model(CASE._replace(scale=0.4), seed)
    family_parity.quiet(model.save_pretrained, tmp_path)
    loaded = family_parity.load(CASE, tmp_path, scan_layers=seed % 2 == 0)
    prompt = family_parity.padded_ids(model.config.vocab_size, seed, left=True, length=9)
    decoding = random_decoding(seed, model.config.vocab_size)
    theirs = transformers_text(model, prompt, decoding)
    begin, step = generate.causal_lm(loaded.model, loaded.family.init_cache)
    made = generate.generator(begin, step, decoding)(loaded.params, prompt)
    rows = zip(made.tokens.tolist(), made.lengths.tolist(), strict=True)
    assert [row[:length] for row, length in rows] == theirs


def test_beam_search_with_a_lifted_model(tmp_path):
    model = family_parity.torch_model(CASE, 3)
    family_parity.quiet(model.save_pretrained, tmp_path / "base")
    loaded = family_parity.load(CASE, tmp_path / "base")
    inputs = random_inputs(model.config, 3)
    adapter = family_parity.random_adapter(
        loaded.model.apply, loaded.params, inputs, targets=("c_attn",)
    )
    merged = lora.merge(loaded.params, adapter)
    prompt = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    decoding = Decoding(max_new_tokens=8, beams=3, stop=(4, 5))
    begin, step = generate.causal_lm(loaded.model, loaded.family.init_cache)
    one = generate.generator(begin, step, decoding)(merged, prompt)
    bound = lora.bind(loaded.params, adapter)
    two = generate.generator(begin, lora.lift(step), decoding)(bound, prompt)
    jax.tree.map(np.testing.assert_array_equal, one, two)
