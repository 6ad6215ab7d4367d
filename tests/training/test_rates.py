"""Learning rates of parts of an adapter: LoRA+ and embeddings, by hand, logged, and in a sweep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from configs import common
from lora_jax import adapter as adapters
from lora_jax.lowrank import LowRank
from lora_jax.sweeps import trials, vmapped_step
from lora_jax.training import optimizer
from lora_jax.training.state import initial_state
from lora_jax.training.step import train_step
from tests.helpers import tiny_task
from tests.helpers.comparisons import assert_close, perturbed


def make_adapter():
    draw = lambda *shape: jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    node = lambda: LowRank(draw(5, 2), draw(2, 3), 2.0)
    tree = {
        "dense": {"kernel": node(), "bias": draw(3)},
        "wte": {"embedding": node()},
        "embedding": {"scale": draw(4)},
    }
    return adapters.as_data(tree)


def update(adapter, **fields):
    config = common.base_config().optimizer
    config.update(fields)
    tx = optimizer.make(config, adapter, 10)
    grads = perturbed(adapter, seed=3)
    return tx.update(grads, tx.init(adapter), adapter)


def test_multipliers_are_of_their_leaves_alone():
    adapter = make_adapter()
    plain, state = update(adapter)
    changed, other = update(adapter, b_rate=16.0, embedding_rate=0.25)
    assert jax.tree.structure(state) == jax.tree.structure(other)  # a checkpoint fits both
    ratio = jax.tree.map(lambda x, y: np.unique(np.asarray(x) / np.where(y, y, 1)), changed, plain)
    assert ratio["dense"]["kernel"].a == ratio["dense"]["bias"] == 1
    assert ratio["dense"]["kernel"].b == 16
    assert ratio["wte"]["embedding"].a == ratio["wte"]["embedding"].b == 0.25
    assert ratio["embedding"]["scale"] == 1  # of a module with that name
    assert ratio["dense"]["kernel"].scale == 0  # no update at all


def test_three_steps_of_lora_plus_by_hand():
    """Against two optimizers with two rates; weight decay goes with the rate, as in torch."""
    adapter = {"kernel": make_adapter()["dense"]["kernel"]}
    config = common.base_config().optimizer
    config.update(
        {
            "b_rate": 8.0,
            "learning_rate": 0.01,
            "weight_decay": 0.1,
            "clip_norm": 0.0,
            "decay": "none",
        }
    )
    tx = optimizer.make(config, adapter, 10)
    state, node = tx.init(adapter), adapter["kernel"]
    want = {"a": node.a, "b": node.b}
    rules = {"a": optax.adamw(0.01, weight_decay=0.1), "b": optax.adamw(0.08, weight_decay=0.1)}
    states = {n: rule.init(want[n]) for n, rule in rules.items()}
    for k in range(3):
        grads = perturbed(adapter, seed=k)
        updates, state = tx.update(grads, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        for n, rule in rules.items():
            u, states[n] = rule.update(getattr(grads["kernel"], n), states[n], want[n])
            want[n] = want[n] + u
    assert_close({n: getattr(adapter["kernel"], n) for n in want}, want, rtol=1e-6)


def test_the_default_is_no_equation_more():
    """The step of plain LoRA is the one with the rule that optax composes."""
    task, config = tiny_task.task(), tiny_task.config()
    state, tx = initial_state(task, config, tiny_task.LORA)
    s = optimizer.settings(config.optimizer, 24)
    rule = optax.chain(
        optax.clip_by_global_norm(s.clip_norm),
        optax.adamw(optimizer.schedule(s, "linear"), weight_decay=s.weight_decay),
    )
    parts = {"trainable": rule, "frozen": optax.set_to_zero()}
    composed = optax.multi_transform(parts, lora.labels(state.adapter))
    trace = lambda tx: str(
        jax.make_jaxpr(train_step(task, tx, 0.0))(state, task.base, task.train_batch(0))
    )
    assert trace(tx) == trace(composed)
    configs = [tiny_task.config(), tiny_task.config(optimizer__b_rate=2.0)]
    member = vmapped_step.make_member(task, configs[0], tiny_task.LORA)

    def count(*configs):
        options = vmapped_step.make_options(*configs)
        step = vmapped_step.member_step(task, has_dropout=False, options=options)
        return len(str(jax.make_jaxpr(step)(member, task.base, task.train_batch(0))))

    assert count(configs[0]) < count(*configs)


def test_a_sweep_varies_it_as_data():
    task = tiny_task.task()
    configs = [tiny_task.config(optimizer__b_rate=x) for x in (1.0, 4.0, 16.0)]
    assert len({trials.group_key(c) for c in configs}) == 1
    members = [vmapped_step.make_member(task, c, tiny_task.LORA) for c in configs]
    program = vmapped_step.make_program(
        task, 3, has_dropout=False, options=vmapped_step.make_options(*configs)
    )
    stacked = vmapped_step.place(program, vmapped_step.stack(members, 3))
    for k in range(6):
        batch = task.train_batch(k)
        stacked, _ = vmapped_step.call(program, "train", stacked, task.base, batch)
    ends = [vmapped_step.unstack(stacked, k).state.adapter for k in range(3)]
    for config, end in zip(configs, ends, strict=True):
        state, tx = initial_state(task, config, tiny_task.LORA)
        step = jax.jit(train_step(task, tx, 0.0))
        for k in range(6):
            state, _ = step(state, task.base, task.train_batch(k))
        assert_close(end, state.adapter, rtol=1e-5, atol=1e-6)
    b = [np.abs(end["dense"]["kernel"].b).max() for end in ends]
    assert b[0] < b[1] < b[2]


def test_logged_beside_the_learning_rate(tmp_path):
    tiny_task.run(tmp_path, steps=4, optimizer__b_rate=4.0)
    lines = [x for x in tiny_task.lines(tmp_path) if "learning_rate" in x]
    assert [x["step"] for x in lines] == [3, 4]
    assert all(x["b_learning_rate"] == 4 * x["learning_rate"] for x in lines)
    assert not any("embedding_learning_rate" in x for x in lines)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("field", ["b_rate", "embedding_rate"])
def test_wrong_multipliers(field, value):
    config = common.base_config()
    config.optimizer[field] = value
    with pytest.raises(
        ValueError, match=f"optimizer.{field} multiplies the learning rate and must"
    ):
        optimizer.check(config.optimizer)


@pytest.mark.parametrize(("field", "says"), [("b_rate", "factors b"), ("embedding_rate", "called")])
def test_a_multiplier_for_nothing(field, says):
    with pytest.raises(ValueError, match=rf"optimizer.{field} is 2.0, .* no leaf .*{says}"):
        update({"bias": jnp.ones(3)}, **{field: 2.0})
