"""One training step of BERT with a classifier: by this library, and by torch with PEFT.

Both sides have the same shapes and rules: random weights and tokens, rank 8, the classifier
trained, the gradient clipped, AdamW; what is trained is float32. Nothing here needs more than jax,
flax and optax, and for PEFT's side torch, transformers and peft.
"""

import collections
import functools
import glob
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from benchmarks.vs_peft import MODELS
from lora_jax import adapter as adapters
from lora_jax.models import bert

PyTree = Any
RANK, ALPHA, HEAD, RATE, DECAY, CLIP = 8, 16.0, "classifier", 5e-4, 0.01, 1.0
SIX = ("query", "key", "value", "attention/output/dense", "intermediate/dense", "output/dense")
PROFILED = 5  # cases, from the first on, of which a profile is made if it is asked for
TARGETS = {"query,value": ("query", "value"), "all six": SIX}


class Case(NamedTuple):
    """What every side is given.

    ``stored`` is the dtype of the frozen base; ``how`` is "lifted", "merged" or "full"; ``at_once``
    is the number of adapters that one step trains on the same batch.
    """

    batch: tuple[int, int]
    targets: str = "query,value"
    dtype: str = "bfloat16"
    stored: str = "bfloat16"
    how: str = "lifted"
    dropout: float = 0.0
    at_once: int = 1
    model: str = "bert_base"

    @property
    def config(self) -> dict:
        """The model's config, in Hugging Face's words."""
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        return MODELS[self.model] | dict.fromkeys(rates, self.dropout)


def example(case: Case) -> dict[str, np.ndarray]:
    """A random batch, whose sentences fill half of the length or more."""
    rng, (size, length) = np.random.default_rng(0), case.batch
    ids = rng.integers(1, case.config.get("vocab_size", 30522), (size, length))
    lengths = rng.integers(length // 2, length + 1, (size, 1))
    mask, labels = np.arange(length) < lengths, rng.integers(0, 2, size)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: x.astype(np.int32) for name, x in batch.items()}


# ---- Our side ----------------------------------------------------------------------------------


class State(NamedTuple):
    """What a step changes, and its learning rate, which a sweep varies."""

    trained: PyTree
    moments: PyTree
    key: jax.Array
    rate: jax.Array


class Setup(NamedTuple):
    """A pure step, and what it is given."""

    step: Callable[[State, PyTree, dict], tuple[State, jax.Array]]
    state: State
    base: PyTree
    batch: dict[str, jax.Array]


def setup(case: Case) -> Setup:
    """Draws a model and its adapter."""
    config = bert.BertConfig(**case.config)
    model = bert.BertForSequenceClassification(config, dtype=jnp.dtype(case.dtype))
    batch = jax.device_put(example(case))

    def apply(params: PyTree, batch: dict, key: jax.Array) -> jax.Array:
        rngs = {"dropout": key} if case.dropout else None
        inputs = batch["input_ids"], batch["attention_mask"]
        return model.apply(params, *inputs, deterministic=not case.dropout, rngs=rngs)

    key = jax.random.key(0)
    base = weights(case.model, case.stored)
    trained = base
    if case.how != "full":
        config = lora.LoRAConfig(
            rank=RANK, alpha=ALPHA, targets=TARGETS[case.targets], train=(HEAD,)
        )
        adapter = lora.init(key, apply, base, config, batch, key)
        trained = adapters.as_data(jax.tree.map(lambda x: x.astype(jnp.float32), adapter))
    rate = jnp.float32(RATE)
    state = State(trained, optimizer(rate, trained, case.how).init(trained), key, rate)
    # A step donates its state: the base must not be in it.
    state = jax.tree.map(lambda x: jnp.array(x, copy=True), state)
    return Setup(training_step(apply, case), state, {} if case.how == "full" else base, batch)


@functools.cache
def weights(name: str, dtype: str) -> PyTree:
    """Random weights, drawn once."""
    model = bert.BertForSequenceClassification(bert.BertConfig(**MODELS[name]))
    ids = jnp.ones((1, 8), jnp.int32)
    drawn = jax.jit(model.init)(jax.random.key(0), ids, ids)
    return jax.tree.map(lambda x: x.astype(dtype), drawn)


def optimizer(rate: jax.Array, trained: PyTree, how: str) -> optax.GradientTransformation:
    """Clipping and AdamW, as ``lora_jax.training.optimizer`` builds them."""
    rule = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(rate, weight_decay=DECAY))
    if how == "full":
        return rule
    parts = {"trainable": rule, "frozen": optax.set_to_zero()}
    return optax.multi_transform(parts, lora.labels(trained))


