"""Small folders of images, whole and broken, and records as TensorFlow Datasets writes them."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "emu")


def write_folder(root: Path, per_class: int = 4, size: tuple[int, int] = (10, 8), classes=CLASSES) -> Path:
    """Images of one colour each: class ``i``, number ``n`` is ``(40 * i, 10 * n, 200)``."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            Image.new("RGB", size, (40 * label, 10 * number, 200)).save(root / name / f"{number}.png")
    return root


def varint(number: int) -> bytes:
    number %= 2**64
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(packed: bool = True, **features) -> bytes:
    """A ``tf.train.Example``, by the published message definitions."""
    entries = b""
    for name, values in features.items():
        values = values if isinstance(values, list) else [values]
        if isinstance(values[0], bytes):
            feature = field(1, b"".join(field(1, value) for value in values))
        elif isinstance(values[0], float):
            feature = field(2, field(1, struct.pack(f"<{len(values)}f", *values)))
        elif packed:
            feature = field(3, field(1, b"".join(map(varint, values))))
        else:
            feature = field(3, b"".join(varint(1 << 3) + varint(value) for value in values))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def gradient_image(width: int, height: int) -> Image.Image:
    """Red tells the column, green the row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 7)], -1).astype(np.uint8))
