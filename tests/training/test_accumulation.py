"""Gradient accumulation: the large batch's gradient, from parts of it, in less memory."""

import dataclasses
import doctest
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from configs import common
from lora_jax.data import texts
from lora_jax.models import gpt2
from lora_jax.sweeps import parallelism, trial_loop, vmapped_step
from lora_jax.sweeps.trials import Trial
from lora_jax.tasks import classification, from_config, language_modeling
from lora_jax.training import gradients, metrics, optimizer, training_config
from lora_jax.training.state import initial_state
from lora_jax.training.step import StepOptions, make_train_step, step_options, train_step
from lora_jax.training.task import Task
from tests.helpers import runs_together, tiny_encoder, tiny_task

ROWS, PARTS = 8, 4


def classes_task(dtype=jnp.float64):
    """Eight rows, the last three of no weight: with four parts, one part has half a part's weight."""
    task = runs_together.float64_task()
    weights = np.array([1, 0.5, 1, 2, 1, 0, 0, 0], np.float32)
    batch = lambda step: task.train_batch(step) | {"weights": weights}
    apply = lambda params, b, key: task.apply(params, b, None)  # without the dropout that it has
    return (
        dataclasses.replace(task, train_batch=batch, apply=apply),
        ("embed", "hidden"),
        ("classifier",),
    )


def language_task(dtype=jnp.float64, layers=1, rows=ROWS):
    """Texts of very different numbers of tokens that count; two rows fill the batch."""
    shape = gpt2.GPT2Config(
        vocab_size=40, n_positions=24, n_embd=8, n_layer=layers, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = gpt2.GPT2LMHeadModel(shape, dtype=dtype, scan_layers=True)
    base = model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))
    if dtype == jnp.float64:
        base = jax.tree.map(lambda x: x.astype(dtype), base)
    rng = np.random.default_rng(3)
    rows_of_tokens = [
        (rng.integers(0, 40, 2).tolist(), rng.integers(0, 40, 1 + 3 * k % 20).tolist())
        for k in range(rows - 2)
    ]
    options = {"seed": 0, "batch_size": rows, "buckets": (20, 24)}
    task = Task(
        apply=functools.partial(language_modeling.apply, model),
        metrics=language_modeling.token_loss,
        train_batch=lambda step: texts.train_batch(texts.make_texts(rows_of_tokens), step, **options),
        eval_batches=None, steps_per_epoch=10, base=base, base_id="", metadata={},
    )  # fmt: skip
    return task, ("c_attn",), ()


def config(targets, train, **changes):
    c = common.base_config()
    c.lora.targets, c.lora.train, c.lora.rank = targets, train, 2
    c.lora.dropout = 0.0
    c.optimizer.learning_rate = 0.01
    for field, value in changes.items():
        section, _, name = field.rpartition("__")
        (c[section] if section else c)[name] = value
    return c


def started(made, **changes):
    """Task, config, state at which factors b are not zero, and the optimiser."""
    task, targets, train = made
    c = config(targets, train, **changes)
    settings = lora.LoRAConfig.from_dict(c.lora.to_dict())
    state, tx = initial_state(task, c, settings)
    keys = iter(jax.random.split(jax.random.key(5), 100))
    moved = lambda x, trained: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype) * trained
    adapter = jax.tree.map(moved, state.adapter, lora.mask(state.adapter))
    return task, c, state._replace(adapter=adapter), tx


def sums_of(task, base):
    """The task's sums without dropout, by merging: no part of the code under test."""

    def fn(adapter, batch, key):
        return task.metrics(task.apply(lora.merge(base, adapter), batch, None), batch)

    return fn


def trainable(tree):
    return [
        x for x, t in zip(jax.tree.leaves(tree), jax.tree.leaves(lora.mask(tree)), strict=True) if t
    ]


