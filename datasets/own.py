"""Data of one's own: a folder of class folders, a CSV of paths and labels, or an .npz file as MedMNIST has them.

Small images (a side of at most ``SMALL_SIDE`` pixels) are held in memory and treated as CIFAR is; larger ones are
photos and treated as ImageNet is. Every file is decoded once, the first time, so that none can end a run later.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from datasets.batches import Augment
from datasets.checked import check_all
from datasets.files import EXTENSIONS, Listing, Manifest, image_size, read_image
from datasets.listed import PHOTO_SIDE, photos_of
from datasets.photos import Crops, Photos, cropped, shortened
from datasets.spec import ImageOptions, ImageSet, Recipe, Source
from utils.errors import UsageError
from utils.files import require_writable, write_text
from utils.readers import Unreadable, array_shapes, read_arrays, read_json, read_table
from utils.system import available_cpus

T = TypeVar("T")
#: Where what was found of a data set's files is kept; it may be deleted.
CACHE = Path("cache", "images")
SMALL_SIDE = 64
#: Files whose size decides what kind of images these are, and of which mean and std of photos are computed.
PEEKED, MEASURED = 100, 5000
SPLITS = ("train", "val", "test")
LAYOUTS = {
    "folder": "a folder with train/<class>/<images> and test/<class>/<images> (or val/)",
    "csv": "a CSV with the columns path, label, split (train, val, test), or a folder of train.csv and test.csv",
    "npz": "an .npz with train_images, train_labels, test_images, test_labels (uint8, (N, H, W) or (N, H, W, 3))",
}

#: What is found: {split: (paths relative to the root, names of their classes)}.
Named = Mapping[str, tuple[list[str], list[str]]]
ON_SMALL: Recipe = {"network": "resnet32", "epochs": 200, "lr": 0.1, "batch_size": 128, "wd": 5e-4}
ON_PHOTOS: Recipe = {
    "network": "resnet50",
    "epochs": 90,
    "lr": 0.1,
    "batch_size": 256,
    "wd": 5e-4,
    "views": 4,
    "feature_dtype": "float16",
}


def suited(kind: str, data_dir: str, image_size: int | None) -> Recipe:
    """Option values for the images in a place: those for small images, or those for photos."""
    return ON_SMALL if (image_size or natural_side(kind, data_dir)) <= SMALL_SIDE else ON_PHOTOS


def natural_side(kind: str, data_dir: str) -> int:
    """The side that images are shown at by default: their own where they are small, else 224."""
    if kind == "npz":
        path = _only(data_dir, ".npz", kind)
        try:
            shape = array_shapes(path, ["train_images"])["train_images"]
        except (Unreadable, KeyError) as error:
            raise UsageError(f"{path} has no train_images ({error})", LAYOUTS["npz"]) from None
        return min(shape[1:3], default=0)
    root, listing = list_images(kind, data_dir)
    sizes = [image_size(root / name) for name in _some(listing["train"][0])]
    return _usual([min(size) for size in sizes if size])  # the check of all files names the others


def _some(images: list[T]) -> list[T]:
    """About ``PEEKED`` of a sequence, evenly spread."""
    return images[:: max(1, len(images) // PEEKED)]


def _usual(sides: list[int]) -> int:
    """The side that images with these shorter sides are shown at by default."""
    side = int(statistics.median(sides)) if sides else PHOTO_SIDE
    return side if side <= SMALL_SIDE else PHOTO_SIDE


def list_images(kind: str, data_dir: str) -> tuple[Path, Named]:
    """The root and the images of a folder or a CSV, split by split, in the order of their paths or lines.

    Raises:
        UsageError: it is not laid out so, or a split that must be there is not.
    """
    root, listing = _list_folder(data_dir) if kind == "folder" else _list_csv(data_dir)
    if "test" not in listing and "val" in listing:  # as in ImageNet: there is a val folder, and it is the test set
        listing = {"train": listing["train"], "test": listing["val"]}
    missing = [split for split in ("train", "test") if not listing.get(split, ([], []))[0]]
    if missing:
        raise UsageError(f"--data_dir {data_dir} has no {missing[0]} images", LAYOUTS[kind])
    seen: dict[str, tuple[str, str]] = {}
    for split, (paths, labels) in listing.items():
        for path, label in zip(paths, labels):
            if "\n" in path:
                raise UsageError(f"image {path!r}: a name of two lines", "names without line ends")
            if seen.setdefault(path, (split, label)) != (split, label):
                where = " and ".join(f"in {part} as {name}" for part, name in (seen[path], (split, label)))
                raise UsageError(f"image {root / path} is {where}", "each image in one split and of one class")
    return root, listing


def _list_folder(data_dir: str) -> tuple[Path, Named]:
    root = Path(data_dir)
    if not (root / "train").is_dir():
        raise UsageError(f"--data_dir {data_dir}: no folder {root / 'train'}", LAYOUTS["folder"])
    listing = {}
    for split in SPLITS:
        paths, labels = [], []
        for folder in sorted(p for p in (root / split).glob("[!.]*") if p.is_dir()):
            found = sorted(
                p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")
            )
            if not found:
                raise UsageError(f"{folder} has no image", f"images ({', '.join(EXTENSIONS)}), or no such folder")
            paths += [str(path.relative_to(root)) for path in found]
            labels += [folder.name] * len(found)
        if paths:
            listing[split] = paths, labels
    return root, listing


def _list_csv(data_dir: str) -> tuple[Path, Named]:
    place = Path(data_dir)
    files = [(place, None)] if place.is_file() else [(place / f"{split}.csv", split) for split in SPLITS]
    if not place.is_file() and not (place / "train.csv").is_file():
        raise UsageError(f"--data_dir {data_dir}: there is no {place / 'train.csv'}", LAYOUTS["csv"])
    listing: dict[str, tuple[list[str], list[str]]] = {}
    for path, split in files:
        if not path.is_file():
            continue
        try:
            table = read_table(path)
        except Unreadable as error:
            raise UsageError(f"{path}: {error}", LAYOUTS["csv"]) from None
        for column in ("path", "label", *(() if split else ("split",))):
            if column not in table:
                raise UsageError(
                    f"{path} has no column {column}, only {', '.join(map(str, table.columns))}", LAYOUTS["csv"]
                )
        parts = [split] * len(table) if split else table["split"].tolist()
        for number, (image, label, part) in enumerate(zip(table["path"], table["label"].str.strip(), parts), start=2):
            if part not in SPLITS or not image or not label:
                raise UsageError(f"{path}, line {number}: {image}, {label}, {part}", LAYOUTS["csv"])
            paths, labels = listing.setdefault(part, ([], []))
            paths.append(image)
            labels.append(label)
    return (place.parent if place.is_file() else place), listing


def class_names_of(listing: Named) -> list[str]:
    """The classes of the training images, whole numbers in their order, other names in that of the alphabet.

    Raises:
        UsageError: another split has a class that training images lack.
    """
    names = set(listing["train"][1])
    for split, (_, labels) in listing.items():
        unseen = sorted(set(labels) - names)
        if unseen:
            raise UsageError(f"class {unseen[0]} has {split} images but no training images", "classes that are trained")
    if len(names) < 2:
        raise UsageError(f"all training images are of class {names.pop()}", "two classes or more")
    return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def read_files(kind: str, data_dir: str, image_options: ImageOptions) -> Source:
    """The data set of a folder or a CSV."""
    manifest = manifest_of(kind, data_dir, image_options.workers)
    side = image_options.image_size or _usual(_some(manifest.splits["train"].sizes.amin(dim=1).tolist()))
    if side > SMALL_SIDE:
        home = Path(manifest.about["home"])
        source = photos_of(manifest, replace(image_options, image_size=side), home)
        return _with_statistics(source, image_options, home / f"statistics_{side}.json")
    if image_options.how != "files":
        raise UsageError(f"--input {image_options.how}: images of {side} pixels are held in memory", "files")
    sets = {}
    for split, files in manifest.splits.items():
        images = torch.stack([square(read_image(Path(manifest.root, path)), side) for path in files.paths])
        sets[split] = ImageSet.of(images, files.labels)
    return _in_memory(sets, manifest.class_names, image_options)


def manifest_of(kind: str, data_dir: str, workers: int) -> Manifest:
    """What is known of the files: from an earlier check of the very same ones, else all are decoded now."""
    root, home, listing = listing_of(kind, data_dir)
    known = Manifest.load(home / "manifest.npz")
    return known or check_all(kind, root, home, listing, max(1, min(workers, available_cpus())))


def listing_of(kind: str, data_dir: str) -> tuple[Path, Path, Listing]:
    """The root of the files, the folder for what is found of them, which changes with them, and the files."""
    root, found = list_images(kind, data_dir)
    names = class_names_of(found)
    place = {name: number for number, name in enumerate(names)}
    splits, origins, stamps = {}, {}, [str(root.resolve())]
    for split, (paths, labels) in found.items():
        splits[split], origins[split] = (paths, torch.tensor([place[label] for label in labels])), data_dir
        for path, label in zip(paths, labels):
            try:
                status = (root / path).stat()
            except (OSError, ValueError) as error:  # a name too long, or with a NUL
                reason = getattr(error, "strerror", None) or "no name of a file"
                raise UsageError(f"image {root / path}: {reason}", "files that are there") from None
            stamps.append(f"{split} {path} {label} {status.st_size} {status.st_mtime_ns}")
    home = CACHE / hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]
    require_writable("the folder", home)
    return root.resolve(), home, Listing(splits, names, origins, {"source": data_dir, "home": str(home)})


def read_npz(data_dir: str, image_options: ImageOptions) -> Source:
    """The data set of an .npz file: {train, val, test}_images (N, H, W) or (N, H, W, 3) uint8, _labels (N,) or (N, 1).

    Raises:
        UsageError: an array is missing or of another kind.
    """
    path = _only(data_dir, ".npz", "npz")
    if image_options.how != "files":
        raise UsageError(f"--input {image_options.how}: {path} is held in memory", "files")
    sets: dict[str, ImageSet] = {}
    try:
        arrays = read_arrays(path, [f"{split}_{part}" for split in SPLITS for part in ("images", "labels")])
    except Unreadable as error:
        raise UsageError(f"{path}: {error}", LAYOUTS["npz"]) from None
    listing: dict[str, tuple[list[str], list[str]]] = {}
    pixels = {}
    for split in SPLITS:
        if split == "val" and "val_images" not in arrays:
            continue
        for name in (f"{split}_images", f"{split}_labels"):
            if name not in arrays:
                raise UsageError(f"{path} has no {name}, only {', '.join(arrays) or 'others'}", LAYOUTS["npz"])
        images, labels = (arrays[f"{split}_{part}"] for part in ("images", "labels"))
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
            raise UsageError(f"{path}: {split}_images is {images.dtype} {images.shape}", LAYOUTS["npz"])
        if not images.size:
            raise UsageError(f"{path}: {split}_images is empty", LAYOUTS["npz"])
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
            raise UsageError(
                f"{path}: {split}_labels is {labels.dtype} {labels.shape}",
                f"one whole number for each of {len(images)} images",
            )
        pixels[split] = images.reshape(*images.shape[:3], -1)
        listing[split] = [], [str(label) for label in labels]
    names = class_names_of(listing)
    place = {name: number for number, name in enumerate(names)}
    side = image_options.image_size or min(pixels["train"].shape[1:3])
    for split, images in pixels.items():
        numbers = torch.tensor([place[name] for name in listing[split][1]])
        if side <= SMALL_SIDE:
            tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
            sets[split] = ImageSet.of(square(tensor, side), numbers)
        else:
            images = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
            sizes = torch.tensor(images.shape[1:3], dtype=torch.int32).expand(len(images), 2)
            sets[split] = ImageSet.of(
                Photos(path.parent, [], sizes, side, images, "files", image_options.workers), numbers
            )
    if side <= SMALL_SIDE:
        return _in_memory(sets, names, image_options)
    return _with_statistics(Source(sets["train"], sets["test"], names, sets.get("val")), image_options)


def _in_memory(sets: Mapping[str, ImageSet], names: list[str], image_options: ImageOptions) -> Source:
    pad = max(1, round(sets["train"].side / 8))  # CIFAR's 4 at 32 pixels
    source = Source(sets["train"], sets["test"], names, sets.get("val"), augment=Augment(pad, flip=True))
    return _with_statistics(source, image_options)


def _with_statistics(source: Source, image_options: ImageOptions, kept: Path | None = None) -> Source:
    """The source with the mean and std that were given, else its training images' own, which a file may keep."""
    mean, std = image_options.mean, image_options.std
    if mean is None or std is None:
        own = None if kept is None else _kept_statistics(kept, source.train.channels)
        if own is None:
            images = source.train.images
            own = statistics_of(_sample(images) if isinstance(images, Photos) else images)
            if kept is not None:
                write_text(kept, json.dumps(own))
        mean, std = mean or own[0], std or own[1]
    if len(mean) != source.train.channels or len(std) != source.train.channels:
        raise UsageError(f"--mean and --std of {len(mean)} and {len(std)} numbers", f"{source.train.channels} each")
    return source._replace(mean=mean, std=std)


