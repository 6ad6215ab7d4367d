"""The report of a sweep, from runs whose results are known."""

import csv
import io
import json

import numpy as np
import pytest

import lora_jax as lora
from configs import common, quickstart_sweep
from experiments import recipes
from lora_jax.lowrank import LowRank
from lora_jax.sweeps import plots, report, results, sweep_dirs, trials
from lora_jax.training import workdirs

ACCURACY = {(1, 0): 0.5, (1, 1): 0.7, (4, 0): 0.8, (4, 1): 0.9, (16, 0): 0.6, (16, 1): None}


def adapter(rank, seed):
    draw = np.random.default_rng([rank, seed]).normal
    node = lambda: LowRank(draw(size=(24, rank)), draw(size=(rank, 24)), np.float64(2.0))
    return {"layer_0": {"kernel": node()}, "layer_1": {"kernel": node()}}


@pytest.fixture
def workdir(tmp_path):
    """Ranks 1, 4, 16 by two seeds; the last one diverged; alpha 16, or as the rank, or twice."""
    base = quickstart_sweep.get_config()
    sweep_dirs.claim(tmp_path, base, 0)
    for point in trials.make_trials(base, lambda add: [add(**v) for v in grid()], recipes.GLUE):
        config, folder = point.config, sweep_dirs.run_dir(tmp_path, point)
        workdirs.claim(folder, config)
        rank, seed = config.lora.rank, config.seed
        accuracy = ACCURACY[rank, seed]
        lines = [{"step": k, "epoch": k / 10, "loss": 1 / k} for k in range(1, 21)]
        if accuracy is not None:
            accuracy += 0.01 * (config.lora.alpha == 16)
            lines.append({"step": 20, "epoch": 2.0, "eval_loss": 0.5, "eval_accuracy": accuracy})
            lora.save(folder / "adapter", adapter(rank, seed), lora.LoRAConfig(rank=rank))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        status = "diverged" if accuracy is None else "finished"
        values = {"status": status, "steps": 20, "best_step": 20, "best_accuracy": accuracy}
        values |= {"best_loss": 0.5, "trainable_parameters": 1000 * rank, "seconds": 10.0 + seed}
        sweep_dirs.finish(tmp_path, point, values)
    return tmp_path


def grid():
    for point in common.product({"lora.rank": (1, 4, 16), "seed": (0, 1)}):
        for alpha in (point["lora.rank"], 2 * point["lora.rank"], 16):
            yield point | {"lora.alpha": float(alpha)}


def test_the_table_has_means_and_spreads(workdir):
    found = results.load(workdir)
    assert found.varied == ["lora.rank", "lora.alpha", "seed"] and found.unfinished == 0
    header, lines = results.table(found)
    assert header[:4] == ["rank", "alpha", "runs", "validation accuracy"]
    mean, spread = np.mean([0.81, 0.91]), np.std([0.81, 0.91], ddof=1)
    assert lines[0] == ["4", "16", "2", f"{mean:.4f} ± {spread:.4f}", "4,000", "10.5"]  # the best
    by_run = {tuple(line[:2]): line[2:4] for line in lines}
    assert by_run["16", "32"] == ["1, 1 diverged", "0.6000"]  # a diverged run has no accuracy
    assert len(lines) == 3 * 3 - 1  # rank 16 has alpha 16 by two rules
    assert results.to_markdown(found).count("\n") == 2 + len(lines)


def test_the_csv_has_every_run(workdir):
    rows = list(csv.DictReader(io.StringIO(results.to_csv(results.load(workdir)))))
    assert len(rows) == 16
    (row,) = [r for r in rows if (r["lora.rank"], r["lora.alpha"], r["seed"]) == ("4", "8.0", "1")]
    assert row["best_accuracy"] == "0.9" and row["status"] == "finished"
    assert row["trainable_parameters"] == "4000" and row["seconds"] == "11.0"


def test_lines_follow_the_rules_of_alpha(workdir):
    found = results.load(workdir)
    lines = dict(plots._lines(found, "lora.rank"))
    assert sorted(lines) == ["alpha = 16", "alpha = 2 × rank", "alpha = rank"]
    twice = {c.values["lora.rank"]: c.values["lora.alpha"] for c in lines["alpha = 2 × rank"]}
    assert twice == {1: 2, 4: 8, 16: 32}


def test_similarity_is_that_of_the_saved_adapters(workdir):
    found = results.load(workdir)
    _, (small, large) = plots._two_ranks(found)
    assert [row.values["lora.rank"] for row in (small, large)] == [4, 16]
    assert small.values["seed"] == large.values["seed"] == 0
    values = plots._similarity(small, large, "layer_1/kernel")
    a, b = (adapter(r, 0)["layer_1"]["kernel"].a for r in (4, 16))
    u, v = (np.linalg.svd(x)[0] for x in (a, b))
    want = np.linalg.norm(u[:, :3].T @ v[:, :7]) ** 2 / 3
    assert values[2, 6] == pytest.approx(want, abs=1e-5)
    _, (one, other) = plots._two_seeds(found)
    assert one.values["lora.rank"] == other.values["lora.rank"] == 4  # 16 has but one that finished
    assert one.values["lora.alpha"] == other.values["lora.alpha"]


def test_the_page_needs_no_other_file(workdir):
    (workdir / "runs" / "begun").mkdir()
    folder = report.write(workdir, results.load(workdir))
    assert sorted(p.name for p in folder.iterdir()) == [
        "against.png", "curves.png", "heat_map.png", "report.html", "results.csv",
        "similarity.png", "table.md",
    ]  # fmt: skip
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page and 'src="data:' in page and "<link" not in page
    assert "17 runs: 14 finished, 2 diverged, 1 not finished yet" in page
    assert "Best validation accuracy 0.9100: rank 4, alpha 16, seed 1" in page


def test_a_single_run_has_a_report(workdir):
    """With nothing varied there is nothing to draw but the curves."""
    keep = min((workdir / "runs").iterdir())
    for path in (workdir / "runs").iterdir():
        if path != keep:
            (path / "result.json").unlink()
    found = results.load(workdir)
    assert found.varied == [] and found.unfinished == 15
    assert [p.name for p in plots.draw_all(found)] == ["curves"]
    (keep / "result.json").unlink()
    with pytest.raises(ValueError, match="is finished yet"):
        results.load(workdir)
