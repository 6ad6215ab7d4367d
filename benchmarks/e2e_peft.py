"""A recipe for the E2E data in PEFT: the same base, batches and rules, by torch.

    python -m benchmarks.e2e_peft --config=configs/smollm2_e2e.py --source=DIRECTORY_OF_E2E

Needs the extra `parity`. It prints one JSON object: BLEU and chrF of what the adapted model writes
for the meanings of the test file, the validation loss, and seconds of wall clock and processor.
``python -m experiments.e2e_nlg`` with the same config is this library's side.

The tokens, the order of the batches, the schedule of the learning rate and the scores are those of
this library; model, adapter, gradients, AdamW and beam search are those of torch, transformers and
PEFT, on weights that transformers decodes to float32. PEFT draws an adapter of its own, and the
rule against repeated n-grams looks at new tokens alone, as here.
"""

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lora_jax.data import e2e_nlg, texts
from lora_jax.data.batches import steps_per_epoch
from lora_jax.models import checkpoints, generate
from lora_jax.tasks import e2e
from lora_jax.tasks.text_metrics import bleu_and_chrf
from lora_jax.training import optimizer

Model = Any  # a module of torch, which only this program needs


def read_config(path: str) -> ConfigDict:
    """Runs a config file."""
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().unlock()


def check(config: ConfigDict) -> None:
    """Raises ValueError for what this program does not do."""
    plain = {"label_smoothing": 0.0, "accumulate": 1, "adapter": ""}
    if wrong := {name: config[name] for name, x in plain.items() if config[name] != x}:
        raise ValueError(f"{wrong} are not for this program, which takes {plain}.")


def load(config: ConfigDict, checkpoint: checkpoints.Checkpoint) -> Model:
    """Loads the base, decoded to float32, with PEFT's adapter."""
    import peft
    import torch
    import transformers

    torch.manual_seed(config.seed)
    file = checkpoint.weights[0]
    options = {"gguf_file": file.name} if file.suffix == ".gguf" else {}
    base = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, **options
    )
    c = config.lora
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=c.rank, lora_alpha=c.alpha, lora_dropout=c.dropout,
        target_modules=list(c.targets),
    )  # fmt: skip
    return peft.get_peft_model(base, settings)


def token_loss(model: Model, batch: dict[str, np.ndarray]) -> tuple[Any, float]:
    """Computes the sum of the losses of the tokens that count, and their number."""
    import torch

    ids, mask = (torch.from_numpy(batch[n]).long() for n in ("input_ids", "attention_mask"))
    counts = torch.from_numpy(batch["counts"] * batch["weights"][:, None])[:, 1:]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * counts.flatten()).sum(), float(counts.sum())


def train(config: ConfigDict, model: Model, batches: Callable, steps: int) -> None:
    """Trains the adapter by the config's rules."""
    import torch

    c = config.optimizer
    rate = optimizer.schedule(optimizer.settings(c, steps), c.decay)
    trained = [p for p in model.parameters() if p.requires_grad]
    rule = torch.optim.AdamW(trained, lr=c.learning_rate, weight_decay=c.weight_decay)
    model.train()
    for step in range(steps):
        for group in rule.param_groups:
            group["lr"] = float(rate(step))
        loss, count = token_loss(model, batches(step))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, c.clip_norm)
        rule.step()
        rule.zero_grad()


def evaluate(model: Model, data: texts.Texts, config: ConfigDict) -> float:
    """Computes the mean loss of the tokens to learn."""
    import torch

    model.eval()
    buckets = tuple(config.data.buckets)
    batches = texts.eval_batches(data, batch_size=config.eval_batch_size, buckets=buckets)
    with torch.no_grad():
        sums = [token_loss(model, batch) for batch in batches]
    return sum(float(loss) for loss, _ in sums) / sum(count for _, count in sums)


def write(model: Model, prompts: Sequence[list[int]], config: ConfigDict, end: int) -> list[list]:
    """Writes a text for each prompt by beam search, the shortest prompts first."""
    import torch
    import transformers

    class NewTokens(transformers.NoRepeatNGramLogitsProcessor):
        """The rule against repeated n-grams, for new tokens alone."""

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return super().__call__(input_ids[:, start:], scores)

    c = config.decode
    model.eval()
    model.generation_config = transformers.GenerationConfig(
        num_beams=c.beams, max_new_tokens=c.max_new_tokens, length_penalty=c.length_penalty,
        early_stopping=c.early_stopping, do_sample=False, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
    found: dict[int, list[int]] = {}
    for first in range(0, len(order), c.batch_size):
        rows = order[first : first + c.batch_size]
        start = max(len(prompts[k]) for k in rows)
        batch = generate.pad_left([prompts[k] for k in rows], pad_id=end, length=start)
        ids, mask = (torch.from_numpy(np.asarray(batch[n])).long() for n in batch)
        rule = transformers.LogitsProcessorList([NewTokens(c.no_repeat_ngram)])
        with torch.no_grad():
            written = model.generate(ids, attention_mask=mask, logits_processor=rule)
        found |= dict(zip(rows, written[:, start:].tolist(), strict=True))
    return [[token for token in found[k] if token != end] for k in range(len(prompts))]


def run(config: ConfigDict, options: argparse.Namespace) -> dict[str, float]:
    """Trains, evaluates, writes and scores."""
    check(config)
    c = config.data
    c.source = options.source
    writer = e2e.load(config)
    data, evaluation = (e2e.tokenize(pairs, writer=writer) for pairs in e2e.read_parts(config))
    per_epoch = steps_per_epoch(len(data.offsets) - 1, config.batch_size)
    steps = options.steps or config.epochs * per_epoch
    batches = lambda step: texts.train_batch(
        data, step, seed=c.seed, batch_size=config.batch_size, buckets=tuple(c.buckets),
        alike=c.alike,
    )  # fmt: skip
    model, clock = load(config, writer.loaded.checkpoint), Clock()
    train(config, model, batches, steps)
    row = {"steps": steps, **clock.read("train")}
    row["validation_loss"] = round(evaluate(model, evaluation, config), 4)
    pairs = e2e_nlg.take_first(e2e_nlg.read(c.source, c.test), options.meanings)
    references, clock = e2e_nlg.group_references(pairs), Clock()
    prompts = e2e.encode_prompts(list(references), writer)
    rows = write(model.merge_and_unload(), prompts, config, writer.decoding.stop[0])
    found = [writer.tokenizer.decode(tokens).strip() for tokens in rows]
    scores = bleu_and_chrf(found, list(references.values()))
    return row | {"meanings": len(rows), **scores, **clock.read("write")}


class Clock:
    """Seconds of wall clock and processor (all threads) since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def read(self, name: str) -> dict[str, float]:
        """Returns the seconds so far, rounded, under two names."""
        now = time.perf_counter(), time.process_time()
        return {
            f"{name}_{kind}": round(b - a, 1)
            for kind, a, b in zip(("s", "cpu_s"), self._start, now, strict=True)
        }


def main() -> None:
    """Prints the row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--source", required=True, help="directory of the E2E data")
    parser.add_argument("--steps", type=int, default=0, help="0 for those of the config")
    parser.add_argument("--meanings", type=int, default=0, help="of the test file; 0 for all")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    print(json.dumps(run(read_config(options.config), options)))


if __name__ == "__main__":
    main()
