"""Runs the cases of test_meshes.py on 8 virtual devices, in a process of its own.

    python tests/helpers/cases_on_8_devices.py DIRECTORY CASE ...

prints a JSON object with what each case has shown.
"""

import json
import os
import re
import sys
import tracemalloc
from pathlib import Path

from tests.helpers import xla_flags

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {xla_flags.make_flags()}"

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax import paths, sharding
from lora_jax.models import checkpoints, gpt2, llama, mixtral, t5, token_losses
from lora_jax.tasks import classification, language_modeling
from lora_jax.training import metrics, partitioning
from lora_jax.training.evaluation import evaluate, make_eval_step
from lora_jax.training.global_batches import put_batch
from lora_jax.training.mesh import find
from lora_jax.training.state import initial_state, unwrap_key, wrap_key
from lora_jax.training.step import make_train_step, step_options
from tests.helpers import tiny_encoder
from tests.helpers.collectives import collectives
from tests.helpers.comparisons import perturbed
from tests.helpers.tiny_encoder import config

STEPS = 50
MESHES = {
    "one": {},
    "data": {"mesh.data": 8},
    "fsdp": {"mesh.fsdp": 8},
    "tensor": {"mesh.tensor": 2},
    "mixed": {"mesh.data": -1, "mesh.fsdp": 2, "mesh.tensor": 2},
    "pmap": {"pmap": True},
}


def train(c, *, scores=False, steps=STEPS):
    """Some steps of the real step, with its program, and an evaluation if asked for."""
    devices = find(c)
    task, settings = classification.make_task(c)
    state, tx = initial_state(task, c, settings)
    state = wrap_key(partitioning.place_state(devices, unwrap_key(state), task.base))
    about = {} if devices.pmap else layout(task, state)
    task, options = partitioning.copy_base(devices, task), step_options(c)
    step = make_train_step(task, tx, settings.dropout, options, devices=devices, like=state)
    if devices.mesh is not None and not devices.pmap:
        compiled = step.lower(state, task.base, task.train_batch(0)).compile()
        about["collectives"] = [x._asdict() for x in collectives(compiled.as_text())]
        step = lambda state, base, batch: compiled(state, base, put_batch(devices, batch))
    before, losses = jax.tree.map(lambda x: x.sharding, state.opt_state), []
    for k in range(steps):
        state, (sums, verdict) = step(state, task.base, task.train_batch(k))
        assert not int(verdict.skips)
        losses.append(float(sums[0]) / float(sums[-1]))
    jax.tree.map(lambda x: x + 1, task.base)  # it was not donated
    stays = jax.tree.map(
        lambda s, x: s.is_equivalent_to(x.sharding, x.ndim), before, state.opt_state
    )
    about |= {"losses": losses, "stays": all(jax.tree.leaves(stays))}
    if scores:
        about["scores"] = evaluate(make_eval_step(task, devices), state.adapter, task)
    return about


def layout(task, state):
    """Bytes of each leaf of the base, on the first device and in all; and what is trained."""
    first = jax.devices()[0]
    here = lambda x: sum(s.data.nbytes for s in x.addressable_shards if s.device == first)
    base = paths.named_leaves(task.base)
    trained = {n: x.shape for n, x in paths.named_leaves(state.adapter).items() if x.shape}
    return {
        "base": {name: (here(x), x.nbytes) for name, x in base.items()},
        "kernels": sorted({x.shape for x in base.values() if x.ndim > 1}),
        "trained": trained,
    }


def still(root, mesh):
    """Without dropout, whose draw in a pmap is each device's own; some have rows of no weight."""
    changes = {"model.name": str(root / "still"), "lora.dropout": 0.0, "data.train_examples": 196}
    return train(config(root, **MESHES[mesh], **changes), scores=True)


def parts(root, mesh):
    """With the batch in two parts, each layer computed again, and no dropout."""
    changes = {"accumulate": 2, "model.remat": "full", "batch_size": 16}
    changes |= {"model.name": str(root / "still"), "lora.dropout": 0.0}
    return train(config(root, **MESHES[mesh], **changes), scores=True)


