"""Photos: images of various sizes that are decoded when they are wanted, and the 224-pixel recipe for them.

How their pixels come is ``INPUTS``, the names of --input: from the files, from a map of decoded pixels that
``python -m datasets.prepare ... --cache SIDE`` has written, or from the files by the GPU's JPEG decoder. Crops are
drawn in the same way for all; the cache differs from the files in resolution alone.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.files import FULL_RANGE, orientation, read_image, turned
from datasets.geometry import as_seen, centre, cut, in_image, placed, resample, rescaled, resized, whole_boxes
from utils.console import show
from utils.distributed import local_rank_and_size
from utils.errors import UsageError
from utils.system import available_cpus

INPUTS = ("files", "cache", "nvjpeg")
#: Attempts at a random crop before the central one is taken, as in torchvision.
ATTEMPTS = 10
#: Red, green and blue in a grey value (ITU-R 601-2, as PIL and torchvision have it).
GREY = (0.2989, 0.587, 0.114)
#: Photos whose colours a CPU varies at a time, so that they stay in its cache.
IN_CACHE = 8
#: Steps that every worker process prepares ahead.
PREFETCH = 2

Array = npt.NDArray[np.uint8]
#: What a worker needs for a step: positions (B,), and for random crops chances (B, 2 A + 2) and flip (B,).
Job = tuple[Tensor, ...]


class PhotoDraws(NamedTuple):
    """One epoch's random numbers: order (N,), and what :meth:`ResizedCrop.draw` gives; one row a step."""

    order: Tensor
    chances: Tensor
    flip: Tensor
    factors: Tensor
    sequence: Tensor


@dataclass(frozen=True)
class ResizedCrop:
    """The ImageNet recipe: RandomResizedCrop (Szegedy et al., CVPR 2015), a flip with probability 1/2, ColorJitter.

    A crop has a share of the area in ``scale`` and a width over height in ``ratio``, and is resized to a square.
    ``jitter`` j draws factors of brightness, contrast and saturation from [1 - j, 1 + j], applied in random order.
    """

    flip: bool = True
    jitter: float = 0.4
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def draw(self, n: int, generator: Generator) -> tuple[Tensor, ...]:
        """chances (n, 2 A + 2) in [0, 1) for the crops, flip (n,) bool, factors (n, 3), sequence (n, 3) int64."""
        chances = torch.rand(n, 2 * ATTEMPTS + 2, generator=generator)
        flip = torch.rand(n, generator=generator) < 0.5 if self.flip else torch.zeros(n, dtype=torch.bool)
        factors = 1 + self.jitter * (2 * torch.rand(n, 3, generator=generator) - 1)
        return chances, flip, factors, torch.rand(n, 3, generator=generator).argsort(dim=1)

    draws = PhotoDraws

    def boxes(self, chances: Tensor, sizes: Tensor) -> Tensor:
        """Crops of images of ``sizes`` (B, 2): top, left, height, width (B, 4) int64, as torchvision makes them."""
        height, width = sizes.double().T[:, :, None]
        area, aspect, place = chances.double().split([ATTEMPTS, ATTEMPTS, 2], dim=1)
        area = height * width * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
        low, high = map(math.log, self.ratio)
        aspect = (low + aspect * (high - low)).exp()
        h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
        fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
        first = fits.int().argmax(dim=1, keepdim=True)
        # Where none fits: the largest central crop of an allowed ratio.
        central_h = torch.minimum(height, (width / self.ratio[0]).round())
        central_w = torch.minimum(width, (height * self.ratio[1]).round())
        found = fits.any(dim=1, keepdim=True)
        h, w = torch.where(found, h.gather(1, first), central_h), torch.where(found, w.gather(1, first), central_w)
        top = torch.where(found, place[:, :1] * (height - h + 1), (height - h) / 2)
        left = torch.where(found, place[:, 1:] * (width - w + 1), (width - w) / 2)
        return torch.cat([top, left, h, w], dim=1).floor().long()

    def jittered(self, pixels: Tensor, order: Tensor, chances: Tensor, flip: Tensor, *draws: Tensor) -> Tensor:
        """Pixels (B, H, W, 3) uint8 after ColorJitter, as float: x <- f x + (1 - f) target, three times, in [0, 255].

        The target is black for brightness, the image's mean grey for contrast, each pixel's grey for saturation.
        """
        if self.jitter == 0:
            return pixels.float()
        factors, sequence = (draw.to(pixels.device, non_blocking=True) for draw in draws)
        out = torch.empty(pixels.shape, device=pixels.device)
        few = len(pixels) if pixels.is_cuda else IN_CACHE
        for part in zip(*(each.split(few) for each in (pixels, factors, sequence, out))):
            _vary_colours(*part)
        return out


