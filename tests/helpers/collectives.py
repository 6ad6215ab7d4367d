"""Reads the collectives of a compiled program from its text."""

import math
import re
from typing import NamedTuple

_SIZES = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s32=4, u32=4, f32=4, s64=8, u64=8, f64=8)
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_LINE = re.compile(rf" = (\(?.*?\)?) ({_KINDS})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    kind: str
    shapes: tuple  # of each array that it yields
    largest: int  # bytes of the largest of them


def collectives(text):
    found = []
    for line in text.splitlines():
        if match := _LINE.search(line):
            arrays = [
                (d, tuple(map(int, n.split(","))) if n else ()) for d, n in _ARRAY.findall(match[1])
            ]
            sizes = [math.prod(shape) * _SIZES[dtype] for dtype, shape in arrays]
            found.append(Collective(match[2], tuple(shape for _, shape in arrays), max(sizes)))
    return found
