"""What a sweep saves: against a process for each run, and by runs at a time.

    python -m benchmarks.sweep processes [--steps=100] [--only=seed=0] [--parallel=1,auto] \
        [--targets=query,value] [--field=model.dtype=float32] [--field=lora.dropout=0.1] \
        [--uncached]
    python -m benchmarks.sweep throughput [--model=minilm] [--at_once=1,2,4] [--batch=16x32] \
        [--targets=query,value] [--dropout=0.1]

``processes`` trains the runs of configs/quickstart_sweep.py (MiniLM, 16 x 32 tokens) as separate
processes one after another, and as one sweep, turn by turn. ``throughput`` times the compiled step
for several runs at a time on whatever device JAX finds; on a GPU:

    python -m benchmarks.sweep throughput --model=bert_base --batch=16x64 --at_once=1,2,4,8,16,32 \
        --dtype=bfloat16

One JSON object a line. Times are only to be compared within one output; ``cpu_s`` is the processor
time of all cores, which other load on the machine changes less.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import common, quickstart_sweep
from experiments import recipes
from lora_jax.models import bert
from lora_jax.sweeps import trials, vmapped_step
from lora_jax.tasks import classification, from_config
from lora_jax.training import metrics
from lora_jax.training.task import Task

ROOT = Path(__file__).parent.parent
CONFIG = "configs/quickstart_sweep.py"
MODELS = {
    "tiny": bert.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    ),
    "minilm": bert.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    ),
    "bert_base": bert.BertConfig(),
}


# Against processes.


def flags_for(steps: int, targets: str, more: list[str]) -> list[str]:
    """Overrides that make a run of ``steps`` steps, evaluated four times, in batches of 16 x 32.

    Args:
      steps: number of steps of each run.
      targets: patterns of kernels, with commas between them.
      more: further overrides, each FIELD=VALUE.
    """
    per_epoch = max(steps // 4, 1)
    fields = {"data.train_examples": 16 * per_epoch, "batch_size": 16, "epochs": steps // per_epoch}
    fields["lora.targets"] = tuple(targets.split(","))
    return [f"--config.{name}={value}" for name, value in fields.items()] + [
        f"--config.{text}" for text in more
    ]


def measured(arguments: list[str]) -> dict:
    """Runs a module, and gives its wall-clock and processor seconds."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(wall, 1), "cpu_s": round(cpu, 1)}


def processes(args: argparse.Namespace) -> None:
    """Prints each way of doing the runs, with its share of the time of separate processes."""
    flags = flags_for(args.steps, args.targets, args.field)
    if args.uncached:
        flags.append("--compilation_cache=")
    found = trials.make_trials(quickstart_sweep.get_config(), quickstart_sweep.sweep, recipes.GLUE)
    found = trials.select(found, args.only)
    only = [f"--only={text}" for text in args.only]
    sweeps: dict[str, dict] = {}
    ways = args.parallel.split(",")
    alone = []
    with tempfile.TemporaryDirectory() as folder:
        for number, point in enumerate(found):
            fields = [f"--config.{name}={value}" for name, value in point.values.items()]
            workdir = f"--workdir={folder}/{point.id}"
            run = ["experiments.sst2", f"--config={CONFIG}", workdir, *flags, *fields]
            alone.append(measured(run))
            # The sweeps stand between the single runs, so that all see the same machine.
            if ways and (number + 1) * (len(ways) + 1) >= len(found) * (len(sweeps) + 1):
                way = ways.pop(0)
                workdir = f"--workdir={folder}/sweep_{way}"
                sweeps[way] = measured(
                    ["experiments.sweep", f"--config={CONFIG}", workdir, f"--parallel={way}"]
                    + flags + only
                )  # fmt: skip
    what = {"runs": len(found), "steps": args.steps, "targets": args.targets, "fields": args.field}
    what["uncached"] = args.uncached
    total = {name: round(sum(row[name] for row in alone), 1) for name in alone[0]}
    print_row(how="processes", **what, **total)
    for way, row in sweeps.items():
        ratios = {f"{name[:-2]}_ratio": round(row[name] / total[name], 3) for name in total}
        print_row(how=f"sweep --parallel={way}", **what, **row, **ratios)


def print_row(**values: object) -> None:
    """Prints a JSON object, with the device."""
    device = jax.devices()[0]
    values["device"] = f"{device.platform} {device.device_kind} x{os.cpu_count()}"
    print(json.dumps(values), flush=True)


# Runs at a time.


