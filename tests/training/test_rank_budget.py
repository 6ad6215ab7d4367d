"""AdaLoRA's budget of ranks: against numpy, in a sweep, and after an interruption."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from configs import common
from lora_jax import adapter as adapters
from lora_jax.lowrank import LowRank
from lora_jax.methods.adalora import AdaLoRA
from lora_jax.sweeps import vmapped_step
from lora_jax.tasks import from_config
from lora_jax.training import gradients, optimizer, rank_budget, train
from lora_jax.training.state import initial_state
from lora_jax.training.step import StepOptions, train_step
from tests.helpers import tiny_task
from tests.helpers.comparisons import assert_close

BUDGET = {"target_rank": 2, "begin": "2 steps", "end": "5 steps"}


def make_budget(**changes):
    numbers = {"target_rank": 2, "begin": 2, "final": 15, "every": 1, "beta1": 0.85, "beta2": 0.85}
    return rank_budget.Budget(**numbers | changes)


def make_node(rng, rank=4, batch=()):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    axes = "b" * len(batch) + "io"
    return AdaLoRA(draw(*batch, 5, rank), draw(*batch, rank, 3), draw(*batch, rank), 2.0, axes=axes)


def run(adapter, budget, steps, rate=0.05, seed=0):
    """Adapters after each step of plain gradient descent, and the gradients."""
    rule = rank_budget.allocate(optax.with_extra_args_support(optax.sgd(rate)), budget)
    state, states, grads = rule.init(adapter), [], []
    update = jax.jit(rule.update)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
        grads.append(jax.tree.map(draw, adapter))
        updates, state = update(grads[-1], state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        states.append(adapter)
    return states, grads


def count(adapter):
    return sum(int(np.count_nonzero(x.e)) for x in adapters.nodes(adapter).values())


def test_the_budget_falls_as_in_peft():
    """Budgets that PEFT has been seen to choose for 20 steps, of which 2 are before and 5 after."""
    rng = np.random.default_rng(0)
    states, _ = run({"a": make_node(rng), "b": make_node(rng)}, make_budget(), 20)
    want = [8, 8, 8, 7, 6, 5, 5, 4, 4, *[4] * 11]
    assert [count(x) for x in states] == want


def test_the_choice_is_that_of_numpy():
    """An importance of its own, in float64; layers of a stack are kernels of their own."""
    rng = np.random.default_rng(1)
    adapter = {"stack": make_node(rng, batch=(2,)), "one": make_node(rng), "bias": jnp.ones(3)}
    states, grads = run(adapter, make_budget(every=3), 20)
    mean, deviation, kept, current = {}, {}, None, {}
    for step, (after, grad) in enumerate(zip(states, grads, strict=True)):
        scores = []
        before = adapter if step == 0 else states[step - 1]
        for name in ("one", "stack"):
            for field in ("a", "b", "e"):
                p, g = (np.asarray(getattr(t[name], field), np.float64) for t in (before, grad))
                now = np.abs((p - 0.05 * g) * g)
                key = name, field
                if step < 15:
                    mean[key] = 0.85 * mean.get(key, 0) + 0.15 * now
                    change = np.abs(now - mean[key])
                    deviation[key] = 0.85 * deviation.get(key, 0) + 0.15 * change
                current[key] = mean[key] * deviation[key]
            of = lambda field, axis, name=name: current[name, field].mean(axis)
            scores.append((current[name, "e"] + of("a", -2) + of("b", -1)).ravel())
        scores = np.concatenate(scores)
        if (2 < step < 15 and step % 3 == 0) or step == 15:
            size = 6 if step >= 15 else int(6 * (1 - (step - 2) / 13) ** 3 + 6)
            kept = scores > np.sort(scores)[11 - size]
        if kept is not None and ((step < 15 and step % 3 == 0) or step >= 15):
            e = np.concatenate([np.asarray(after[name].e).ravel() for name in ("one", "stack")])
            np.testing.assert_array_equal(e != 0, kept)


def test_zeros_that_a_sweep_adds_do_not_count():
    rng = np.random.default_rng(0)
    nodes = {"a": make_node(rng, rank=3), "b": make_node(rng)}
    pad = lambda x, axis: jnp.concatenate(
        [x, jnp.zeros_like(jnp.take(x, jnp.arange(1), axis))], axis
    )
    small = nodes["a"]
    padded = dataclasses.replace(small, a=pad(small.a, 1), b=pad(small.b, 0), e=pad(small.e, 0))
    assert_close(padded.penalties(), small.penalties())
    budget = make_budget(target_rank=1)
    rule = rank_budget.allocate(optax.with_extra_args_support(optax.sgd(0.05)), budget)
    adapters_of = {"small": nodes, "padded": nodes | {"a": padded}}
    ends = {}
    for name, adapter in adapters_of.items():
        state, update = rule.init(adapter), jax.jit(rule.update)
        for k in range(16):
            grads = jax.tree.map(lambda x, k=k: jnp.cos(x + k) * (x != 0), adapter)
            updates, state = update(grads, state, adapter)
            adapter = optax.apply_updates(adapter, updates)
        ends[name] = adapter
    assert count(ends["small"]) == 2
    np.testing.assert_array_equal(ends["padded"]["a"].e[:3], ends["small"]["a"].e)
    np.testing.assert_array_equal(ends["padded"]["b"].e, ends["small"]["b"].e)


def test_penalties_are_distances_from_orthonormal_rows():
    node = make_node(np.random.default_rng(0), batch=(2,))
    want = [
        [np.linalg.norm(a.T @ a - np.eye(4)), np.linalg.norm(b @ b.T - np.eye(4))]
        for a, b in zip(np.asarray(node.a), np.asarray(node.b), strict=True)
    ]
    np.testing.assert_allclose(node.penalties(), want, rtol=1e-5)
    orthonormal = AdaLoRA(jnp.eye(5)[:, :2], jnp.eye(3)[:2], jnp.zeros(2), 1.0)
    assert not np.any(orthonormal.penalties())
    grads = jax.grad(lambda x: jnp.sum(x.penalties()))(orthonormal)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads))


def test_only_nodes_with_a_penalty_have_one():
    plain = {"kernel": LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)), 2.0), "bias": jnp.ones(2)}
    assert gradients.add_penalty(plain, plain, 0.5) is plain
    adapter = plain | {"other": make_node(np.random.default_rng(0))}
    assert gradients.add_penalty(adapter, adapter, 0.0) is adapter
    got = gradients.add_penalty(adapter, adapter, 0.5)
    want = jax.grad(lambda x: 0.5 * jnp.mean(x.penalties()))(adapter["other"])
    assert_close(got["other"].a, adapter["other"].a + want.a)
    assert_close(got["kernel"].a, adapter["kernel"].a)


# ---- In runs -------------------------------------------------------------------------------------

ADALORA = {"lora__method": "adalora", "lora__rank": 3, "optimizer__learning_rate": 0.1}


def make_config(**changes):
    config = tiny_task.config(**ADALORA, **changes).unlock()
    config.optimizer.budget.update({"target_rank": 1, "begin": "2 steps", "end": "6 steps"})
    return config.lock()


@pytest.mark.slow
def test_a_run_goes_on_exactly_where_it_stopped(tmp_path):
    """Its memory of what is important is in its checkpoints."""

    class Interrupted(Exception):
        pass

    config = make_config()
    lora_config = from_config.lora_config(config)

    def failing(step):
        task = tiny_task.task()

        def batch(number):
            if number == step:
                raise Interrupted
            return task.train_batch(number)

        return dataclasses.replace(task, train_batch=batch)

    go = lambda task, folder: train.train(task, config, lora_config, folder, say=lambda text: None)
    go(tiny_task.task(), tmp_path / "whole")
    for step in (7, 13, 20):
        with pytest.raises(Interrupted):
            go(failing(step), tmp_path / "parts")
    go(tiny_task.task(), tmp_path / "parts")
    whole, parts = (tiny_task.outcome(tmp_path / name) for name in ("whole", "parts"))
    assert whole.lines == parts.lines and whole.adapter == parts.adapter


@pytest.mark.slow
def test_a_sweep_of_ranks():
    """Runs of one program are those alone, at their own ranks."""
    task = tiny_task.task()
    configs = [make_config(seed=0), make_config(seed=1)]
    configs[1].unlock().lora.rank = 2
    lora_configs = [from_config.lora_config(c) for c in configs]
    members = [
        vmapped_step.make_member(task, c, x) for c, x in zip(configs, lora_configs, strict=True)
    ]
    shapes = vmapped_step.common_shapes(members)
    options = vmapped_step.make_options(*configs)
    program = vmapped_step.make_program(task, 2, has_dropout=False, options=options)
    padded = [vmapped_step.pad(m, shapes) for m in members]
    stacked = vmapped_step.place(program, vmapped_step.stack(padded, 2))
    for k in range(24):
        batch = task.train_batch(k)
        stacked, _ = vmapped_step.call(program, "train", stacked, task.base, batch)
    for k, (config, lora_config) in enumerate(zip(configs, lora_configs, strict=True)):
        state, tx = initial_state(task, config, lora_config)
        step = jax.jit(
            train_step(task, tx, 0.0, StepOptions(orthogonality=config.optimizer.orthogonality))
        )
        for number in range(24):
            state, _ = step(state, task.base, task.train_batch(number))
        got = vmapped_step.cut(vmapped_step.unstack(stacked, k), members[k]).state.adapter
        assert_close(got, state.adapter, rtol=1e-4, atol=1e-5)
        assert count(got) == 1


def check(adapter, **budget):
    config = common.base_config().optimizer
    config.budget.update(BUDGET | budget)
    return optimizer.make(config, adapter, 20)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target_rank": -1}, "budget.target_rank must be at least 1, or 0 for none, got -1"),
        ({"every": 0}, "budget.every must be at least 1, got 0"),
        ({"beta1": 1.0}, "budget.beta1 must be between 0 and 1, got 1.0"),
        ({"begin": "soon"}, "optimizer.budget.begin"),
        ({"begin": "16 steps"}, "take 16 and 5 steps, and the run has 20: there is none left"),
        ({"target_rank": 4}, "target_rank is 4, and kernels begin with a rank of 4"),
    ],
)
def test_wrong_budgets(fields, says):
    adapter = {"kernel": make_node(np.random.default_rng(0))}
    with pytest.raises(ValueError, match=says):
        check(adapter, **fields)


def test_a_budget_is_for_adalora():
    adapter = {"kernel": LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)), 2.0)}
    with pytest.raises(ValueError, match='no kernel is adapted by AdaLoRA: set lora.method="adal'):
        check(adapter)


@pytest.mark.parametrize("field", ["rank_stabilized", "init", "train_a", "projection_seed"])
def test_fields_without_a_meaning_are_refused(field):
    value = {"rank_stabilized": True, "init": "other", "train_a": False, "projection_seed": 1}[
        field
    ]
    with pytest.raises(ValueError, match=field):
        lora.LoRAConfig(method="adalora", **{field: value})
