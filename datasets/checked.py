"""Checking all files of a data set once: what it leaves is a manifest, and the pixels of all images if asked to."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from datasets.files import Files, Listing, Manifest
from datasets.scan import check_files, has_pixels, require_files, write_pixels
from utils.console import write
from utils.errors import UsageError
from utils.files import atomic
from utils.system import provenance


def check_all(
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
    belong to the manifest beside them, which names their key. Nothing of an earlier run is replaced or removed before
    all that takes its place is whole.

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
    key = str(old.about.get("pixels", "")) if old is not None and known else secrets.token_hex(16)
    wanted = {split: folder / f"{split}_{side}.npy" for split in listing.splits if side}
    for split, files in known.items():
        if split in wanted and has_pixels(wanted[split], len(files.paths), side, key) and not verify:
            del wanted[split]
    if old is not None and known and not wanted and not verify:
        write(f"{target}: prepared already; --verify checks all files again")
        return old

    for split, (paths, _) in listing.splits.items():
        require_files(root, paths, listing.origins[split])
    if wanted:
        _require_room(folder, {path: len(listing.splits[split][0]) for split, path in wanted.items()}, side)
    splits = {}
    with ExitStack() as whole:  # renamed at its end, the last one first: pixels, and then the manifest
        temporary = whole.enter_context(atomic(target))
        for split, (paths, labels) in listing.splits.items():
            origin = listing.origins[split]
            if split in wanted:
                pixels = whole.enter_context(atomic(wanted[split]))
                sizes = write_pixels(root, paths, side, pixels, workers, origin, key)
            elif split in known and not verify:
                sizes = known[split].sizes
            else:
                sizes = check_files(root, paths, workers, origin)
            if split in known and not torch.equal(sizes, known[split].sizes):
                raise UsageError(f"images of {origin} have another size than before", f"remove {target} to start anew")
            splits[split] = Files(paths, labels, sizes)
            shorter = sizes.amin(dim=1)
            span = f"{int(shorter.min())} to {int(shorter.max())}, median {int(shorter.median())}"
            write(f"{split}: {len(paths):,} images, all whole; shorter side {span} pixels")
        made = provenance("-m datasets.prepare", argv, torch.device("cpu"), time.perf_counter() - began)
        about = listing.about | {"provenance": made} | ({"pixels": key} if key else {})
        manifest = Manifest(name, str(root), splits, listing.class_names, about)
        manifest.write(temporary)
    stores = stores_of(manifest, folder)
    for path in (path for split in ("train", "val", "test") for path in folder.glob(f"{split}_*.npy")):
        if path not in stores:
            path.unlink(missing_ok=True)
    write(f"{target}: {len(counts)} classes of {max(counts):,} to {min(counts):,} training images")
    return manifest


def stores_of(manifest: Manifest, folder: Path) -> dict[Path, tuple[str, int]]:
    """The files of decoded pixels in a folder that are whole and a manifest's, each with its split and side."""
    found = {}
    for split, files in manifest.splits.items():
        for path in folder.glob(f"{split}_*.npy"):
            side = path.stem.rpartition("_")[2]
            key = str(manifest.about.get("pixels", ""))  # older ones have none
            if side.isdecimal() and has_pixels(path, len(files.paths), int(side), key):
                found[path] = split, int(side)
    return found


def _same_files(manifest: Manifest, root: Path, listing: Listing) -> bool:
    kept = {split: (files.paths, files.labels.tolist()) for split, files in manifest.splits.items()}
    listed = {split: (paths, labels.tolist()) for split, (paths, labels) in listing.splits.items()}
    return manifest.root == str(root) and kept == listed


def _require_room(folder: Path, images: dict[Path, int], side: int) -> None:
    """Says how large the files of so many images get; UsageError where the disk has no room for them."""
    sizes = {path: n * side * side * 3 / 1e9 for path, n in images.items()}
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free / 1e9
    write(f"{folder}: {', '.join(f'{path.name} {size:.2f} GB' for path, size in sizes.items())}; {free:.2f} GB free")
    if total > free:
        raise UsageError(
            f"--cache {side} needs {total:.2f} GB in {folder}, {free:.2f} GB are free",
            "a smaller side, or a --data_dir with more room",
        )
