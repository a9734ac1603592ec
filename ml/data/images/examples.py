"""Reads ``tf.train.Example`` messages, the form of TensorFlow Datasets' records, without TensorFlow.

Protocol buffers' wire format: fields of ``number << 3 | type`` and a value. An Example holds Features (1), a map (1) of
name (1) -> Feature (2), which holds one list (1) of bytes (1), floats (2) or whole numbers (3).
"""

import struct
from collections.abc import Iterator
from typing import Any

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


def read_example(message: bytes) -> dict[str, list[Any]]:
    """Name -> list of bytes, floats or ints.

    Raises:
      ValueError: not such a message.
    """
    try:
        return dict(_entry(entry) for _, features in _fields(message, 1) for _, entry in _fields(features, 1))
    except (IndexError, struct.error, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"not a tf.train.Example ({error})") from None


def _entry(entry: bytes) -> tuple[str, list[Any]]:
    name, values = "", []
    for number, content in _fields(entry):
        if number == 1:
            name = content.decode()
        elif number == 2:
            for kind, of_kind in _fields(content):
                values = _VALUES[kind](of_kind)
    return name, values


def _floats(content: bytes) -> list[float]:
    return [x for _, part in _fields(content, 1) for (x,) in struct.iter_unpack("<f", part)]


def _whole_numbers(content: bytes) -> list[int]:
    numbers: list[int] = []
    for _, part in _fields(content, 1):
        if isinstance(part, int):
            numbers.append(part)
            continue
        place = 0
        while place < len(part):
            number, place = _varint(part, place)
            numbers.append(number)
    return [n - 2**64 if n >= 2**63 else n for n in numbers]


_VALUES = {1: lambda content: [part for _, part in _fields(content, 1)], 2: _floats, 3: _whole_numbers}


def _fields(message: Any, wanted: int | None = None) -> Iterator[tuple[int, Any]]:
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, place = _varint(message, place)
        else:
            if kind == _BYTES:
                size, place = _varint(message, place)
            else:
                size = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind, -1)
            value, place = message[place : place + size], place + size
            if size < 0 or place > len(message):
                raise ValueError("not a tf.train.Example (cut short, or of another format)")
        if wanted in (None, number):
            yield number, value


def _varint(message: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = message[place]
        number |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return number, place
