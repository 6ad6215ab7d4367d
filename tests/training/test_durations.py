"""Durations of a config, the schedules that they shape, and the pauses of a run."""

import ast
import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from experiments import recipes
from lora_jax.sweeps import scheduler, sweep_dirs, trials
from lora_jax.tasks import classification, glue_config
from lora_jax.training import durations, metric_writer, optimizer, train, training_config, workdirs
from lora_jax.training.durations import Plan
from tests.helpers import encoder_runs, tiny_task

config, task = encoder_runs.config, encoder_runs.task


@pytest.mark.parametrize("module", [durations, optimizer])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


STEPS = {
    100: 100, 0: 0, 7.0: 7, "100": None, "100 steps": 100, "1 step": 1, "1.5 epochs": 45,
    "1 epoch": 30, "0.5epochs": 15, "6%": 12, " 2.5 % ": 5, "100%": 200, ".5 epochs": 15,
    0.06: None, -1: None, "-1 steps": None, "1.5 steps": None, "6 percent": None, "": None,
    "epoch": None, "1e3 steps": None, None: None, float("nan"): None, float("inf"): None,
    (1,): None, "6 % of it": None,
}  # fmt: skip


@pytest.mark.parametrize("value, want", STEPS.items())
def test_steps(value, want):
    if want is not None:
        assert durations.to_steps(value, per_epoch=30, total=200) == want
        return
    with pytest.raises(ValueError, match='whole number of steps.*"1.5 epochs" or "6%"; got'):
        durations.to_steps(value, per_epoch=30, total=200)


def test_a_truth_value_is_no_duration():
    for value in (True, False):
        with pytest.raises(ValueError, match="got"):
            durations.parse(value)


@pytest.mark.parametrize(
    "value, want",
    [(0.06, 12), (0, 0), (0.0, 0), ("6%", 12), ("100 steps", 100), ("0.5 epochs", 15), (100, None),
     (1.0, None), ("100%", None), (-0.1, None), ("lots", None)],
)  # fmt: skip
def test_fractions(value, want):
    if want is not None:
        assert durations.to_steps(value, per_epoch=30, total=200, number="fraction") == want
        return
    with pytest.raises(ValueError, match=r"a number in \[0, 1\).*100 steps.*; got"):
        durations.to_steps(value, per_epoch=30, total=200, number="fraction")


def test_the_length_of_a_run_can_not_be_a_part_of_it():
    with pytest.raises(ValueError, match="'6%' is a part of the run, whose length"):
        durations.to_steps("6%", per_epoch=30)
    c = common.base_config()
    c.steps = "50%"
    with pytest.raises(ValueError, match="steps '50%' is a part of the run"):
        training_config.check(c)
    with pytest.raises(ValueError, match="^steps '50%' is a part"):
        durations.make_plan(c, 10)


def test_all_wrong_fields_are_in_one_message():
    c = common.base_config()
    c.steps, c.eval_every, c.checkpoint_every = "soon", 0, 0.5
    c.early_stopping.patience, c.early_stopping.min_delta = -1, -0.5
    with pytest.raises(ValueError) as error:
        training_config.check(c)
    for field in (
        "steps must be a whole number", "eval_every must not be 0", "checkpoint_every must be",
        "early_stopping.patience must be at least 0, got -1", "early_stopping.min_delta must be",
    ):  # fmt: skip
        assert field in str(error.value)


@pytest.mark.parametrize(
    "fields, want",
    [
        ({}, Plan(90, 30, 0)),  # as ever
        ({"steps": 70}, Plan(70, 30, 0)),
        ({"steps": "1.5 epochs", "eval_every": "20%"}, Plan(45, 9, 0)),
        ({"eval_every": 7, "checkpoint_every": "0.1 epochs"}, Plan(90, 7, 3)),
        ({"eval_every": "0.1%", "steps": "0.01 epochs"}, Plan(1, 1, 0)),  # at least a step
    ],
)
def test_plans(fields, want):
    c = encoder_runs.changed(common.base_config(), **fields)
    plan = durations.make_plan(c, 30)
    assert plan == want._replace(eval_at_start=True)
    evaluations = [k for k in range(1, plan.total + 1) if durations.is_evaluation_due(plan, k)]
    assert evaluations[-1] == plan.total
    assert evaluations[:-1] == list(range(plan.eval_every, plan.total, plan.eval_every))
    every = plan.checkpoint_every or plan.total
    saves = {k for k in range(1, plan.total + 1) if durations.is_checkpoint_due(plan, k)}
    assert saves == {*evaluations, *range(every, plan.total + 1, every)}


