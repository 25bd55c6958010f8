"""What a network is to predict: images as it is shown them, or rows of features; a few at a time, in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from datasets import DATASETS
from datasets.features import as_floats
from datasets.files import FULL_RANGE, read_image
from datasets.found import LeftOut, images_below
from datasets.geometry import centre, resized, square
from datasets.own import SMALL_SIDE
from experiment.options import DataOptions, constants_of
from experiment.pretrained import shown_of
from utils.checkpoints import Checkpoint
from utils.console import counted, write
from utils.errors import UsageError
from utils.options import shown
from utils.readers import Unreadable, map_array, read_arrays
from utils.system import available_cpus

#: Where something lies or which row it is, its pixels or why there are none, and what was made of it.
Prediction = tuple[Path, Tensor | UsageError, Tensor]


class View:
    """How the network of a checkpoint is shown images: their size, their channels, their normalisation."""

    def __init__(self, file: Checkpoint, options: DataOptions, is_typed: bool, paths: Sequence[Path]) -> None:
        self.paths = paths
        spec = DATASETS[file.data.get("dataset", options.dataset)]
        own = constants_of(file) if file.data or not is_typed or spec.own else {}
        usual = 224 if file.stem == "imagenet" else 8 if spec.name == "digits" else 32
        self.side, self.channels = options.image_size or file.data.get("image_size") or usual, file.in_channels
        mean, std = options.mean or own.get("mean", spec.mean), options.std or own.get("std", spec.std)
        if len(mean) != self.channels or len(std) != self.channels:
            raise UsageError(
                f"{file.path} does not say how pixels are normalised", "--dataset NAME, or --mean and --std"
            )
        self.mean, self.std = list(mean), list(std)
        low, high = file.data.get("levels") or options.range or FULL_RANGE
        self.levels = low, high
        self.is_photo = self.side > SMALL_SIDE or (spec.photos and not spec.own)
        self.fit = file.data.get("fit") or options.fit
        how = shown_of(file)
        self.resize, self.mode = (how.resize, how.interpolation) if how else (resized(self.side), "bilinear")
        fit = "" if self.fit == "crop" else f" ({self.fit})"
        write(f"input: {self.side} x {self.side} pixels{fit}, mean {shown(self.mean)}, std {shown(self.std)}")

    def __len__(self) -> int:
        return len(self.paths)

    def of(self, path: Path) -> Tensor | UsageError:
        """The pixels (c, side, side) uint8 of a file, or why there are none."""
        try:
            image = read_image(path, self.levels)
        except UsageError as error:
            return error
        from torchvision.transforms.v2 import functional as F  # here, since it is slow to import

        if self.channels != 3:  # the weights of the three do not add up to 1: grey would become darker
            image = image[:1] if bool((image == image[:1]).all()) else F.rgb_to_grayscale(image)
        if self.is_photo:
            return centre(image, self.side, self.fit, self.resize, self.mode)
        return square(image, self.side, self.fit)

    def normalised(self, images: Sequence[Tensor]) -> Tensor:
        """What the network takes: (B, c, side, side) float."""
        from torchvision.transforms.v2 import functional as F

        pixels: Tensor = F.normalize(torch.stack(list(images)).float() / 255, self.mean, self.std)
        return pixels.contiguous(memory_format=torch.channels_last)

    def predictions(self, forward: Callable[[Tensor], Tensor], batch_size: int, workers: int) -> Iterator[Prediction]:
        """(path, its pixels or why there are none, what ``forward`` makes of them) of every image, in order."""
        with ThreadPoolExecutor(max(1, min(workers, available_cpus()))) as pool:
            for start in range(0, len(self.paths), batch_size):
                chunk = self.paths[start : start + batch_size]
                images = list(pool.map(self.of, chunk))
                good = [image for image in images if isinstance(image, Tensor)]
                rows = iter(forward(self.normalised(good)) if good else ())
                for path, image in zip(chunk, images):
                    yield path, image, next(rows) if isinstance(image, Tensor) else torch.empty(0)

    def some(self, number: int) -> Tensor:
        """At most so many of the images, (n, c, side, side) in [0, 1]."""
        found = [image for image in map(self.of, self.paths[:number]) if isinstance(image, Tensor)]
        return torch.stack(found).float() / 255 if found else torch.empty(0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.channels, self.side, self.side

    def metadata(self) -> dict[str, str]:
        """What a program must know to show a network its images."""
        shorter = str(self.resize if self.is_photo else self.side)
        return {
            "input": "RGB" if self.channels == 3 else "grey levels",
            "range": "0 to 1; mean and std are applied in the graph",
            "side": str(self.side),
            "shorter_side": shorter,
            "channels": str(self.channels),
            "mean": json.dumps(self.mean),
            "std": json.dumps(self.std),
            "fit": self.fit,
            "resize": f"shorter side to {shorter}, antialiased, centre cut out"
            if self.fit == "crop"
            else "all of the image",
            "interpolation": self.mode,
            "levels_of_16_bit": json.dumps(self.levels),
        }


class RowView:
    """The rows (N, D) of features of a .npy, or of an .npz as ``features`` or ``test_features``; there may be none."""

    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    def __init__(self, file: Checkpoint, paths: Sequence[Path]) -> None:
        self.shape = (file.in_channels,)
        self.place = paths[0] if paths else Path()
        self.rows = rows_of(self.place, file) if paths else torch.empty(0, file.in_channels)

    def __len__(self) -> int:
        return len(self.rows)

    def predictions(self, forward: Callable[[Tensor], Tensor], batch_size: int) -> Iterator[Prediction]:
        """(a row's name, no pixels or why it is none, what ``forward`` makes of it) of every row, in order."""
        for start in range(0, len(self.rows), batch_size):
            chunk = self.rows[start : start + batch_size].float()
            is_good = chunk.isfinite().all(dim=1)
            made = iter(forward(chunk[is_good]) if bool(is_good.any()) else ())
            for number, good in enumerate(is_good.tolist(), start=start):
                name = Path(f"{self.place}[{number}]")
                problem = UsageError(f"{name}: not finite", "finite numbers")
                yield name, chunk[:0] if good else problem, next(made) if good else torch.empty(0)

    def some(self, number: int) -> Tensor:
        """At most so many of the rows, (n, D)."""
        found = self.rows[:number].float()
        return found[found.isfinite().all(dim=1)]

    def metadata(self) -> dict[str, str]:
        """What a program must know to give a network its rows."""
        return {"features": str(self.shape[0])}


def rows_of(place: Path, file: Checkpoint) -> Tensor:
    """The rows (N, D) of a file; UsageError where there are none, or of another width than a checkpoint's."""
    names = ("features", "test_features")
    try:
        if place.suffix == ".npz":
            found = read_arrays(place, names, others="V")
            array = next((found[name] for name in names if name in found), None)
        else:
            array = map_array(place, others="V")
    except Unreadable as error:
        raise UsageError(f"predict.py {place}: {error}", "a .npy or .npz of features") from None
    if array is None:
        raise UsageError(f"predict.py {place}: there are no {' or '.join(names)} in it", "rows of features")
    rows = as_floats(array, str(place))
    if rows.shape[1] != file.in_channels:
        raise UsageError(f"predict.py {place}: rows of {rows.shape[1]:,} numbers", f"{file.in_channels:,}")
    write(f"found {place}: {counted(len(rows), 'row')} of {rows.shape[1]:,}")
    return rows


def images_in(place: Path) -> list[Path]:
    """The image itself, or all images of a folder and those inside it, in the order of their paths."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UsageError(f"predict.py {place}: there is no such file or folder", "an image, or a folder of some")
    left_out = LeftOut()
    paths = [place / name for name in images_below(place, left_out)]
    words = left_out.describe() or "nothing"
    if not paths:
        raise UsageError(f"predict.py {place}: there is no image in it; left out: {words}", "images that Pillow reads")
    write(f"found {place}: {counted(len(paths), 'image')}; left out: {words}")
    return paths
