"""Data of one's own: a folder of class folders, a CSV of paths and labels, or an .npz file as MedMNIST has them.

Small images (a side of at most ``SMALL_SIDE`` pixels) are held in memory and treated as CIFAR is; larger ones are
photos and treated as ImageNet is. Every file is decoded once, the first time, so that none can end a run later.
"""

from __future__ import annotations

import hashlib
import os
import re
import statistics
import unicodedata
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from datasets.batches import Augment
from datasets.checked import check_all
from datasets.features import identity_of_features
from datasets.files import FULL_RANGE, Listing, Manifest, has_16_bits, image_size, read_image
from datasets.found import LeftOut, images_below
from datasets.geometry import square
from datasets.listed import PHOTO_SIDE, photos_of
from datasets.longtail import hold_out
from datasets.photos import Crops, Photos
from datasets.rows import Rows
from datasets.scan import digest_of
from datasets.spec import CACHE, SPLITS, ImageOptions, ImageSet, Recipe, Source
from utils.console import counted, show
from utils.errors import UsageError
from utils.files import require_writable, write_text
from utils.readers import Unreadable, array_names, array_shapes, read_arrays, read_sealed, read_table, sealed
from utils.system import available_cpus

T = TypeVar("T")
SMALL_SIDE = 64
#: Files whose size decides what kind of images these are, and of which mean and std of photos are computed.
PEEKED, MEASURED = 100, 5000
#: What an .npz has of a split.
PARTS = ("images", "labels")
#: What the folder of a split, or its rows in a CSV, may be called, in small or capital letters.
FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
#: Lengths over widths beyond which a square in the centre leaves more than a third away, and how many are many.
CUT, MANY = 1.5, 0.1
#: Labels of a CSV that stand for none, in small letters, as pandas reads and writes them.
MISSING = {"", "nan", "-nan", "none", "null", "n/a", "na", "<na>", "#n/a", "#na", "#n/a n/a", "nat"}
#: Letters without width, which nobody sees in a name.
UNSEEN = dict.fromkeys(map(ord, "\u200b\u2060\ufeff"))
#: Bytes of a class name, at most.
MOST_NAME = 8000
WHOLE = re.compile(r"-?\d{1,15}(\.0*)?")
LAYOUTS = {
    "folder": "a folder with train/<class>/<images> and test/<class>/<images> (or val/)",
    "csv": "a CSV with the columns path, label, split (train, val, test), or a folder of train.csv and test.csv",
    "npz": "an .npz with train_images, train_labels, test_images, test_labels (uint8, (N, H, W) or (N, H, W, 3))",
}

#: What is found: {split: (paths relative to the root, names of their classes)}.
Named = Mapping[str, tuple[list[str], list[str]]]
Splits = dict[str, tuple[list[str], list[str]]]
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


def suited(kind: str, data_dir: str, image_options: ImageOptions) -> Recipe:
    """Option values for the images in a place: those for small images, or those for photos."""
    side = image_options.image_size or natural_side(kind, data_dir, image_options)
    return ON_SMALL if side <= SMALL_SIDE else ON_PHOTOS


def natural_side(kind: str, data_dir: str, image_options: ImageOptions) -> int:
    """The side that images are shown at by default: their own where they are small, else 224."""
    if kind == "npz":
        path = _only(data_dir, ".npz", kind)
        try:
            shape = array_shapes(path, ["train_images"])["train_images"]
        except (Unreadable, KeyError) as error:
            raise UsageError(f"{path} has no train_images ({error})", LAYOUTS["npz"]) from None
        return min(shape[1:3], default=0)
    reader = _list_folder if kind == "folder" else _list_csv
    root, splits, *_ = reader(data_dir, replace(image_options, test_split=0.5))  # in any layout: a file may know which
    paths = next(iter(splits.values()), ([], []))[0]
    sizes = [image_size(root / name) for name in _some(paths)]
    return _usual([min(size) for size in sizes if size])  # the check of all files names the others


