"""The guard: what is no number changes nothing, says where it came from, and stops or is skipped."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax import paths
from lora_jax.lowrank import LowRank
from lora_jax.tasks import from_config
from lora_jax.training import (
    checkpointing,
    metric_logger,
    metric_writer,
    metrics,
    nan_guard,
    train,
    training_config,
    workdirs,
)
from lora_jax.training.state import initial_state, unwrap_key
from lora_jax.training.step import PLAIN, make_train_step, step_options
from tests.helpers import encoder_runs

PER_EPOCH = encoder_runs.PER_EPOCH
config, task = encoder_runs.config, encoder_runs.task  # the same tiny model and data


def run(task, config, workdir):
    return train.train(task, config, from_config.lora_config(config), workdir, say=print)


def poisoned(task, steps):
    batch = lambda number: encoder_runs.spoilt(task.train_batch(number), number in steps)
    return dataclasses.replace(task, train_batch=batch)


@functools.cache
def spoil(bad):
    """The identity, whose gradient is no number where ``bad``."""

    @jax.custom_vjp
    def fn(x, on):
        return x

    fn.defvjp(
        lambda x, on: (x, on), lambda on, g: (g * jnp.where(on, bad, 1.0).astype(g.dtype), None)
    )
    return fn


def poisoned_gradient(task, step, bad=jnp.nan):
    """The same task, whose loss is finite while its gradient is not, at one step."""

    def apply(params, batch, key):
        logits = task.apply(params, batch, key)
        if key is None:
            return logits
        return spoil(float(bad))(logits, batch["bad"][0] > 0)

    batch = lambda k: task.train_batch(k) | {"bad": np.full(8, k == step, np.float32)}
    return dataclasses.replace(task, train_batch=batch, apply=apply)


def lines(workdir):
    return metric_writer.read(workdir / "metrics.jsonl")


def adapter(workdir, task):
    return lora.load(workdir / "adapter", task.base)[0]


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def step(task, config):
    """A compiled guarded step, at which there is a spike's limit, and a state to copy."""
    config = encoder_runs.changed(config, guard__spike=3.0)
    state, tx = initial_state(task, config, from_config.lora_config(config))
    compiled = make_train_step(task, tx, 0.1, step_options(config))
    fresh = lambda: jax.tree.map(lambda x: x.copy(), state)
    return compiled, fresh, tx


@pytest.mark.rounding
@pytest.mark.slow
def test_a_healthy_run_keeps_its_bits(task, config, step):
    """Guarded or not, step for step: adapter, moments, sums."""
    guarded, fresh, tx = step
    plain = make_train_step(task, tx, 0.1)
    one, other = fresh(), fresh()
    for k in range(12):
        one, (sums, verdict) = guarded(one, task.base, task.train_batch(k))
        other, want = plain(other, task.base, task.train_batch(k))
        assert verdict.bad_leaf == -1 and verdict.skips == 0
        same(sums, want)
    same((one.adapter, one.opt_state, one.step), (other.adapter, other.opt_state, other.step))


def test_a_bad_step_changes_nothing_but_the_clock(task, step):
    guarded, fresh, _ = step
    state, _ = guarded(fresh(), task.base, task.train_batch(0))
    before = jax.tree.map(lambda x: x.copy(), state)
    state, (_, verdict) = guarded(state, task.base, encoder_runs.spoilt(task.train_batch(1)))
    assert verdict.skips == 1 and not np.isfinite(verdict.loss) and state.step == 2
    same(state.adapter, before.adapter)
    clocks = lambda tree: [
        x
        for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
        if isinstance(x, optax.ScaleByScheduleState)
    ]
    assert [int(x.count) for x in clocks(state.opt_state)] == [2]  # the learning rate goes on
    moments = lambda tree: [x for x in jax.tree.leaves(tree) if x.ndim]
    same(moments(state.opt_state), moments(before.opt_state))
    state, (_, verdict) = guarded(state, task.base, task.train_batch(2))
    assert verdict.skips == 0 and state.health.skips == 0