def make_settings(warmup, total):
    peak = {"learning_rate": 0.3, "weight_decay": 0.0, "clip_norm": 1.0}
    return optimizer.Settings(**peak, warmup_steps=warmup, total_steps=total)


def rates(decay, warmup=3, total=11):
    s = make_settings(warmup, total)
    return np.array([optimizer.schedule(s, decay)(k) for k in range(total + 3)])


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("decay", optimizer.DECAYS)
def test_schedules_are_optaxs_own(decay, warmup):
    """Also beyond the end; in float32."""
    after = {
        "linear": optax.linear_schedule(0.3, 0.0, 11 - warmup),
        "cosine": optax.cosine_decay_schedule(0.3, 11 - warmup),
        "none": optax.constant_schedule(0.3),
    }[decay]
    rise = optax.linear_schedule(0.0, 0.3, warmup or 1)
    want = optax.join_schedules([rise, after], [warmup])
    want = np.array([want(k) for k in range(14)])
    np.testing.assert_allclose(rates(decay, warmup), want, rtol=2e-6, atol=2e-8)
    if decay != "none":
        assert rates(decay, warmup)[11] == 0
    if decay == "cosine" and warmup:
        whole = optax.warmup_cosine_decay_schedule(0.0, 0.3, warmup, 11)
        want = [whole(k) for k in range(12)]
        np.testing.assert_allclose(rates(decay, warmup)[:12], want, rtol=2e-6, atol=2e-8)


def test_the_linear_schedule_keeps_its_bits():
    """The formula written out again; a fraction and a percentage are the same number of steps."""
    for warmup, total in ((0, 75), (5, 75), (36, 600)):
        for step in (0, 1, warmup, 17, total - 1, total):
            x = jnp.asarray(jnp.int32(step), float)
            rise, left = x / max(warmup, 1), (total - x) / max(total - warmup, 1)
            want = 0.3 * jnp.clip(jnp.where(x < warmup, rise, left), 0.0, 1.0)
            s = make_settings(warmup, total)
            assert optimizer.schedule(s, "linear")(jnp.int32(step)) == want
    for fraction in (0.06, 0.1, 500 / 26_290):
        c = common.base_config().optimizer
        c.warmup = fraction
        assert optimizer.settings(c, 26_290).warmup_steps == round(fraction * 26_290)


def test_a_schedule_of_arrays_is_that_of_numbers():
    """As a sweep has it."""
    s = make_settings(3, 11)
    arrays = jax.tree.map(jnp.asarray, s)
    for decay in optimizer.DECAYS:
        traced = jax.jit(lambda s, k, d=decay: optimizer.schedule(s, d)(k))
        found = [traced(arrays, jnp.int32(k)) for k in range(14)]
        np.testing.assert_allclose(found, rates(decay), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "warmup, message",
    [
        ("200 steps", "optimizer.warmup '200 steps' takes 200 steps, and the run has 75"),
        ("3 epochs", "optimizer.warmup '3 epochs' takes 75 steps, and the run has 75"),
        (2, r"optimizer.warmup must be a number in \[0, 1\)"),
        ("quick", "optimizer.warmup must be a number"),
    ],
)
def test_a_warm_up_that_never_ends(warmup, message):
    c = common.base_config().optimizer
    c.warmup = warmup
    with pytest.raises(ValueError, match=message):
        optimizer.settings(c, 75, per_epoch=25)
    c.warmup, c.decay = 0.0, "exponential"
    with pytest.raises(ValueError, match="optimizer.decay must be one of linear, cosine, none"):
        optimizer.check(c)


def test_the_fields_take_numbers_and_texts(config):
    """Through a lock, a copy and the command line's parser, and back from a run's config.json."""
    c = common.base_config().lock()
    for text in ("100 steps", "6%", "1.5 epochs", "0.06", "100"):
        try:
            value = ast.literal_eval(text)
        except SyntaxError:
            value = text
        c.optimizer.warmup = c.eval_every = value
        copied = c.copy_and_resolve_references()
        assert copied.optimizer.warmup == copied.eval_every == value
        assert workdirs.to_json_types(c)["eval_every"] == value
    with pytest.raises(TypeError):
        c.epochs = "3 epochs"
    glue_config.check(encoder_runs.changed(config, optimizer__warmup="2 steps", eval_every="50%"))


