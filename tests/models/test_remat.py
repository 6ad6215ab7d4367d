"""Rematerialisation by policy: the same numbers and names, from less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from configs import common, sst2_minilm
from lora_jax import paths
from lora_jax.models import bert, checkpoints, generate, gpt2, llama, llama_config
from lora_jax.models.decoding import Decoding
from lora_jax.models.layers import POLICIES
from lora_jax.tasks import classification, from_config, language_modeling
from lora_jax.training import metrics, training_config
from lora_jax.training.state import initial_state
from lora_jax.training.step import make_train_step, step_options
from lora_jax.training.task import Task
from tests.helpers import places, tiny_encoder

GOLDENS = places.GOLDENS
FAMILIES = {
    "bert/gelu": ("classifier", ("query", "value")),
    "roberta/base": ("classifier", ("query", "value")),
    "distilbert/base": ("classifier", ("q_lin", "v_lin")),
    "gpt2/plain": ("causal-lm", ("c_attn",)),
    "llama/qwen3": ("causal-lm", ("q_proj", "v_proj")),
    "t5/v1_1": ("seq2seq-lm", ("q", "v")),
}


def load(case, **kwargs):
    return checkpoints.load(GOLDENS / case, head=FAMILIES[case][0], **kwargs)


@functools.cache
def adapted(case, scan_layers):
    """Parameters with factors that are not zero, and inputs."""
    loaded = load(case, scan_layers=scan_layers)
    ids = jnp.array(np.random.default_rng(0).integers(3, 20, (2, 6)), jnp.int32)
    inputs = (ids, jnp.ones_like(ids), *((ids,) if "t5" in case else ()))
    fn = lambda params, *args: loaded.model.apply(params, *args)
    config = lora.LoRAConfig(rank=2, targets=FAMILIES[case][1])
    adapter = lora.init(jax.random.key(0), fn, loaded.params, config, *inputs)
    keys = iter(jax.random.split(jax.random.key(1), 200))
    moved = lambda x, t: x + 0.2 * jax.random.normal(next(keys), x.shape) * t
    return loaded.params, jax.tree.map(moved, adapter, lora.mask(adapter)), inputs


def gradient(case, scan_layers, remat):
    """Loss and gradient with the model's own dropout on, through ``lift``."""
    model = load(case, scan_layers=scan_layers, remat=remat).model
    params, adapter, inputs = adapted(case, scan_layers)
    rngs = {"dropout": jax.random.key(2)}
    fn = lora.lift(lambda p, *a: model.apply(p, *a, deterministic=False, rngs=rngs))

    def loss(adapter):
        return jnp.mean(jnp.square(fn(lora.bind(params, adapter), *inputs)))

    return jax.jit(jax.value_and_grad(loss))(adapter)


def check(case, scan_layers, remat):
    want, grads = gradient(case, scan_layers, "none")
    found, others = gradient(case, scan_layers, remat)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads))
    for x, y in zip(jax.tree.leaves(others), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6 * largest)


QUICK = [("gpt2/plain", True, "dots_saveable"), ("distilbert/base", False, "full")]


@pytest.mark.parametrize("case, scan_layers, remat", QUICK)
@pytest.mark.slow
def test_values_and_gradients_are_the_same(case, scan_layers, remat):
    check(case, scan_layers, remat)


@pytest.mark.rounding
@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots_with_no_batch_dims_saveable"])
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("case", FAMILIES)
def test_of_every_family(case, scan_layers, remat):
    check(case, scan_layers, remat)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_trees_and_names_are_unchanged(case, scan_layers):
    one, other = (load(case, scan_layers=scan_layers, remat=r) for r in ("none", "full"))
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    inputs = other.family.inputs(other.head)
    made = jax.eval_shape(other.model.init, jax.random.key(0), *inputs)
    shapes = lambda tree: {n: x.shape for n, x in paths.named_leaves(tree).items()}
    assert shapes(made) == shapes(one.params)
    assert checkpoints.names(one) == checkpoints.names(other)


@pytest.mark.parametrize(
    "case, head",
    [("gpt2/plain", "causal"), pytest.param("t5/v1_1", "seq2seq", marks=pytest.mark.slow)],
)
def test_generation_with_caches_is_the_same(case, head):
    texts = []
    for remat in ("none", "full"):
        loaded = load(case, scan_layers=head == "causal", remat=remat)
        make = generate.causal_lm if head == "causal" else generate.seq2seq_lm
        begin, step = make(loaded.model, loaded.family.init_cache)
        decoding = Decoding(max_new_tokens=5, beams=2, stop=(1,))
        ids = jnp.array([[3, 4, 5], [6, 7, 8]], jnp.int32)
        run = jax.jit(generate.generator(begin, step, decoding))
        texts.append(run(loaded.params, {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}))
    jax.tree.map(np.testing.assert_array_equal, *texts)


def deep_bert(remat, scan_layers):
    shape = bert.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=8, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    model = bert.BertForSequenceClassification(shape, remat=remat, scan_layers=scan_layers)
    labels = {"labels": np.zeros(16, np.int32), "weights": np.ones(16, np.float32)}
    measure = lambda logits, b: metrics.cross_entropy(logits, b["labels"], b["weights"])
    return model, labels, (classification.apply, measure), ("query", "value")


