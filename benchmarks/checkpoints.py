"""Size and time of a checkpoint: BERT-base, rank 8 on query and value, with its classifier.

    python -m benchmarks.checkpoints [--repeats=20]

One JSON object: bytes on disk, seconds that a save holds the training loop, seconds until it is on
disk, and seconds to read it again. The state is noise of the true shapes, which nothing compresses;
the model itself is never made.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax

import lora_jax as lora
from lora_jax.models import bert
from lora_jax.training import checkpointing
from lora_jax.training.optimizer import Settings, adamw
from lora_jax.training.state import TrainState

SETTINGS = Settings(
    learning_rate=1e-3, warmup_steps=0, total_steps=100, weight_decay=0.01, clip_norm=1.0
)


def bert_base_state() -> TrainState:
    """All that changes in such a run, as a checkpoint stores it."""
    model = bert.BertForSequenceClassification(bert.BertConfig(), num_labels=2)
    ids = jax.ShapeDtypeStruct((1, 8), np.int32)
    config = lora.LoRAConfig(rank=8, targets=("query", "value"), train=("classifier",))

    def made(base: dict) -> TrainState:
        adapter = lora.init(jax.random.key(0), model.apply, base, config, ids, ids)
        tx = adamw(SETTINGS, adapter, "linear")
        step, key = jax.numpy.int32(0), jax.random.key_data(jax.random.key(0))
        return TrainState(step, adapter, tx.init(adapter), key)

    shapes = jax.eval_shape(made, jax.eval_shape(model.init, jax.random.key(0), ids, ids))
    rng = np.random.default_rng(0)
    noise = lambda x: rng.integers(0, 255, x.size * x.dtype.itemsize, np.uint8).view(x.dtype)
    return jax.tree.map(lambda x: noise(x).reshape(x.shape), shapes)


def measure(directory: Path, repeats: int) -> dict:
    """Saves and restores ``repeats`` times; times are medians."""
    state = bert_base_state()
    moments = optax.tree_utils.tree_get_all_with_path(state.opt_state, "mu")
    held, done, read = [], [], []
    with checkpointing.manager(directory, keep=1) as checkpoints:
        for step in range(1, repeats + 1):
            begin = time.perf_counter()
            checkpointing.save(checkpoints, step, state, {})
            held.append(time.perf_counter() - begin)
            checkpointing.wait(checkpoints)
            done.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            checkpointing.restore(checkpoints, state)
            read.append(time.perf_counter() - begin)
    median = lambda values: round(statistics.median(values), 4)
    return {
        "trained": sum(x.size for x in jax.tree.leaves(moments[0][1])),
        "bytes": sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()),
        "save_holds_s": median(held),
        "save_s": median(done),
        "restore_s": median(read),
    }


def main() -> None:
    """Prints the line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure(Path(directory), parser.parse_args().repeats)))


if __name__ == "__main__":
    main()
