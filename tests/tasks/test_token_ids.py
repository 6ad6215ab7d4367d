"""Tokens beyond a model's embedding: refused by their names, before the model is applied."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import lora_jax as lora
from lora_jax.data import texts
from lora_jax.models import checkpoints, token_ids
from lora_jax.models.decoding import Decoding
from lora_jax.models.token_ids import Table
from lora_jax.tasks import (
    chat,
    classification,
    classifier,
    e2e,
    from_config,
    generation,
    instruction_tuning,
    language_modeling,
)
from lora_jax.tasks.glue import find
from lora_jax.tasks.text_task import LabelledTexts
from tests.helpers import encoder_runs, programs, tiny_encoder, tiny_llama, tiny_t5

config = encoder_runs.config
SIZE = len(tiny_encoder.WORDS) + 5


@pytest.fixture
def larger(config, tmp_path):
    """The config of a model whose tokenizer has a word, and padding, that the model does not have."""
    tiny_encoder.checkpoint(tmp_path / "model")
    settings = {"added_tokens_decoder": {str(SIZE): {"content": "dull", "single_word": True}}}
    path = tmp_path / "model" / "vocab.txt"
    path.write_text(path.read_text().replace("dull\n", "gray\n"))
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    return encoder_runs.changed(config, model__name=str(tmp_path / "model"))


def test_texts_to_train_on(larger):
    message = (
        rf"The token 'dull' has the id {SIZE}, beyond .* has {SIZE} rows, 0 to {SIZE - 1}; the "
    )
    with pytest.raises(ValueError, match=message + rf"tokenizer has {SIZE + 1} tokens.*resize"):
        classification.make_task(larger)


def save_adapter(config, directory):
    """Saves an adapter as a run does."""
    options = {"num_labels": 2, "key": classification.head_key(config.seed)}
    loaded = classification.load_model(config.model.name, **options)
    settings = from_config.lora_config(config)
    ids = jnp.ones((1, 3), jnp.int32)
    adapter = lora.init(jax.random.key(0), loaded.model.apply, loaded.params, settings, ids, ids)
    about = {"pairs": False, "glue": "sst2"}
    texts = LabelledTexts(task=find("sst2"), training=None, evaluations=(), metadata=about)
    metadata = classification.metadata(config, texts)
    lora.save(directory, adapter, settings, base=loaded.base_id, metadata=metadata)
    return directory


def test_sentences_to_predict(larger, tmp_path):
    model = classifier.load(save_adapter(larger, tmp_path / "adapter"))
    assert np.isfinite(classifier.predict(model, ["the film was good"])).all()
    with pytest.raises(ValueError, match=f"'dull' has the id {SIZE}, beyond"):
        classifier.predict(model, ["the film was dull"])


@pytest.fixture
def without_tokenizer(larger, tmp_path):
    """An adapter whose base has no tokenizer any more."""
    adapter = save_adapter(larger, tmp_path / "adapter")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    return adapter


def test_a_classifier_without_a_tokenizer(without_tokenizer):
    with pytest.raises(ValueError, match="No tokenizer in"):
        classifier.load(without_tokenizer)
    model = classifier.load(without_tokenizer, with_tokenizer=False)
    with pytest.raises(ValueError, match="no tokenizer: load it with"):
        classifier.predict(model, ["a film"])


@pytest.mark.slow
def test_a_merged_export_reads_no_tokenizer(without_tokenizer, tmp_path):
    adapter = without_tokenizer
    done = programs.run("export", f"--adapter={adapter}", f"--out={tmp_path / 'out'}", "--merged")
    assert done.returncode == 0, done.stderr
    assert "note: the base has no tokenizer, so that none was written" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    done = programs.run("predict", f"--adapter={adapter}", "a film")
    assert done.returncode == 2 and "No tokenizer in" in done.stderr


def test_padding_that_the_model_does_not_have(config, tmp_path):
    tiny_encoder.checkpoint(tmp_path / "model")
    path = tmp_path / "model" / "vocab.txt"
    path.write_text(
        path.read_text().replace("[PAD]", "[OLD]")
    )  # transformers adds [PAD] at the end
    task, _ = classification.make_task(
        encoder_runs.changed(config, model__name=str(tmp_path / "model"))
    )
    assert max(batch["input_ids"].max() for batch in task.eval_batches()) < SIZE
    assert any("texts with a token beyond it are refused" in note for note in task.notes)


def test_labels_that_t5_does_not_have(tmp_path):
    loaded = checkpoints.load(tiny_t5.checkpoint(tmp_path), head="seq2seq-lm")
    tokenizer = tiny_t5.tokenizer()
    tokenizer.add_tokens(["yes"])
    with pytest.raises(ValueError, match="'yes' has the id"):
        classification.make_scorer(loaded, ("yes", "negative"), tokenizer, task=find("sst2"))


@pytest.fixture
def llama(tmp_path):
    """A language model whose tokenizer has a token too many."""
    directory = tiny_llama.checkpoint(tmp_path / "model")
    tokenizer = tiny_llama.tokenizer()
    tokenizer.add_special_tokens(["<|new|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


MESSAGE = rf"'<\|new\|>' has the id {len(tiny_llama.WORDS)}, beyond the embedding"


def test_conversations(llama, tmp_path):
    lines = [[tiny_llama.question("red"), tiny_llama.answer("red")] for _ in range(8)]
    lines[3][1] = {"role": "assistant", "content": "a <|new|> colour"}
    text = "".join(json.dumps({"messages": line}) + "\n" for line in lines)
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ValueError, match=MESSAGE):
        instruction_tuning.make_task(tiny_llama.config(tmp_path, **{"data.holdout": 2}))
    (tmp_path / "data.jsonl").write_text(text.replace("<|new|>", "red"))
    task, _ = instruction_tuning.make_task(tiny_llama.config(tmp_path, **{"data.holdout": 2}))
    size = len(tiny_llama.WORDS)
    assert any(note.startswith(f"tokenizer: {size + 1} tokens, and the") for note in task.notes)


def test_messages(llama):
    model = chat.load(None, model=str(llama), max_new_tokens=2)
    with pytest.raises(ValueError, match=MESSAGE):
        chat.reply(model, [{"role": "user", "content": "what is <|new|>?"}])
    with pytest.raises(ValueError, match="half of a character"):
        chat.reply(model, [{"role": "user", "content": "what \udcff is"}])


def test_lines_of_e2e(llama):
    loaded = checkpoints.load(llama, head="causal-lm")
    tokenizer = checkpoints.load_tokenizer(loaded.checkpoint)
    writer = e2e.Writer(loaded, tokenizer, Decoding(max_new_tokens=2, stop=(3,)))
    assert e2e.encode_prompts(["what is red"], writer) == [
        [*(tiny_llama.WORDS.index(w) for w in ("what", "is", "red")), 3]
    ]
    with pytest.raises(ValueError, match=MESSAGE):
        e2e.encode_prompts(["<|new|>"], writer)
    with pytest.raises(ValueError, match=MESSAGE):
        e2e.tokenize(e2e.Pairs(("what",), ("a <|new|>",)), writer=writer)


def test_texts_of_the_library(llama, tmp_path):
    """Without a tokenizer, the message names the number alone."""
    loaded = checkpoints.load(llama, head="causal-lm")
    good, bad = (texts.make_texts([([1], [number])]) for number in (2, 40))
    about = tiny_llama.config(tmp_path)
    with about.unlocked():
        about.data.buckets = (8,)
    with pytest.raises(ValueError, match=r"The token 40 is beyond .*resize_token_embeddings\(41\)"):
        language_modeling.make_task(about, loaded, good, bad)


def test_sizes_are_told():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert token_ids.describe(made, Table("m", 2)) == ()
    (few,) = token_ids.describe(made, Table("m", 1000))
    assert few == "tokenizer: 2 tokens, and the embedding of m has 1,000 rows"
    (many,) = token_ids.describe(made, Table("m", 1))
    assert many.endswith("texts with a token beyond it are refused")


@pytest.mark.slow
def test_a_text_that_ends_with_the_positions_is_told(tmp_path, caplog):
    loaded = checkpoints.load(
        tiny_llama.checkpoint(tmp_path, max_position_embeddings=16), head="causal-lm"
    )
    decoding = Decoding(max_new_tokens=20)
    rows = generation.write(loaded, loaded.params, [[9, 10, 6]], decoding=decoding, batch_size=1)
    assert len(rows[0]) == 13
    assert "ends after 13 of 20 tokens, since the model has no more positions" in caplog.text
    with pytest.raises(ValueError, match="17 tokens, of which 16 are the prompt.*for 16; shorten"):
        generation.write(loaded, loaded.params, [[9] * 16], decoding=decoding, batch_size=1)


# --- Heads of others


@pytest.mark.parametrize("head", ["v_head.summary.weight", "score.weight", "classifier.bias"])
def test_other_heads_are_left_out_and_told(head, tmp_path, caplog):
    tiny_llama.checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors | {head: np.ones((1, 32), np.float32)}, path)
    with caplog.at_level("INFO"):
        checkpoints.load(tmp_path, head="causal-lm")
    assert f"Left out of the checkpoint: {head}" in caplog.text
    safetensors.numpy.save_file(tensors | {"odd": np.ones(1, np.float32)}, path)
    with pytest.raises(ValueError, match="odd is unexpected"):
        checkpoints.load(tmp_path, head="causal-lm")


def test_a_quantized_checkpoint_that_is_not_whole_is_named_as_such(tmp_path):
    tiny_llama.checkpoint(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    safetensors.numpy.save_file(tensors | {name: np.ones(3, np.int8)}, path)
    with pytest.raises(ValueError, match="says that it is quantized with 'fp8'"):
        checkpoints.load(tmp_path, head="causal-lm")
