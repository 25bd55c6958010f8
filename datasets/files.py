"""Image files: decoding to RGB whatever the file holds, and the list of a data set's files with what was found of them.

A :class:`Manifest` is what a check of all files leaves behind (``python -m datasets.prepare``): paths, labels, sizes.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from utils.errors import UsageError
from utils.readers import Array, Unreadable, parse_json, read_arrays, read_bytes
from utils.types import Json

#: File names that count as images.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MANIFEST_FORMAT = 2  # 1 had no checksum
#: Pixels of one image, at most: PIL's own limit, beyond which a small file may ask for all memory there is.
MOST_PIXELS = 178_956_970
warnings.filterwarnings("ignore", module=r"PIL\.")  # of what it then reads, or refuses


def read_image(path: str | Path) -> Tensor:
    """The pixels of an image file: (3, H, W) uint8, RGB. An orientation in EXIF is not applied, as in published code.

    Grey, palette, CMYK and alpha images become RGB (alpha is dropped), 16-bit ones are scaled to 8 bits, of an
    animation the first frame is taken.

    Raises:
        UsageError: the file is missing, no image, truncated, of a kind without a range (32-bit, float), or of more
            than ``MOST_PIXELS``.
    """
    try:
        content = read_bytes(path)
    except Unreadable as error:
        raise UsageError(f"image {path}: {error}", "all files of the data set, readable") from None
    if content.startswith(b"\xff\xd8"):  # JPEG, nearly all there is: half as long as with PIL, for the same pixels
        try:
            _bounded(path, *simplejpeg.decode_jpeg_header(content, strict=True)[:2])
            return torch.from_numpy(simplejpeg.decode_jpeg(content, strict=True)).permute(2, 0, 1)
        except ValueError:  # a rare kind or a blemish, which PIL can take, or damage, which it will tell
            pass
    try:
        with Image.open(io.BytesIO(content)) as opened:
            _bounded(path, opened.height, opened.width)
            return _from_pil(opened)
    except UsageError:
        raise
    except Exception as error:  # Pillow's plug-ins raise nearly anything
        reason = (
            "not an image file that Pillow reads"
            if isinstance(error, UnidentifiedImageError)
            else " ".join(str(error).split())
        )
        raise UsageError(f"image {path} cannot be read ({reason})", "an undamaged image of 8 or 16 bits") from None


def image_size(path: str | Path) -> tuple[int, int] | None:
    """Height and width of an image file, of which only the beginning is read; None where it is none that is known."""
    try:
        if not Path(path).is_file():
            return None
        with Image.open(path) as opened:
            return opened.height, opened.width
    except Exception:  # Pillow's plug-ins raise nearly anything
        return None


def _bounded(path: str | Path, height: int, width: int) -> None:
    """Raises UsageError where an image has more pixels than are taken."""
    if height * width > MOST_PIXELS:
        raise UsageError(f"image {path} has {width:,} x {height:,} pixels", f"images of up to {MOST_PIXELS:,} pixels")


def _from_pil(image: Image.Image) -> Tensor:
    if image.mode.startswith("I;16"):
        grey = torch.from_numpy(np.asarray(image).astype(np.int32) // 257).to(torch.uint8)
        return grey.expand(3, -1, -1).contiguous()
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, mode {image.mode}, have no known range")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Listing:
    """What a data set's lists say, before a file has been opened.

    Attributes:
        splits: of "train", "val" and "test", those that there are: paths relative to a root, and labels (N,) int64.
        class_names: (C,), unique and of one line.
        origins: where each split's files come from, for messages.
        about: plain values that say where the lists come from.
    """

    splits: dict[str, tuple[list[str], Tensor]]
    class_names: list[str]
    origins: dict[str, str]
    about: Json


@dataclass(frozen=True)
class Files:
    """Images of a split: paths relative to a root, labels (N,) int64, sizes (N, 2) int32 (height, width)."""

    paths: list[str]
    labels: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Manifest:
    """A data set whose files have all been decoded once.

    Attributes:
        name: the data set's.
        root: what the paths are relative to.
        splits: of "train", "val" and "test"; those that there are.
        class_names: (C,).
        about: plain values that say what was checked and found.
    """

    name: str
    root: str
    splits: dict[str, Files]
    class_names: list[str]
    about: Json

    def write(self, path: str | Path) -> None:
        """Writes the file as it goes."""
        head = {"format": MANIFEST_FORMAT, "name": self.name, "root": self.root, "class_names": self.class_names}
        arrays: dict[str, Array] = {}
        for name, split in self.splits.items():
            arrays[f"{name}_paths"] = _text("\n".join(split.paths))
            arrays[f"{name}_labels"], arrays[f"{name}_sizes"] = split.labels.numpy(), split.sizes.numpy()
        text = json.dumps(head | {"about": self.about, "checksum": _checksum(arrays)})
        with open(path, "wb") as file:
            np.savez(file, head=_text(text), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> Manifest | None:
        """The manifest of a file; None where there is none, or one that is damaged or of another format."""
        try:
            arrays = read_arrays(path)
            head = parse_json(bytes(arrays.pop("head")))
            if head["format"] != MANIFEST_FORMAT or head["checksum"] != _checksum(arrays):
                return None
            splits = {
                name: Files(
                    bytes(arrays[f"{name}_paths"]).decode(errors="surrogateescape").split("\n"),
                    torch.from_numpy(arrays[f"{name}_labels"]),
                    torch.from_numpy(arrays[f"{name}_sizes"]),
                )
                for name in ("train", "val", "test")
                if f"{name}_paths" in arrays
            }
            manifest = cls(head["name"], head["root"], splits, head["class_names"], head["about"])
            return manifest if manifest.is_right() else None
        except (Unreadable, ValueError, KeyError, TypeError):
            return None

    def is_right(self) -> bool:
        """Whether its parts fit each other."""
        names, classes = self.class_names, len(self.class_names)
        if not (isinstance(self.name, str) and isinstance(self.root, str) and isinstance(self.about, dict)):
            return False
        if "train" not in self.splits or not all(isinstance(name, str) for name in names):
            return False
        return all(
            len(files.paths) == len(files.labels) == len(files.sizes)
            and (files.labels.dtype, files.sizes.dtype) == (torch.int64, torch.int32)
            and (files.labels.dim(), files.sizes.shape[1:]) == (1, (2,))
            and bool((files.labels >= 0).all() and (files.labels < classes).all() and (files.sizes > 0).all())
            for files in self.splits.values()
        )


def _checksum(arrays: Mapping[str, Array]) -> str:
    """The SHA-256 of arrays with their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _text(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text.encode(errors="surrogateescape"), dtype=np.uint8)  # as file names may need it