def deep_gpt2(remat, scan_layers):
    shape = gpt2.GPT2Config(vocab_size=30, n_positions=32, n_embd=16, n_layer=8, n_head=2)
    model = gpt2.GPT2LMHeadModel(shape, remat=remat, scan_layers=scan_layers)
    labels = {"counts": np.ones((16, 32), np.int32), "weights": np.ones(16, np.float32)}
    return model, labels, (language_modeling.apply, language_modeling.token_loss), ("c_attn",)


def lowered(make, remat, scan_layers):
    """A lifted training step."""
    model, labels, (apply, measure), targets = make(remat, scan_layers)
    ids = np.ones((16, 32), np.int32)
    batch = {"input_ids": ids, "attention_mask": ids} | labels
    c = common.base_config()
    c.lora.targets, c.lora.train, c.lora.rank = targets, (), 2
    task = Task(
        apply=functools.partial(apply, model), metrics=measure,
        train_batch=lambda step: batch, eval_batches=None, steps_per_epoch=10,
        base=model.init(jax.random.key(0), ids[:1], ids[:1]), base_id="", metadata={},
    )  # fmt: skip
    state, tx = initial_state(task, c, lora.LoRAConfig.from_dict(c.lora.to_dict()))
    step = make_train_step(task, tx, 0.1, step_options(c))
    return step.lower(state, task.base, batch)


def temporary_bytes(*args):
    """By XLA's own count."""
    return lowered(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_falls():
    """Eight layers: what they keep is most of the memory, and with "full" it is their inputs."""
    assert temporary_bytes(deep_bert, "full", True) < 0.4 * temporary_bytes(deep_bert, "none", True)


@pytest.mark.slow
def test_a_policy_is_between_all_and_nothing():
    policies = ("full", "dots_with_no_batch_dims_saveable", "none")
    found = [temporary_bytes(deep_bert, remat, True) for remat in policies]
    assert found == sorted(found) and len(set(found)) == 3


@pytest.mark.slow
def test_memory_falls_of_a_decoder():
    assert temporary_bytes(deep_gpt2, "full", True) < 0.4 * temporary_bytes(deep_gpt2, "none", True)


@pytest.mark.slow
@pytest.mark.parametrize("make", [deep_gpt2, deep_bert])
def test_layer_by_layer_the_program_computes_twice_and_says_so(make):
    """Without a scan, barriers keep the two computations apart, which XLA would merge otherwise.

    What XLA makes of it is its backend's business (that for CPUs drops the barriers, and merges).
    """
    texts = [lowered(make, remat, False).as_text() for remat in ("none", "full")]
    barriers = [text.count("optimization_barrier") for text in texts]
    products = [text.count("dot_general") for text in texts]
    assert barriers[1] >= barriers[0] + 8
    assert products[1] >= products[0] + 8 * 6  # q, k, v (or all in one), scores, ..., per layer


def test_policies_are_those_of_jax():
    """Every one is there, and tells what to save; the other names of the module make policies."""
    names = [
        n for n in dir(jax.checkpoint_policies) if n[0].islower()
    ]  # classes make policies, too
    assert set(POLICIES) <= set(names)
    made = {n for n in names if n.startswith(("save_", "offload", "checkpoint_name"))}
    assert set(names) - set(POLICIES) <= made


def test_mistakes_list_the_names():
    with pytest.raises(
        ValueError, match="remat must be one of none, full, .*dots_saveable.*'dots'"
    ):
        load("bert/gelu", remat="dots")
    c = common.base_config()
    c.model.remat = "everything"
    with pytest.raises(ValueError, match="model.remat must be one of .*everything_saveable"):
        training_config.check(c)


@pytest.mark.slow
def test_windows_of_gemma_too():
    """Layers that differ by a flag, which is an array under remat."""
    shape = llama_config.LlamaConfig.from_hf({
        "model_type": "gemma2", "vocab_size": 30, "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
        "sliding_window": 3, "max_position_embeddings": 16, "hidden_activation": "gelu_pytorch_tanh",
    })  # fmt: skip
    ids = jnp.arange(1, 13, dtype=jnp.int32).reshape(2, 6)
    one, other = (llama.LlamaForCausalLM(shape, remat=r) for r in ("none", "full"))
    params = one.init(jax.random.key(0), ids)
    loss = lambda model: lambda p: jnp.mean(jnp.square(model.apply(p, ids)))
    (x, dx), (y, dy) = (jax.jit(jax.value_and_grad(loss(m)))(params) for m in (one, other))
    np.testing.assert_allclose(x, y, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, dx, dy)


def test_a_config_has_its_way(tmp_path):
    """What a task applies is the model that the config describes."""
    tiny_encoder.checkpoint(tmp_path / "model")
    tiny_encoder.data(tmp_path / "data", n=16)
    c = sst2_minilm.get_config().unlock()
    c.model.name, c.data.source = str(tmp_path / "model"), str(tmp_path / "data")
    c.data.train_examples, c.data.max_length, c.data.buckets = 0, 16, (16,)
    found = {}
    for c.model.remat in ("none", "full"):
        task, _ = classification.make_task(c)
        made = jax.make_jaxpr(task.apply)(task.base, task.train_batch(0), jax.random.key(0))
        found[c.model.remat] = str(made).count("prevent_cse=")  # a parameter of checkpoint
        assert from_config.load_options(c)["remat"] == c.model.remat  # for language models, too
    # The layers, which print as one; the attention core has some of its own.
    assert found["full"] >= found["none"] + 1, found