def logits(apply: Callable, case: Case, base: PyTree, trained: PyTree, *inputs: Any) -> jax.Array:
    """The model's result by the way of the case; the last two inputs are the batch and a key."""
    if case.how == "full":
        return apply(trained, *inputs)
    if case.how == "merged":
        return apply(lora.merge(base, trained), *inputs)
    drop = {"dropout": case.dropout, "dropout_key": inputs[-1]} if case.dropout else {}
    return lora.lift(apply, **drop)(lora.bind(base, trained), *inputs)


def training_step(apply: Callable, case: Case) -> Callable:
    """``(state, base, batch) -> (state, loss)``."""

    def step(state: State, base: PyTree, batch: dict) -> tuple[State, jax.Array]:
        key, now = jax.random.split(state.key)

        def loss(trained: PyTree) -> jax.Array:
            y = logits(apply, case, base, trained, batch, now).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(y, batch["labels"]).mean()

        value, gradient = jax.value_and_grad(loss)(state.trained)
        tx = optimizer(state.rate, state.trained, case.how)
        updates, moments = tx.update(gradient, state.moments, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return State(trained, moments, key, state.rate), value

    return step


def several(state: State, count: int) -> State:
    """States side by side that differ in learning rate and key."""
    states = jax.tree.map(lambda x: jnp.stack([x] * count), state)
    rates = state.rate * jnp.linspace(0.5, 1.5, count)
    return states._replace(key=jax.random.split(state.key, count), rate=rates)


def product_flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products in a jaxpr; XLA has no count of its own for a GPU."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            sizes = (eqn.invars[0].aval.shape[k] for k in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(sizes)
        inside = sum(map(product_flops, inner_jaxprs(eqn.params.values())))
        total += inside * eqn.params.get("length", 1)  # of a scan
    return total


def inner_jaxprs(values: Iterable[Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from inner_jaxprs(value)
        elif hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield value if hasattr(value, "eqns") else value.jaxpr


def memory(compiled: jax.stages.Compiled) -> dict:
    """XLA's count of the program's memory, where it has one."""
    if (m := compiled.memory_analysis()) is None:
        return {}
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    sizes = {"temporary_mb": m.temp_size_in_bytes, "memory_mb": held + m.temp_size_in_bytes}
    return {name: round(n / 1e6, 1) for name, n in sizes.items()}


def runner(compiled: Callable, state: State, base: PyTree, batch: dict) -> Callable[[int], float]:
    """A function that takes a number of steps, and gives the seconds of each."""

    def run(steps: int) -> float:
        nonlocal state
        begin = time.perf_counter()
        for _ in range(steps):
            state, loss = compiled(state, base, batch)
        jax.block_until_ready((state, loss))
        return (time.perf_counter() - begin) / steps

    return run


class Begun(NamedTuple):
    """A case that is traced, and whose compilation a thread does or will do."""

    setup: Setup
    about: dict
    compiled: Future


def begin(case: Case, pool: ThreadPoolExecutor) -> Begun:
    """Draws a model, traces the step, and has it compiled."""
    start = time.perf_counter()
    s = setup(case)
    step = s.step
    if case.at_once > 1:
        s = s._replace(state=several(s.state, case.at_once))
        step = jax.vmap(step, in_axes=(0, None, None))
    traced = jax.jit(step, donate_argnums=0).trace(s.state, s.base, s.batch)
    lowered = traced.lower()
    about = {
        "trained": trained_count(s.state.trained, case.how),
        "gflop": round(product_flops(traced.jaxpr.jaxpr) / 1e9, 2),
        "setup_s": round(time.perf_counter() - start, 1),
    }
    return Begun(s, about, pool.submit(timed_compile, lowered))


def timed_compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    """The compiled program, and the seconds that it took beside whatever else is compiled."""
    start = time.perf_counter()
    return lowered.compile(), round(time.perf_counter() - start, 1)


def finish(begun: Begun, file: str) -> tuple[dict, Callable[[int], float]]:
    """Returns the facts of a compiled case, and a function that runs a number of steps."""
    compiled, seconds = begun.compiled.result(0)
    s, about = begun.setup, begun.about | {"compile_s": seconds} | memory(compiled)
    run = runner(compiled, s.state, s.base, s.batch)
    run(1)
    if file:
        with open(file, "w") as out:
            out.write(compiled.as_text())
    return about, run


def ours(cases: Sequence[Case], seconds: float, profile: str, threads: int = 5) -> Iterator[tuple]:
    """For each case the facts and the runner of this library's step, or its error and None.

    Nothing runs before all is compiled: the compiler chooses kernels by trying them.
    """
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(threads) as pool:
        begun = [attempt(lambda: begin(case, pool), end) for case in cases]  # noqa: B023
        futures = [x.compiled for x in begun if isinstance(x, Begun)]
        wait(futures, timeout=max(end - time.monotonic(), 0))
        for future in futures:
            future.cancel()  # those that no thread has begun
        wait(futures)
        for number, x in enumerate(begun):
            file = f"{profile}/{number}.hlo" if profile and number < PROFILED else ""
            done = attempt(lambda: finish(x, file)) if isinstance(x, Begun) else x  # noqa: B023
            yield done if isinstance(done, tuple) else (done, None)


def attempt(make: Callable[[], Any], end: float = float("inf")) -> Any:
    """What ``make`` gives, or a dictionary with its error; after the end it is not called."""
    if time.monotonic() > end:
        return {"error": "no time"}
    try:
        return make()
    except (Exception, CancelledError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def trained_count(trained: PyTree, how: str) -> int:
    """How many parameters change."""
    everything = jax.tree.map(lambda _: True, trained)
    mask = everything if how == "full" else lora.mask(trained)
    leaves = zip(*map(jax.tree.leaves, (trained, mask)), strict=True)
    return sum(x.size for x, wanted in leaves if wanted)


def kernels(run: Callable[[int], float], folder: str, steps: int = 5) -> dict[str, float]:
    """Milliseconds a step of each kernel on the device, the longest first, by JAX's profiler."""
    with jax.profiler.trace(folder):
        run(steps)
    newest = max(glob.glob(f"{folder}/**/*.xplane.pb", recursive=True), key=os.path.getmtime)
    total: dict[str, float] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(newest).planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if "Stream" in line.name else ():
                total[event.name] += event.duration_ns / 1e6 / steps
    return {name: round(ms, 4) for name, ms in collections.Counter(total).most_common(40)}


# ---- PEFT --------------------------------------------------------------------------------------


def torch_side(case: Case, mode: str | None) -> tuple[dict, Callable]:
    """PEFT on transformers' model, or that model alone; compiled by torch in a mode, or eager."""
    import torch

    if case.how == "merged" or case.at_once > 1:
        raise NotImplementedError("PEFT has no such step")
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    counted = device.type == "cuda" and mode != "reduce-overhead"  # graphs have their own pool
    before = torch.cuda.memory_allocated() if counted else 0
    model, trained = peft_model(case, device)
    if mode:
        torch._dynamo.config.recompile_limit = 64
        model = torch.compile(model, dynamic=False, mode=mode)
    step = torch_step(case, model, trained, device)

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    run(3)  # a CUDA graph is recorded in the second step
    build = round(time.perf_counter() - begin, 1)
    about = {"trained": sum(p.numel() for p in trained), "build_s": build}
    if counted:
        torch.cuda.reset_peak_memory_stats()
        run(1)
        most = torch.cuda.max_memory_allocated() - before
        about["memory_mb"] = round(most / 1e6, 1)
    return about, run


def peft_model(case: Case, device: Any) -> tuple[Any, list]:
    """The model, and the parameters that are trained, in float32."""
    import peft
    import torch
    import transformers

    config = transformers.BertConfig(**case.config, num_labels=2)
    model = transformers.BertForSequenceClassification(config)
    model = model.to(device, getattr(torch, case.stored)).train()
    if case.how != "full":
        targets = [name.replace("/", ".") for name in TARGETS[case.targets]]
        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, lora_dropout=case.dropout,
            target_modules=targets, modules_to_save=[HEAD],
        )  # fmt: skip
        model = peft.get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    return model, trained


def torch_step(case: Case, model: Any, trained: list, device: Any) -> Callable[[], None]:
    """A step of torch's fused AdamW, with its automatic mixed precision where that is asked for."""
    import torch

    update = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY, fused=True)
    batch = {name: torch.from_numpy(x).to(device) for name, x in example(case).items()}
    batch["labels"] = batch["labels"].long()
    mixed = case.dtype == "bfloat16"

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        update.step()
        update.zero_grad()

    return step


MODES = {"eager": None, "compiled": "default", "graphs": "reduce-overhead"}


def theirs(cases: Sequence[Case], seconds: float, side: str) -> Iterator[tuple]:
    """The same as :func:`ours`, for a side of PEFT."""
    end = time.monotonic() + seconds
    for case in cases:
        done = attempt(lambda: torch_side(case, MODES[side]), end)  # noqa: B023
        yield done if isinstance(done, tuple) else (done, None)
