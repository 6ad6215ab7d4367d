"""The definition of a sweep: points, groups, filters, shards, and mistakes in them."""

import itertools

import pytest

from configs import (
    common,
    quickstart_sweep,
    sst2_alpha_lr_sweep,
    sst2_methods_sweep,
    sst2_rank_sweep,
)
from experiments import recipes
from lora_jax.sweeps import scheduler, sweep_dirs, trials
from lora_jax.training import workdirs

BASE = quickstart_sweep.get_config()


def made(*values, base=BASE):
    return trials.make_trials(base, lambda add: [add(**v) for v in values], recipes.GLUE)


def test_a_point_is_the_base_with_some_fields_set():
    one, other = made({"lora.rank": 3, "seed": 7}, {"lora.alpha": 4})
    assert (one.config.lora.rank, one.config.seed, one.config.lora.alpha) == (3, 7, 16.0)
    assert (other.config.lora.rank, other.config.lora.alpha) == (8, 4.0)
    assert one.id != other.id and BASE.lora.rank == 8
    assert trials.varied_fields([one.config, other.config]) == ["lora.rank", "lora.alpha", "seed"]


def test_the_id_is_that_of_the_whole_config():
    (as_int,), (as_float,) = made({"lora.alpha": 4}), made({"lora.alpha": 4.0, "seed": 0})
    assert as_int.id == as_float.id  # one and the same run, however it is written
    other = quickstart_sweep.get_config().unlock()
    other.epochs = 9
    assert made({"lora.alpha": 4}, base=other.lock())[0].id != as_int.id


@pytest.mark.parametrize(
    "config, runs, programs",
    # Ranks 1, 2, 4, 64 have three alphas each; 8 and 16 have two, as 2·8 = 16 = 1·16.
    [
        (quickstart_sweep, 12, 1),
        (sst2_rank_sweep, (4 * 3 + 2 + 2) * 3, 1),
        (sst2_alpha_lr_sweep, 75, 1),
        # LoRA, rank-stabilized, EVA and LoRA+ share one, and so do the offsets.
        (sst2_methods_sweep, 162, 8),
    ],
)
def test_sweeps_of_this_project(config, runs, programs):
    found = trials.make_trials(config.get_config(), config.sweep, recipes.GLUE)
    assert len(found) == len({p.id for p in found}) == runs
    assert len(trials.group(found)) == programs


def test_the_small_rank_sweep():
    found = trials.make_trials(sst2_rank_sweep.get_config(), sst2_rank_sweep.sweep, recipes.GLUE)
    small = trials.select(found, ["lora.rank=1,4,16", "lora.alpha=2,8,16,32", "seed=0,1"])
    pairs = {(p.config.lora.rank, p.config.lora.alpha) for p in small}
    assert pairs == {(1, 2), (1, 16), (4, 8), (4, 16), (16, 16), (16, 32)} and len(small) == 12


