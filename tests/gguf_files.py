"""Writes small GGUF files, byte by byte, for tests."""

import struct

import numpy as np

from lora_jax.models import ggml

NUMBERS = {layout.name: number for number, layout in ggml.LAYOUTS.items()}
_KINDS = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "u8": 10, "i8": 11, "f8": 12}  # fmt: skip


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(x):
    """With its type before it: an int becomes uint32, a float float32."""
    if isinstance(x, bool):
        return struct.pack("<IB", 7, x)
    if isinstance(x, str | bytes):
        return struct.pack("<I", 8) + string(x)
    if type(x) is int:
        return struct.pack("<II", 4, x)
    if type(x) is float:
        return struct.pack("<If", 6, x)
    if isinstance(x, list) and all(isinstance(y, str) for y in x):
        return struct.pack("<IIQ", 9, 8, len(x)) + b"".join(map(string, x))
    array = np.asarray(x)
    if array.ndim == 0:
        return struct.pack("<I", _KINDS[array.dtype.str[1:]]) + array.tobytes()
    return struct.pack("<IIQ", 9, _KINDS[array.dtype.str[1:]], len(array)) + array.tobytes()


def header(metadata, tensors, *, version=3, step=32, magic=b"GGUF"):
    """Tensors are triples: type's name, shape as in NumPy, bytes."""
    pieces = [magic, struct.pack("<IQQ", version, len(tensors), len(metadata))]
    pieces += [string(key) + value(x) for key, x in metadata.items()]
    at = 0
    for name, (kind, shape, data) in tensors.items():
        number = NUMBERS[kind] if isinstance(kind, str) else kind
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        pieces.append(string(name) + sizes + struct.pack("<IQ", number, at))
        at += -(-len(data) // step) * step
    return b"".join(pieces)


def content(metadata, tensors, *, step=32, **options):
    data = header(metadata, tensors, step=step, **options)
    for _, _, body in tensors.values():
        data += b"\0" * (-len(data) % step) + body
    return data + b"\0" * (-len(data) % step)


def plain(array, kind="F32"):
    """A tensor of plain numbers."""
    bits = {"F32": lambda x: x.astype("<f4"), "F16": lambda x: x.astype("<f2")}
    bits["BF16"] = lambda x: (x.astype("<f4").view("<u4") >> 16).astype("<u2")
    array = np.asarray(array)
    return kind, array.shape, bits[kind](array).tobytes()


def packed(array, kind):
    """A matrix as codes, by the plainest way of choosing a block's scale."""
    if kind in ("F32", "F16", "BF16"):
        return plain(array, kind)
    blocks = np.asarray(array, np.float32).reshape(-1, 32)
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    size = np.abs(blocks).max(1, keepdims=True)
    scale = {"Q4_0": size / 7, "Q4_1": (high - low) / 15, "Q8_0": size / 127}[kind].astype("<f2")
    least = low.astype("<f2") if kind == "Q4_1" else None
    codes = np.rint((blocks - (0 if least is None else least)) / scale.astype(np.float32))
    if kind == "Q8_0":
        body = codes.astype(np.int8).view(np.uint8)
    else:
        four = np.clip(codes + (8 if kind == "Q4_0" else 0), 0, 15).astype(np.uint8)
        body = four[:, :16] | four[:, 16:] << 4
    halves = [x.view(np.uint8) for x in (scale, least) if x is not None]
    return kind, np.shape(array), np.concatenate([*halves, body], axis=1).tobytes()