def _vary_colours(pixels: Tensor, factors: Tensor, sequence: Tensor, out: Tensor) -> None:
    """ColorJitter of pixels (B, H, W, 3) uint8 into ``out``, the same in float; see :meth:`ResizedCrop.jittered`."""
    planes = pixels.permute(0, 3, 1, 2).contiguous().float()  # three times as fast as colour by colour, on a CPU
    for kind in sequence.T:
        factor = factors.gather(1, kind[:, None])[:, :, None]  # (B, 1, 1)
        kind = kind[:, None, None]
        grey = planes[:, 0] * GREY[0] + planes[:, 1] * GREY[1] + planes[:, 2] * GREY[2]
        target = torch.where(kind == 1, grey.mean(dim=(1, 2), keepdim=True), grey).mul_((1 - factor) * (kind > 0))
        planes.mul_(factor[:, None]).add_(target[:, None]).clamp_(0, 255)
    out.copy_(planes.permute(0, 2, 3, 1))


class Photos:
    """Images that are decoded when they are wanted, and how they are shown: N images, ``photos[positions]`` of them.

    Attributes:
        root, paths: the files, relative to a folder; no paths where there is only a store.
        sizes: (N, 2) int32, height and width of each.
        size: side of the square that networks see.
        resize: see :func:`resized`.
        store: decoded pixels (M, S, S, 3) uint8, each image squashed into a square; None to read the files.
        rows: (N,) rows of ``store``.
        identity: changes with the content of the files.
        levels: see :func:`datasets.files.read_image`.
        fit: one of :data:`datasets.geometry.FITS`.
        mode: the interpolation of files, one of torchvision's.
        how: one of ``INPUTS``.
        workers: processes that decode.
    """

    channels = 3

    def __init__(
        self,
        root: str | Path,
        paths: Sequence[str],
        sizes: Tensor,
        size: int = 224,
        store: Array | None = None,
        how: str = "files",
        workers: int = 0,
        rows: Tensor | None = None,
        identity: str = "",
        levels: tuple[int, int] = FULL_RANGE,
        fit: str = "crop",
    ) -> None:
        self.root, self.paths, self.sizes = root, paths, sizes
        self.size, self.resize = size, resized(size)
        self.store, self.how, self.workers, self.identity = store, how, workers, identity
        self.rows = torch.arange(len(sizes)) if rows is None else rows
        self.levels, self.fit, self.mode = levels, fit, "bilinear"

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, positions: Tensor) -> Photos:
        paths = [self.paths[i] for i in positions.tolist()] if self.paths else []
        chosen = copy.copy(self)
        chosen.paths, chosen.sizes, chosen.rows = paths, self.sizes[positions], self.rows[positions]
        return chosen

    @property
    def read(self) -> str:
        """How they are read, in words."""
        return f"cache of {self.store.shape[1]} pixels" if self.store is not None and self.paths else self.how

    def path(self, position: int) -> Path:
        """The file of an image."""
        return Path(self.root, self.paths[position])

    def fingerprint(self) -> str:
        """A hash that changes with the images and with how they are shown."""
        digest = hashlib.sha256(f"{self.how} {self.size} {self.resize} {self.identity} {self.levels}".encode())
        for value, usual in ((self.fit, "crop"), (self.mode, "bilinear")):
            digest.update(b"" if value == usual else value.encode())
        digest.update("\n".join(self.paths).encode(errors="surrogateescape"))
        digest.update(self.sizes.numpy().tobytes())
        if self.store is not None:
            digest.update(str(self.store.shape).encode())
            digest.update(self.rows.numpy().tobytes())
            if not self.paths:
                digest.update(np.ascontiguousarray(self.store).data)
        return digest.hexdigest()

    def centres(self, index: Tensor) -> Tensor:
        """The boxes (B, 4) float, top, left, height, width, of test images: the centre, in the image's own pixels."""
        sizes = self.sizes[index].double()
        side = sizes.amin(dim=1, keepdim=True) * (self.size / self.resize)
        return torch.cat([(sizes - side) / 2, side, side], dim=1)

    def boxes(self, augment: ResizedCrop | None, index: Tensor, chances: Tensor | None) -> Boxes | None:
        """What a step's images are cut at, see :class:`Boxes`; None for the central test view of files."""
        sizes, places = self.sizes[index], None
        if augment is not None and chances is not None:
            boxes = in_image(augment.boxes(chances, as_seen(sizes, self.fit)), sizes, self.fit)
        elif self.fit != "crop":
            boxes = whole_boxes(sizes, self.fit)
        elif self.store is not None:
            boxes = self.centres(index)
        else:
            return None
        if self.fit == "pad":
            boxes, places = placed(boxes, sizes, self.size)
        if self.store is not None:
            boxes = rescaled(boxes, sizes, torch.tensor(self.store.shape[1:3]))
        return Boxes(boxes, places)

    def show(self, position: int, box: list[int] | None, place: list[int] | None = None) -> Tensor:
        """One image as networks see it, (3, size, size) uint8; a test image's centre where ``box`` is None."""
        if self.store is not None:
            image = torch.from_numpy(self.store[int(self.rows[position])]).permute(2, 0, 1)
        else:
            image = read_image(self.path(position), self.levels)
        return self.cut(image, box, place)

    def cut(self, image: Tensor, box: list[int] | None, place: list[int] | None = None) -> Tensor:
        """A crop (3, size, size) of an image (3, H, W) on any device; ``box`` and ``place`` as in :meth:`show`."""
        if box is None:
            return centre(image, self.size, resize=self.resize, mode=self.mode)
        return cut(image, box, self.size, place, self.mode)

    def shown_as(self, size: int, resize: int, mode: str) -> Photos:
        """The same photos in another size, see the attributes."""
        shown = copy.copy(self)
        shown.size, shown.resize, shown.mode = size, resize, mode
        return shown


