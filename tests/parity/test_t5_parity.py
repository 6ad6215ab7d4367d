"""T5 1.0 and 1.1 against transformers and PEFT, live."""

import numpy as np
import pytest

import lora_jax as lora
from lora_jax.models import generate
from lora_jax.models.decoding import Decoding
from tests.helpers import family_parity

torch, transformers = family_parity.torch, family_parity.transformers

pytestmark = pytest.mark.parity


BUCKETS = [(8, 7), (4, 5), (6, 9), (32, 20)]


def random_config(seed, **version):
    """Few buckets that the inputs reach beyond; heads that do not divide the model's width."""
    rng = np.random.default_rng(seed)
    return transformers.T5Config(
        vocab_size=int(rng.integers(12, 40)),
        d_model=int(rng.integers(8, 20)),
        d_kv=int(rng.integers(3, 7)),
        d_ff=int(rng.integers(8, 30)),
        num_layers=int(rng.integers(2, 4)),
        num_decoder_layers=2,
        num_heads=int(rng.integers(1, 4)),
        relative_attention_num_buckets=BUCKETS[seed % 4][0],
        relative_attention_max_distance=BUCKETS[seed % 4][1],
        layer_norm_epsilon=float(rng.choice([1e-6, 1e-3])),
        dropout_rate=0.0,
        decoder_start_token_id=int(rng.integers(0, 12)),
        **version,
    )


def random_inputs(config, seed):
    """Input and output tokens, both with padding on one side or the other."""
    rng = np.random.default_rng(seed)
    source = family_parity.padded_ids(config.vocab_size, seed, length=14, left=bool(seed % 2))
    target = family_parity.padded_ids(
        config.vocab_size, seed + 1, length=9, left=bool(seed % 3 == 1)
    )
    labels = rng.integers(0, config.vocab_size, target["input_ids"].shape)
    mask = target["attention_mask"]
    return source | {
        "decoder_input_ids": target["input_ids"],
        "decoder_attention_mask": mask,
        "labels": np.where(mask > 0, labels, -100),
    }


def untie(model):
    """Gives the head a kernel of its own, as T5 1.1 has: transformers 5 makes all of them tied."""
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False


V1_0 = family_parity.Case(
    head="seq2seq-lm",
    model=transformers.T5ForConditionalGeneration,
    config=random_config,
    inputs=random_inputs,
    targets=("q", "v"),
    task_type="SEQ_2_SEQ_LM",
    scale=0.22,  # its scores are not divided by the root of the head's size
)
V1_1 = V1_0._replace(
    config=lambda seed: random_config(
        seed, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
    prepare=untie,
)
# What transformers 5 makes of a config of version 1.1 from scratch.
V1_1_TIED = V1_1._replace(prepare=lambda model: None)
CASES = {"1.0": V1_0, "1.1": V1_1, "1.1 tied": V1_1_TIED}
each = pytest.mark.parametrize("version", CASES)
scanned = pytest.mark.parametrize("scan_layers", [False, True], ids=["layers", "scan"])


@pytest.mark.supports("T5", "logits")
@pytest.mark.parametrize("seed", range(4))
@each
def test_logits(version, seed, tmp_path):
    family_parity.check_logits(CASES[version], seed, tmp_path, scan_layers=seed == 3)


ACTIVATIONS = ("gelu", "gated-relu", "gated-silu", "gated-gelu_new")


@pytest.mark.supports("T5", "logits")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_logits_with_other_activations(activation, tmp_path):
    config = lambda seed: random_config(seed, feed_forward_proj=activation)
    family_parity.check_logits(V1_0._replace(config=config), 5, tmp_path)


@pytest.mark.supports("T5", "training")
@pytest.mark.parametrize(
    ("version", "targets", "scan_layers"),
    [("1.0", ("q", "v"), False), ("1.1", "all-linear", False), ("1.1", ("q", "v", "wo"), True)],
)
def test_training(version, targets, scan_layers, tmp_path):
    # transformers takes the mean square of its norms in float32, whatever the model's dtype.
    case = CASES[version]._replace(targets=targets)
    family_parity.check_training(case, tmp_path, rtol=1e-4, scan_layers=scan_layers)


@pytest.mark.supports("T5", "PEFT round trip")
@pytest.mark.parametrize("targets", [("q", "v"), "all-linear"], ids=str)
@each
def test_peft(version, targets, tmp_path):
    scan_layers = version == "1.1" and targets != "all-linear"
    case = CASES[version]._replace(targets=targets)
    family_parity.check_peft(case, 1, tmp_path, scan_layers=scan_layers)


@pytest.mark.supports("T5", "merged export")
@scanned
@each
def test_merged_export(version, scan_layers, tmp_path):
    auto = transformers.AutoModelForSeq2SeqLM
    family_parity.check_merged_export(
        CASES[version], 2, tmp_path, auto=auto, scan_layers=scan_layers
    )


def text(loaded, params, inputs, new_tokens, lifted):
    options = {"transform": lora.lift} if lifted else {}
    begin, step = generate.seq2seq_lm(loaded.model, loaded.family.init_cache, **options)
    settings = Decoding(max_new_tokens=new_tokens)
    return generate.generator(begin, step, settings)(params, inputs).tokens


@pytest.mark.supports("T5", "generation")
@pytest.mark.parametrize("seed", range(2))
@each
def test_greedy_text(version, seed, tmp_path):
    family_parity.check_generation(CASES[version], seed, tmp_path, text)


@pytest.mark.supports("T5", "generation")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_beam_search(version, seed, tmp_path):
    """With an end that some texts come to; the layers are scanned in some."""
    case = CASES[version]
    model = family_parity.torch_model(case, seed)
    family_parity.quiet(model.save_pretrained, tmp_path)
    loaded = family_parity.load(case, tmp_path, scan_layers=seed == 1)
    inputs = case.inputs(model.config, seed)
    prompt = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    settings = Decoding(max_new_tokens=10, beams=2 + seed, stop=(3, 5), length_penalty=0.8)
    theirs = family_parity.quiet(
        model.generate, **{k: torch.from_numpy(v) for k, v in prompt.items()}, do_sample=False,
        max_new_tokens=10, num_beams=settings.beams, eos_token_id=[3, 5], pad_token_id=0,
        length_penalty=0.8,
    ).numpy()[:, 1:]  # fmt: skip
    begin, step = generate.seq2seq_lm(loaded.model, loaded.family.init_cache)
    made = generate.generator(begin, step, settings)(loaded.params, prompt)
    for row, length, expected in zip(made.tokens, made.lengths, theirs, strict=True):
        ends = np.flatnonzero(np.isin(expected, settings.stop))
        assert length == (ends[0] + 1 if ends.size else len(expected))
        np.testing.assert_array_equal(row[:length], expected[:length])
