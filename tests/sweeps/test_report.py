"""The report of a sweep, from runs whose results are known."""

import csv
import io
import json
import re

import jax
import numpy as np
import pytest

import lora_jax as lora
from configs import common, quickstart_sweep
from experiments import recipes
from lora_jax.lowrank import LowRank
from lora_jax.sweeps import (
    curve_plots,
    figures,
    plots,
    report,
    results,
    runs,
    sweep_dirs,
    trials,
)
from lora_jax.training import about, workdirs

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
    rows = plots._find_comparable(found)
    _, (small, large) = plots._two_ranks(rows)
    assert [row.values["lora.rank"] for row in (small, large)] == [4, 16]
    assert small.values["seed"] == large.values["seed"] == 0
    values = plots._similarity(small, large, "layer_1/kernel")
    a, b = (adapter(r, 0)["layer_1"]["kernel"].a for r in (4, 16))
    u, v = (np.linalg.svd(x)[0] for x in (a, b))
    want = np.linalg.norm(u[:, :3].T @ v[:, :7]) ** 2 / 3
    assert values[2, 6] == pytest.approx(want, abs=1e-5)
    _, (one, other) = plots._two_seeds(found, rows)
    assert one.values["lora.rank"] == other.values["lora.rank"] == 4  # 16 has but one that finished
    assert one.values["lora.alpha"] == other.values["lora.alpha"]


@pytest.mark.parametrize("kind", ["full", "of another kernel"])
def test_subspaces_of_runs_that_have_them(workdir, kind):
    """As in a sweep over methods: some runs have no factors, or not those of the others."""
    (found,) = (r for r in results.load(workdir).rows if r.score is not None and r.values["lora.alpha"] == 32)  # fmt: skip
    other = {"head": np.zeros((3, 4))}
    if kind != "full":
        other = {"head": adapter(16, 0)["layer_0"]}
    lora.save(found.directory / "adapter", other, lora.LoRAConfig(rank=16))
    sweep = results.load(workdir)
    rows = plots._find_comparable(sweep)
    assert found.directory not in [row.directory for row in rows]
    assert len(rows) == sum(row.score is not None for row in sweep.rows) - 1
    assert plots.draw_similarity(sweep) is not None


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
    links = set(re.findall(r'href="([^"]+)"', page))
    assert len(links) == 16 and all((folder / link).is_file() for link in links)
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


def single(path, score="accuracy", rank=4, value=0.75, ended=True, task="sst2", **changes):
    """The directory of a run by itself, as the training leaves it."""
    config = quickstart_sweep.get_config().unlock()
    config.lora.rank, config.task = rank, task
    config.update_from_flattened_dict({k.replace("__", "."): x for k, x in changes.items()})
    workdirs.claim(path, config)
    lines = [{"step": 0, "epoch": 0.0, "eval_loss": 0.9, f"eval_{score}": 0.5}]
    lines += [{"step": k, "epoch": k / 10, "loss": 1 / k} for k in range(1, 11)]
    lines.append({"step": 10, "epoch": 1.0, "eval_loss": 0.4, f"eval_{score}": value})
    (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    facts = {"score": score, "higher_is_better": score != "loss", "trainable_parameters": 1234}
    about.write(path, **facts, notes=["a <note>"])
    if ended:
        about.update(path, steps=10, seconds=90.0, end="all 10 steps are done")
    return path


def test_the_page_of_a_run(tmp_path):
    path = report.write_run(single(tmp_path / "größe & <rest>"))
    page = path.read_text()
    assert "<h1>größe &amp; &lt;rest&gt;</h1>" in page and "a &lt;note&gt;" in page
    assert "Best validation accuracy 0.7500 (0.5000 before training), at step 10." in page
    assert "Finished after 10 steps and 1.5 minutes" in page and "1,234" in page
    for text in (f"jax {jax.__version__}", "sentence-transformers/all-MiniLM-L6-v2", "viewport"):
        assert text in page
    assert "http" not in page and page.count("data:image/png;base64,") == 1


def test_a_run_under_way_and_one_of_an_earlier_version(tmp_path):
    running = single(tmp_path / "running", ended=False)
    assert "Running after 10 steps" in report.write_run(running).read_text()
    old = single(tmp_path / "old", score="pearson")
    (old / "about.json").unlink()
    assert runs.read_result(old)["score"] == "pearson" and runs.read_result(old)["best_step"] == 10
    empty = single(tmp_path / "empty")
    (empty / "metrics.jsonl").unlink()
    assert "no evaluation yet" in report.write_run(empty).read_text()


def test_runs_side_by_side(tmp_path, workdir):
    """Fields that change nothing of what is learned are no differences; a sweep is its runs."""
    one = single(tmp_path / "one", rank=2, log_every=3)
    other = single(tmp_path / "other", rank=8, value=0.85)
    (group,) = runs.compare([one, other, one])
    assert group.varied == ["lora.rank"] and len(group.rows) == 2
    assert len(runs.find(workdir)) == 16
    path = report.write_comparison(tmp_path / "report", [group])
    page = path.read_text()
    assert "2 runs; best validation accuracy 0.8500: other." in page
    assert 'href="../one/report/report.html"' in page
    assert (tmp_path / "one" / "report" / "report.html").exists()
    with pytest.raises(ValueError, match="neither a run nor a sweep"):
        runs.find(tmp_path / "report")


def test_runs_of_different_tasks_have_sections_of_their_own(tmp_path):
    one = single(tmp_path / "one")
    other = single(tmp_path / "other", task="stsb", score="pearson", value=-0.25)
    groups = runs.compare([one, other])
    assert [group.score_name for group in groups] == ["accuracy", "pearson"]
    page = report.write_comparison(tmp_path / "report", groups).read_text()
    assert "They are of 2 tasks or scores" in page
    assert "stsb" in page and "best validation pearson 0.5000: other." in page


def test_bars_and_axes_stay_within_the_score(tmp_path):
    below, above = figures.clip_bars([0.95, 0.5, 0.01], [0.1, 0.1, 0.1], "accuracy")
    np.testing.assert_allclose(below, [0.1, 0.1, 0.01])
    np.testing.assert_allclose(above, [0.05, 0.1, 0.1])
    _, (panel,) = figures.make_figure()
    panel.set_ylim(0.9, 1.3)
    figures.keep_in_range(panel, "accuracy")
    low, high = panel.get_ylim()
    assert low == 0.9 and 1.0 < high < 1.01
    panel.set_ylim(-5, 5)
    figures.keep_in_range(panel, "bleu")
    assert panel.get_ylim() == (-5, 5)


def test_curves_are_colored_by_what_separates_the_runs(workdir):
    """The accuracies above differ by rank, and hardly by alpha."""
    found = results.load(workdir)
    assert curve_plots.find_separating_field(found) == "lora.rank"
    means = {cell.values["lora.rank"]: cell for cell in results.cells(found, ["lora.rank"])}
    spread = np.mean([np.var(cell.scores) for cell in means.values() for _ in cell.scores])
    assert curve_plots._spread_within(found, "lora.rank") == pytest.approx(spread)
    alone = results.Results(found.rows[:1], [], 0)
    assert curve_plots.find_separating_field(alone) == ""


def test_truth_values_are_no_numbers(workdir):
    found = results.load(workdir)
    rows = [
        row._replace(values=row.values | {"lora.train_a": row.values["lora.rank"] > 1})
        for row in found.rows
    ]
    assert "lora.train_a" not in plots._numeric_fields(
        results.Results(rows, ["lora.train_a", "lora.rank", "seed"], 0)
    )
