"""Makes tests/goldens/adapters/format_1: an adapter as lora_jax wrote it before kinds of nodes.

    git archive 6a3feea lora_jax | tar x -C OLD
    PYTHONPATH=OLD python scripts/make_adapter_goldens.py

Commit 6a3feea is the last that wrote format 1; later ones write format 2. Beside the two files of
the adapter is io.npz with the parameters, an input, and the output of the merged function.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora

OUT = Path(__file__).resolve().parents[1] / "tests" / "goldens" / "adapters" / "format_1"


def fn(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"] + params["bias"][None]


def main(out=OUT):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"up": {"kernel": draw(5, 4)}, "down": {"kernel": draw(4, 3)}, "bias": draw(3)}
    x = draw(2, 5)
    config = lora.LoRAConfig(rank=2, alpha=3.0, train=("bias",), rank_pattern={"down": 1})
    adapter = lora.init(jax.random.key(0), fn, params, config, x)
    adapter = jax.tree.map(lambda v: v + 0.1 * draw(*v.shape), adapter)
    lora.save(out, adapter, config, base="golden", metadata={"step": 8})
    leaves = {
        "up": params["up"]["kernel"],
        "down": params["down"]["kernel"],
        "bias": params["bias"],
    }
    y = fn(lora.merge(params, adapter), x)
    np.savez(out / "io.npz", x=x, y=y, **leaves)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
