"""What W&B has written of a run offline, as far as it can be read.

W&B writes a block of 32 kB at a time, so that a process that is killed leaves less than it logged.
Its files are records in LevelDB's format for logs, after a header, each a protocol buffer.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK = 7, 32768  # bytes
_PREFIX = struct.Struct("<IHB")  # checksum, size and kind of a part of a record
_WHOLE, _LAST = 1, 4  # kinds of the part that ends a record


def find_last_number(directory: Path, run_id: str) -> int:
    """Returns the number of the last line of a run that W&B's files have; 0 for none."""
    from wandb.proto import wandb_internal_pb2

    records: Any = wandb_internal_pb2  # its classes are made when it is imported
    last = 0
    for path in directory.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"):
        for content in _read_records(path.read_bytes()):
            record = records.Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                last = max(last, record.history.step.num)
    return last


def _read_records(data: bytes) -> Iterator[bytes]:
    """Yields the records of a file, up to one that was cut short."""
    place, record = _HEADER, b""
    while place + _PREFIX.size <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _PREFIX.size:  # a block's end that is too small for a part
            place += left
            continue
        _, size, kind = _PREFIX.unpack_from(data, place)
        place += _PREFIX.size
        record, place = record + data[place : place + size], place + size
        if place > len(data) or not kind:
            return
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""
