r"""Trains a small GPT-2 from nothing, as a plain language model, on the lines of the E2E data.

    python -m experiments.pretrain --config=configs/e2e_tiny_base.py --workdir=runs/e2e_base \
        --config.data.source=DIRECTORY_OF_E2E

Each meaning representation and each reference is a text of its own, and texts follow each other in
random order, as in GPT-2's own training: the model learns both languages, but not how
to turn the one into the other. The tokenizer is made from the same texts. ``WORKDIR/model`` is a
directory as Hugging Face has it. Training in full is a value of the adapter's config: the loop is
the one that adapts.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from experiments import base_configs, cli, environment, finetuning, lazy

with lazy.imports():
    import jax
    import tokenizers

    import lora_jax as lora
    from lora_jax import files
    from lora_jax.data import e2e_nlg, order, texts
    from lora_jax.models import checkpoints, families, gpt2, hub
    from lora_jax.tasks import language_modeling
    from lora_jax.training import train, workdirs

if TYPE_CHECKING:
    from lora_jax.data.texts import Texts

START, MODEL = "start", "model"
_END = "<|endoftext|>"
_LEAST = {"data.holdout": 1, "data.length": 2, "model.vocab_size": 257}


def main(argv: list[str]) -> None:
    """Makes tokenizer and model, trains, and saves."""
    resolve = lambda config: config.copy_and_resolve_references()
    config, workdir = finetuning.command_line(argv, resolve, base_configs.PRETRAIN)
    logging.getLogger("lora_jax").setLevel(logging.ERROR)
    if finetuning.is_eval_only():
        raise ValueError("--eval_only is for adapters, and this trains a model from nothing.")
    language_modeling.check(config, _LEAST)
    workdirs.check(workdir, config)
    pairs = e2e_nlg.read(config.data.source, config.data.train)
    parts = e2e_nlg.split(pairs, config.data.holdout, config.data.seed)
    training, evaluation = (_lines(part) for part in parts)
    tokenizer = make_tokenizer(training, config.model.vocab_size)
    loaded = make_model(workdir / START, config, tokenizer)
    packed = [pack(lines, tokenizer, config.data) for lines in (training, evaluation)]
    task, settings = language_modeling.make_task(config, loaded, *packed)
    with environment.open_store(config) as store:
        best = train.train(task, config, settings, workdir, say=cli.say, store=store)
    adapter, _ = lora.load(workdir / workdirs.ADAPTER, loaded.params, base=loaded.base_id)
    merged = lora.merge(loaded.params, adapter)
    checkpoints.save_hf(workdir / MODEL, merged, loaded.checkpoint, head=families.CAUSAL_LM)
    print(
        f"{finetuning.describe_change(workdir, best, 'loss')}"
        f"best validation loss {best.best_loss:.4f} at step {best.best_step}; "
        f"{best.seconds / 60:.1f} minutes; the model is in {workdir / MODEL}"
    )


def _lines(pairs: e2e_nlg.Pairs) -> list[str]:
    """Returns each meaning once, and the texts with a space before them, as after a meaning."""
    return [*dict.fromkeys(pairs.meanings), *(f" {text}" for text in pairs.texts)]


def make_tokenizer(lines: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Makes a byte-level BPE like GPT-2's from lines; the result depends on them alone."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        lines, vocab_size=vocab_size, special_tokens=[_END], show_progress=False
    )
    return tokenizers.Tokenizer.from_str(bpe.to_str())


def pack(lines: list[str], tokenizer: tokenizers.Tokenizer, c: ConfigDict) -> Texts:
    """Joins all lines in random order, each after the token that ends one, and cuts the whole."""
    end: Any = tokenizer.token_to_id(_END)  # `make_tokenizer` has added it
    rows = tokenizer.encode_batch_fast(lines)
    stream = [
        t
        for k in order.permutation(len(rows), c.seed, stream=order.LINES)
        for t in (end, *rows[k].ids)
    ]
    pieces = [stream[k : k + c.length] for k in range(0, len(stream), c.length)]
    return texts.make_texts([(p[:1], p[1:]) for p in pieces if len(p) > 1], pad_id=end)


def make_model(
    directory: Path, config: ConfigDict, tokenizer: tokenizers.Tokenizer
) -> checkpoints.Loaded:
    """Makes a model of random values, drawn by the config's seed, and writes it."""
    end = tokenizer.token_to_id(_END)
    sizes = {n: x for n, x in config.model.to_dict().items() if n in _SIZES}
    fields: dict[str, Any] = sizes | {"vocab_size": tokenizer.get_vocab_size()}
    shape = gpt2.GPT2Config(**fields)
    about = shape.to_hf() | {"bos_token_id": end, "eos_token_id": end}
    model = gpt2.GPT2LMHeadModel(shape)
    params = jax.jit(model.init)(
        jax.random.key(config.seed), jax.numpy.zeros(families.TOKENS.shape, int)
    )
    directory.mkdir(parents=True, exist_ok=True)
    files.write_atomically(directory / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    weights = (directory / hub.WEIGHTS,)
    here = hub.Checkpoint(str(directory), directory, json.loads(json.dumps(about)), weights, "made")
    checkpoints.save_hf(directory, params, here, head=families.CAUSAL_LM)
    options = {"remat": config.model.remat, "attention": config.model.attention}
    return checkpoints.load(directory, head=families.CAUSAL_LM, **options)


_SIZES = ("n_positions", "n_embd", "n_layer", "n_head", "resid_pdrop", "embd_pdrop", "attn_pdrop")


if __name__ == "__main__":
    cli.run(main, lambda: base_configs.PRETRAIN)
