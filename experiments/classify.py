r"""Fine-tunes a model to tell the classes of one's own texts apart, or to predict a number.

    python -m experiments.classify --config=configs/classify.py --config.data.source=news.csv \
        --workdir=runs/news

The source is a CSV, TSV, JSON or Parquet file, a folder with one for each split, or datasets:NAME
for a data set of Hugging Face. The columns of texts and labels are found by their names, or named
with --config.data.text (two with a comma between for pairs) and --config.data.label. A tenth of the
rows is held out to evaluate on, unless --config.data.validation names a file. Numbers are learned
with --config.data.regression=True. At the end the program prints how well each class is told from
the others, and writes that to classes.json and confusion.csv.
Resuming, --adapter and --eval_only are as in experiments.sst2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from experiments import base_configs, cli, finetuning, lazy, next_commands

with lazy.imports():
    import jax
    import numpy as np

    from experiments import recipes
    from lora_jax import files
    from lora_jax.data import examples as labelled
    from lora_jax.tasks import class_report, classifier, own_texts
    from lora_jax.training import workdirs

if TYPE_CHECKING:
    from lora_jax.data.examples import Examples
    from lora_jax.training.loop import Progress

CLASSES, CONFUSION = "classes.json", "confusion.csv"


def main(argv: list[str]) -> None:
    """Trains, says how well each class is told from the others, and what to do next."""
    config, workdir, devices = finetuning.prepare(argv, recipes.CLASSIFY)
    best = finetuning.fit(config, workdir, recipes.CLASSIFY, devices)
    if best is None:
        _report_classes(config, Path(config.adapter), None)
        return
    cli.say(_describe(config, best, workdir))
    adapter = workdir / workdirs.ADAPTER
    examples = _report_classes(config, adapter, workdir)
    print(
        "Next:\n"
        f"  {next_commands.predict(adapter, own_texts.find_example(examples))}\n"
        f"  {next_commands.export(adapter, workdir / 'merged')}"
    )


def _describe(config: ConfigDict, best: Progress, workdir: Path) -> str:
    score = "pearson" if config.data.regression else "accuracy"
    return (
        f"{finetuning.describe_change(workdir, best, score)}"
        f"best validation {score} {best.best_score:.4f} (loss {best.best_loss:.4f}) at "
        f"step {best.best_step}; {best.seconds / 60:.1f} minutes; "
        f"curves in {workdir / workdirs.CURVES}"
    )


def _report_classes(config: ConfigDict, adapter: Path, workdir: Path | None) -> Examples:
    """Prints the scores of each class, writes them into the workdir, if any.

    Returns:
      The examples that were evaluated on.
    """
    (examples,) = own_texts.load(config).evaluations
    if config.data.regression:
        return examples
    if jax.process_count() > 1:
        cli.say("Scores of the classes are computed by one process: --eval_only prints them.")
        return examples
    model = classifier.load(adapter, model=config.model.name)
    predictions = np.argmax(classifier.predict_examples(model, examples), axis=-1)
    labels = labelled.require_labels(examples)
    report = class_report.make_report(config.model.labels, labels, predictions)
    cli.say("\n".join(class_report.describe(report)))
    if workdir is None:  # the last line is JSON, as that of every evaluation
        cli.say(json.dumps({"adapter": str(adapter)} | class_report.to_json(report)))
    else:
        text = json.dumps(class_report.to_json(report), indent=2, ensure_ascii=False) + "\n"
        files.write_atomically(workdir / CLASSES, text.encode())
        files.write_atomically(workdir / CONFUSION, class_report.to_csv(report).encode())
        cli.say(f"scores of the classes in {workdir / CLASSES} and {workdir / CONFUSION}")
    return examples


if __name__ == "__main__":
    cli.run(main, lambda: base_configs.CLASSIFY)
