"""Many runs through one compiled step, against each of them alone."""

import functools
import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import sst2_minilm
from lora_jax.sweeps import vmapped_step
from lora_jax.tasks import classification, from_config
from lora_jax.training import metrics
from lora_jax.training.task import Task
from tests.helpers import runs_together

root = runs_together.root

POINTS = (
    {"lora.rank": 1, "seed": 0},
    {"lora.rank": 4, "lora.alpha": 8.0, "seed": 1, "optimizer.learning_rate": 0.02},
    {"lora.rank": 2, "lora.dropout": 0.0, "optimizer.warmup": 0.2},
    {
        "lora.rank": 3,
        "lora.dropout": 0.5,
        "optimizer.clip_norm": 0.0,
        "optimizer.weight_decay": 0.3,
    },
)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.slow
def test_a_run_among_others_is_the_run_alone(root, count):
    """Per-step losses over 50 steps, in float32, to 1e-5: rounding, and its growth so far."""
    found = runs_together.add_points(root, POINTS)
    task, _ = classification.make_task(found[0].config)
    losses, states, members, program = runs_together.together(
        task, [p.config for p in found], 50, count
    )
    assert len(program.compiled) == 1  # all batches of this data have one length
    for point, loss, state, member in zip(found, losses, states, members, strict=True):
        want, end = runs_together.alone(task, point.config, 50)
        # A loss is a difference of numbers near 1, however small it is: so is its rounding.
        np.testing.assert_allclose(loss, want, rtol=1e-5, atol=2e-6)
        got = vmapped_step.cut(state.state, member.state)
        for x, y in zip(jax.tree.leaves(got.adapter), jax.tree.leaves(end.adapter), strict=True):
            # Adam divides by the root of tiny second moments: entries near zero differ most.
            np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5)
        padding = jax.tree.map(np.copy, state.state)
        for x, y in zip(jax.tree.leaves(padding), jax.tree.leaves(member.state), strict=True):
            x[tuple(map(slice, y.shape))] = 0
            assert not np.any(x)  # factors, both moments: exactly zero beyond the rank


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_offsets_of_several_kinds_and_ranks_share_a_program(root, method):
    points = (
        {"lora.init": "pissa", "lora.rank": 2, "lora.dropout": 0.0},
        {"lora.init": "olora", "lora.rank": 3, "lora.dropout": 0.0},
        {"lora.init": "lora_ga", "lora.rank": 1, "lora.dropout": 0.0, "init_batches": 2},
    )
    points = points if method == "dora" else points[:2]  # the last takes the longest
    found = runs_together.add_points(root, points, lora__method=method)
    task, _ = classification.make_task(found[0].config)
    configs = [p.config for p in found]
    losses, states, members, program = runs_together.together(task, configs, 10, len(points))
    assert len(program.compiled) == 1
    for point, loss, state, member in zip(found, losses, states, members, strict=True):
        want, end = runs_together.alone(task, point.config, 10)
        np.testing.assert_allclose(loss, want, rtol=1e-5, atol=2e-6)
        got = vmapped_step.cut(state.state, member.state)
        for x, y in zip(jax.tree.leaves(got.adapter), jax.tree.leaves(end.adapter), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5)


@pytest.mark.slow
def test_in_float64_they_stay_together(root):
    """Over 150 steps to 1e-9: what differs is rounding and nothing else."""
    targets = {"lora__targets": ("embed", "hidden"), "lora__train": ("classifier",)}
    with jax.enable_x64(True):
        found = [p.config for p in runs_together.add_points(root, POINTS, **targets)]
        task = runs_together.float64_task()
        losses, states, *_ = runs_together.together(task, found, 150, len(found))
        assert losses[0].dtype == np.float64 and states[0].state.adapter["params"]
        for config, loss in zip(found, losses, strict=True):
            want, _ = runs_together.alone(task, config, 150)
            np.testing.assert_allclose(loss, want, rtol=1e-9)
            assert np.ptp(want) > 0.05  # it does train


