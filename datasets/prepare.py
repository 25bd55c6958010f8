"""Checks a set of photos once and for all: lists, images per class, every file; and decodes them ahead if asked to.

    python -m datasets.prepare imagenet_lt --root DIR
    python -m datasets.prepare imagenet_lt --root DIR --cache 256

What is found goes to DATA_DIR/DATASET/manifest.npz, which training reads. --cache SIDE adds <split>_SIDE.npy beside it:
every image squashed to SIDE x SIDE, for training without decoding. The usual layouts of the images are recognised.
Lists are looked for in DATA_DIR/DATASET and in --root.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from datasets.files import Files, Listing, Manifest
from datasets.published import PUBLISHED, read_published
from datasets.scan import check_files, has_pixels, require_files, write_pixels
from utils.files import require_writable
from utils.options import Flag, Number, Text, UsageError, check, command, option, parse_typed
from utils.system import available_cpus, provenance


@dataclass(frozen=True)
class Reader:
    """A DATASET: ``read`` (folder with images, folder with lists, take any counts) -> listing; what a user must get."""

    read: Callable[[Path, Path, bool], Listing]
    needs: str


READERS = {name: Reader(partial(read_published, name), known.describe()) for name, known in PUBLISHED.items()}


@dataclass(frozen=True)
class Options:
    """Options of the command, which follow its DATASET."""

    root: str | None = option(None, Text("a folder"), "where the images lie; needed")
    data_dir: str = option("data/", Text("a folder"), "in its folder DATASET is kept what is found")
    cache: int | None = option(None, Number(int, 16, 1024), "side at which to write the pixels of all images as well")
    workers: int | None = option(
        None, Number(int, 1, 256), "images decoded at a time; as many as CPUs that may be used, if not given"
    )
    any_counts: bool = option(False, Flag(), "go on where images per class are not the published, for trials on a part")
    verify: bool = option(False, Flag(), "check all files again")

    def __post_init__(self) -> None:
        check(self)


def prepare(
    name: str,
    root: Path,
    folder: Path,
    listing: Listing,
    workers: int,
    side: int = 0,
    verify: bool = False,
    argv: Sequence[str] = (),
) -> Manifest:
    """Checks all files of a data set and writes ``folder``/manifest.npz, and with a ``side`` their pixels beside it.

    What is known of the same files from an earlier run is not found out again, unless to ``verify`` it. Pixels always
    belong to the manifest beside them: those of other files are removed first.

    Args:
        name: the data set's.
        root: what the listing's paths are relative to.
        folder: where to write; it exists.
        listing: the files.
        workers: images decoded at a time.
        side: see :func:`datasets.scan.write_pixels`; 0 writes none.
        verify: decode files that are known, too.
        argv: the command's arguments, for the manifest to keep.

    Raises:
        UsageError: a file is missing or damaged, or other than it was; a class has no training image; no room.
    """
    began, target = time.perf_counter(), folder / "manifest.npz"
    counts = torch.bincount(listing.splits["train"][1], minlength=len(listing.class_names)).tolist()
    if 0 in counts:
        raise UsageError(f"class {counts.index(0)} of {name} has no training image", "at least one for every class")
    old = Manifest.load(target)
    known = old.splits if old is not None and _same_files(old, root, listing) else {}
    wanted = {split: folder / f"{split}_{side}.npy" for split in listing.splits if side}
    for split, files in known.items():
        if split in wanted and has_pixels(wanted[split], len(files.paths), side):
            del wanted[split]
    if old is not None and known and not wanted and not verify:
        print(f"{target}: prepared already; --verify checks all files again")
        return old

    for split, (paths, _) in listing.splits.items():
        require_files(root, paths, listing.origins[split])
    if not known:
        for path in (target, *(path for split in ("train", "val", "test") for path in folder.glob(f"{split}_*.npy"))):
            path.unlink(missing_ok=True)
    if wanted:
        _require_room(folder, {path: len(listing.splits[split][0]) for split, path in wanted.items()}, side)
    splits = {}
    for split, (paths, labels) in listing.splits.items():
        origin = listing.origins[split]
        if split in wanted:
            sizes = write_pixels(root, paths, side, wanted[split], workers, origin)
        elif split in known and not verify:
            sizes = known[split].sizes
        else:
            sizes = check_files(root, paths, workers, origin)
        if split in known and not torch.equal(sizes, known[split].sizes):
            raise UsageError(f"images of {origin} have another size than before", f"remove {target} to start anew")
        splits[split] = Files(paths, labels, sizes)
        shorter = sizes.amin(dim=1)
        span = f"{int(shorter.min())} to {int(shorter.max())}, median {int(shorter.median())}"
        print(f"{split}: {len(paths):,} images, all whole; shorter side {span} pixels", flush=True)
    made = provenance("-m datasets.prepare", argv, torch.device("cpu"), time.perf_counter() - began)
    manifest = Manifest(name, str(root), splits, listing.class_names, listing.about | {"provenance": made})
    manifest.save(target)
    print(f"{target}: {len(counts)} classes of {max(counts):,} to {min(counts):,} training images")
    return manifest


def _same_files(manifest: Manifest, root: Path, listing: Listing) -> bool:
    kept = {split: (files.paths, files.labels.tolist()) for split, files in manifest.splits.items()}
    listed = {split: (paths, labels.tolist()) for split, (paths, labels) in listing.splits.items()}
    return manifest.root == str(root) and kept == listed


def _require_room(folder: Path, images: dict[Path, int], side: int) -> None:
    """Says how large the files of so many images get; UsageError where the disk has no room for them."""
    sizes = {path: n * side * side * 3 / 1e9 for path, n in images.items()}
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free / 1e9
    print(f"{folder}: {', '.join(f'{path.name} {size:.2f} GB' for path, size in sizes.items())}; {free:.2f} GB free")
    if total > free:
        raise UsageError(
            f"--cache {side} needs {total:.2f} GB in {folder}, {free:.2f} GB are free",
            "a smaller side, or a --data_dir with more room",
        )


@command
def main(argv: Sequence[str]) -> Manifest:
    """Runs the command; returns the manifest."""
    name, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    if name not in READERS and not {"-h", "--help"} & set(argv):
        problem = f"{name!r} is no DATASET" if name else "DATASET, which comes first, is missing"
        raise UsageError(f"python -m datasets.prepare: {problem}", ", ".join(READERS))
    needs = "\n".join(f"{key}: {reader.needs}." for key, reader in READERS.items())
    typed = parse_typed(Options, flags, "python -m datasets.prepare DATASET", f"{__doc__}\n{needs}")
    options, reader = Options(**typed), READERS[name]
    if options.root is None or not Path(options.root).is_dir():
        problem = "--root is missing" if options.root is None else f"--root {options.root} is no folder"
        raise UsageError(problem, f"the folder with the images of {name}. {reader.needs}")
    root, folder = Path(os.path.abspath(options.root)), Path(options.data_dir, name)
    require_writable("--data_dir", folder)
    torch.set_num_threads(1)  # the workers are the parallelism

    listing = reader.read(root, folder, options.any_counts)
    for split, (paths, _) in listing.splits.items():
        print(f"{split}: {len(paths):,} images listed, the first {root / paths[0]}", flush=True)
    if listing.about.get("counts") == "other":
        print("images per class are not the published ones (--any_counts)")
    workers = options.workers or available_cpus()
    return prepare(name, root, folder, listing, workers, options.cache or 0, options.verify, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
