"""Meaning representations to texts with a causal language model: model, data and scores.

As in the LoRA paper's code, a line is one text: the meaning, the token that ends a text, the
reference, and that token again. What comes after the meaning is to be learned.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import tokenizers
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.data import e2e_nlg, texts
from lora_jax.data.e2e_nlg import Pairs
from lora_jax.data.texts import Texts
from lora_jax.models import checkpoints
from lora_jax.models.decoding import Decoding
from lora_jax.models.families import CAUSAL_LM
from lora_jax.models.tokenizer import read_tokenizer
from lora_jax.tasks import adapter_files, from_config, generation, language_modeling
from lora_jax.tasks.text_metrics import bleu_and_chrf
from lora_jax.training import mesh, training_config
from lora_jax.training.task import Task

_LEAST = {"data.test_meanings": 0, "decode.batch_size": 1}


class Writer(NamedTuple):
    """A model that writes texts.

    Attributes:
      loaded: the model.
      tokenizer: its own, or the config's.
      decoding: how tokens are chosen; its first stop token parts meanings from texts.
    """

    loaded: checkpoints.Loaded
    tokenizer: tokenizers.Tokenizer
    decoding: Decoding


class Written(NamedTuple):
    """Texts for meanings, with their scores."""

    texts: dict[str, str]
    scores: dict[str, float]


def resolved(config: ConfigDict) -> ConfigDict:
    """A copy of the config; it leaves nothing open."""
    return config.copy_and_resolve_references()


def check(config: ConfigDict) -> None:
    """Finds mistakes in a config before anything is loaded or written.

    Raises:
      ValueError: the first that it finds.
    """
    language_modeling.check(config, _LEAST)
    generation.decoding(config, (0,))
    training_config.raise_problems(list(training_config.validation_problems(config)))


def load(config: ConfigDict, devices: mesh.Devices | None = None) -> Writer:
    """Loads the unadapted model.

    Args:
      config: config of the run.
      devices: devices of the run; by default those that the config describes.

    Raises:
      FileNotFoundError, ValueError: model or tokenizer is missing or damaged, or the two do not
        belong together.
    """
    c = config.model
    loaded = checkpoints.load(
        c.name,
        head=CAUSAL_LM,
        scan_layers=c.scan_layers,
        **from_config.load_options(config, devices),
    )
    if c.tokenizer:
        tokenizer = read_tokenizer(c.tokenizer)
    else:
        tokenizer = checkpoints.load_tokenizer(loaded.checkpoint)
    size, known = tokenizer.get_vocab_size(), loaded.model.config.vocab_size
    if size > known:
        raise ValueError(
            f"The tokeniser has {size} tokens, and {loaded.checkpoint.name} knows {known}: they do "
            "not belong together; set model.tokenizer."
        )
    stop = generation.stop_tokens(loaded, tokenizer)
    return Writer(loaded, tokenizer, generation.decoding(config, stop))


def make_task(
    config: ConfigDict, devices: mesh.Devices | None = None, *, writer: Writer | None = None
) -> tuple[Task, lora.LoRAConfig]:
    """Makes the task of learning to write, from the training lines.

    Args:
      config: config of the run.
      devices: devices of the run; by default those that the config describes.
      writer: the model, if it is loaded already.

    Raises:
      FileNotFoundError, ValueError: data that are missing or damaged, or do not fit the model.
    """
    c, writer = config.data, writer or load(config, devices)
    training = e2e_nlg.read(c.source, c.train)
    if c.holdout:
        training, evaluation = e2e_nlg.split(training, c.holdout, c.seed)
    else:
        evaluation = e2e_nlg.read(c.source, c.validation)
    made = functools.partial(tokenized, writer=writer)
    return language_modeling.make_task(config, writer.loaded, made(training), made(evaluation))


def tokenized(pairs: Pairs, *, writer: Writer) -> Texts:
    """The lines as tokens, of which those of the references count."""
    end = writer.decoding.stop[0]
    given = prompts(pairs.meanings, writer)
    learned = writer.tokenizer.encode_batch_fast([f" {text}" for text in pairs.texts])
    rows = [(a, [*b.ids, end]) for a, b in zip(given, learned, strict=True)]
    return texts.make_texts(rows, pad_id=end)


def prompts(meanings: Sequence[str], writer: Writer) -> list[list[int]]:
    """What the model reads before it writes."""
    found = writer.tokenizer.encode_batch_fast(list(meanings))
    return [[*row.ids, writer.decoding.stop[0]] for row in found]


def write(config: ConfigDict, writer: Writer, adapter: Any = None) -> Written:
    """Writes a text for each meaning of the test file, and scores them.

    Args:
      config: gives the file, and how to write.
      writer: the model.
      adapter: to put into it; None for the unadapted model.

    Raises:
      FileNotFoundError, ValueError: data that are missing or damaged, or texts that do not fit.
    """
    c, decode = config.data, config.decode
    pairs = e2e_nlg.take_first(e2e_nlg.read(c.source, c.test), c.test_meanings)
    right = e2e_nlg.group_references(pairs)
    params = writer.loaded.params
    if adapter is not None:
        params = lora.merge(adapter_files.widened(writer.loaded).params, adapter)
    rows = generation.write(
        writer.loaded,
        params,
        prompts(list(right), writer),
        decoding=writer.decoding,
        batch_size=decode.batch_size,
        buckets=tuple(decode.buckets),
        seed=decode.seed,
    )
    texts = [writer.tokenizer.decode(row).strip() for row in rows]
    scores = bleu_and_chrf(texts, list(right.values()))
    return Written(dict(zip(right, texts, strict=True)), scores)
