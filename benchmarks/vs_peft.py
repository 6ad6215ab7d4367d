"""A training step here and in PEFT, on the same shapes, side by side in one run.

    python -m benchmarks.vs_peft [--cases=minilm:16x32,bert_base:8x64] [--dropout=0.1] [--compile]
        [--dtypes=float32,bfloat16] [--threads=1,2]

Needs the extra `parity`. One JSON object a line and case, with the processor's name and those of
its instructions that matter. `ratio` is PEFT's time divided by ours: above 1, the step here is
faster. Each side is a process of its own with the same number of threads, and they take turns step
by step, so that whatever else the machine does meets both.

The step is the one of `lora_jax.training`: low-rank adaptation of query and value, the classifier
trained, the gradient clipped, AdamW with a linear decay. Models are drawn at random, in float32;
"bfloat16" is the dtype of the activations here, and autocast in torch. Sentences fill half of the
length or more. GLIBC_TUNABLES holds for both sides.

    step_s           median and least seconds of one step, until its results are there
    cpu_s            the same in processor seconds, of all threads together
    loss, trained    of the first step; how many parameters are trained: the same on both sides
    first_step_s     from the model in memory to the end of its first step: adapters, compilation
    start_peak_mb    high-water mark of the process from its imports to the end of the first step,
                     above what it held after the imports: drawing the model and compilation count
    peak_mb          the same of the steps after it; on an accelerator, of its memory, first step
                     included
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import time
from typing import NamedTuple

import numpy as np

MODELS = {
    "bert_base": {},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "tiny": {
        "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16,
    },
}  # fmt: skip
CASES = "minilm:16x32,minilm:16x128,bert_base:8x64,bert_base:16x128"
RANK, ALPHA, TARGETS, HEAD = 8, 16.0, ["query", "value"], "classifier"
RATE, DECAY, CLIP, STEPS = 5e-4, 0.01, 1.0, 10_000


class Case(NamedTuple):
    """What both sides are given."""

    model: str
    size: int
    length: int
    dropout: float
    dtype: str
    threads: int
    prng: str
    full: bool

    @property
    def config(self) -> dict:
        """The model's config, in Hugging Face's words."""
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        return MODELS[self.model] | dict.fromkeys(rates, self.dropout)


def batches(case: Case):
    """An endless sequence of random batches, the same on both sides."""
    rng = np.random.default_rng(0)
    vocabulary = case.config.get("vocab_size", 30522)
    while True:
        least = case.length if case.full else case.length // 2
        lengths = rng.integers(least, case.length + 1, case.size)
        yield {
            "input_ids": rng.integers(1, vocabulary, (case.size, case.length)).astype(np.int32),
            "attention_mask": (np.arange(case.length) < lengths[:, None]).astype(np.int32),
            "labels": rng.integers(0, 2, case.size).astype(np.int32),
        }


class Step(NamedTuple):
    """What a side tells of one step: its loss, parameters trained, peak of the device's memory."""

    loss: float
    trained: int
    peak: int | None


# ---- The two sides: each yields after its imports, with its model, and then after every step -----


def ours(case: Case):
    """The training loop of this repository, with its own step."""
    import functools

    import jax
    import jax.numpy as jnp

    import lora_jax as lora
    from configs import common
    from lora_jax.models import bert
    from lora_jax.tasks import classification
    from lora_jax.training import metrics
    from lora_jax.training.state import initial_state
    from lora_jax.training.step import make_train_step
    from lora_jax.training.task import Task

    jax.config.update("jax_default_prng_impl", case.prng)
    device = jax.devices()[0]
    yield f"{device.platform} {device.device_kind}"

    model = bert.BertForSequenceClassification(bert.BertConfig(**case.config), dtype=case.dtype)
    ids = jnp.ones((case.size, case.length), jnp.int32)
    base = jax.block_until_ready(jax.jit(model.init)(jax.random.key(0), ids, ids))
    yield

    data = ({**b, "weights": np.ones(case.size, np.float32)} for b in batches(case))
    task = Task(
        apply=functools.partial(classification.apply, model),
        metrics=lambda logits, b: metrics.cross_entropy(logits, b["labels"], b["weights"]),
        train_batch=lambda _: next(data),
        eval_batches=None, steps_per_epoch=STEPS, base=base, base_id="", metadata={},
    )  # fmt: skip
    config = common.base_config()
    config.epochs = 1
    config.optimizer.update(learning_rate=RATE, weight_decay=DECAY, clip_norm=CLIP)
    lora_config = lora.LoRAConfig(
        rank=RANK, alpha=ALPHA, targets=tuple(TARGETS), train=(HEAD,), dropout=case.dropout
    )
    state, tx = initial_state(task, config, lora_config)
    leaves = zip(*map(jax.tree.leaves, (state.adapter, lora.mask(state.adapter))), strict=True)
    trained = sum(x.size for x, wanted in leaves if wanted)
    compiled = make_train_step(task, tx, lora_config.dropout)
    while True:
        state, sums = compiled(state, base, next(data))
        jax.block_until_ready((state.adapter, sums))
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        yield Step(float(sums[0] / sums[2]), trained, peak)