def _some(images: list[T]) -> list[T]:
    """About ``PEEKED`` of a sequence, evenly spread."""
    return images[:: max(1, len(images) // PEEKED)]


def _usual(sides: list[int]) -> int:
    """The side that images with these shorter sides are shown at by default."""
    side = int(statistics.median(sides)) if sides else PHOTO_SIDE
    return side if side <= SMALL_SIDE else PHOTO_SIDE


class Listed(NamedTuple):
    """The root and the images of a folder or a CSV, split by split, and what there is to say of how they were read."""

    root: Path
    splits: Named
    notes: list[str]


def list_images(kind: str, data_dir: str, image_options: ImageOptions) -> Listed:
    """The images of a folder or a CSV in the order of their paths or lines.

    Where there is no test set, ``test_split`` takes one from the training images.

    Raises:
        UsageError: it is not laid out so, or a split that must be there is not.
    """
    reader = _list_folder if kind == "folder" else _list_csv
    root, splits, left_out, notes = reader(data_dir, image_options)
    if image_options.test_split:
        if splits.get("test"):
            raise UsageError(f"--test_split {image_options.test_split}: {data_dir} has test images", "without it")
        if "train" in splits and image_options.test_files:
            splits |= split_by_name(splits["train"], image_options.test_files, data_dir)
            notes.append(f"{len(splits['test'][0]):,} of the images are the test set, as the checkpoint names them")
        elif "train" in splits:
            splits |= split_off(splits["train"], image_options)
            notes.append(
                f"--test_split {image_options.test_split}: {len(splits['test'][0]):,} of the images are the test set, "
                f"drawn class by class (--test_seed {image_options.test_seed})"
            )
    if "test" not in splits and "val" in splits:  # as in ImageNet: there is a val folder, and it is the test set
        splits = {"train": splits["train"], "test": splits["val"]} if "train" in splits else splits
        notes.append("note: there are no test images: those to validate on are the test set")
    missing = [split for split in ("train", "test") if not splits.get(split, ([], []))[0]]
    if missing:
        others = ", or --test_split 0.2" if missing == ["test"] else ""
        words = left_out.describe()
        problem = f"--data_dir {data_dir} has no {missing[0]} images{f'; left out: {words}' if words else ''}"
        raise UsageError(problem, f"{LAYOUTS[kind]}{others}")
    seen: dict[str, tuple[str, str]] = {}
    for split, (paths, labels) in splits.items():
        for path, label in zip(paths, labels):
            if "\n" in path:
                raise UsageError(f"image {path!r}: a name of two lines", "names without line ends")
            first = seen.setdefault(path, (split, label))
            if first[1] != label:
                where = " and ".join(f"in {part} as {name}" for part, name in (first, (split, label)))
                raise UsageError(f"image {root / path} is {where}", "each image of one class")
    counts = counts_in_words({split: len(paths) for split, (paths, _) in splits.items()})
    words = left_out.describe()
    notes.insert(0, f"found {data_dir}: {counts}; left out: {words or 'nothing'}")
    return Listed(root, splits, notes)


def counts_in_words(counts: Mapping[str, int]) -> str:
    """Images of each split: "1,200 train, 300 test images"."""
    return f"{', '.join(f'{count:,} {split}' for split, count in counts.items())} images"


def _list_folder(data_dir: str, image_options: ImageOptions) -> tuple[Path, Splits, LeftOut, list[str]]:
    root, left_out, notes = Path(data_dir), LeftOut(), list[str]()
    class_level = image_options.class_level
    if not root.is_dir():
        raise UsageError(f"--data_dir {data_dir}: no folder {root / 'train'}", LAYOUTS["folder"])
    found: dict[str, dict[str, list[str]]] = {}
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    is_split = any(folder.name.lower() in names for names in FOLDERS.values() for folder in folders)
    if folders and not is_split:
        if not image_options.test_split:
            allowed = f"{LAYOUTS['folder']}; where it holds the class folders themselves, --test_split 0.2"
            raise UsageError(f"--data_dir {data_dir}: no folder {root / 'train'}", allowed)
        found["train"], folders = _by_class(root, class_level, left_out, prefix=""), []
        refuse_inner_splits(data_dir, found["train"])
    for split, names in FOLDERS.items():
        mine = [folder for folder in folders if folder.name.lower() in names]
        if len(mine) > 1:
            raise UsageError(f"--data_dir {data_dir} has more than one folder of {split} images", "one of them")
        for folder in mine:
            found[split] = _by_class(folder, class_level, left_out)
            folders.remove(folder)
    for folder in folders:
        left_out.add("in folders that are no split", str(folder))
    if "train" not in found:
        raise UsageError(f"--data_dir {data_dir}: no folder {root / 'train'}", LAYOUTS["folder"])
    if class_level == 1:
        above = 1 + is_split  # folders of an image that lies in its class folder
        deeper = [path for paths in found["train"].values() for path in paths if path.count("/") > above]
        if deeper:
            every = sum(map(len, found["train"].values()))
            share = "all" if len(deeper) == every else f"{len(deeper):,} of {every:,}"
            notes.append(
                f"note: {share} training images lie in folders inside the class folders ({deeper[0]}): classes are the "
                f"folders in {root / 'train'}; --class_level 2 takes those inside them"
            )
    leaves: dict[str, set[str]] = {}
    for classes in found.values():
        for name in classes:
            leaves.setdefault(name.rpartition("/")[2], set()).add(name)
    splits = {}
    for split, classes in found.items():
        paths, labels = [], []
        for name, images in classes.items():
            leaf = name.rpartition("/")[2]
            paths += images
            labels += [normal(leaf if len(leaves[leaf]) == 1 else name)] * len(images)
        if paths:
            splits[split] = paths, labels
    return root, splits, left_out, notes


def refuse_inner_splits(data_dir: str, classes: Mapping[str, Sequence[str]]) -> None:
    """Raises UsageError where the splits lie inside the class folders, which would make one of them."""
    names = {name for names in FOLDERS.values() for name in names}
    for path in (path for paths in classes.values() for path in paths):
        if any(part.lower() in names for part in path.split("/")[1:-1]):
            raise UsageError(f"--data_dir {data_dir}: splits lie inside the class folders ({path})", LAYOUTS["folder"])


def _by_class(folder: Path, class_level: int, left_out: LeftOut, prefix: str | None = None) -> dict[str, list[str]]:
    """{class: its images}, both as paths in a folder, of an image after its name, or what stands for it."""
    prefix = f"{folder.name}/" if prefix is None else prefix
    classes: dict[str, list[str]] = {}
    for name in images_below(folder, left_out):
        parts = name.split("/")
        if len(parts) <= class_level:
            left_out.add("beside the class folders", str(folder / name))
        else:
            classes.setdefault("/".join(parts[:class_level]), []).append(f"{prefix}{name}")
    if class_level == 1:
        for inside in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
            if inside.name not in classes:
                raise UsageError(f"{inside} has no image", "images that Pillow reads, or no such folder")
    return classes


def _list_csv(data_dir: str, image_options: ImageOptions) -> tuple[Path, Splits, LeftOut, list[str]]:
    place, left_out = Path(data_dir), LeftOut()
    files = [(place, None)] if place.is_file() else [(place / f"{split}.csv", split) for split in SPLITS]
    if not place.is_file() and not (place / "train.csv").is_file():
        raise UsageError(f"--data_dir {data_dir}: there is no {place / 'train.csv'}", LAYOUTS["csv"])
    root = place.parent if place.is_file() else place
    rows: dict[tuple[str, str, str], None] = {}
    for path, split in files:
        if not path.is_file():
            continue
        try:
            table = read_table(path)
        except Unreadable as error:
            raise UsageError(f"{path}: {error}", LAYOUTS["csv"]) from None
        if split is None and image_options.test_split and "split" not in table:
            split = "train"
        for column in ("path", "label", *(() if split else ("split",))):
            if column not in table:
                raise UsageError(
                    f"{path} has no column {column}, only {', '.join(map(str, table.columns))}", LAYOUTS["csv"]
                )
        parts = [split] * len(table) if split else [part.strip().lower() for part in table["split"]]
        for number, (image, label, part) in enumerate(zip(table["path"], table["label"], parts), start=2):
            part = next((name for name, names in FOLDERS.items() if part in names), part)
            label = normal(label)
            if part not in SPLITS or not image.strip():
                raise UsageError(
                    f"{path}, line {number}: {', '.join(each[:60] for each in (image, label, part))}", LAYOUTS["csv"]
                )
            if label.lower() in MISSING:
                raise UsageError(
                    f"{path}, line {number}: {image[:60]} has no label ({label!r})", "a label in every row"
                )
            row = _below(root, image), label, part
            if row in rows:
                left_out.add("repeated rows", f"{path}, line {number}")
            rows[row] = None
    names = whole_numbers({label for _, label, _ in rows})
    splits: Splits = {}
    for image, label, part in rows:
        paths, labels = splits.setdefault(part, ([], []))
        paths.append(image)
        labels.append(names.get(label, label))
    whole = next((label for label, number in sorted(names.items()) if label != number), None)
    notes = [] if whole is None else [f"labels are whole numbers: {whole} is read as {names[whole]}"]
    return root, splits, left_out, notes


def split_off(train: tuple[list[str], list[str]], image_options: ImageOptions) -> Splits:
    """The images of every class in two, "train" and "test"; a class of one is not tested."""
    labels = train[1]
    number = {label: place for place, label in enumerate(dict.fromkeys(sorted(labels)))}
    numbers = torch.tensor([number[label] for label in labels])
    return parted(train, hold_out(numbers, image_options.test_split, image_options.test_seed).tolist())


def split_by_name(train: tuple[list[str], list[str]], test_files: Sequence[str], data_dir: str) -> Splits:
    """The images in two, "train" and "test", which are those of these names; UsageError where one is not there."""
    tested = set(test_files)
    gone = sorted(tested - set(train[0]))
    if gone:
        raise UsageError(
            f"{data_dir} lacks {len(gone):,} of the test images that the checkpoint names, the first: {gone[0]}",
            "the images that it was trained and tested on",
        )
    return parted(train, [path in tested for path in train[0]])


def parted(train: tuple[list[str], list[str]], is_test: Sequence[bool]) -> Splits:
    """Paths and labels in two, "train" and "test"."""
    parts: Splits = {"train": ([], []), "test": ([], [])}
    for path, label, tested in zip(*train, is_test):
        for column, value in zip(parts["test" if tested else "train"], (path, label)):
            column.append(value)
    return parts


def _below(root: Path, path: str) -> str:
    """A path of a CSV in its shortest form, relative to ``root`` where it lies below."""
    whole, top = os.path.normpath(root / path.strip()), os.path.normpath(root)
    if os.path.isabs(path.strip()):
        top = os.path.abspath(root)
    return os.path.relpath(whole, top) if os.path.commonpath([whole, top]) == top else whole


def normal(name: str) -> str:
    """A class name as names are compared: one space between words, nothing unseen, in Unicode's normal form C."""
    return " ".join(unicodedata.normalize("NFC", name.translate(UNSEEN)).split())


def whole_numbers(labels: Set[str]) -> dict[str, str]:
    """{label: whole number}, where all of these are such, written as "3.0" perhaps, as pandas does beside a gap.

    Raises:
        UsageError: one of them is negative.
    """
    if not all(WHOLE.fullmatch(label) for label in labels):
        return {}
    negative = sorted(label for label in labels if label.startswith("-") and float(label))
    if negative:
        raise UsageError(f"label {negative[0]}", "whole numbers from 0, or names")
    return {label: str(int(float(label))) for label in labels}


def class_names_of(listing: Named) -> list[str]:
    """The classes of the training images, whole numbers in their order, other names in that of the alphabet.

    Raises:
        UsageError: another split has a class that training images lack.
    """
    names = set(listing["train"][1])
    for name in names:
        if len(os.fsencode(name)) > MOST_NAME:
            raise UsageError(f"a class name of {len(name):,} letters, {name[:20]}...", f"up to {MOST_NAME:,} bytes")
    for split, (_, labels) in listing.items():
        unseen = sorted(set(labels) - names)
        if unseen:
            raise UsageError(f"class {unseen[0]} has {split} images but no training images", "classes that are trained")
    if len(names) < 2:
        raise UsageError(f"all training images are of class {names.pop()}", "two classes or more")
    by_letters: dict[str, str] = {}
    for name in sorted(names):
        if by_letters.setdefault(name.casefold(), name) != name:
            first = by_letters[name.casefold()]
            show(f"note: {first} and {name} are two classes, whose names differ in the form of letters alone")
    return sorted(names, key=lambda name: (not is_number(name), int(name) if is_number(name) else 0, name))


def is_number(name: str) -> bool:
    """Whether a class name is a whole number."""
    return name.isdecimal() and len(name) < 16


def read_files(kind: str, data_dir: str, image_options: ImageOptions) -> Source:
    """The data set of a folder or a CSV."""
    manifest, home = manifest_of(kind, data_dir, image_options)
    levels = image_options.levels or manifest.levels
    if not levels:
        say_depth([Path(manifest.root, path) for path in _some(manifest.splits["train"].paths)])
    if levels:
        said = "as --range says" if image_options.levels else "the training images' own; --range chooses"
        show(f"16-bit grey images: {levels[0]} becomes black and {levels[1]} white ({said})")
    shared = Duplicates({split: files.digests for split, files in manifest.splits.items()})
    shared.say(lambda split, position: manifest.splits[split].paths[position], image_options.drop_duplicates)
    say_contradictions(manifest)
    say_shapes(manifest.splits["train"].sizes, image_options.fit)
    side = image_options.image_size or _usual(_some(manifest.splits["train"].sizes.amin(dim=1).tolist()))
    if side > SMALL_SIDE:
        source = photos_of(manifest, replace(image_options, image_size=side), home)
        source = shared.dropped(source) if image_options.drop_duplicates else source
        is_plain = levels == manifest.levels and not image_options.drop_duplicates
        fit = "" if image_options.fit == "crop" else f"_{image_options.fit}"
        kept = home / f"statistics_{side}{fit}.json" if is_plain else None
        source = _with_statistics(source, image_options, kept)
    else:
        if image_options.how != "files":
            raise UsageError(f"--input {image_options.how}: images of {side} pixels are held in memory", "files")
        sets = {}
        for split, files in manifest.splits.items():
            paths = [Path(manifest.root, path) for path in files.paths]
            images = torch.stack(
                [square(read_image(path, levels or FULL_RANGE), side, image_options.fit) for path in paths]
            )
            sets[split] = ImageSet.of(images, files.labels)
        if image_options.drop_duplicates:
            sets["train"] = shared.without(sets["train"], manifest.class_names)
        source = _in_memory(sets, manifest.class_names, image_options)
    tested = tuple(manifest.splits["test"].paths) if image_options.test_split else ()
    return source._replace(levels=levels, listing=str(manifest.about.get("listing", "")), test_files=tested)


def say_depth(paths: Sequence[Path]) -> None:
    """Says where images of 16 bits a channel, of those in these files, lose the lower ones."""
    deep = [path for path in paths if has_16_bits(path)]
    if deep:
        show(
            f"note: {len(deep)} of {len(paths)} training images looked at have 16 bits a channel ({deep[0]}), of which "
            "the upper 8 are kept: 0 becomes black, 65535 white; --range is for sets of 16-bit grey images alone"
        )


def say_shapes(sizes: Tensor, fit: str) -> None:
    """Says where many images of ``sizes`` (N, 2) lose more than a third of their length to the square in the centre."""
    share = (sizes.amax(dim=1) > CUT * sizes.amin(dim=1)).double().mean().item()
    if fit == "crop" and share > MANY:
        show(
            f"note: {100 * share:.0f} % of the training images are more than {CUT} times as long as they are wide, and "
            f"tests see a square in their centre (--fit crop); --fit squash or --fit pad show all of them"
        )


def say_contradictions(manifest: Manifest) -> None:
    """Says where training images of the same content have different labels."""
    train = manifest.splits["train"]
    order = train.digests.argsort(stable=True)
    digests, labels = train.digests[order], train.labels[order]
    places = torch.nonzero((digests.diff() == 0) & (labels.diff() != 0)).flatten()
    if len(places):
        one, other = order[places[0]], order[places[0] + 1]
        pair = " and ".join(f"{train.paths[i]} of {manifest.class_names[train.labels[i]]}" for i in (one, other))
        number = counted(len(places), "training image")
        show(f"note: {number} with the content of one of another class, the first: {pair}")


class Duplicates:
    """Images that are there more than once, by digests {split: (N,) int64} of their content."""

    def __init__(self, digests: Mapping[str, Tensor]) -> None:
        self.digests = digests
        others = [digests[split] for split in ("val", "test") if split in digests]
        self.in_train = torch.isin(digests["train"], torch.cat(others))

    def say(self, name: Callable[[str, int], str], is_dropped: bool) -> None:
        """Says which splits share images, with the first pair; ``name`` gives an image's by split and position."""
        splits = [split for split in ("test", "val", "train") if split in self.digests]
        for k, split in enumerate(splits):
            for other in splits[k + 1 :]:
                mine, theirs = self.digests[split], self.digests[other]
                same = torch.isin(mine, theirs).nonzero().flatten().tolist()
                if same:
                    pair = name(split, same[0]), name(other, int((theirs == mine[same[0]]).nonzero()[0]))
                    what = "--drop_duplicates takes them out of training" * (other == "train" and not is_dropped)
                    what = (
                        "they are taken out of training (--drop_duplicates)"
                        if other == "train" and is_dropped
                        else what
                    )
                    is_all = other == "train" and len(same) == len(mine) and not is_dropped
                    word = "warning: accuracy says nothing about new images" if is_all else "note"
                    show(
                        f"{word}: {len(same):,} of {len(mine):,} {split} images are {other} images too, the first: "
                        f"{' = '.join(pair)}{'; ' if what else ''}{what}"
                    )

    def without(self, train: ImageSet, class_names: Sequence[str]) -> ImageSet:
        """The training images that are in no other split; UsageError where a class has no other."""
        left = train.take((~self.in_train).nonzero().flatten())
        empty = sorted(set(range(len(class_names))) - set(left.labels.tolist()))
        if empty:
            raise UsageError(
                f"--drop_duplicates leaves class {class_names[empty[0]]} without a training image",
                "test images that are not trained on",
            )
        return left

    def dropped(self, source: Source) -> Source:
        """A data set whose training images are in no other split."""
        return source._replace(train=self.without(source.train, source.class_names))


def manifest_of(kind: str, data_dir: str, image_options: ImageOptions) -> tuple[Manifest, Path]:
    """What is known of the files, and where: from an earlier check of the very same ones, else all are decoded now.

    Raises:
        UsageError: see :func:`datasets.checked.check_all`; or damaged files, that an earlier run skipped.
    """
    root, home, listing = listing_of(kind, data_dir, image_options)
    known, skip = Manifest.load(home / "manifest.npz"), image_options.skip_damaged
    if known is not None and not known.fits(root, listing):
        known = None
    if known is not None and known.skipped and not skip:
        words = f"{counted(len(known.skipped), 'image')} cannot be read, the first: {root / known.skipped[0]}"
        raise UsageError(f"{words}; all are in {home / 'damaged.csv'}", "images that are whole, or --skip_damaged")
    workers = max(1, min(image_options.workers, available_cpus()))
    manifest = known or check_all(kind, root, home, listing, workers, skip_damaged=skip)
    if manifest.skipped:
        show(
            f"--skip_damaged: {counts_in_words({split: len(files.paths) for split, files in manifest.splits.items()})} "
            f"are read, {len(manifest.skipped):,} damaged ones are left out, all of which are in {home / 'damaged.csv'}"
        )
    return manifest, home


def listing_of(
    kind: str, data_dir: str, image_options: ImageOptions, is_told: bool = True
) -> tuple[Path, Path, Listing]:
    """The root of the files, the folder for what is found of them, which changes with them, and the files.

    Says how they were read, where it ``is_told``.
    """
    root, found, notes = list_images(kind, data_dir, image_options)
    for note in notes if is_told else ():
        show(note)
    names = class_names_of(found)
    place = {name: number for number, name in enumerate(names)}
    splits = {
        split: (paths, torch.tensor([place[label] for label in labels])) for split, (paths, labels) in found.items()
    }
    lines, times = _stamps(root, found)
    stamps = [str(root.resolve()), *(f"{line} {changed}" for line, changed in zip(lines, times))]
    home = CACHE / _hash(stamps)[:16]
    require_writable("the folder", home)
    about = {"source": data_dir, "home": str(home), "listing": _hash(lines)}
    return root.resolve(), home, Listing(splits, names, dict.fromkeys(splits, data_dir), about)


def _stamps(root: Path, found: Named) -> tuple[list[str], list[int]]:
    """Of every file a line of its split, path, class and size, and when it was last changed.

    Raises:
        UsageError: one is not there.
    """
    lines, times = [], []
    for split, (paths, labels) in found.items():
        for path, label in zip(paths, labels):
            try:
                status = (root / path).stat()
            except (OSError, ValueError) as error:  # a name too long, or with a NUL
                reason = getattr(error, "strerror", None) or "no name of a file"
                raise UsageError(f"image {root / path}: {reason}", "files that are there") from None
            lines.append(f"{split} {path} {label} {status.st_size}")
            times.append(status.st_mtime_ns)
    return lines, times


def _hash(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def identity_of(kind: str, data_dir: str, image_options: ImageOptions) -> tuple[list[str], str]:
    """The class names of a data set of one's own, and its ``listing``, see :class:`datasets.spec.Source`, or "".

    Raises:
        UsageError: it is not laid out so.
    """
    if kind == "features":
        return identity_of_features(data_dir)
    if kind == "npz":
        labels = _npz_labels(_only(data_dir, ".npz", kind))
        return class_names_of({"train": ([], labels)}), ""
    root, found, _ = list_images(kind, data_dir, image_options)
    try:
        lines = _stamps(root, found)[0]
    except UsageError:  # files that are gone, so it is another list
        lines = []
    return class_names_of(found), _hash(lines)


def _npz_labels(path: Path) -> list[str]:
    """The names of the training images' classes, of an .npz."""
    try:
        return [str(label) for label in read_arrays(path, ["train_labels"])["train_labels"].flatten()]
    except (Unreadable, KeyError) as error:
        raise UsageError(f"{path} has no train_labels ({error})", LAYOUTS["npz"]) from None


def read_npz(data_dir: str, image_options: ImageOptions) -> Source:
    """The data set of an .npz file: {train, val, test}_images (N, H, W) or (N, H, W, 3) uint8, _labels (N,) or (N, 1).

    Raises:
        UsageError: an array is missing or of another kind.
    """
    path = _only(data_dir, ".npz", "npz")
    if image_options.test_split:
        raise UsageError(
            f"--test_split {image_options.test_split}: an .npz says which images are for tests", "without it"
        )
    if image_options.how != "files":
        raise UsageError(f"--input {image_options.how}: {path} is held in memory", "files")
    sets: dict[str, ImageSet] = {}
    named = {f"{name}_{part}": f"{split}_{part}" for split in SPLITS for name in FOLDERS[split] for part in PARTS}
    try:
        there = array_names(path)
        arrays = {named[name]: array for name, array in read_arrays(path, named).items()}
    except Unreadable as error:
        raise UsageError(f"{path}: {error}", LAYOUTS["npz"]) from None
    if len(arrays) < len(named.keys() & set(there)):
        raise UsageError(f"{path} has more than one set of images of a split", "one of them")
    listing: Splits = {}
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
        if labels.min() < 0:
            raise UsageError(f"{path}: {split}_labels has {labels.min()}", "whole numbers from 0")
        pixels[split] = images.reshape(*images.shape[:3], -1)
        listing[split] = [], [str(label) for label in labels]
    others = [name for name in there if name not in named]
    left_out = f"{counted(len(others), 'array')} ({others[0]})" if others else "nothing"
    counts = {split: len(images) for split, images in pixels.items()}
    show(f"found {path}: {counts_in_words(counts)}; left out: {left_out}")
    colours = {split: images.shape[3] for split, images in pixels.items()}
    if len(set(colours.values())) > 1:
        grey = [split for split, number in colours.items() if number == 1]
        show(f"note: {' and '.join(grey)} images are grey, the others have colours: grey ones become colour images")
        pixels = {split: np.repeat(images, 3 // images.shape[3], axis=3) for split, images in pixels.items()}
    shapes = {split: images.shape[1:3] for split, images in pixels.items()}
    if len(set(shapes.values())) > 1:
        of_split = ", ".join(f"{split} {height} x {width}" for split, (height, width) in shapes.items())
        show(f"note: images of several sizes ({of_split}): all are scaled to the training images', or --image_size")
    shared = Duplicates({split: _digests(images) for split, images in pixels.items()})
    shared.say(lambda split, position: f"{split}_images[{position}]", image_options.drop_duplicates)
    names = class_names_of(listing)
    place = {name: number for number, name in enumerate(names)}
    say_shapes(torch.tensor([pixels["train"].shape[1:3]]), image_options.fit)
    side = image_options.image_size or min(pixels["train"].shape[1:3])
    for split, images in pixels.items():
        numbers = torch.tensor([place[name] for name in listing[split][1]])
        if side <= SMALL_SIDE:
            tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
            sets[split] = ImageSet.of(square(tensor, side, image_options.fit), numbers)
        else:
            images = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
            sizes = torch.tensor(images.shape[1:3], dtype=torch.int32).expand(len(images), 2)
            sets[split] = ImageSet.of(
                Photos(path.parent, [], sizes, side, images, "files", image_options.workers, fit=image_options.fit),
                numbers,
            )
    if image_options.drop_duplicates:
        sets["train"] = shared.without(sets["train"], names)
    if side <= SMALL_SIDE:
        return _in_memory(sets, names, image_options)
    return _with_statistics(Source(sets["train"], sets["test"], names, sets.get("val")), image_options)


def _digests(images: np.typing.NDArray[np.uint8]) -> Tensor:
    """Digests (N,) int64 of images (N, ...)."""
    return torch.tensor([digest_of(image.tobytes()) for image in images], dtype=torch.int64)


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
            assert not isinstance(images, Rows)
            own = statistics_of(_sample(images) if isinstance(images, Photos) else images)
            if kept is not None:
                write_text(kept, sealed([kept.parent.name, *own]))
        mean, std = mean or own[0], std or own[1]
    if len(mean) != source.train.channels or len(std) != source.train.channels:
        raise UsageError(f"--mean and --std of {len(mean)} and {len(std)} numbers", f"{source.train.channels} each")
    return source._replace(mean=mean, std=std)


def _kept_statistics(path: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of each channel, as a file has them; None where it has none that can be right.

    It names the folder that it is in, which is called by the files of the data set.
    """
    try:
        content = read_sealed(path)
        if not isinstance(content, list) or content[:1] != [path.parent.name]:
            return None
        found = np.asarray(content[1:], dtype=np.float64)
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


def _only(data_dir: str, suffix: str, kind: str) -> Path:
    """The file itself, or the only one of its kind in a folder."""
    place = Path(data_dir)
    found = [place] if place.suffix == suffix else sorted(place.glob(f"*{suffix}"))
    if len(found) != 1 or not found[0].is_file():
        raise UsageError(f"--data_dir {data_dir}: {len(found)} files {suffix}", LAYOUTS[kind])
    return found[0]
