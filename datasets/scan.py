"""Passes over all images of a list, decoded side by side: are they whole, how large are they, their pixels in one file.

The work is done by threads, since decoding and scaling run outside of Python's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from datasets.files import read_image
from utils.bar import bar
from utils.errors import UsageError
from utils.readers import Unreadable, map_array

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


def check_files(root: str | Path, paths: Sequence[str], workers: int, origin: str = "the data set") -> Tensor:
    """Decodes every image; returns their sizes (N, 2) int32, height and width.

    Args:
        root: what the paths (N,) are relative to.
        workers: images decoded at a time.
        origin: where the images come from, for messages.

    Raises:
        UsageError: names the first image, in the order of the list, that is missing or damaged.
    """
    return _sizes(_each(lambda image: image.shape[1:], root, paths, workers, origin, "checking"))


def write_pixels(
    root: str | Path,
    paths: Sequence[str],
    side: int,
    target: str | Path,
    workers: int,
    origin: str = "the data set",
    key: str = "",
) -> Tensor:
    """Decodes every image and writes their pixels; returns their sizes as :func:`check_files` does, and fails as it.

    ``target`` becomes a .npy of (N, side, side, 3) uint8, which NumPy can map into memory: each image as a whole,
    squashed into a square by torchvision's antialiased bilinear resize. The file is written as it goes, and ends in
    the ``key`` of the list that it is of, which NumPy does not look at.

    Raises:
        OSError: the disk is full.
    """
    from torchvision.transforms.v2.functional import resize  # here, since it is slow to import

    def shrink(image: Tensor) -> tuple[torch.Size, bytes]:
        small: Tensor = resize(image, [side, side], antialias=True)
        return image.shape[1:], small.permute(1, 2, 0).numpy().tobytes()

    def written() -> Iterator[torch.Size]:
        for size, pixels in _each(shrink, root, paths, workers, origin, f"writing {Path(target).name}"):
            file.write(pixels)  # not through a memory map, where a full disk kills the process
            yield size

    with open(target, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), side, side, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        sizes = _sizes(written())
        file.write(key.encode())
    return sizes


def has_pixels(path: str | Path, n: int, side: int, key: str = "") -> bool:
    """Whether ``path`` is a whole file that :func:`write_pixels` made of ``n`` images, those of the list ``key``."""
    try:
        pixels = map_array(path, len(key))
        with open(path, "rb") as file:
            file.seek(-len(key), os.SEEK_END)
            is_of_list = file.read() == key.encode()
    except (Unreadable, OSError):
        return False
    return bool(is_of_list and pixels.shape == (n, side, side, 3) and pixels.dtype == np.uint8)


def _each(
    task: Callable[[Tensor], R], root: str | Path, paths: Sequence[str], workers: int, origin: str, label: str
) -> Iterator[R]:
    """What ``task`` returns for each image, in the order of ``paths``."""

    def one(path: str) -> R:
        try:
            return task(read_image(Path(root, path)))
        except UsageError as error:
            problem, allowed = error.args
            raise UsageError(problem, f"{allowed}, as in {origin}") from None

    def turns() -> Iterator[R]:
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(paths), TURN * workers):
                yield from pool.map(one, paths[start : start + TURN * workers])

    return bar(turns(), len(paths), label)


def _sizes(sizes: Iterator[torch.Size]) -> Tensor:
    return torch.tensor(list(sizes), dtype=torch.int32).reshape(-1, 2)
