"""Sweeps of other programs than GLUE's: they get a recipe, and know nothing else of the task."""

import numpy as np
import pytest

from configs import instruct_llama
from experiments import recipes
from lora_jax.sweeps import report, results, scheduler, trials
from lora_jax.tasks import from_config
from lora_jax.training import train
from lora_jax.training.task import Score
from tests.helpers import tiny_llama

FIELDS = {
    "model.dtype": "float32", "data.holdout": 6, "data.max_length": 48, "batch_size": 4,
    "eval_batch_size": 2, "epochs": 1, "lora.dropout": 0.0,
}  # fmt: skip
RATES = (0.0001, 0.01, 0.003)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    tiny_llama.checkpoint(root / "model")
    tiny_llama.data(root / "data.jsonl")
    config = instruct_llama.get_config()
    places = {"model.name": str(root / "model"), "data.train": str(root / "data.jsonl")}
    config.update_from_flattened_dict(FIELDS | places)
    return config


@pytest.fixture(scope="module")
def swept(base, tmp_path_factory):
    """Three runs of different ranks and rates on conversations."""
    workdir = tmp_path_factory.mktemp("sweep")

    def sweep(add):
        for rank, rate in zip((2, 4, 2), RATES, strict=True):
            add(**{"lora.rank": rank, "optimizer.learning_rate": rate})

    points = trials.make_trials(base, sweep, recipes.INSTRUCT)
    asked = scheduler.Sweep(
        trials=points, local_trials=points, recipe=recipes.INSTRUCT, workdir=workdir, parallel=3
    )
    compiled = scheduler.run(asked, base)
    assert sum(compiled.values()) == 2  # one step and one evaluation for all
    return workdir, points


@pytest.mark.slow
def test_each_run_is_the_run_alone(swept, tmp_path):
    workdir, points = swept
    rows = {row.values["optimizer.learning_rate"]: row for row in results.load(workdir).rows}
    for point in points[1:]:
        task, lora_config = recipes.INSTRUCT.make_task(point.config)
        assert lora_config == from_config.lora_config(point.config)
        alone = train.train(task, point.config, lora_config, tmp_path / point.id)
        found = rows[point.config.optimizer.learning_rate].score
        np.testing.assert_allclose(found, alone.best_loss, rtol=1e-4)  # sums in another order


@pytest.mark.slow
def test_the_lowest_loss_is_the_best(swept):
    workdir, _ = swept
    found = results.load(workdir)
    assert found.score == Score("loss", higher_is_better=False)
    losses = {row.values["optimizer.learning_rate"]: row.score for row in found.rows}
    order = sorted(RATES, key=losses.get)
    assert order[0] != RATES[0]
    header, lines = results.table(found)
    column = header.index("learning rate")
    assert [float(line[column]) for line in lines] == order
    assert f"Best validation loss {losses[order[0]]:.4f}" in report.summarize(found)
    folder = report.write(workdir, found)
    assert (folder / "report.html").stat().st_size > 10_000