def _kept_statistics(path: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of each channel, as a file has them; None where it has none that can be right."""
    try:
        found = np.asarray(read_json(path), dtype=np.float64)
    except (Unreadable, TypeError, ValueError):
        return None
    is_right = found.shape == (2, channels) and bool((found >= 0).all() and (found[0] <= 1).all() and found[1].all())
    return (tuple(found[0].tolist()), tuple(found[1].tolist())) if is_right else None


def statistics_of(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of images (N, c, H, W) uint8, as of pixels in [0, 1]."""
    sums = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for part in images.split(1000):
        values = part.double() / 255
        sums += torch.stack([values.sum(dim=(0, 2, 3)), values.square().sum(dim=(0, 2, 3))])
    mean, square = sums / (images.numel() / images.shape[1])
    std = (square - mean.square()).clamp(min=1e-6).sqrt()
    return tuple(round(value, 4) for value in mean.tolist()), tuple(max(round(v, 4), 1e-4) for v in std.tolist())


def _sample(photos: Photos) -> Tensor:
    """``MEASURED`` photos, evenly spread, as they are shown in a test: (n, 3, size, size) uint8."""
    chosen = photos[torch.arange(0, len(photos), -(-len(photos) // MEASURED))]
    chosen.how = "files" if chosen.store is None else chosen.how  # nvjpeg is not for the CPU
    views = Crops(chosen, None, torch.device("cpu")).whole(torch.arange(len(chosen)).split(100))
    return torch.cat(list(views)).permute(0, 3, 1, 2)


def square(images: Tensor, side: int) -> Tensor:
    """Images (..., H, W) uint8 with the shorter side scaled to ``side``, and the centre of that: (..., side, side)."""
    if images.shape[-2:] == (side, side):
        return images
    from torchvision.transforms.v2 import functional as F  # here, since it is slow to import

    return cropped(F.resize(shortened(images), [side], antialias=True), side, side)


def _only(data_dir: str, suffix: str, kind: str) -> Path:
    """The file itself, or the only one of its kind in a folder."""
    place = Path(data_dir)
    found = [place] if place.suffix == suffix else sorted(place.glob(f"*{suffix}"))
    if len(found) != 1 or not found[0].is_file():
        raise UsageError(f"--data_dir {data_dir}: {len(found)} files {suffix}", LAYOUTS[kind])
    return found[0]
