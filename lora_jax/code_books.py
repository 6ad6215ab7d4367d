"""The tables of numbers that codes stand for, bit for bit those of bitsandbytes.

NF4 has the quantiles of a normal distribution (Dettmers et al. 2023, appendix E), FP4 the numbers
of a sign, two bits of an exponent and one of a mantissa. The table of 256 entries has floats of 8
bits with a dynamic exponent (Dettmers et al. 2022), for scales that are quantized again.
"""

import numpy as np

_NF4 = (
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
    + (-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
    + (0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
    + (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
)
_FP4 = (
    (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0)
    + (0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
)  # fmt: skip
# The second half has the other sign; its zero has none.
TABLES = {
    "nf4": np.array(_NF4, np.float32),
    "fp4": np.array([*_FP4, 0.0, *(-x for x in _FP4[1:])], np.float32),
}


def _make_dynamic() -> np.ndarray:
    """Lists midpoints of 2^i equal parts of [0.1, 1], times 10^(i - 6), of both signs; 0 and 1."""
    positive = []
    for i in range(7):
        ends = _linspace(0.1, 1.0, 2**i + 1)
        middles = (ends[:-1] + ends[1:]) / np.float32(2)
        positive += [np.float32(10.0 ** (i - 6)) * x for x in middles]
    return np.sort(np.array([*positive, *(-x for x in positive), 0, 1], np.float32))


def _linspace(start: float, stop: float, n: int) -> np.ndarray:
    """Counts from the nearer end in float32, rounding product and sum together, as PyTorch does."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(n - 1))
    k = np.arange(n)
    values = np.where(k < n // 2, first + step * k, last - step * (n - 1 - k))
    return values.astype(np.float32)


DYNAMIC = _make_dynamic()