def adalora(root, mesh):
    """Its optimizer chooses ranks by the scores of all devices."""
    changes = {"lora.method": "adalora", "optimizer.budget.target_rank": 1}
    return train(config(root, **MESHES[mesh], **changes), steps=20)


def losses(root, mesh):
    return train(config(root, **MESHES[mesh]), scores=mesh in ("one", "mixed"))


SIZES = dict(vocab_size=64, max_position_embeddings=64)
LLAMA = SIZES | dict(
    hidden_size=128, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=8,
    intermediate_size=256, model_type="llama",
)  # fmt: skip


def memory(root, mesh):
    """What the compiled gradient of a deep Llama keeps, of which only shapes are needed."""
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_hf(LLAMA), scan_layers=True)
    mesh = find(config(root, **MESHES[mesh])).mesh
    _, base, _, compiled = gradient(model, lora_family("llama"), mesh)
    kernels = [x for x in jax.tree.leaves(base) if x.ndim > 2]
    return {
        "base": sum(x.size * 4 for x in jax.tree.leaves(base)),
        "arguments": compiled.memory_analysis().argument_size_in_bytes,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "layer": max(x.size * 4 // LLAMA["num_hidden_layers"] for x in kernels),
        "collectives": [x._asdict() for x in collectives(compiled.as_text())],
    }


def lora_family(name):
    families = (gpt2.FAMILY, t5.FAMILY, mixtral.FAMILY, *llama.FAMILIES)
    return next(f for f in families if name in f.model_type)


def gradient(model, family, mesh):
    """Specs, shapes and compiled gradient of a language model's loss by its adapter."""
    at = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    ids = jax.ShapeDtypeStruct((8, 8), jnp.int32, sharding=jax.NamedSharding(mesh, sharding.BATCH))
    base = jax.eval_shape(model.init, jax.random.key(0), *inputs(family, ids))
    specs = sharding.specs(base, family.sharding, mesh, strict=False)
    base = jax.tree.map(at, base, sharding.shardings(specs, mesh))
    fn = forward(model, family)
    draw = lambda: lora.init(jax.random.key(0), fn, base, lora.LoRAConfig(rank=4), ids)
    adapter = jax.eval_shape(draw)
    split = sharding.shardings(sharding.adapter_specs(specs, adapter), mesh)
    with jax.set_mesh(mesh):
        jitted = jax.jit(jax.grad(loss_of(fn), has_aux=True), out_shardings=(split, None))
        compiled = jitted.lower(jax.tree.map(at, adapter, split), base, ids).compile()
    return specs, base, adapter, compiled


def inputs(family, ids):
    return (ids, jnp.ones(ids.shape, jnp.int32), ids)[: 3 if family is t5.FAMILY else 1]


def forward(model, family):
    """What the loss is computed from: a T5's logits, and the others' losses of tokens."""
    if family is t5.FAMILY:
        return lambda p, ids: model.apply(p, *inputs(family, ids))
    return lambda p, ids: language_modeling.apply(model, p, batch_of(ids), None)


def batch_of(ids):
    return {"input_ids": ids, "counts": jnp.ones_like(ids), "weights": jnp.ones(len(ids))}


def loss_of(fn):
    def loss(adapter, base, ids):
        outputs = lora.lift(fn)(lora.bind(base, adapter), ids)
        if isinstance(outputs, token_losses.TokenLosses):
            sums = language_modeling.token_loss(outputs, batch_of(ids))
        else:
            labels = ids[:, 1:].reshape(-1)
            logits = outputs[:, :-1].reshape(labels.size, -1)
            sums = metrics.cross_entropy(logits, labels, jnp.ones(labels.size))
        return sums.loss / sums.weight, sums

    return loss


MODELS = {
    "llama": lambda: llama.LlamaForCausalLM(
        llama.LlamaConfig.from_hf(LLAMA | {"num_hidden_layers": 2, "hidden_size": 16,
        "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}),
        scan_layers=True),
    "mixtral": lambda: mixtral.MixtralForCausalLM(
        mixtral.MixtralConfig(vocab_size=64, max_position_embeddings=64, num_hidden_layers=2,
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4), scan_layers=True),
    "gpt2": lambda: gpt2.GPT2LMHeadModel(
        gpt2.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=16),
        scan_layers=True),
    "t5": lambda: t5.T5ForConditionalGeneration(
        t5.FAMILY.config(vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=2,
        num_decoder_layers=2, num_heads=2), scan_layers=True),
}  # fmt: skip
# Fields of the adapter and the learning rate: each method's arrays have specs of their own.
ADAPTERS = {
    "llama": (dict(rank=2, alpha=2.0), 0.05),
    "mixtral": (dict(rank=2, alpha=2.0), 0.05),
    "gpt2": (dict(rank=2, alpha=2.0, train_a=False), 0.05),
    "t5": (dict(rank=8, method="vera"), 1.0),
}


def family(root, name):
    """A model with stacked layers, on one device and on a mixed mesh."""
    mesh, model, about = find(config(root, **MESHES["mixed"])).mesh, MODELS[name](), {}
    kind = lora_family(name)
    ids = np.random.default_rng(0).integers(0, 61, (8, 8)).astype(np.int32)
    fn = forward(model, kind)
    base = jax.jit(model.init)(jax.random.key(1), *inputs(kind, jnp.asarray(ids)))
    fields, rate = ADAPTERS[name]
    adapter = lora.init(jax.random.key(0), fn, base, lora.LoRAConfig(**fields), ids)
    specs = sharding.specs(base, kind.sharding, mesh, strict=False)
    tx = optax.multi_transform(
        # No Adam: it makes steps of gradients that are nothing but rounding.
        {"trainable": optax.sgd(rate), "frozen": optax.set_to_zero()},
        lora.labels(adapter),
    )
    state = adapter, tx.init(adapter)
    grad = jax.grad(loss_of(fn), has_aux=True)

    def step(state, base, ids):
        grads, sums = grad(state[0], base, ids)
        updates, opt_state = tx.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), sums.loss

    run = jax.jit(step)
    about["one"] = steps(run, state, base, ids)
    split = sharding.adapter_specs(specs, adapter)
    whole = sharding.state_specs(state, adapter, split)
    placed = sharding.place(state, whole, mesh), sharding.place(base, specs, mesh)
    rows = sharding.put(ids, jax.NamedSharding(mesh, sharding.BATCH))
    out = sharding.shardings(whole, mesh), None
    with jax.set_mesh(mesh):
        about["mixed"] = steps(jax.jit(step, out_shardings=out), *placed, rows)
    about["replicated"] = sharding.replicated(base, specs)
    return about


def steps(run, state, base, ids):
    losses = []
    for _ in range(STEPS):
        state, loss = run(state, base, ids)
        losses.append(float(loss))
    return losses


HEAD = LLAMA | dict(
    vocab_size=512, hidden_size=16, num_hidden_layers=1, intermediate_size=24,
    num_attention_heads=2, num_key_value_heads=2,
)  # fmt: skip
TOKENS = 8 * 4  # of each chunk, in four parts of rows, each with half of the vocabulary


def chunks(root, name):
    """An adapted head: the loss by chunks on a mesh, and at once on one device."""
    mesh, kind = find(config(root, **MESHES[name])).mesh, lora_family("llama")
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_hf(HEAD))
    ids = np.random.default_rng(0).integers(0, 512, (8, 16)).astype(np.int32)
    fn = forward(model, kind)
    base = jax.jit(model.init)(jax.random.key(1), jnp.asarray(ids))
    settings = lora.LoRAConfig(rank=2, targets=("lm_head", "q_proj"))
    adapter = perturbed(lora.init(jax.random.key(0), fn, base, settings, ids))
    run = lambda: jax.value_and_grad(loss_of(fn), has_aux=True)
    (one, _), grads = jax.jit(run())(adapter, base, ids)
    specs = sharding.specs(base, kind.sharding, mesh, strict=False)
    placed = sharding.place(adapter, sharding.adapter_specs(specs, adapter), mesh)
    args = (
        placed,
        sharding.place(base, specs, mesh),
        sharding.put(ids, jax.NamedSharding(mesh, sharding.BATCH)),
    )
    token_losses.CHUNK_BYTES = TOKENS * 512 * 4 // mesh.size
    with jax.set_mesh(mesh):
        compiled = jax.jit(run()).lower(*args).compile()
        (many, _), split_grads = compiled(*args)
    far = lambda x, y: float(np.abs(x - np.asarray(y)).max() / np.abs(x).max())
    return {
        "loss": abs(float(many) / float(one) - 1),
        "gradients": max(jax.tree.leaves(jax.tree.map(far, jax.tree.map(np.asarray, grads), split_grads))),
        "collectives": [x._asdict() for x in collectives(compiled.as_text())],
        "loops": compiled.as_text().count(" while("),
        "gathered in": places(compiled.as_text(), r" = f32\[16,256\]\S* all-gather\("),
    }  # fmt: skip


