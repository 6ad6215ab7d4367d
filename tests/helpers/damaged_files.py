"""Ways to damage files: bytes and a random generator to bytes. Shared by the tests that do so."""

import json
import struct

import numpy as np


def split(data):
    """Header and body of a safetensors file."""
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def join(header, body, *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + body


# Mutations of the weights: bytes and a random generator to bytes.


def truncated(data, rng):
    return data[: rng.integers(len(data))]


def extended(data, rng):
    return data + rng.bytes(int(rng.integers(1, 50)))


def flipped_bits(data, rng):
    out = bytearray(data)
    for at in rng.integers(len(data), size=rng.integers(1, 4)):
        out[at] ^= 1 << int(rng.integers(8))
    return bytes(out)


def flipped_header_bits(data, rng):
    (n,) = struct.unpack("<Q", data[:8])
    out = bytearray(data)
    out[int(rng.integers(8 + n))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def random_block(data, rng):
    at, size = int(rng.integers(len(data))), int(rng.integers(1, 64))
    return data[:at] + rng.bytes(size) + data[at + size :]


def renamed(data, rng):
    header, body = split(data)
    name = str(rng.choice([n for n in header if n != "__metadata__"]))
    new = str(rng.choice([name + "x", name[1:], name.replace("lora", "LORA"), name.upper(), "",
                          name.replace("base_model.model.", ""), name.replace("layer.0", "layer.7"),
                          "../" + name, "\x00"]))  # fmt: skip
    return join({new if n == name else n: x for n, x in header.items()}, body)


def swapped(data, rng):
    """Two tensors of one shape change names: nothing is wrong with the file, so it is read as it is."""
    header, body = split(data)
    names = [n for n in header if n != "__metadata__"]
    one, two = (str(n) for n in rng.choice(names, 2))
    header[one], header[two] = header[two], header[one]
    return join(header, body)


def dropped(data, rng):
    header, body = split(data)
    del header[str(rng.choice([n for n in header if n != "__metadata__"]))]
    return join(header, body)


def lying_entry(data, rng):
    header, body = split(data)
    entry = header[str(rng.choice([n for n in header if n != "__metadata__"]))]
    begin, end = entry["data_offsets"]
    huge = int(rng.choice([2**31, 2**40, 2**53, 2**62]))
    choice = int(rng.integers(9))
    if choice == 0:
        entry["shape"] = [huge, huge]
    elif choice == 1:
        entry["data_offsets"] = [begin, huge]
    elif choice == 2:
        entry["data_offsets"] = [end, begin]
    elif choice == 3:
        entry["data_offsets"] = [0, end - begin]
    elif choice == 4:
        entry["shape"] = entry["shape"][::-1]
    elif choice == 5:
        entry["dtype"] = str(rng.choice(["F64", "F16", "I32", "U8", "F8_E4M3", "BOOL", "X", ""]))
    elif choice == 6:
        entry["shape"] = [-1, *entry["shape"]]
    elif choice == 7:
        entry["shape"] = entry["shape"] + [1]
    else:
        entry["shape"] = [1] * 10_000 + entry["shape"]
    return join(header, body)


def lying_length(data, rng):
    header, body = split(data)
    lengths = [0, 1, 7, len(data), len(data) * 2, 2**24, 2**27, 2**32, 2**63, 2**64 - 1]
    return join(header, body, length=int(rng.choice(np.array(lengths, object))))


def deep_header(data, rng):
    _, body = split(data)
    depth = int(rng.choice([10, 1000, 100_000]))
    opening = rng.choice(['{"a":', "[", '{"__metadata__":{"a":'])
    return join(str(opening).encode() * depth, body)


def many_entries(data, rng):
    header, body = split(data)
    end = len(body)
    more = {f"t{k}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for k in range(500)}
    return join(header | more, body)


def not_finite(data, rng):
    header, body = split(data)
    entry = header[str(rng.choice([n for n in header if n != "__metadata__"]))]
    at = entry["data_offsets"][0]
    bad = {"F32": b"\x00\x00\xc0\x7f", "BF16": b"\xc0\x7f"}[entry["dtype"]]
    return join(header, body[:at] + bad + body[at + len(bad) :])


def padded(data, rng):
    """Neutral: other white space, another order of the header's keys, no metadata."""
    header, body = split(data)
    header.pop("__metadata__", None)
    names = list(header)
    rng.shuffle(names)
    return join({n: header[n] for n in names}, body)


# Mutations of the config.


def _words(change):
    return lambda data, rng: json.dumps(change(json.loads(data), rng)).encode()


def _other_value(words, rng):
    values = [None, True, False, 0, 1, -1, 2**70, 1.5, 1e308, "", "x", "query", [], ["query"], [3], {},
              {"query": 2}, {"q": -1}, {"": 1}, {"(": 1}, ["query"] * 1000, "(a+)+$", "all-linear", ".*"]  # fmt: skip
    name = str(rng.choice(list(words)))
    return words | {name: values[int(rng.integers(len(values)))]}


def _without(words, rng):
    gone = str(rng.choice(list(words)))
    return {n: x for n, x in words.items() if n != gone}


def _unknown(words, rng):
    return words | {
        f"new_{rng.integers(99)}": [None, False, True, 0, 3, "on", {}, [1]][rng.integers(8)]
    }


def _other_ranks(words, rng):
    return words | {"r": int(rng.integers(-1, 9)), "rank_pattern": {"0": int(rng.integers(-1, 4))}}


def deep_config(data, rng):
    depth = int(rng.choice([10, 1000, 200_000]))
    return b'{"peft_type":' + (b"[" if rng.random() < 0.5 else b'{"a":') * depth


def big_config(data, rng):
    return data[:-1] + b', "x": "' + b"y" * int(rng.choice([10, 10_000, 6 << 20])) + b'"}'


# Mutations of any JSON.

NASTY = [
    None, True, False, 0, 1, -1, 50_000, 10**9, 2**31, 2**70, 10**400, 1.5, 1e308, float("nan"), float("-inf"), "", "x", "../../x",
    "/etc/passwd", "\x00", "query", [], ["x"], [[]], {}, {"x": 1}, ["a"] * 1000, "re:(a+)+$", "re:(",
]  # fmt: skip


def _places(value):
    """Each container with each of its keys."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _place(words, rng):
    places = list(_places(words))
    return places[rng.integers(len(places))]


def json_value(words, rng):
    container, key = _place(words, rng)
    container[key] = NASTY[rng.integers(len(NASTY))]
    return words


def json_gone(words, rng):
    container, key = _place(words, rng)
    del container[key]
    return words


def json_moved(words, rng):
    """The value of one place is put into another."""
    (one, key), (other, place) = _place(words, rng), _place(words, rng)
    other[place] = json.loads(json.dumps(one[key]))
    return words


def json_other(words, rng):
    return [NASTY, NASTY[rng.integers(len(NASTY))], [words]][rng.integers(3)]


def json_twins(data, rng):
    """Keys that are there twice, with other values."""
    words = json.loads(data)
    if not isinstance(words, dict) or not words:
        return data
    name = str(rng.choice(list(words)))
    value = json.dumps(NASTY[rng.integers(len(NASTY))])
    return data.rstrip()[:-1] + f", {json.dumps(name)}: {value}}}".encode()


def not_utf8(data, rng):
    at = int(rng.integers(len(data)))
    return data[:at] + b"\xff\xfe" + data[at:]


def deep_json(data, rng):
    depth = int(rng.choice([10, 1000, 200_000]))
    return [b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth][rng.integers(3)]


def deep_inside(data, rng):
    """A value that is deeply nested, in an object that is otherwise whole."""
    return data.rstrip()[:-1] + b', "metadata": ' + b"[" * 900 + b"]" * 900 + b"}"


OF_WEIGHTS = [
    truncated, extended, flipped_bits, flipped_header_bits, random_block, renamed, swapped, dropped,
    lying_entry, lying_length, deep_header, many_entries, not_finite, padded,
]  # fmt: skip
OF_CONFIG = {
    "truncated": truncated, "flipped_bits": flipped_bits, "random_block": random_block,
    "other_value": _words(_other_value), "without": _words(_without), "unknown": _words(_unknown),
    "other_ranks": _words(_other_ranks), "deep": deep_config, "big": big_config,
}  # fmt: skip
OF_JSON = {
    "truncated": truncated, "extended": extended, "flipped_bits": flipped_bits, "block": random_block,
    "value": _words(json_value), "gone": _words(json_gone), "moved": _words(json_moved),
    "other": _words(json_other), "twins": json_twins, "not_utf8": not_utf8, "deep": deep_json,
    "inside": deep_inside,
}  # fmt: skip
