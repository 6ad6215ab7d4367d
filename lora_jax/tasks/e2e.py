"""The E2E challenge with a causal language model: it turns meaning representations into texts.

As in the LoRA paper's code, a line is one text: the meaning, the token that ends a text, the
reference, and that token again. The model learns the tokens after the meaning.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import tokenizers
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.data import e2e_nlg, texts
from lora_jax.data.e2e_nlg import Pairs
from lora_jax.data.texts import Texts
from lora_jax.models import checkpoints, token_ids
from lora_jax.models.decoding import Decoding
from lora_jax.models.families import CAUSAL_LM
from lora_jax.models.tokenizer import read_tokenizer
from lora_jax.tasks import adapter_files, from_config, generation, language_modeling
from lora_jax.tasks.text_metrics import bleu_and_chrf
from lora_jax.training import mesh, training_config
from lora_jax.training.task import Task

PyTree = Any
_LEAST = {"data.test_meanings": 0, "decode.batch_size": 1}


class Writer(NamedTuple):
    """A model that writes texts.

    Attributes:
      loaded: the model.
      tokenizer: the model's tokenizer, or the config's.
      decoding: settings by which tokens are chosen; the first stop token separates a meaning from
        its text.
    """

    loaded: checkpoints.Loaded
    tokenizer: tokenizers.Tokenizer
    decoding: Decoding


class ScoredTexts(NamedTuple):
    """Texts by their meanings, and scores of them all; and how many meanings the file has."""

    texts: dict[str, str]
    scores: dict[str, float]
    total: int


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a copy of the config, in which nothing is left open."""
    return config.copy_and_resolve_references()


def check(config: ConfigDict) -> None:
    """Checks a config before anything is loaded or written.

    Raises:
      ValueError: names fields that are wrong.
    """
    language_modeling.check(config, _LEAST)
    generation.make_decoding(config, (0,))
    training_config.raise_problems(list(training_config.validation_problems(config)))


def load(config: ConfigDict, devices: mesh.Devices | None = None) -> Writer:
    """Loads the unadapted model.

    Args:
      config: config of the run.
      devices: devices of the run; by default those that the config describes.

    Raises:
      FileNotFoundError, ValueError: model or tokenizer is missing or damaged.
    """
    c = config.model
    loaded = checkpoints.load(c.name, head=CAUSAL_LM, **from_config.load_options(config, devices))
    if c.tokenizer:
        tokenizer = read_tokenizer(c.tokenizer)
    else:
        tokenizer = checkpoints.load_tokenizer(loaded.checkpoint)
    stop = generation.stop_tokens(loaded, tokenizer)
    return Writer(loaded, tokenizer, generation.make_decoding(config, stop))


def make_task(
    config: ConfigDict, devices: mesh.Devices | None = None, *, writer: Writer | None = None
) -> tuple[Task, lora.LoRAConfig]:
    """Makes the task of learning to write, from the training lines.

    Args:
      config: config of the run.
      devices: devices of the run; by default those that the config describes.
      writer: the model, if it is loaded already.

    Raises:
      FileNotFoundError, ValueError: the data are missing or damaged, or do not fit the model.
    """
    writer = writer or load(config, devices)
    parts = [tokenize(pairs, writer=writer) for pairs in read_parts(config)]
    task, settings = language_modeling.make_task(config, writer.loaded, *parts)
    sizes = token_ids.describe(writer.tokenizer, checkpoints.find_table(writer.loaded))
    return dataclasses.replace(task, notes=(*task.notes, *sizes)), settings


def read_parts(config: ConfigDict) -> tuple[Pairs, Pairs]:
    """Reads the lines to learn from, and those to evaluate on.

    Raises:
      FileNotFoundError, ValueError: the data are missing or damaged.
    """
    c = config.data
    training = e2e_nlg.read(c.source, c.train)
    if c.holdout:
        return e2e_nlg.split(training, c.holdout, c.seed)
    return training, e2e_nlg.read(c.source, c.validation)


def tokenize(pairs: Pairs, *, writer: Writer) -> Texts:
    """Converts lines to tokens, of which those of the references count.

    Raises:
      ValueError: the model has no such token.
    """
    end = writer.decoding.stop[0]
    prompts = encode_prompts(pairs.meanings, writer)
    references = writer.tokenizer.encode_batch_fast([f" {text}" for text in pairs.texts])
    rows = [(a, [*b.ids, end]) for a, b in zip(prompts, references, strict=True)]
    made = texts.make_texts(rows, pad_id=end)
    token_ids.check(made.ids, checkpoints.find_table(writer.loaded), writer.tokenizer)
    return made


def encode_prompts(meanings: Sequence[str], writer: Writer) -> list[list[int]]:
    """Converts meanings to the tokens that the model reads before it writes.

    Raises:
      ValueError: the model has no such token.
    """
    rows = writer.tokenizer.encode_batch_fast(list(meanings))
    prompts = [[*row.ids, writer.decoding.stop[0]] for row in rows]
    table = checkpoints.find_table(writer.loaded)
    for prompt in prompts:
        token_ids.check(prompt, table, writer.tokenizer)
    return prompts


def write(config: ConfigDict, writer: Writer, adapter: PyTree | None = None) -> ScoredTexts:
    """Writes a text for each meaning of the test file, and scores them.

    Args:
      config: config that names the file, and says how to write.
      writer: the model.
      adapter: adapter to merge into the model; None for the unadapted model.

    Raises:
      FileNotFoundError, ValueError: the data are missing or damaged, or texts are too long.
    """
    c, decode = config.data, config.decode
    whole = e2e_nlg.read(c.source, c.test)
    pairs = e2e_nlg.take_first(whole, c.test_meanings)
    references = e2e_nlg.group_references(pairs)
    base = writer.loaded if adapter is None else adapter_files.widen(writer.loaded)
    params = lora.merge(base.params, adapter or {})  # plain arrays, also of a quantized base
    rows = generation.write(
        writer.loaded,
        params,
        encode_prompts(list(references), writer),
        decoding=writer.decoding,
        batch_size=decode.batch_size,
        buckets=tuple(decode.buckets),
        seed=decode.seed,
    )
    texts = [writer.tokenizer.decode(row).strip() for row in rows]
    scores = bleu_and_chrf(texts, list(references.values()))
    written = dict(zip(references, texts, strict=True))
    return ScoredTexts(written, scores, len(set(whole.meanings)))
