"""A base in bfloat16: trained on, saved, used and exported with factors of float32."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from configs import sst2_minilm
from lora_jax import paths
from lora_jax.tasks import classification, classifier, from_config, glue_config
from lora_jax.training import train
from lora_jax.training.evaluation import evaluate, make_eval_step
from lora_jax.training.state import initial_state
from tests.helpers import tiny_encoder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny_encoder.checkpoint(root / "model")
    tiny_encoder.data(root / "data")
    config = sst2_minilm.get_config().unlock()
    changes = {"model.param_dtype": "bfloat16", "lora.train": "('classifier','pooler')"}
    for field, value in (tiny_encoder.overrides(root) | changes).items():
        tupled = isinstance(value, str) and value.startswith("(")
        config.update_from_flattened_dict({field: ast.literal_eval(value) if tupled else value})
    return config.lock()


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    task, lora_config = classification.make_task(config)
    progress = train.train(task, config, lora_config, workdir)
    return task, workdir, progress


def test_the_base_is_rounded_and_what_is_trained_is_not(config, trained):
    task, _, _ = trained
    fresh = {"params/classifier/kernel", "params/classifier/bias"}
    for name, x in paths.named_leaves(task.base).items():
        assert x.dtype == (jnp.float32 if name in fresh else jnp.bfloat16), name
    state, _ = initial_state(task, config, from_config.lora_config(config))
    assert {x.dtype for x in jax.tree.leaves(state.adapter)} == {jnp.dtype("float32")}


def test_it_learns_and_what_was_trained_is_what_predicts(config, trained):
    """The loss of the saved adapter, merged in float32, is the one that training measured."""
    task, workdir, progress = trained
    assert progress.best_score > 0.9
    found = classifier.load(workdir / "adapter")
    leaves = paths.named_leaves(found.loaded.params)
    for name, x in paths.named_leaves(task.base).items():
        np.testing.assert_array_equal(leaves[name], x.astype(jnp.float32), err_msg=name)
    merged = lora.merge(found.loaded.params, found.adapter)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("float32")}
    step = jax.jit(lambda p, batch: task.metrics(task.apply(p, batch, None), batch))
    sums = np.sum([step(merged, batch) for batch in task.eval_batches()], axis=0)
    assert sums[0] / sums[-1] == pytest.approx(progress.best_loss, rel=1e-5)


@pytest.mark.slow
def test_another_run_starts_from_it(config, trained):
    _, workdir, progress = trained
    with config.copy_and_resolve_references().unlocked() as c:
        c.adapter = str(workdir / "adapter")
    task, _ = classification.make_task(c)
    step = make_eval_step(task)
    values = evaluate(step, task.adapter, task)
    assert values["loss"] == pytest.approx(progress.best_loss, rel=1e-5)


def test_unknown_dtypes_are_refused(config):
    c = config.copy_and_resolve_references()
    with c.unlocked():
        c.model.param_dtype = "float16"
    with pytest.raises(ValueError, match="model.param_dtype must be one of"):
        glue_config.check(c)