class Boxes(NamedTuple):
    """What images are cut at: ``boxes`` (B, 4) int64, top, left, height, width, in their own pixels or the store's.

    ``places`` (B, 4) is where that lies in the view, whose rest is black; None where it is all of it.
    """

    boxes: Tensor
    places: Tensor | None

    def of(self, k: int) -> tuple[list[int], list[int] | None]:
        """Those of an image."""
        return self.boxes[k].tolist(), None if self.places is None else self.places[k].tolist()


#: What a worker hands over: pixels, the bytes of files with their lengths, or why there are none.
Content = Tensor | tuple[Tensor, list[int]] | UsageError


class _Reader(Dataset[Content]):
    """What runs in worker processes: a job -> the step's pixels, or a UsageError to be raised in the main process."""

    def __init__(self, photos: Photos, augment: ResizedCrop | None, on_gpu: bool) -> None:
        self.photos, self.augment, self.on_gpu = photos, augment, on_gpu

    def __getitem__(self, job: Job) -> Content:
        try:
            return self.read(*job)
        except UsageError as error:
            return error

    def read(self, index: Tensor, chances: Tensor | None = None, flip: Tensor | None = None) -> Content:
        photos = self.photos
        if photos.how == "nvjpeg":  # as one tensor: each would take a file descriptor on its way
            contents = [torch.from_numpy(np.fromfile(photos.path(i), dtype=np.uint8)) for i in index.tolist()]
            return torch.cat(contents), [len(content) for content in contents]
        if photos.store is not None and self.on_gpu:  # cropped there
            return torch.from_numpy(photos.store[photos.rows[index].numpy()])
        boxes = photos.boxes(self.augment, index, chances)
        out = torch.empty(len(index), photos.size, photos.size, 3, dtype=torch.uint8)
        for k, position in enumerate(index.tolist()):
            view = photos.show(position, *((None,) if boxes is None else boxes.of(k)))
            out[k] = (view.flip(2) if flip is not None and flip[k] else view).permute(1, 2, 0)
        return out


