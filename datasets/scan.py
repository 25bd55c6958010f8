"""Passes over all images of a list, decoded side by side: are they whole, how large are they, their pixels in one file.

The work is done by threads, since decoding and scaling run outside of Python's lock.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from datasets.files import FULL_RANGE, decode, read_content, to_rgb
from utils.arrays import open_array, write_array
from utils.bar import bar
from utils.errors import UsageError
from utils.readers import Unreadable

R = TypeVar("R")
#: Images that a worker decodes before all wait for the slowest; a pass holds no more results than these in memory.
TURN = 32


def require_files(root: str | Path, paths: Sequence[str], origin: str = "the data set") -> None:
    """Checks that all files are there, without opening them.

    Raises:
        UsageError: how many are missing, the first of them, and ``origin``, which they come from.
    """
    shown = bar(paths, len(paths), "looking for files")
    missing = [path for path in shown if not os.path.isfile(os.path.join(root, path))]
    if missing:
        raise UsageError(
            f"{len(missing):,} of {len(paths):,} images are missing, the first is {os.path.join(root, missing[0])}",
            f"all images of {origin}",
        )


class Seen(NamedTuple):
    """What a pass over images has found.

    Attributes:
        sizes: (N, 2) int32, height and width; zeros where an image is damaged.
        digests: (N,) int64, of the files' bytes.
        levels: smallest and largest value, where all are 16-bit grey images; None else.
        damaged: {position: what is wrong}.
    """

    sizes: Tensor
    digests: Tensor
    levels: tuple[int, int] | None
    damaged: dict[int, str]


class _Look(NamedTuple):
    """What a pass finds of one image that is whole; ``deep`` are the smallest and largest of 16-bit grey values."""

    size: torch.Size
    digest: int
    deep: tuple[int, int] | None
    pixels: bytes


def check_files(root: str | Path, paths: Sequence[str], workers: int) -> Seen:
    """Decodes every image, ``workers`` at a time; what the paths (N,) are relative to is ``root``."""
    return _gather(_each(partial(_look, root=root), paths, workers, "checking"))


def _look(path: str, root: str | Path, side: int = 0, levels: tuple[int, int] = FULL_RANGE) -> _Look | str:
    """What there is to know of one image, with its pixels at ``side`` where that is not 0; or what is wrong with it."""
    try:
        content = read_content(Path(root, path))
        pixels = decode(content, Path(root, path))
    except UsageError as error:
        return str(error.args[0])
    deep = None if pixels.dtype == torch.uint8 else (int(pixels.min()), int(pixels.max()))
    small = b""
    if side:
        from torchvision.transforms.v2.functional import resize  # here, since it is slow to import

        square: Tensor = resize(to_rgb(pixels, levels), [side, side], antialias=True)
        small = square.permute(1, 2, 0).numpy().tobytes()
    return _Look(pixels.shape[1:], digest_of(content), deep, small)


def _gather(looks: Iterable[_Look | str]) -> Seen:
    """What was seen of all images."""
    sizes, digests, damaged = [], [], {}
    deep: list[int] = []
    for position, look in enumerate(looks):
        if isinstance(look, str):
            damaged[position] = look
            sizes.append(torch.Size((0, 0)))
            digests.append(0)
            continue
        sizes.append(look.size)
        digests.append(look.digest)
        deep += look.deep or ()
    is_all = len(deep) == 2 * (len(sizes) - len(damaged))
    levels = (min(deep), max(deep)) if deep and is_all else None
    return Seen(
        torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2), torch.tensor(digests, dtype=torch.int64), levels, damaged
    )


def digest_of(content: bytes) -> int:
    """64 bits of the BLAKE2 hash of a file's bytes, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def write_pixels(
    root: str | Path,
    paths: Sequence[str],
    side: int,
    target: str | Path,
    workers: int,
    key: str = "",
    levels: tuple[int, int] = FULL_RANGE,
) -> Seen:
    """Decodes every image and writes their pixels, black ones of those that are damaged.

    ``target`` becomes a .npy of (N, side, side, 3) uint8, which NumPy can map into memory: each image as a whole,
    squashed into a square by torchvision's antialiased bilinear resize. The file is written as it goes, and ends in
    checksums (:mod:`utils.arrays`) that hold the ``key`` of the list that it is of. For ``levels`` see
    :func:`datasets.files.read_image`.

    Raises:
        OSError: the disk is full.
    """
    look = partial(_look, root=root, side=side, levels=levels)
    looks: list[_Look | str] = []

    def pieces() -> Iterator[bytes]:  # not through a map of memory, where a full disk kills the process
        for each in _each(look, paths, workers, f"writing {Path(target).name}"):
            looks.append(each if isinstance(each, str) else each._replace(pixels=b""))
            yield bytes(side * side * 3) if isinstance(each, str) else each.pixels

    with open(target, "wb") as file:
        write_array(file, key, (len(paths), side, side, 3), "|u1", pieces())
    return _gather(looks)


def has_pixels(path: str | Path, n: int, side: int, key: str = "", is_whole: bool = False) -> bool:
    """Whether ``path`` is a whole file that :func:`write_pixels` made of ``n`` images, those of the list ``key``.

    All of its blocks are looked at with ``is_whole``, else a sample, see :func:`utils.arrays.open_array`.
    """
    try:
        pixels = open_array(path, key, is_whole)
    except Unreadable:
        return False
    return bool(pixels.shape == (n, side, side, 3) and pixels.dtype == np.uint8)


def _each(task: Callable[[str], R], paths: Sequence[str], workers: int, label: str) -> Iterator[R]:
    """What ``task`` returns for each path, in their order."""

    def turns() -> Iterator[R]:
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(paths), TURN * workers):
                yield from pool.map(task, paths[start : start + TURN * workers])

    return bar(turns(), len(paths), label)
