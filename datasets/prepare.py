"""Checks a set of photos once and for all: lists, images per class, every file; and decodes them ahead if asked to.

    python -m datasets.prepare imagenet_lt --root DIR
    python -m datasets.prepare imagenet_lt --root DIR --cache 256
    python -m datasets.prepare folder --root DIR --show sheet.png

What is found goes to DATA_DIR/DATASET/manifest.npz, which training reads. --cache SIDE adds <split>_SIDE.npy beside it:
every image squashed to SIDE x SIDE, for training without decoding. The usual layouts of the images are recognised.
Lists are looked for in DATA_DIR/DATASET and in --root. Data of one's own needs this command for --cache alone; what is
found of it goes to cache/images/.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from datasets import Batches, load
from datasets.checked import check_all
from datasets.files import Listing, Manifest
from datasets.geometry import FITS
from datasets.own import LAYOUTS, listing_of
from datasets.published import PUBLISHED, read_published
from datasets.spec import NATURAL, ImageOptions
from utils.command import command
from utils.console import counted, write
from utils.errors import UsageError
from utils.files import Target, atomic, require_targets, require_writable
from utils.options import Choice, Flag, Number, Text, check, option, parse_typed, resolve
from utils.plots import Pictured, contact_sheet
from utils.system import available_cpus

#: Classes that --show draws, at most.
SHOWN = 32


@dataclass(frozen=True)
class Reader:
    """A DATASET: ``read`` (folder with images, folder with lists, take any counts) -> listing; what a user must get."""

    read: Callable[[Path, Path, bool], Listing]
    needs: str


READERS = {name: Reader(partial(read_published, name), known.describe()) for name, known in PUBLISHED.items()}
OWN = {name: LAYOUTS[name] for name in ("folder", "csv")}


@dataclass(frozen=True)
class Options:
    """Options of the command, which follow its DATASET."""

    root: str | None = option(
        None, Text("a folder"), "where the images lie, of data of one's own what it is; needed", "data"
    )
    data_dir: str = option("data/", Text("a folder"), "in its folder DATASET is kept what is found", "data")
    cache: int | None = option(
        None, Number(int, 16, 1024), "side at which to write the pixels of all images as well", "data"
    )
    workers: int | None = option(
        None, Number(int, 1, 256), "images decoded at a time; None: as many as CPUs that may be used", "machine"
    )
    any_counts: bool = option(
        False, Flag(), "go on where images per class are not the published, for trials on a part", "data"
    )
    test_split: float = option(0.0, Number(float, 0, 0.9), "own data: share of every class to test on", "data")
    test_seed: int = option(0, Number(int, 0, 2**31 - 1), "seed of --test_split", "data")
    class_level: int = option(
        1, Number(int, 1, 20), "folder: how many folders below the split's the classes are", "data"
    )
    skip_damaged: bool = option(False, Flag(), "go on without files that cannot be read", "data")
    show: str | None = option(
        None,
        Text("a PNG to write"),
        "draw training and test images of some classes as a network sees them",
        "data",
    )
    image_size: int | None = option(None, Number(int, 8, 1024), "--show: side in pixels", "data")
    fit: str = option("crop", Choice(FITS), "--show, own data: see --fit of main_stage1.py", "data")
    verify: bool = option(False, Flag(), "check all files again", "data")

    def __post_init__(self) -> None:
        check(self)


def draw(name: str, data_dir: str, image_options: ImageOptions, path: str) -> None:
    """Draws training images as they are augmented, and test images, of classes from the largest to the smallest."""
    data = load(name, data_dir, image_options=image_options, imb_ratio=NATURAL)
    order = torch.tensor(data.class_counts).argsort(descending=True, stable=True)
    classes = order[torch.linspace(0, len(order) - 1, min(len(order), SHOWN)).long()].tolist()
    pictures: list[Pictured] = []
    for title, part, augment in (("train", data.train, data.spec.augment), ("test", data.test, None)):
        firsts = [torch.nonzero(part.labels == number).flatten()[:1] for number in classes]
        chosen = part.take(torch.cat(firsts))
        batches = Batches(chosen.images, chosen.labels, 64, data.spec.mean, data.spec.std, torch.device("cpu"), augment)
        for images, labels in batches.epoch():
            mean, std = (torch.tensor(values)[:, None, None] for values in (data.spec.mean, data.spec.std))
            pixels = ((images * std + mean) * 255).round().clamp(0, 255).byte()
            names = [data.class_names[label] for label in labels.tolist()]
            pictures += [Pictured(image, f"{title}\n{called}") for image, called in zip(pixels, names)]
    with atomic(path) as temporary:
        size = f"{data.train.side} x {data.train.side} pixels"
        title = f"{data_dir}: {size}, --fit {image_options.fit}; training images as augmented"
        contact_sheet(pictures, temporary, title)
    write(f"{path}: {counted(len(pictures), 'image')} as a network sees them, {data.train.side} pixels")


@command
def main(argv: Sequence[str]) -> Manifest:
    """Runs the command; returns the manifest."""
    name, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    if name not in (*READERS, *OWN) and not {"-h", "--help"} & set(argv):
        problem = f"{name!r} is no DATASET" if name else "DATASET, which comes first, is missing"
        raise UsageError(f"python -m datasets.prepare: {problem}", ", ".join([*READERS, *OWN]))
    needs = {key: reader.needs for key, reader in READERS.items()} | OWN
    lines = "\n".join(f"{key}: {need}." for key, need in needs.items())
    typed = parse_typed(Options, flags, "python -m datasets.prepare DATASET", f"{__doc__}\n{lines}")
    options = resolve(Options, typed, {}).options
    workers, side = options.workers or available_cpus(), options.cache or 0
    if options.root is None or not (Path(options.root).is_dir() or name == "csv"):
        problem = "--root is missing" if options.root is None else f"--root {options.root} is no folder"
        raise UsageError(problem, f"the folder with the images of {name}. {needs[name]}")
    for flag in ("image_size", "fit"):
        if flag in typed and not options.show:
            raise UsageError(f"--{flag} without --show", "--show FILE.png beside it")
    if options.show:
        if Path(options.show).suffix.lower() != ".png":
            raise UsageError(f"--show {options.show}", "the path of a .png")
        require_targets([Target("--show", options.show, b"\x89PNG", b"Matplotlib")], [Path(options.root)])
    image_options = ImageOptions(
        image_size=options.image_size,
        fit=options.fit,
        class_level=options.class_level,
        test_split=options.test_split,
        test_seed=options.test_seed,
        skip_damaged=options.skip_damaged,
    )
    torch.set_num_threads(1)  # the workers are the parallelism
    if name in OWN:
        for flag in ("data_dir", "any_counts"):
            if flag in typed:
                raise UsageError(f"--{flag} with {name}, data of one's own", "without it")
        if options.show:  # reads all files, and says which
            draw(name, options.root, image_options, options.show)
        root, home, listing = listing_of(name, options.root, image_options, is_told=not options.show)
        return check_all(name, root, home, listing, workers, side, options.verify, argv, options.skip_damaged)
    for flag in ("fit", "class_level", "test_split", "test_seed", "skip_damaged"):
        if flag in typed:
            raise UsageError(f"--{flag} with {name}, whose lists are published", "without it")
    root, folder = Path(os.path.abspath(options.root)), Path(options.data_dir, name)
    require_writable("--data_dir", folder)
    ours = {"manifest.npz": (b"PK", b"head.npy"), "damaged.csv": (b"path,problem", b"")}
    require_targets([Target("--data_dir", str(folder / file), *marks) for file, marks in ours.items()])

    listing = READERS[name].read(root, folder, options.any_counts)
    for split, (paths, _) in listing.splits.items():
        write(f"{split}: {len(paths):,} images listed, the first {root / paths[0]}")
    if listing.about.get("counts") == "other":
        write("images per class are not the published ones (--any_counts)")
    manifest = check_all(name, root, folder, listing, workers, side, options.verify, argv)
    if options.show:
        draw(name, options.data_dir, image_options, options.show)
    return manifest


if __name__ == "__main__":
    main(sys.argv[1:])