MISTAKES = {
    "unknown field": ({"lora.rnk": 4}, "lora.rnk.*did you mean.*lora.rank"),
    "section": ({"lora": {"rank": 4}}, "unknown config field 'lora'"),
    "wrong type": ({"lora.rank": "four"}, "rank"),
    "out of range": ({"lora.rank": 0}, "rank must be a whole number of at least 1, got 0"),
    "rate": ({"optimizer.learning_rate": -1.0}, "learning_rate must be positive"),
    "batch": ({"batch_size": 0}, "batch_size must be at least 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_point(name):
    values, says = MISTAKES[name]
    with pytest.raises(ValueError, match=f"1 of the sweep's 2 runs are wrong: add.*{says}"):
        made({"lora.rank": 1}, values)


def test_all_mistakes_are_in_one_message():
    with pytest.raises(ValueError, match="3 of the sweep's 3 runs.*rnk.*alpa.*epoch"):
        made({"lora.rnk": 4}, {"lora.alpa": 1.0}, {"epoch": 3})


def test_no_runs_and_no_sweep(tmp_path):
    with pytest.raises(ValueError, match="adds no run"):
        made()
    path = tmp_path / "config.py"
    path.write_text("def get_config(): pass\n")
    with pytest.raises(ValueError, match="defines no sweep"):
        trials.load_sweep(path)


def test_groups_share_base_data_and_shapes():
    axes = {"lora.rank": (1, 2), "batch_size": (8, 16), "seed": range(2), "lora.dropout": (0, 0.1)}
    found = made(*common.product(axes))
    groups = trials.group(found)
    assert [len(g) for g in groups] == [8, 8]
    assert {len({p.config.batch_size for p in g}) for g in groups} == {1}
    for field, value in [("data.seed", 1), ("model.dtype", "bfloat16"), ("lora.method", "dora")]:
        assert len(trials.group(made({}, {field: value}))) == 2
    patterns = made({}, {"lora.rank_pattern": {"query": 3}}, {"lora.rank_stabilized": True})
    assert len(patterns) == 3 and len(trials.group(patterns)) == 1


def test_shards_share_the_runs():
    found = made(*common.product({"seed": range(11)}))
    for n in (1, 2, 3, 11, 12):
        parts = [trials.shard(found, f"{i}/{n}") for i in range(1, n + 1)]
        ids = [p.id for part in parts for p in part]
        assert sorted(ids) == sorted(p.id for p in found)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    more = [*found, *made({"seed": 99})]  # what is added moves nothing
    assert trials.shard(more, "1/2")[:6] == trials.shard(found, "1/2")
    for text in ("0/2", "3/2", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(ValueError, match="give i/n"):
            trials.shard(found, text)


@pytest.mark.parametrize("text", ["6e-05", "0.00006", "6e-5", " 0.000060"])
def test_numbers_are_chosen_however_they_are_written(text):
    found = made({"optimizer.learning_rate": 6e-5}, {"optimizer.learning_rate": 1e-3})
    assert trials.select(found, [f"optimizer.learning_rate={text}"]) == found[:1]
    assert trials.select(found, ["optimizer.b_rate=1.0", "lora.rank=8.0"]) == found


@pytest.mark.parametrize(
    "text, says",
    [
        ("seed", "give a config field and its values"),
        ("sed=1", "give a config field"),
        ("seed=0,7", "no run has seed 7; there are 0, 1"),
    ],
)
def test_filters_that_can_not_be_meant(text, says):
    with pytest.raises(ValueError, match=says):
        trials.select(made({"seed": 0}, {"seed": 1}), [text])


def test_a_directory_is_for_one_sweep(tmp_path):
    sweep_dirs.claim(tmp_path / "sweep", BASE, 0)
    sweep_dirs.claim(tmp_path / "sweep", BASE, 0)
    other = quickstart_sweep.get_config().unlock()
    other.epochs = 9
    with pytest.raises(ValueError, match="epochs is 2 there and 9 here"):
        sweep_dirs.check(tmp_path / "sweep", other, 0)
    with pytest.raises(ValueError, match="halving is 0 there and 3 here"):
        sweep_dirs.check(tmp_path / "sweep", BASE, 3)
    with pytest.raises(ValueError, match="is that of a sweep"):
        workdirs.check(tmp_path / "sweep", BASE)
    workdirs.claim(tmp_path / "run", BASE)
    with pytest.raises(ValueError, match="holds a single run"):
        sweep_dirs.check(tmp_path / "run", BASE, 0)
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep\.json is damaged"):
        sweep_dirs.check(tmp_path / "sweep", BASE, 0)


def test_two_processes_do_not_do_the_same_runs(tmp_path):
    again = pytest.raises(ValueError, match="Another process")
    with sweep_dirs.lock(tmp_path, "1/2"), again, sweep_dirs.lock(tmp_path, "1/2"):
        pass
    with sweep_dirs.lock(tmp_path, "1/2"), sweep_dirs.lock(tmp_path, "2/2"):
        pass
    with sweep_dirs.lock(tmp_path, "1/2"):
        pass


@pytest.mark.parametrize("halving, runs", [(2, 8), (3, 12), (3, 27), (4, 5), (3, 2)])
def test_rungs(halving, runs):
    """One run is left at the end, and each rung comes later than the one before."""
    found = made(*common.product({"seed": range(runs)}))
    sweep = scheduler.Sweep(
        trials=found, local_trials=[], recipe=None, workdir=None, halving=halving
    )
    rungs = scheduler.rung_count(sweep)
    left = [runs, *(scheduler.survivors(runs, halving, r) for r in range(1, rungs + 1))]
    assert left[-1] == 1 and all(b < a <= b * halving for a, b in itertools.pairwise(left))
    for total in (halving**rungs, 1000):
        steps = [scheduler.rung_step(total, halving, rungs, r) for r in range(1, rungs + 1)]
        assert [0, *steps, total] == sorted({0, *steps, total})


def test_initial_values_of_one_class_of_nodes_share_a_program():
    """Offsets have two arrays more than plain LoRA, and so another program."""
    runs = made(*({"lora.init": x} for x in ("uniform", "pissa", "gaussian", "olora", "lora_ga")))
    runs += made(*({"lora.init": x, "lora.method": "dora"} for x in ("pissa", "eva", "milora")))
    found = [[trial.config.lora.init for trial in group] for group in trials.group(runs)]
    assert found == [
        ["uniform", "gaussian"], ["pissa", "olora", "lora_ga"], ["pissa", "milora"], ["eva"],
    ]  # fmt: skip