@pytest.mark.parametrize(
    "action, bad", [("stop", np.inf), pytest.param("skip", np.nan, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_gradient_that_is_not_finite(task, config, tmp_path, action, bad):
    """The loss is; the error names the first leaf in the adapter's order."""
    names = list(paths.named_leaves(initial_state(
        task, config, from_config.lora_config(config))[0].adapter))  # fmt: skip
    faulty = poisoned_gradient(task, PER_EPOCH + 2, bad)
    config = encoder_runs.changed(config, guard__action=action)
    if action == "stop":
        with pytest.raises(FloatingPointError) as error:
            run(faulty, config, tmp_path)
        said = str(error.value)
        assert f"The gradient is not finite at step {PER_EPOCH + 3}: training stopped" in said
        assert f"first at {names[0]};" in said  # all are
        assert f"kept in {tmp_path / 'adapter'}" in said
        assert f"the newest checkpoint, of step {PER_EPOCH}, in {tmp_path / 'checkpoints'}" in said
        assert encoder_runs.finite(adapter(tmp_path, task))
        return
    run(faulty, config, tmp_path)
    assert [x["step"] for x in lines(tmp_path) if "skipped" in x] == [PER_EPOCH + 3]
    assert [x["step"] for x in lines(tmp_path) if "eval_loss" in x] == [8, 16, 24]
    assert encoder_runs.finite(adapter(tmp_path, task))


def test_the_first_offending_path():
    """One leaf alone, of any kind; a scale is not trained, and so is not looked at."""
    node = lambda: LowRank(jnp.ones((3, 2)), jnp.ones((2, 4)), jnp.ones(()))
    tree = {"x": {"kernel": node(), "bias": jnp.ones(4)}, "y": {"kernel": node()}}
    names = list(paths.named_leaves(tree))
    assert names[:3] == ["x/bias", "x/kernel/a", "x/kernel/b"]
    policy = nan_guard.Policy("skip", 10, 0.0, names)
    for k, name in enumerate(names):
        leaves = jax.tree.leaves(tree)
        leaves[k] = leaves[k].at[(0,) * leaves[k].ndim].set(jnp.nan)
        grads = jax.tree.unflatten(jax.tree.structure(tree), leaves)
        verdict, health = nan_guard.judge(
            nan_guard.initial_health(), jnp.float32(0.5), grads, spike=0.0
        )
        if name.endswith("scale"):
            assert verdict.skips == 0
            continue
        want = f"The gradient is not finite at step 7, first at {name}"
        assert nan_guard.check_step(policy, 7, jax.device_get(verdict)) == want
        assert health.skips == 1 and health.count == 0


@pytest.mark.rounding
@pytest.mark.slow
def test_skipping_is_as_if_the_batch_had_not_been(task, config, tmp_path, step):
    """The run goes on, by hand and by the loop, to the same bits; its log has a line for the step."""
    bad = {3, 4, PER_EPOCH}
    config = encoder_runs.changed(config, guard__action="skip", epochs=2, guard__patience=3)
    run(poisoned(task, bad), config, tmp_path)
    found = [(x["step"], x["skipped"]) for x in lines(tmp_path) if "skipped" in x]
    assert found == [(4, 1), (5, 2), (PER_EPOCH + 1, 1)]
    state, tx = initial_state(task, config, from_config.lora_config(config))
    one = make_train_step(task, tx, 0.1)
    for k in range(2 * PER_EPOCH):
        if k not in bad:
            state, _ = one(state, task.base, task.train_batch(k))
            continue
        clock = lambda x: isinstance(x, optax.ScaleByScheduleState)
        tick = lambda x: x._replace(count=x.count + 1) if clock(x) else x
        opt_state = jax.tree.map(tick, state.opt_state, is_leaf=clock)
        state = state._replace(step=state.step + 1, opt_state=opt_state)
    with checkpointing.manager(tmp_path / "checkpoints") as checkpoints:
        stored, _ = checkpointing.restore(checkpoints, unwrap_key(state))
    same(stored.adapter, state.adapter)
    same(stored.opt_state, state.opt_state)


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run(task, config, tmp_path):
    config = encoder_runs.changed(config, guard__action="skip", guard__patience=3)
    with pytest.raises(FloatingPointError, match=r"inf at step 6: .*after 3 steps in a row"):
        run(poisoned(task, {3, 4, 5}), config, tmp_path)
    assert [x["step"] for x in lines(tmp_path) if "skipped" in x] == [4, 5]


@pytest.mark.slow
def test_a_stopped_run_goes_on_by_skipping(task, config, tmp_path):
    """In the same workdir, from its checkpoint: to the bits of a run that skipped from the start."""
    faulty = poisoned(task, {PER_EPOCH + 1})
    with pytest.raises(FloatingPointError, match=r'set guard.action to "skip"'):
        run(faulty, config, tmp_path / "stopped")
    skipping = encoder_runs.changed(config, guard__action="skip")
    run(faulty, skipping, tmp_path / "stopped")
    run(faulty, skipping, tmp_path / "whole")
    same(adapter(tmp_path / "stopped", task), adapter(tmp_path / "whole", task))
    plain = lambda w: [{k: v for k, v in x.items() if "per_second" not in k} for x in lines(w)]
    assert plain(tmp_path / "stopped") == plain(tmp_path / "whole")
    with pytest.raises(ValueError, match="epochs is 3 there and 4 here"):
        workdirs.check(tmp_path / "stopped", encoder_runs.changed(skipping, epochs=4))


def test_the_host_looks_one_step_late(tmp_path):
    """At a step, it reads what the step before gave, which the device has had the time to finish."""
    sums = metrics.Sums(jnp.float32(jnp.inf), jnp.float32(0), jnp.float32(1))
    verdict, _ = nan_guard.judge(nan_guard.initial_health(), sums[0], {"w": jnp.ones(2)}, spike=0.0)
    with metric_writer.MetricWriter(tmp_path, 0) as log:
        options = {
            "steps": range(9),
            "per_epoch": 3,
            "log_every": 1,
            "describe_rates": lambda step: {},
        }
        with metric_logger.Meter(
            log, policy=nan_guard.Policy("stop", 10, 0.0, ("w",)), **options
        ) as seen:
            seen.add(1, sums, verdict)
            with pytest.raises(FloatingPointError, match="inf at step 1"):
                seen.add(2, sums, verdict)


def test_the_running_mean_is_the_exponential_one():
    """Against float64; losses of steps that are left out do not count."""
    losses = 1 + np.random.default_rng(0).random(200)
    losses[[20, 150]] = np.nan
    health, mean, weight = nan_guard.initial_health(), 0.0, 0.0
    grads = {"w": jnp.ones(2)}
    judge = jax.jit(functools.partial(nan_guard.judge, spike=5.0))
    for loss in losses:
        verdict, health = judge(health, jnp.float32(loss), grads)
        if weight:
            np.testing.assert_allclose(verdict.running_mean, mean / weight, rtol=2e-5)
        if np.isfinite(loss):
            mean = nan_guard.DECAY * mean + (1 - nan_guard.DECAY) * loss
            weight = nan_guard.DECAY * weight + (1 - nan_guard.DECAY)
    assert health.count == 198 and health.skips == 0


def test_a_spike_counts_once_the_mean_has_settled():
    judge = jax.jit(functools.partial(nan_guard.judge, spike=3.0))
    grads, health = {"w": jnp.ones(2)}, nan_guard.initial_health()
    for k in range(nan_guard.MIN_LOSSES + 1):
        verdict, health = judge(health, jnp.float32(1.0), grads)
        spiked, _ = judge(health, jnp.float32(3.1), grads)
        assert (spiked.skips == 1) == (k + 1 >= nan_guard.MIN_LOSSES)
        below, _ = judge(health, jnp.float32(2.9), grads)
        assert below.skips == 0
    policy = nan_guard.Policy("stop", 10, 3.0, ("w",))
    with pytest.raises(FloatingPointError) as error:
        nan_guard.check_step(policy, 60, jax.device_get(spiked))
    said = "".join(error.value.args)
    assert said == (
        "The training loss is 3.1 at step 60, more than guard.spike 3 times 1, its running mean"
    )
    _, health = judge(health, jnp.float32(100.0), grads)
    np.testing.assert_allclose(
        judge(health, jnp.float32(1.0), grads)[0].running_mean, 1.0, rtol=1e-5
    )
    off, _ = nan_guard.judge(health, jnp.float32(100.0), grads, spike=0.0)
    assert off.skips == 0


@pytest.mark.slow
def test_a_spike_in_a_run_and_resuming_from_before_it(task, config, tmp_path):
    """A label flip makes a spike; a run that was stopped before sees the same one, to the bit."""
    batches = lambda k: (
        task.train_batch(k)
        | ({"labels": 1 - task.train_batch(k)["labels"]} if k in {61, 62} else {})
    )
    spiky = dataclasses.replace(task, train_batch=batches)
    config = encoder_runs.changed(
        # Without dropout the flipped labels cost four times the mean before, and no other batch two.
        config,
        epochs=9,
        guard__action="skip",
        guard__spike=3.0,
        log_every=100,
        lora__dropout=0.0,
    )
    run(spiky, config, tmp_path / "whole")
    skipped = [x["step"] for x in lines(tmp_path / "whole") if "skipped" in x]
    assert skipped == [62, 63]

    class Halt(Exception):
        pass

    def halting(k):
        if k == 58:
            raise Halt
        return batches(k)

    with pytest.raises(Halt):
        run(dataclasses.replace(task, train_batch=halting), config, tmp_path / "resumed")
    run(spiky, config, tmp_path / "resumed")
    assert [x["step"] for x in lines(tmp_path / "resumed") if "skipped" in x] == [62, 63]
    same(adapter(tmp_path / "resumed", task), adapter(tmp_path / "whole", task))
    stop = encoder_runs.changed(config, guard__action="stop")
    with pytest.raises(FloatingPointError, match=r"at step 62: .*guard.spike 3 times .* newest"):
        run(spiky, stop, tmp_path / "stop")


@pytest.mark.slow
def test_it_costs_little(task, config):
    """XLA's own count of operations, next to those of the step."""
    flops = []
    state, tx = initial_state(task, config, from_config.lora_config(config))
    for opts in (PLAIN, step_options(config)):
        step = make_train_step(task, tx, 0.1, opts)
        compiled = step.lower(state, task.base, task.train_batch(0)).compile()
        flops.append(compiled.cost_analysis()["flops"])
    assert flops[1] < 1.02 * flops[0]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"guard__action": "ignore"}, "guard.action must be one of stop, skip, got 'ignore'"),
        ({"guard__patience": 0}, "guard.patience must be at least 1, got 0"),
        ({"guard__spike": 0.5}, "guard.spike must be above 1, or 0 for no limit, got 0.5"),
        ({"guard__spike": -1.0, "guard__action": ""}, "guard.action .*; guard.spike must"),
    ],
)
def test_mistakes(config, fields, message):
    with pytest.raises(ValueError, match=message):
        training_config.check(encoder_runs.changed(config, **fields))


@pytest.mark.slow
def test_the_log_stays_json(task, config, tmp_path):
    """A window of nothing but skipped steps has no line of means, and no NaN is written."""
    config = encoder_runs.changed(config, guard__action="skip", log_every=2, epochs=1)
    run(poisoned(task, {2, 3}), config, tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert not re.search("NaN|Infinity", text)
    rows = [json.loads(x) for x in text.splitlines()]
    assert [x["step"] for x in rows if "loss" in x] == [2, 6, 8]