@pytest.mark.slow
def test_a_run_evaluates_and_saves_when_it_should(task, config, tmp_path):
    config = encoder_runs.changed(
        config, steps="2.5 epochs", eval_every=6, checkpoint_every="0.5 epochs",
        optimizer__warmup="5 steps", optimizer__decay="cosine", log_every=100,
    )  # fmt: skip
    saved = []
    save = train.checkpointing.save
    spy = lambda checkpoints, step, *rest: (saved.append(step), save(checkpoints, step, *rest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.checkpointing, "save", spy)
        encoder_runs.run(task, config, tmp_path)
    lines = metric_writer.read(tmp_path / "metrics.jsonl")
    assert [x["step"] for x in lines if "eval_loss" in x] == [6, 12, 18, 20]
    assert saved == [4, 6, 8, 12, 16, 18, 20]


@pytest.mark.slow
def test_a_run_of_a_sweep_pauses_as_it_does_alone(config, tmp_path):
    """Evaluations where the config wants them, and at the end; the same lines of the log."""
    base = encoder_runs.changed(
        config, steps=13, eval_every="0.5 epochs", checkpoint_every=5, log_every=50,
        eval_at_start=True,
    )  # fmt: skip
    values = [{"lora.rank": 1, "optimizer.warmup": "2 steps"}, {"lora.rank": 2, "seed": 1}]
    found = trials.make_trials(base, lambda add: [add(**v) for v in values], recipes.GLUE)
    sweep = scheduler.Sweep(
        trials=found,
        local_trials=found,
        recipe=recipes.GLUE,
        workdir=tmp_path / "sweep",
        parallel=2,
    )
    scheduler.run(sweep, base)
    for point in found:
        task, lora_config = classification.make_task(point.config)
        alone = tmp_path / point.id
        train.train(task, point.config, lora_config, alone)
        logged = [
            metric_writer.read(w / "metrics.jsonl")
            for w in (alone, sweep_dirs.run_dir(tmp_path / "sweep", point))
        ]
        assert [x["step"] for x in logged[0] if "eval_loss" in x] == [0, 4, 8, 12, 13]
        for one, other in zip(*logged, strict=True):
            assert list(one) == list(other)
            assert ("grad_norm" in one) == ("learning_rate" in one) == ("eval_loss" not in one)
            for key in one.keys() - {"examples_per_second"}:
                np.testing.assert_allclose(one[key], other[key], rtol=1e-4)
        assert sweep_dirs.read_result(tmp_path / "sweep", point)["steps"] == 13


def test_the_sweep_refuses_what_only_a_run_alone_can_do():
    base = encoder_runs.changed(
        common.base_config(), lora__targets=("query",), data__source="reviews"
    )
    values = [
        {"early_stopping.patience": 2}, {"guard.action": "skip"}, {"guard.spike": 4.0, "seed": 1},
    ]  # fmt: skip
    with pytest.raises(ValueError) as error:
        trials.make_trials(base, lambda add: [add(**v) for v in values], recipes.GLUE)
    assert "3 of the sweep's 3 runs are wrong" in str(error.value)
    assert "early_stopping.patience is 2" in str(error.value)
    assert str(error.value).count("leave guard.action at stop") == 2
    good = [{"optimizer.warmup": x, "optimizer.decay": d}
            for x in (0.1, "5 steps") for d in optimizer.DECAYS]  # fmt: skip
    found = trials.make_trials(base, lambda add: [add(**v) for v in good], recipes.GLUE)
    assert len(trials.group(found)) == 3  # the warm-up is a number of a run, the decay is not


@pytest.mark.parametrize("halt", [3, 6])
def test_an_evaluation_at_the_start(left_alone, tmp_path, halt):
    """It is that of the base; once, also if the run is broken off before or after a checkpoint."""
    made = tiny_task.task()

    def batch(step):
        if step == halt:
            raise InterruptedError
        return made.train_batch(step)

    with pytest.raises(InterruptedError):
        halting = dataclasses.replace(made, train_batch=batch)
        tiny_task.run(tmp_path, halting, eval_at_start=True)
    tiny_task.run(tmp_path, eval_at_start=True)
    found = tiny_task.outcome(tmp_path)
    first = [line for line in found.lines if line["step"] == 0]
    assert [line for line in found.lines if line["step"]] == left_alone.lines
    losses = []
    for some in made.eval_batches():
        logits = np.float64(some["x"]) @ np.float64(made.base["dense"]["kernel"])
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += list(-logits[np.arange(6), some["labels"]])
    assert [line["epoch"] for line in first] == [0]
    np.testing.assert_allclose(first[0]["eval_loss"], np.mean(losses), rtol=1e-6)