def has_decoder() -> bool:
    """Whether this torchvision can decode JPEGs on a GPU."""
    import torchvision.io

    return hasattr(torchvision.io, "decode_jpeg")


class Crops:
    """The pixels of photos, step by step, prepared ahead by worker processes: (B, size, size, 3) uint8 on the device.

    On a GPU the cache's images are cropped there, all of a step at once; files are cropped where they are decoded.
    """

    def __init__(self, photos: Photos, augment: ResizedCrop | None, device: torch.device) -> None:
        if photos.how == "nvjpeg" and not (device.type == "cuda" and has_decoder()):
            raise UsageError("--input nvjpeg: it takes a GPU, and a torchvision with decode_jpeg", "files, cache")
        self.photos, self.augment, self.device = photos, augment, device
        self.on_gpu = device.type == "cuda"
        self.index_device = torch.device("cpu")
        self._loader: DataLoader[Content] | None = None
        self._jobs: list[Job] = []
        self._told = False

    def cuts(self, steps: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
        """The crops of each step of :class:`PhotoDraws`."""
        return self._run([(index, chances, flip) for index, chances, flip, *_ in steps])

    def whole(self, steps: Iterable[Tensor]) -> Iterator[Tensor]:
        """The test view of the images at each step's positions."""
        return self._run([(index,) for index in steps])

    def _run(self, jobs: list[Job]) -> Iterator[Tensor]:
        self._jobs[:] = jobs
        for job, content in zip(jobs, self._workers()):
            if isinstance(content, UsageError):
                raise content
            yield self._finish(content, *job)

    def _workers(self) -> DataLoader[Content]:
        """The loader, whose processes stay for the next epoch."""
        if self._loader is None:
            number = min(self.photos.workers, max(1, available_cpus() // local_rank_and_size()[1]))
            reader = _Reader(self.photos, self.augment, self.on_gpu)
            pin = self.device.type == "cuda"
            own = torch.Generator()  # a loader would draw from the global one
            self._loader = DataLoader(
                reader,
                None,
                sampler=self._jobs,
                num_workers=number,
                pin_memory=pin,
                generator=own,
                prefetch_factor=PREFETCH if number else None,
                persistent_workers=number > 0,
            )
        return self._loader

    def _finish(
        self,
        content: Tensor | tuple[Tensor, list[int]],
        index: Tensor,
        chances: Tensor | None = None,
        flip: Tensor | None = None,
    ) -> Tensor:
        photos = self.photos
        if isinstance(content, Tensor) and not (self.on_gpu and photos.store is not None):
            return content.to(self.device, non_blocking=True)
        boxes = photos.boxes(self.augment, index, chances)
        if not isinstance(content, Tensor):
            pixels = self._decode(list(content[0].split(content[1])), index, boxes)
            mirrored = None if flip is None else flip.to(self.device, non_blocking=True)[:, None, None, None]
            return pixels if mirrored is None else torch.where(mirrored, pixels.flip(2), pixels)
        assert boxes is not None
        pixels = content.to(self.device, non_blocking=True)
        return resample(pixels, boxes.boxes, flip, photos.size, boxes.places)

    def _decode(self, contents: list[Tensor], index: Tensor, boxes: Boxes | None) -> Tensor:
        """Files' bytes through the GPU's decoder; what it does not know is decoded on the CPU."""
        from torchvision.io import decode_jpeg

        try:
            images = decode_jpeg(contents, mode="RGB", device=self.device)
            images = [turned(image, orientation(file.numpy().tobytes())) for image, file in zip(images, contents)]
        except RuntimeError as error:  # one of them is no baseline JPEG
            if not self._told:
                show(f"--input nvjpeg: some steps are decoded on the CPU ({' '.join(str(error).split())[:80]})")
                self._told = True
            levels = self.photos.levels
            images = [read_image(self.photos.path(i), levels).to(self.device) for i in index.tolist()]
        views = [self.photos.cut(image, *((None,) if boxes is None else boxes.of(k))) for k, image in enumerate(images)]
        return torch.stack([view.permute(1, 2, 0) for view in views])