def random_task(model: str, batch: tuple[int, int], dtype: str, *, dropout: bool) -> Task:
    """Sequence classification with random weights and tokens."""
    size, length = batch
    config = MODELS[model]
    net = bert.BertForSequenceClassification(config, dtype=jnp.dtype(dtype))
    ids = np.random.default_rng(0).integers(1000, 20000, (size, length)).astype(np.int32)
    data = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "labels": (np.arange(size) % 2).astype(np.int32),
        "weights": np.ones(size, np.float32),
    }
    return Task(
        apply=lambda params, b, key: classification.apply(net, params, b, key if dropout else None),
        metrics=lambda logits, b: metrics.cross_entropy(logits, b["labels"], b["weights"]),
        train_batch=lambda step: data,
        eval_batches=lambda: [data],
        steps_per_epoch=100,
        base=jax.jit(net.init)(jax.random.key(0), ids, ids),
        base_id="",
        metadata={},
    )


def throughput(args: argparse.Namespace) -> None:
    """Prints steps of a run per second, FLOPs and memory, for each number of runs at a time."""
    batch = tuple(int(n) for n in args.batch.split("x"))
    task = random_task(args.model, batch, args.dtype, dropout=args.dropout > 0)
    config = common.base_config()
    config.lora.rank, config.lora.dropout = args.rank, args.dropout
    config.lora.targets = tuple(args.targets.split(","))
    member = vmapped_step.make_member(task, config, from_config.lora_config(config))
    peak = matmul_tflops(args.dtype)
    first = None
    for count in (int(n) for n in args.at_once.split(",")):
        row = {"how": "throughput", "model": args.model, "batch": batch, "at_once": count}
        try:
            row |= timed(task, member, count, args)
        except jax.errors.JaxRuntimeError as error:
            print_row(**row, error=str(error).splitlines()[0][:200])
            break
        first = first or row["run_steps_per_s"]
        row["speed_ratio"] = round(row["run_steps_per_s"] / first, 3)
        row["of_matmul_peak"] = round(row["tflops"] / peak, 3)
        print_row(**row, dtype=args.dtype)


def timed(task: Task, member: vmapped_step.Member, count: int, args: argparse.Namespace) -> dict:
    """Compiles the step for ``count`` runs and times it."""
    options = vmapped_step.make_options(common.base_config())
    program = vmapped_step.make_program(task, count, has_dropout=args.dropout > 0, options=options)
    members = vmapped_step.place(program, vmapped_step.stack([member] * count, count))
    base, batch = vmapped_step.replicate(program, task.base), task.train_batch(0)
    step = vmapped_step.compile_step(program, "train", members, base, batch)
    cost, memory = step.cost_analysis(), step.memory_analysis()
    seconds = []
    for _ in range(args.repeats + 1):
        begin = time.perf_counter()
        members, _ = jax.block_until_ready(step(members, base, batch))
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[1:])
    return {
        "compile_s": round(vmapped_step.compile_seconds(program), 2),
        "step_s": round(median, 4),
        "least_step_s": round(min(seconds[1:]), 4),
        "run_steps_per_s": round(count / median, 2),
        "gflop_a_run": round(cost["flops"] / count / 1e9, 2),
        "tflops": round(cost["flops"] / median / 1e12, 4),
        "temporary_mb": round(memory.temp_size_in_bytes / 1e6, 1),
    }


def matmul_tflops(dtype: str, size: int = 2048) -> float:
    """What one large matrix product reaches: the roof for everything made of products."""
    x = jnp.ones((size, size), jnp.dtype(dtype))
    multiply = jax.jit(lambda x: x @ x)
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        multiply(x).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times[1:]) / 1e12


def main() -> None:
    """Prints the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(required=True)
    against = kinds.add_parser("processes")
    against.add_argument("--steps", type=int, default=100)
    against.add_argument("--only", action="append", default=[], help="as experiments.sweep --only")
    against.add_argument("--parallel", default="1,auto")
    against.add_argument("--targets", default="query,value", help="kernels, as lora.targets")
    against.add_argument("--field", action="append", default=[], help="FIELD=VALUE of the config")
    against.add_argument("--uncached", action="store_true", help="each process compiles anew")
    against.set_defaults(run=processes)
    at_once = kinds.add_parser("throughput")
    at_once.add_argument("--model", default="minilm", choices=list(MODELS))
    at_once.add_argument("--batch", default="16x32")
    at_once.add_argument("--at_once", default="1,2,4,8")
    at_once.add_argument("--rank", type=int, default=8)
    at_once.add_argument("--repeats", type=int, default=5)
    at_once.add_argument("--targets", default="query,value", help="kernels, as lora.targets")
    at_once.add_argument("--dropout", type=float, default=0.1, help="0: the model's own off, too")
    at_once.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    at_once.set_defaults(run=throughput)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