def places(text, pattern):
    """The computations of a compiled program that have a line with a pattern."""
    parts = re.split(r"\n(?=\S)", text)
    return [part.split()[0] for part in parts if re.search(pattern, part)]


def host_memory(root, name):
    """The most that numpy had at a time while a checkpoint was loaded into pieces, in bytes."""
    tiny_encoder.CONFIGS["large"] = tiny_encoder.BERT | dict(
        hidden_size=256, num_hidden_layers=6, intermediate_size=1024
    )
    directory = tiny_encoder.checkpoint(root / "large", kind="large")
    mesh = find(config(root, **MESHES[name])).mesh
    about = {}
    for scan in (False, True):
        tracemalloc.start()
        loaded = checkpoints.load(directory, head="encoder", scan_layers=scan, mesh=mesh)
        about[str(scan)] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    leaves = jax.tree.leaves(loaded.params)
    return about | {"result": sum(x.nbytes for x in leaves), "tensor": 256 * 1024 * 4}


def stream(root, name):
    """Loading into pieces, with how much of the arrays on the host is alive at most."""
    mesh = find(config(root, **MESHES[name])).mesh
    whole = checkpoints.load(root / "model", head="classifier", scan_layers=True)
    split = checkpoints.load(root / "model", head="classifier", scan_layers=True, mesh=mesh)
    short = checkpoints.load(
        root / "model", head="classifier", scan_layers=True, mesh=mesh, param_dtype=jnp.bfloat16
    )
    again = checkpoints.redraw(split, jax.random.key(5))
    drawn = checkpoints.redraw(whole, jax.random.key(5))
    leaves = {k: paths.named_leaves(x) for k, x in dict(
        whole=whole.params, split=split.params, short=short.params, again=again, drawn=drawn
    ).items()}  # fmt: skip
    equal = lambda x, y: bool(np.array_equal(np.asarray(x), np.asarray(y)))
    specs = sharding.specs(whole.params, whole.family.sharding, mesh, strict=False)
    wanted = paths.named_leaves(sharding.shardings(specs, mesh))
    names = list(leaves["whole"])
    return {
        "same": {n: equal(leaves["whole"][n], leaves["split"][n]) for n in names},
        "redrawn": {n: equal(leaves["drawn"][n], leaves["again"][n]) for n in names},
        "placed": {n: all(leaves[k][n].sharding == wanted[n] for k in ("split", "short", "again")) for n in names},
        "rounded": {n: equal(leaves["whole"][n].astype(leaves["short"][n].dtype), leaves["short"][n]) for n in names},
        "dtypes": {n: str(leaves["short"][n].dtype) for n in names},
        "fresh": split.fresh,
    }  # fmt: skip


CASES = dict(
    losses=losses,
    still=still,
    parts=parts,
    adalora=adalora,
    memory=memory,
    family=family,
    stream=stream,
    host=host_memory,
    chunks=chunks,
)


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    found = {}
    for case in sys.argv[2:]:
        kind, _, name = case.partition(":")
        found[case] = CASES[kind](Path(sys.argv[1]), name)
    print(json.dumps(found))
