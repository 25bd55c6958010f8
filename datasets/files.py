"""Image files: decoding to RGB whatever the file holds, and the list of a data set's files with what was found of them.

A :class:`Manifest` is what a check of all files leaves behind (``python -m datasets.prepare``): paths, labels, sizes.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from utils.errors import UsageError
from utils.readers import MOST_TEXT, Array, Unreadable, parse_json, read_arrays, read_bytes, size_of
from utils.system import free_memory
from utils.types import Json

MANIFEST_FORMAT = 3  # 1 had no checksum, 2 no digests, and the sizes of images as they are stored, not as they are seen
#: Values of 16-bit images that become black and white where nothing else is known.
FULL_RANGE = (0, 65535)
#: What a manifest keeps of the images of a split beside their paths, see :class:`Files`.
_ARRAYS = ("labels", "sizes", "digests")
#: EXIF's tag of how an image is to be turned.
_ORIENTATION = 0x0112
#: Pixels of one image, at most: PIL's own limit, beyond which a small file may ask for all memory there is.
MOST_PIXELS = 178_956_970
warnings.filterwarnings("ignore", module=r"PIL\.")  # of what it then reads, or refuses


#: Formats that Pillow decodes in C. It runs other programs for some of the others, PostScript's for instance, and takes
#: minutes and gigabytes for a small file of those that it decodes in Python.
_IN_C = (
    *("JPEG", "MPO", "PNG", "GIF", "WEBP", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "ICNS"),
    *("PCX", "DCX", "SGI", "SUN", "IM", "MSP", "XBM", "SPIDER", "CUR"),
)
#: Pixels of a large image, and bytes that one takes while it is decoded, turned and converted.
LARGE, PIXEL_BYTES = 2**22, 30
#: Scans of a progressive JPEG, at most: encoders make about ten, and each takes as long as the whole image.
MOST_SCANS = 100


@cache
def formats() -> tuple[str, ...]:
    """The formats that Pillow reads by itself. A file's content tells its format, whatever it is called."""
    Image.init()
    return tuple(name for name in _IN_C if name in Image.OPEN)


def read_image(path: str | Path, levels: tuple[int, int] = FULL_RANGE) -> Tensor:
    """The pixels of an image file as viewers show it: (3, H, W) uint8, RGB, turned as EXIF says.

    Grey, palette, CMYK and alpha images become RGB (alpha is dropped), of an animation the first frame is taken.

    Args:
        path: the file.
        levels: of 16-bit grey images, the values that become 0 and 255; others are between, or clipped.

    Raises:
        UsageError: the file is missing, no image, truncated, of a kind without a range (32-bit, float), or of more
            than ``MOST_PIXELS``.
    """
    return to_rgb(decode(read_content(path), path), levels)


def read_content(path: str | Path) -> bytes:
    """The bytes of an image file; UsageError where they cannot be read."""
    try:
        return read_bytes(path)
    except Unreadable as error:
        raise UsageError(f"image {path} cannot be read ({error})", "all files of the data set, readable") from None


def decode(content: bytes, path: str | Path) -> Tensor:
    """The pixels of an image, turned as EXIF says: (3, H, W) uint8, or (1, H, W) int32 of a 16-bit grey one.

    ``path`` is for messages; see :func:`read_image`.
    """
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > MOST_SCANS:
        raise UsageError(f"image {path} is a JPEG of more than {MOST_SCANS} scans", "an image saved anew")
    if content.startswith(b"\xff\xd8"):  # JPEG, nearly all there is: half as long as with PIL, for the same pixels
        try:
            height, width = simplejpeg.decode_jpeg_header(content, strict=True)[:2]
            with _bounded(path, height, width):
                pixels = torch.from_numpy(simplejpeg.decode_jpeg(content, strict=True)).permute(2, 0, 1)
                return turned(pixels, orientation(content))
        except ValueError:  # a rare kind or a blemish, which PIL can take, or damage, which it will tell
            pass
    try:
        with (
            Image.open(io.BytesIO(content), formats=formats()) as opened,
            _bounded(path, opened.height, opened.width),
        ):
            return _from_pil(opened)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # Pillow's plug-ins raise nearly anything
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image file that Pillow reads" if is_unknown else " ".join(str(error).split())
        raise UsageError(f"image {path} cannot be read ({reason})", "an undamaged image of 8 or 16 bits") from None