@pytest.mark.slow
def test_a_nan_run_is_frozen_and_disturbs_nobody(root):
    good = {"lora.rank": 2, "seed": 3}
    bad = {"lora.rank": 4, "optimizer.learning_rate": 1e30}
    found = runs_together.add_points(root, [good, bad, {"lora.rank": 1}])
    task, _ = classification.make_task(found[0].config)
    configs = [p.config for p in found]
    _, early, _, program = runs_together.together(task, configs, 8, 3)
    losses, states, *_ = runs_together.together(task, configs, 20, program)
    assert not np.isfinite(losses[1]).all() and not states[1].is_alive
    assert int(states[1].state.step) < 8
    for x, y in zip(jax.tree.leaves(early[1]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(x, y)
    good = [configs[0], configs[0].copy_and_resolve_references(), configs[2]]
    good[1].unlock().lora.rank = 4  # the same shapes, so that the same program serves
    without, *_ = runs_together.together(task, good, 20, program)
    assert states[0].is_alive and states[2].is_alive
    np.testing.assert_array_equal(losses[0], without[0])
    np.testing.assert_array_equal(losses[2], without[2])


@pytest.mark.slow
def test_an_untrained_fresh_head_is_each_runs_own(root):
    """A head drawn by the seed and not trained is data of the run, and still that of the run alone."""
    found = runs_together.add_points(root, [{"seed": 0}, {"seed": 1}], lora__train=())
    task, _ = classification.make_task(found[0].config)
    losses, _, members, _ = runs_together.together(task, [p.config for p in found], 5, 2)
    assert sorted(members[1].own_leaves) == ["params/classifier/bias", "params/classifier/kernel"]
    for point, loss in zip(found, losses, strict=True):
        np.testing.assert_allclose(loss, runs_together.alone(task, point.config, 5)[0], rtol=1e-5)
    single, _ = classification.make_task(found[1].config)
    np.testing.assert_allclose(
        losses[1], runs_together.alone(single, found[1].config, 5)[0], rtol=1e-5
    )


@pytest.mark.slow
def test_what_no_run_changes_is_computed_once():
    """XLA's own count: with adapters in the last layer only, four runs cost far less than four."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for k in range(4):
                x = nn.relu(nn.Dense(64, name=f"layer_{k}")(x))
            return nn.Dense(2, name="last")(x)

    net, x = Net(), np.ones((32, 64), np.float32)
    batch = {"x": x, "labels": np.zeros(32, np.int32), "weights": np.ones(32, np.float32)}
    task = Task(
        apply=lambda params, b, key: net.apply(params, b["x"]),
        metrics=lambda logits, b: metrics.cross_entropy(logits, b["labels"], b["weights"]),
        train_batch=lambda step: batch, eval_batches=lambda: [batch], steps_per_epoch=10,
        base=net.init(jax.random.key(0), x), base_id="", metadata={},
    )  # fmt: skip
    config = sst2_minilm.get_config().unlock()
    config.lora.targets, config.lora.train, config.lora.rank = ("last",), (), 2
    member = vmapped_step.make_member(task, config, from_config.lora_config(config))

    @functools.cache
    def flops(count):
        program = vmapped_step.make_program(
            task, count, has_dropout=True, options=vmapped_step.make_options(config)
        )
        stacked = vmapped_step.place(program, vmapped_step.stack([member] * count, count))
        step = vmapped_step.compile_step(program, "train", stacked, task.base, batch)
        return step.cost_analysis()["flops"]

    layers = 4 * 2 * 32 * 64 * 64
    assert flops(1) > layers
    assert flops(4) - flops(1) < 0.5 * layers  # three more runs, without the layers of even one


def test_one_compilation_serves_a_group(root, caplog):
    """Counted by JAX's own log: one for each length of batch, whatever the runs."""
    values = [{"lora.rank": r, "seed": s, "lora.alpha": 2.0 * r} for r in (1, 3) for s in (0, 1, 2)]
    found = runs_together.add_points(root, values, data__buckets=(6, 16))
    task, _ = classification.make_task(found[0].config)
    lengths = {task.train_batch(k)["input_ids"].shape[1] for k in range(12)}
    with jax.log_compiles(), caplog.at_level("WARNING"):
        runs_together.together(task, [p.config for p in found], 12, 2)
    steps = re.findall(r"Compiling jit\(sweep_train_step\)", caplog.text)
    assert len(steps) == len(lengths)