@pytest.mark.parametrize(
    "make, parts",
    [
        (classes_task, PARTS),
        pytest.param(language_task, ROWS, marks=pytest.mark.slow),
        pytest.param(classes_task, 2, marks=pytest.mark.slow),
        pytest.param(language_task, 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_in_float64_it_is_the_large_batchs_gradient(make, parts):
    """To 1e-12; parts weigh differently, and some weigh nothing."""
    with jax.enable_x64(True):
        task, _, state, _ = started(make())
        fn, batch = sums_of(task, task.base), task.train_batch(0)
        gradient = jax.jit(lambda a, b: gradients.accumulate(fn, a, b, state.key, parts=parts))
        found, sums = gradient(state.adapter, batch)
        mean = lambda a: (lambda s: s[0] / s[-1])(fn(a, batch, None))
        want = jax.jit(jax.grad(mean))(state.adapter)
        for x, y in zip(trainable(found), trainable(want), strict=True):
            assert x.dtype == np.float64 and np.abs(y).max() > 1e-4
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15)
        whole = jax.jit(lambda b: fn(state.adapter, b, None))
        np.testing.assert_allclose(sums, whole(batch), rtol=1e-12)
        weights = [
            float(whole({k: v[i::parts] for k, v in batch.items()})[-1]) for i in range(parts)
        ]
        assert len(set(weights)) > 1  # the mean of means would be another gradient
        if parts == ROWS:
            assert 0.0 in weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [classes_task, pytest.param(language_task, marks=pytest.mark.slow)]
)
def test_whole_runs_stay_together(make):
    """Twenty steps of AdamW with clipping, in float64: the state is that of the large batch."""
    ends = []
    with jax.enable_x64(True):
        for parts in (1, PARTS):
            task, c, state, tx = started(make(), accumulate=parts, optimizer__clip_norm=0.05)
            step = make_train_step(task, tx, 0.0, step_options(c))
            losses = []
            for k in range(20):
                state, (sums, _) = step(state, task.base, task.train_batch(k))
                losses.append(float(sums[0]) / float(sums[-1]))
            ends.append((losses, state))
        np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-9)
        # Adam divides by the root of tiny second moments: entries near zero differ most.
        for x, y in zip(*(trainable(e[1].adapter) for e in ends), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_over_devices_it_is_the_gradient_of_all_rows(parts):
    """Two devices with half of the rows each, mapped over by an axis with a name: as under a pmap."""
    with jax.enable_x64(True):
        task, c, state, tx = started(classes_task(), accumulate=parts)
        batch = task.train_batch(0)
        halves = {k: np.stack([v[:4], v[4:]]) for k, v in batch.items()}
        halves["weights"][1] = [3, 0, 0, 0]
        batch["weights"] = halves["weights"].reshape(-1)
        step = train_step(task, tx, 0.0, step_options(c), axis="devices")
        both = jax.vmap(step, in_axes=(None, None, 0), axis_name="devices")
        ends, (sums, verdict) = jax.jit(both)(state, task.base, halves)
        want, whole = make_train_step(task, tx, 0.0)(state, task.base, batch)
        for device in (0, 1):
            here = jax.tree.map(lambda x, d=device: x[d], (ends.adapter, sums))
            for x, y in zip(
                jax.tree.leaves(here), jax.tree.leaves((want.adapter, whole)), strict=True
            ):
                np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
        assert not verdict.skips.any()


def test_rows_are_dealt_out_like_cards():
    """Those that a device holds of a batch that is sharded by rows stay on it."""
    assert doctest.testmod(gradients).failed == 0
    x = jnp.arange(24).reshape(12, 2)
    dealt = gradients.deal(x, 3)
    for part in range(3):
        np.testing.assert_array_equal(dealt[part], x[part::3])
    device = x.reshape(4, 3, 2)  # the three rows of each of four devices
    np.testing.assert_array_equal(jnp.swapaxes(device, 0, 1), dealt)


@pytest.mark.slow
def test_a_part_without_weight_does_no_harm():
    """Also where its rows are no numbers: NaN times a weight of zero would be NaN."""
    task, c, state, tx = started(language_task(jnp.float32), accumulate=ROWS)
    step = make_train_step(task, tx, 0.0, step_options(c))
    batch = task.train_batch(0)
    assert (batch["weights"] == 0).sum() == 2
    state, (sums, verdict) = step(state, task.base, batch)
    assert np.isfinite(sums[0]) and not verdict.skips
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.adapter))