def to_rgb(pixels: Tensor, levels: tuple[int, int]) -> Tensor:
    """What :func:`decode` gives as (3, H, W) uint8; see :func:`read_image` for ``levels``."""
    if pixels.dtype == torch.uint8:
        return pixels
    low, high = levels
    grey = ((pixels - low).double() * (255 / max(1, high - low))).round().clamp(0, 255)
    return grey.to(torch.uint8).expand(3, -1, -1).contiguous()


def orientation(content: bytes) -> int:
    """How EXIF says that a JPEG is to be turned, 1 to 8; 1 where it does not say."""
    if b"Exif\x00\x00" not in content:
        return 1
    try:
        with Image.open(io.BytesIO(content), formats=formats()) as opened:
            found = opened.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's plug-ins raise nearly anything
        return 1
    return found if found in range(1, 9) else 1


def turned(images: Tensor, how: int) -> Tensor:
    """Images (..., H, W) turned by EXIF's number; 6, of a phone held upright, is a quarter clockwise."""
    if how in (5, 6, 7, 8):
        images = images.transpose(-2, -1)
    flips = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}
    return images.flip(flips[how]) if how in flips else images


def image_size(path: str | Path) -> tuple[int, int] | None:
    """Height and width of an image as viewers show it, of whose file the beginning is read; None where it is none."""
    try:
        size_of(path, MOST_TEXT)
        with Image.open(path, formats=formats()) as opened:
            is_on_its_side = opened.format != "TIFF" and opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return (opened.width, opened.height) if is_on_its_side else (opened.height, opened.width)
    except Exception:  # Pillow's plug-ins raise nearly anything
        return None


def is_deep(path: str | Path) -> bool:
    """Whether an image file has 16-bit grey values."""
    try:
        size_of(path, MOST_TEXT)
        with Image.open(path, formats=formats()) as opened:
            return _has_deep_grey(opened)
    except Exception:  # Pillow's plug-ins raise nearly anything
        return False


def has_16_bits(path: str | Path) -> bool:
    """Whether an image has 16 bits a channel, grey or, of a PNG, in colours or with alpha."""
    try:
        with open(path, "rb") as file:
            head = file.read(26)
    except OSError:
        return False
    return (head.startswith(b"\x89PNG") and head[24:25] == b"\x10") or is_deep(path)


