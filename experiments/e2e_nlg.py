r"""Adapts GPT-2 to write texts for meaning representations, and scores what it writes.

    python -m experiments.e2e_nlg --config=configs/gpt2_medium_e2e.py --workdir=runs/e2e \
        --config.data.source=DIRECTORY_OF_E2E

It trains, then writes a text for each meaning of the test file by beam search, and prints BLEU and
chrF of the unadapted model and of the adapted one. Run again with the same config, it goes on where
it stopped. With --adapter it starts from a trained adapter, of this library or in PEFT's format.
With --evaluate nothing is trained: the unadapted model is scored, and the adapter if one is given.
With --eval_only nothing is trained or written: the loss of the run's best adapter, or of that of
--adapter, on the validation texts.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from experiments import base_configs, cli, finetuning, lazy

with lazy.imports():
    import jax

    from experiments import recipes
    from lora_jax import files
    from lora_jax.tasks import adapter_files, e2e
    from lora_jax.training import workdirs

if TYPE_CHECKING:
    from lora_jax.tasks.e2e import ScoredTexts, Writer

_EVALUATE = flags.DEFINE_bool("evaluate", False, "Train nothing; score the model as it is.")

PyTree = Any
SCORES, TEXTS = "scores.json", "texts.jsonl"


def main(argv: list[str]) -> None:
    """Trains, writes and scores."""
    config, workdir, devices = finetuning.prepare(argv, recipes.E2E)
    if finetuning.is_eval_only() and _EVALUATE.value:
        raise ValueError("--eval_only is the validation loss alone; leave it out with --evaluate.")
    if _EVALUATE.value and jax.process_count() > 1:
        raise ValueError("Texts are written by one process: leave out the flags for several.")
    if not config.adapter and not _EVALUATE.value:
        workdirs.check(workdir, config)  # before the model is loaded
    writer, directory = e2e.load(config, devices), config.adapter
    if not _EVALUATE.value:
        recipe = recipes.E2E._replace(make_task=functools.partial(e2e.make_task, writer=writer))
        best = finetuning.fit(config, workdir, recipe, devices)
        if best is None:
            return
        directory = workdir / workdirs.ADAPTER
        cli.say(
            f"{finetuning.describe_change(workdir, best, 'loss')}"
            f"best validation loss {best.best_loss:.4f} at step {best.best_step}; "
            f"{best.seconds / 60:.1f} minutes; curves in {workdir / workdirs.CURVES}"
        )
    if jax.process_count() > 1:
        print(f"Next: let one process score it, with --evaluate --adapter={directory}")
        return
    results = {}
    if config.decode.unadapted or not directory:
        results["unadapted"] = _write_and_score("unadapted", config, writer)
    if directory:
        adapter, _ = adapter_files.load(directory, writer.loaded)
        results["adapted"] = _write_and_score("adapted", config, writer, adapter)
    _report(workdir, results)
    if directory:
        print(
            f"Next:\n  python -m experiments.export --adapter={directory} "
            f"--out={workdir / 'merged'} --merged"
        )


def _write_and_score(
    name: str, config: ConfigDict, writer: Writer, adapter: PyTree | None = None
) -> ScoredTexts:
    written = e2e.write(config, writer, adapter)
    scores = ", ".join(f"{score} {x:.2f}" for score, x in written.scores.items())
    of_all = f" of {written.total}" if len(written.texts) < written.total else ""
    print(f"{name}: {scores} ({len(written.texts)}{of_all} meanings)", flush=True)
    return written


def _report(workdir: Path, results: dict[str, ScoredTexts]) -> None:
    """Writes scores and texts into files."""
    workdir.mkdir(parents=True, exist_ok=True)
    scores = {name: written.scores for name, written in results.items()}
    files.write_atomically(workdir / SCORES, (json.dumps(scores, indent=2) + "\n").encode())
    meanings = next(iter(results.values())).texts
    lines = [
        {"meaning": meaning} | {name: written.texts[meaning] for name, written in results.items()}
        for meaning in meanings
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write_atomically(workdir / TEXTS, text.encode())
    print(f"texts in {workdir / TEXTS}, scores in {workdir / SCORES}")


if __name__ == "__main__":
    cli.run(main, lambda: base_configs.E2E)
