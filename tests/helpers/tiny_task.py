"""A task of one 4 x 4 kernel, for tests of the loop: it compiles in no time, and a step takes none."""

import contextlib
import resource
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from configs import common
from lora_jax.training import metric_writer, metrics, train
from lora_jax.training.state import initial_state, unwrap_key
from lora_jax.training.task import Task

LORA = lora.LoRAConfig(rank=2, alpha=4.0, targets=("dense",))
PER_EPOCH = 8


def task(per_epoch=PER_EPOCH, evaluations=3):
    """Which of four classes a vector is of: that of its largest entry, after a rotation."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]

    def batch(number):
        x = np.random.default_rng([1, number]).normal(size=(6, 4)).astype(np.float32)
        labels = np.argmax(x @ rotation, axis=-1).astype(np.int32)
        return {"x": x, "labels": labels, "weights": np.ones(6, np.float32)}

    return Task(
        apply=lambda params, batch, key: batch["x"] @ params["dense"]["kernel"],
        metrics=lambda logits, batch: metrics.cross_entropy(
            logits, batch["labels"], batch["weights"]
        ),
        train_batch=batch,
        eval_batches=lambda: (batch(10**6 + k) for k in range(evaluations)),
        steps_per_epoch=per_epoch,
        base={"dense": {"kernel": kernel}},
        base_id="sha256:none",
        metadata={},
    )


def config(**changes):
    """Lines every 3 steps, checkpoints every 5, evaluations every 8: in no step they want."""
    c = common.base_config()
    c.epochs, c.log_every, c.checkpoint_every, c.eval_at_start = 3, 3, 5, False
    c.optimizer.learning_rate = 0.05
    c.lora.targets, c.lora.train = ("dense",), ()
    c.update_from_flattened_dict({n.replace("__", "."): x for n, x in changes.items()})
    return c.lock()


def run(workdir, some_task=None, **changes):
    return train.train(some_task or task(), config(**changes), LORA, workdir, say=print)


def lines(workdir):
    """Its metric lines, but for what the clock says."""
    found = metric_writer.read(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "examples_per_second"} for line in found]


def outcome(workdir):
    """All that must be the same however often a run was interrupted."""
    (weights,) = (workdir / "adapter").glob("*.safetensors")
    return SimpleNamespace(lines=lines(workdir), name=weights.name, adapter=weights.read_bytes())


def state():
    """The state at step 0, as it is stored."""
    return unwrap_key(initial_state(task(), config(), LORA)[0])


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


@contextlib.contextmanager
def files(limit=100):
    """No file can become longer, which is an error in place of the usual signal."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