@pytest.mark.slow
def test_one_part_is_the_step_without():
    """The same program, letter by letter."""
    task, c, state, tx = started(language_task(jnp.float32))
    programs = [
        jax.jit(train_step(task, tx, 0.0, o)).lower(state, task.base, task.train_batch(0))
        for o in (StepOptions(), StepOptions(accumulate=1))
    ]
    assert programs[0].as_text() == programs[1].as_text()


@pytest.mark.slow
def test_memory_falls():
    """XLA's own count of temporary bytes, for 64 rows in eight parts: less than a third."""
    found = {}
    for parts in (1, 8):
        task, c, state, tx = started(language_task(jnp.float32, rows=64), accumulate=parts)
        step = make_train_step(task, tx, 0.0, step_options(c))
        compiled = step.lower(state, task.base, task.train_batch(0)).compile()
        found[parts] = compiled.memory_analysis().temp_size_in_bytes
    assert found[8] < found[1] / 3


@pytest.mark.slow
def test_bfloat16_gradients_are_added_up_in_float32_and_clipped_once():
    """Against numpy, from each part's own gradient; bfloat16 sums would be off by 4e-3."""
    task, c, state, tx = started(
        language_task(jnp.bfloat16), accumulate=PARTS, optimizer__clip_norm=0.01
    )
    batch = task.train_batch(0)
    parts = [{k: v[i::PARTS] for k, v in batch.items()} for i in range(PARTS)]
    apply = lora.lift(task.apply)
    fn = lambda a, b, key: task.metrics(apply(lora.bind(task.base, a), b, None), b)
    one = jax.jit(jax.grad(lambda a, b: fn(a, b, None)[0]))
    sums_of_part = jax.jit(lambda b: fn(state.adapter, b, None))
    total = sum(float(sums_of_part(part)[-1]) for part in parts)
    each = [trainable(one(state.adapter, part)) for part in parts]
    want = [sum(np.asarray(x, np.float64) for x in xs) / total for xs in zip(*each, strict=True)]
    accumulated = functools.partial(gradients.accumulate, fn, parts=PARTS)
    found, sums = jax.jit(accumulated)(state.adapter, batch, state.key)
    assert float(sums[-1]) == total
    for x, y in zip(trainable(found), want, strict=True):
        assert x.dtype == np.float32
        # Each part's own gradient may be rounded to bfloat16 elsewhere when compiled within a loop.
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-3 * np.abs(y).max())
    norm = np.sqrt(sum((x**2).sum() for x in want))
    assert norm > 5 * c.optimizer.clip_norm
    clipped, _ = optax.clip_by_global_norm(0.01).update(found, optax.EmptyState())
    step = make_train_step(task, tx, 0.0, step_options(c))
    after, (_, verdict) = step(state, task.base, batch)
    moments = [x for x in jax.tree.leaves(after.opt_state) if x.ndim > 1]
    first = sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in moments[: len(moments) // 2])
    # (1 - b1) of a gradient whose norm over factors and scales is clip_norm
    assert np.sqrt(first) <= 0.1 * 0.01 * 1.001
    assert np.sqrt(first) > 0.1 * 0.01 * 0.5
    assert all(x.dtype == np.float32 for x in trainable(after.adapter))


def test_dropout_differs_from_part_to_part():
    """Parts of the same rows have gradients of their own."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(nn.Dense(16, name="hidden")(x))

    net, x = Net(), np.ones((2, 8), np.float32)
    batch = {"x": x, "labels": np.zeros(2, np.int32), "weights": np.ones(2, np.float32)}
    base = net.init(jax.random.key(0), x)
    task = Task(
        apply=lambda params, b, key: net.apply(params, b["x"]),
        metrics=lambda logits, b: metrics.cross_entropy(logits, b["labels"], b["weights"]),
        train_batch=lambda step: batch, eval_batches=None, steps_per_epoch=10, base=base,
        base_id="", metadata={},
    )  # fmt: skip
    seen = []
    task, c, state, tx = started((task, ("hidden",), ()))

    def fn(adapter, part, key):
        jax.debug.callback(lambda k: seen.append(str(k)), jax.random.key_data(key))
        model_key, branch_key = jax.random.split(key)
        apply = lora.lift(task.apply, dropout=0.5, dropout_key=branch_key)
        return task.metrics(apply(lora.bind(base, adapter), part, model_key), part)

    gradients.accumulate(fn, state.adapter, batch, state.key, parts=2)
    jax.effects_barrier()
    assert len(set(seen)) == 2


def test_a_batch_that_can_not_be_dealt_out():
    c = config(("query",), (), batch_size=16, accumulate=3)
    with pytest.raises(ValueError, match="accumulate is 3.*batch_size 16; 1, 2, 4, 8, 16 do"):
        training_config.check(c)
    c.accumulate = 0
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        training_config.check(c)
    task, c, state, tx = started(language_task(jnp.float32), accumulate=3)
    step = make_train_step(task, tx, 0.0, step_options(c))
    with pytest.raises(ValueError, match="accumulate is 3, and the batch has 8 rows"):
        step(state, task.base, task.train_batch(0))


@pytest.mark.slow
def test_in_a_sweep_a_run_accumulates_as_it_does_alone(tmp_path):
    root = tmp_path
    tiny_encoder.checkpoint(root / "model")
    tiny_encoder.data(root / "data", n=32)
    values = [{"lora.rank": 1, "seed": 0}, {"lora.rank": 2, "seed": 1}]
    changes = {"accumulate": 4, "optimizer__decay": "cosine", "lora__dropout": 0.0}
    found = runs_together.add_points(root, values, **changes)

    task, _ = classification.make_task(found[0].config)
    opts = vmapped_step.make_options(found[0].config)
    group = trial_loop.Group(
        task=task, plan=None, make_member=None, shapes=None, has_dropout=True, options=opts
    )
    assert opts == group.options and (opts.decay, opts.accumulate) == ("cosine", 4)
    program = vmapped_step.make_program(task, 2, has_dropout=True, options=opts)
    losses, *_ = runs_together.together(task, [p.config for p in found], 8, program)
    for point, loss in zip(found, losses, strict=True):
        state, tx = initial_state(
            dataclasses.replace(task, base=task.redraw_base(point.config.seed)), point.config,
            from_config.lora_config(point.config),
        )  # fmt: skip
        step = make_train_step(task, tx, 0.0, step_options(point.config))
        base, want = task.redraw_base(point.config.seed), []
        for k in range(8):
            state, (sums, _) = step(state, base, task.train_batch(k))
            want.append(float(sums[0]) / float(sums[-1]))
        np.testing.assert_allclose(loss, want, rtol=1e-5)  # rounding, and its growth


def test_the_key_of_a_program_tells_them_apart():

    keys = set()
    for changes in ({}, {"accumulate": 2}, {"optimizer__decay": "none"}, {"model__remat": "full"}):
        keys.add(parallelism.program_key(Trial("", {}, config(("query",), (), **changes))))
    assert len(keys) == 4
    assert optimizer.DECAYS == ("linear", "cosine", "none")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The adapters of dense")  # whose kernel is tiny
@pytest.mark.parametrize("init", ["lora_ga", "eva"])
def test_initial_values_from_data_see_micro_batches(init):
    """One at a time, with the sum of all."""
    settings = dataclasses.replace(tiny_task.LORA, init=init)
    start = lambda parts: initial_state(
        tiny_task.task(), tiny_task.config(batch_size=6, accumulate=parts), settings
    )[0].adapter["dense"]["kernel"]
    whole, parts = (np.asarray(start(n).a) for n in (1, 3))
    np.testing.assert_allclose(parts @ parts.T, whole @ whole.T, rtol=0, atol=1e-5)