def _has_deep_grey(image: Image.Image) -> bool:
    """Whether it has 16-bit grey values; those of a .pgm are in 32 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


class _InFlight:
    """The pixels of large images that the threads of this process decode at once, as many as memory has room for."""

    def __init__(self) -> None:
        self._changed, self._now = threading.Condition(), 0

    @contextmanager
    def decoding(self, pixels: int) -> Iterator[None]:
        """Waits until there is room for an image of so many pixels, or nothing else is decoded."""
        most = free_memory(torch.device("cpu")) // PIXEL_BYTES
        with self._changed:
            self._changed.wait_for(lambda: self._now == 0 or self._now + pixels <= most)
            self._now += pixels
        try:
            yield
        finally:
            with self._changed:
                self._now -= pixels
                self._changed.notify_all()


_IN_FLIGHT = _InFlight()


def _bounded(path: str | Path, height: int, width: int) -> AbstractContextManager[None]:
    """What an image is decoded in; UsageError where it has more pixels than are taken."""
    if height * width > MOST_PIXELS:
        raise UsageError(f"image {path} has {width:,} x {height:,} pixels", f"images of up to {MOST_PIXELS:,} pixels")
    return _IN_FLIGHT.decoding(height * width) if height * width > LARGE else nullcontext()


def _from_pil(image: Image.Image) -> Tensor:
    is_deep_grey = _has_deep_grey(image)
    image = ImageOps.exif_transpose(image)
    if is_deep_grey:
        return torch.from_numpy(np.asarray(image).astype(np.int32))[None]
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
    """Images of a split: paths relative to a root, labels (N,) int64, sizes (N, 2) int32 (height, width).

    ``digests`` (N,) int64 are of the files' bytes, the same for the same content.
    """

    paths: list[str]
    labels: Tensor
    sizes: Tensor
    digests: Tensor


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
            for part in _ARRAYS:
                arrays[f"{name}_{part}"] = getattr(split, part).numpy()
        head |= {"about": self.about}
        text = json.dumps(head | {"checksum": _checksum(arrays, head)})
        with open(path, "wb") as file:
            np.savez(file, head=_text(text), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> Manifest | None:
        """The manifest of a file; None where there is none, or one that is damaged or of another format."""
        try:
            arrays = read_arrays(path)
            head = parse_json(bytes(arrays.pop("head")))
            if head["format"] != MANIFEST_FORMAT or head.pop("checksum") != _checksum(arrays, head):
                return None
            splits = {
                name: Files(
                    bytes(arrays[f"{name}_paths"]).decode(errors="surrogateescape").split("\n"),
                    *(torch.from_numpy(arrays[f"{name}_{part}"]) for part in _ARRAYS),
                )
                for name in ("train", "val", "test")
                if f"{name}_paths" in arrays
            }
            manifest = cls(head["name"], head["root"], splits, head["class_names"], head["about"])
            return manifest if manifest.is_right() else None
        except (Unreadable, ValueError, KeyError, TypeError):
            return None

    @property
    def levels(self) -> tuple[int, int] | None:
        """The smallest and largest value of the training images, where all are 16-bit grey; None else."""
        found = self.about.get("levels")
        return (int(found[0]), int(found[1])) if found else None

    @property
    def skipped(self) -> list[str]:
        """Files that were damaged and left out."""
        return list(self.about.get("skipped", []))

    def fits(self, root: Path, listing: Listing) -> bool:
        """Whether it is of these files with these labels, but for those that were skipped."""
        skipped = set(self.skipped)
        listed = {
            split: [pair for pair in zip(paths, labels.tolist()) if pair[0] not in skipped]
            for split, (paths, labels) in listing.splits.items()
        }
        known = {split: list(zip(files.paths, files.labels.tolist())) for split, files in self.splits.items()}
        return (self.root, self.class_names, known) == (str(root), listing.class_names, listed)

    def is_right(self) -> bool:
        """Whether its parts fit each other."""
        names, classes = self.class_names, len(self.class_names)
        if not (isinstance(self.name, str) and isinstance(self.root, str) and isinstance(self.about, dict)):
            return False
        if not _are_levels(self.about.get("levels")) or not isinstance(self.about.get("skipped", []), list):
            return False
        if "train" not in self.splits or not all(isinstance(name, str) for name in names):
            return False
        return all(
            len(files.paths) == len(files.labels) == len(files.sizes) == len(files.digests)
            and (files.labels.dtype, files.sizes.dtype, files.digests.dtype) == (torch.int64, torch.int32, torch.int64)
            and (files.labels.dim(), files.sizes.shape[1:], files.digests.dim()) == (1, (2,), 1)
            and bool((files.labels >= 0).all() and (files.labels < classes).all() and (files.sizes > 0).all())
            for files in self.splits.values()
        )


def _are_levels(found: object) -> bool:
    """Whether this is None or two values of 16 bits."""
    is_pair = isinstance(found, list | tuple) and len(found) == 2 and all(type(value) is int for value in found)
    return found is None or (is_pair and 0 <= found[0] <= found[1] <= FULL_RANGE[1])  # type: ignore[index]


def _checksum(arrays: Mapping[str, Array], head: Json) -> str:
    """The SHA-256 of arrays with their names, and of what else a manifest says."""
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _text(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text.encode(errors="surrogateescape"), dtype=np.uint8)  # as file names may need it
