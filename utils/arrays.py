"""Large arrays on disk that say whether they are still what was written: .npy files that end in checksums.

NumPy reads such a file as any other. After the array stand a CRC-32 of every block of the file and one of these and of
the file's name, so that a part can be checked without reading all of it.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from utils.readers import MOST_NUMBERS, Array, Unreadable, map_array, size_of

#: Bytes of a block, and of a file up to which all blocks are checked when it is opened; of a larger one, so many.
BLOCK, CHECKED_WHOLE, SAMPLED = 2**22, 2**28, 32
_END = struct.Struct("<4sI")
_MAGIC = b"LTCK"


def write_array(file: IO[bytes], name: str, shape: tuple[int, ...], kind: str, pieces: Iterable[bytes]) -> None:
    """Writes an array of NumPy's type ``kind`` whose bytes come in pieces; ``name`` is what it must be opened as."""
    sums, left = bytearray(), bytearray()

    def write(content: bytes) -> None:
        file.write(content)
        left.extend(content)
        while len(left) >= BLOCK:
            sums.extend(_sum(left[:BLOCK]))
            del left[:BLOCK]

    start = io.BytesIO()
    np.lib.format.write_array_header_1_0(start, {"descr": kind, "fortran_order": False, "shape": shape})
    write(start.getvalue())
    for piece in pieces:
        write(piece)
    if left:
        sums.extend(_sum(left))
    file.write(bytes(sums) + _END.pack(_MAGIC, zlib.crc32(sums, zlib.crc32(name.encode()))))


def open_array(path: str | Path, name: str, is_whole: bool = False) -> Array:
    """The array of a file of :func:`write_array`, mapped into memory, copied where it is written to.

    Its blocks are checked, of a large one a sample unless ``is_whole``.

    Raises:
        Unreadable: it is missing, damaged, or was written under another name.
    """
    size = size_of(path, MOST_NUMBERS)
    number = -(-(size - _END.size) // (BLOCK + 4))
    content = size - _END.size - 4 * number
    try:
        with open(path, "rb") as file:
            file.seek(max(0, content))
            sums = file.read(4 * number)
            if number < 1 or file.read() != _END.pack(_MAGIC, zlib.crc32(sums, zlib.crc32(name.encode()))):
                raise Unreadable("damaged, or written under another name")
            blocks = list(range(number))
            if content > CHECKED_WHOLE and not is_whole:
                blocks = sorted({0, number - 1, *random.Random().sample(blocks, min(SAMPLED, number))})
            for block in blocks:
                file.seek(block * BLOCK)
                if _sum(file.read(min(BLOCK, content - block * BLOCK))) != sums[4 * block : 4 * block + 4]:
                    raise Unreadable(f"damaged: block {block} of {number} has another checksum")
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    return map_array(path, size - content)


def is_written_array(path: Path) -> bool:
    """Whether a file ends as those of :func:`write_array` do, damaged or not."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _END.size))
        return file.read(len(_MAGIC)) == _MAGIC


def _sum(block: bytes | bytearray) -> bytes:
    return zlib.crc32(block).to_bytes(4, "little")