def theirs(case: Case, *, compiled: bool = False):
    """PEFT on transformers' model, with torch's AdamW."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(case.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield f"torch {device}"

    torch.manual_seed(0)
    config = transformers.BertConfig(**case.config, num_labels=2)
    model = transformers.BertForSequenceClassification(config).to(device)
    yield

    data = batches(case)
    lora_config = peft.LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, lora_dropout=case.dropout,
        target_modules=TARGETS, modules_to_save=[HEAD],
    )  # fmt: skip
    model = peft.get_peft_model(model, lora_config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    forward = torch.compile(model) if compiled else model
    low = contextlib.nullcontext()
    if case.dtype != "float32":
        low = torch.autocast(device.type, dtype=getattr(torch, case.dtype))
    while True:
        batch = {k: torch.from_numpy(v).to(device) for k, v in next(data).items()}
        with low:
            loss = forward(**batch | {"labels": batch["labels"].long()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        value = loss.item()  # waits for the device
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        yield Step(value, sum(p.numel() for p in trained), peak)


SIDES = {
    "ours": ours,
    "eager": theirs,
    "compiled": lambda case: theirs(case, compiled=True),
}


# ---- One process a side ------------------------------------------------------------------------


def serve(pipe, side: str, case: Case) -> None:
    """The life of one side's process: starts, then answers each message with a step's time."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: case.threads])
    run = SIDES[side](case)
    device, held = next(run), memory("VmRSS")
    next(run)
    begun = time.perf_counter()
    try:
        step = next(run)
    except Exception as error:  # torch.compile needs a compiler that knows the machine
        return pipe.send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})
    first = round(time.perf_counter() - begun, 2)
    start = memory("VmHWM") - held
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again from here: after compilation
    about = {"device": device, "trained": step.trained, "loss": round(step.loss, 4)}
    pipe.send(about | {"first_step_s": first, "start_peak_mb": round(start / 1e6, 1)})
    while pipe.recv():
        begun = time.perf_counter(), time.process_time()
        step = next(run)
        pipe.send((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    most = memory("VmHWM") - held if step.peak is None else step.peak
    return pipe.send({"peak_mb": round(most / 1e6, 1), "imports_mb": round(held / 1e6, 1)})


INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def find_processor() -> dict:
    """The processor's name, and those of its instructions that matter here, from Linux."""
    with open("/proc/cpuinfo") as file:
        lines = [line.partition(":")[::2] for line in file]
    about = {key.strip(): value.strip() for key, value in reversed(lines)}
    flags = about.get("flags", about.get("Features", "")).split()
    return {
        "processor": about.get("model name", platform.machine()),
        "family": about.get("cpu family", ""),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def memory(field: str) -> int:
    """A figure of this process in bytes, from Linux: VmRSS now, VmHWM at its highest."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measure(case: Case, sides: list[str], *, steps: int, warmup: int) -> dict:
    """Runs all sides, taking turns; one row."""
    context = multiprocessing.get_context("spawn")
    rows, pipes, processes = {}, {}, []
    for side in sides:
        pipes[side], end = context.Pipe()
        processes.append(context.Process(target=serve, args=(end, side, case), daemon=True))
        processes[-1].start()
        rows[side] = pipes[side].recv()  # one at a time: the first step's time is measured too
        if "error" in rows[side]:
            pipes.pop(side)
    times = {side: [] for side in pipes}
    for turn in range(warmup + steps):
        for side in pipes if turn % 2 else reversed(pipes):
            pipes[side].send(True)
            times[side].append(pipes[side].recv())
    for side, pipe in pipes.items():
        pipe.send(False)
        wall, cpu = zip(*times[side][warmup:], strict=True)
        rows[side] |= {"step_s": summary(wall), "cpu_s": summary(cpu), **pipe.recv()}
    for process in processes:
        process.join()
    return {**case._asdict(), **compared(rows)}


def summary(times: tuple) -> dict:
    """Median and minimum."""
    return {"median": round(statistics.median(times), 5), "min": round(min(times), 5)}


def compared(rows: dict) -> dict:
    """The sides' rows, and the ratios of the others' times to ours."""
    part = lambda row, what, of: row[what][of] / rows["ours"][what][of]
    ratios = {
        f"{side} {what} {of}": round(part(row, what, of), 3)
        for side, row in rows.items()
        for what in ("step_s", "cpu_s")
        for of in ("median", "min")
        if side != "ours" and what in row and what in rows["ours"]
    }
    return {"ratio": ratios, **rows}


def main() -> None:
    """Prints the cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--cases", default=CASES, help="MODEL:BATCHxLENGTH, separated by commas")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the model and the branches")
    parser.add_argument("--prng", default="threefry2x32", help="JAX's generator, for dropout")
    parser.add_argument("--full", action="store_true", help="sentences without padding")
    parser.add_argument("--compile", action="store_true", help="also PEFT under torch.compile")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed, on each side")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--dtypes", default="float32,bfloat16", help="separated by commas")
    parser.add_argument("--threads", default=str(cpus), help="numbers, separated by commas")
    args = parser.parse_args()
    sides = [*SIDES][: 3 if args.compile else 2]
    processor = find_processor()
    choices = itertools.product(
        args.cases.split(","), args.dtypes.split(","), map(int, args.threads.split(","))
    )
    for name, dtype, threads in choices:
        model, shape = name.split(":")
        size, length = map(int, shape.split("x"))
        case = Case(model, size, length, args.dropout, dtype, threads, args.prng, args.full)
        row = measure(case, sides, steps=args.steps, warmup=args.warmup)
        print(json.dumps(row | processor), flush=True)


if __name__ == "__main__":
    main()
