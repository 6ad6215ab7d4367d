"""Makes tests/goldens/gguf/blocks.npz: blocks of every packed type, and the numbers in them.

    pip install gguf==0.19.0
    python scripts/make_gguf_goldens.py

The numbers are those of the package ``gguf``, by the authors of the format. The bytes are random,
but for the halves among them, which are of a size as trained weights have.
"""

from pathlib import Path

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

OUT = Path(__file__).resolve().parents[1] / "tests" / "goldens" / "gguf" / "blocks.npz"
# Where each type has halves, in bytes from a block's beginning.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def main(out=OUT):
    rng, arrays = np.random.default_rng(0), {}
    for name, places in HALVES.items():
        kind = GGMLQuantizationType[name]
        blocks = rng.integers(0, 256, (4, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        for at in places:
            halves = (0.01 * rng.normal(size=(4, 1))).astype("<f2")
            blocks[:, at : at + 2] = halves.view(np.uint8)
        arrays[name] = blocks
        arrays[f"{name} values"] = quants.dequantize(blocks, kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **arrays)


if __name__ == "__main__":
    main()
