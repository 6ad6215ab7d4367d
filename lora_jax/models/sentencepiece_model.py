"""Reads SentencePiece's models, which are messages of protocol buffers, without its library.

Only the fields that make a tokenizer are read; their numbers are those of
``sentencepiece_model.proto``.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

UNIGRAM, BPE = 1, 2
_CONTROL, _USER_DEFINED = 3, 4
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_VARINT, _WIDE, _BYTES, _NARROW = 0, 1, 2, 5  # how a field is stored

Value = int | bytes


class Piece(NamedTuple):
    """A piece of the vocabulary; its place is its id.

    Attributes:
      text: the piece, with "▁" for a space.
      score: its log-probability, or minus its place among the merges.
      is_control: whether it stands for no text, as ``<s>`` does.
      is_user_defined: whether it is found as a whole in any text.
    """

    text: str
    score: float
    is_control: bool
    is_user_defined: bool


class SentencePieceModel(NamedTuple):
    """The parts of a model that make a tokenizer.

    Attributes:
      pieces: the vocabulary.
      kind: ``UNIGRAM``, ``BPE``, or another number of a kind that is not read.
      unk_id: id of the piece for what no other piece is.
      charsmap: rules of normalization, compiled; empty for none.
      has_prefix: whether a space is put before each text.
    """

    pieces: tuple[Piece, ...]
    kind: int
    unk_id: int
    charsmap: bytes
    has_prefix: bool


def read(path: str | Path) -> SentencePieceModel:
    """Reads a model.

    Raises:
      ValueError: the file is none, or damaged.
      OSError: it can't be read.
    """
    data = Path(path).read_bytes()
    try:
        fields = list(_read_fields(data))
        pieces = tuple(_read_piece(value) for number, value in fields if number == _PIECES)
        parts = {number: dict(_read_fields(value)) for number, value in fields if number != _PIECES}
        trainer, normalizer = parts.get(_TRAINER, {}), parts.get(_NORMALIZER, {})
        if not pieces:
            raise ValueError("it has no pieces")
        return SentencePieceModel(
            pieces,
            kind=_to_int(trainer.get(3, UNIGRAM)),
            unk_id=_to_int(trainer.get(40, 0)),
            charsmap=_to_bytes(normalizer.get(2, b"")),
            has_prefix=bool(normalizer.get(3, 1)),
        )
    except (ValueError, IndexError, struct.error) as error:
        raise ValueError(f"{path} is no SentencePiece model, or damaged: {error}") from error


def _read_piece(value: Value) -> Piece:
    fields = dict(_read_fields(value))
    text = _to_bytes(fields.get(1, b"")).decode("utf-8")
    score = struct.unpack("<f", _to_bytes(fields.get(2, b"\0\0\0\0")))[0]
    kind = _to_int(fields.get(3, 1))
    return Piece(text, score, kind == _CONTROL, kind == _USER_DEFINED)


def _read_fields(data: Value) -> Iterator[tuple[int, Value]]:
    """Yields number and value of each field: an integer, or bytes of a known length.

    >>> list(_read_fields(bytes([8, 150, 1, 18, 2, 104, 105])))
    [(1, 150), (2, b'hi')]
    """
    data, place = _to_bytes(data), 0
    while place < len(data):
        key, place = _read_varint(data, place)
        number, form = key >> 3, key & 7
        if form == _VARINT:
            value, place = _read_varint(data, place)
            yield number, value
            continue
        if form == _BYTES:
            size, place = _read_varint(data, place)
        elif form in (_WIDE, _NARROW):
            size = 8 if form == _WIDE else 4
        else:
            raise ValueError(f"field {number} at byte {place} is of an unknown form")
        if place + size > len(data):
            raise ValueError(f"field {number} at byte {place} is cut off")
        yield number, data[place : place + size]
        place += size


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    """Returns an integer in groups of seven bits, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError(f"the integer before byte {place} does not end")


def _to_int(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a field that is to be an integer is none")
    return value


def _to_bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field that is to hold bytes is an integer")
    return value
