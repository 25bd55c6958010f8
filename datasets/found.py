"""Which files below a folder are images, and which were left out: one rule for training, evaluation and prediction.

An image is a file whose suffix Pillow reads, or one without suffix that it recognises. Links are followed, to files and
to folders. Hidden files and folders, whose names begin with a dot, are left out.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from datasets.files import formats, image_size


@dataclass
class LeftOut:
    """Files and folders that were not read, {why: paths}."""

    paths: dict[str, list[str]] = field(default_factory=dict)
    files: Counter[str] = field(default_factory=Counter)

    def add(self, why: str, path: str) -> None:
        """Notes a file, or a folder with all files in it."""
        self.paths.setdefault(why, []).append(path)
        is_folder = os.path.isdir(path) and not os.path.islink(path)
        self.files[why] += sum(len(names) for _, _, names in os.walk(path)) if is_folder else 1

    def describe(self) -> str:
        """How many files of each kind, with the first of them or its folder; "" where there are none."""
        return ", ".join(f"{self.files[why]:,} {why} ({paths[0]})" for why, paths in self.paths.items())


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of files that Pillow reads by itself, in small letters, with their dots."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats())


def is_image(path: str) -> bool:
    """Whether a file counts as an image, by its name; without suffix by its first bytes."""
    suffix = os.path.splitext(path)[1].lower()
    return suffix in suffixes() if suffix else image_size(path) is not None


def images_below(folder: str | Path, left_out: LeftOut) -> list[str]:
    """The images in a folder and those inside it, relative to it, in the order of their paths.

    What is no image, is hidden, or links to a folder that it lies in goes to ``left_out``.
    """
    top = os.fspath(folder)
    found: list[str] = []

    def walk(inside: str, above: frozenset[tuple[int, int]]) -> None:
        for entry in sorted(os.scandir(os.path.join(top, inside)), key=lambda entry: entry.name):
            name = f"{inside}/{entry.name}" if inside else entry.name
            path = os.path.join(top, name)
            if entry.name.startswith("."):
                left_out.add("in hidden folders" if entry.is_dir() else "hidden", path)
            elif entry.is_dir():
                here = identity(path)
                if here in above:
                    left_out.add("links to a folder that they lie in", path)
                else:
                    walk(name, above | {here})
            elif is_image(path):
                found.append(name)
            else:
                left_out.add("of other kinds", path)

    home = Path(top).resolve()
    walk("", frozenset(map(identity, (home, *home.parents))))
    return sorted(found, key=lambda name: name.split("/"))


def identity(path: str | Path) -> tuple[int, int]:
    """What tells a folder from any other, by whatever path it is reached."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
