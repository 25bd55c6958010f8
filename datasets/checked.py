"""Checking all files of a data set once: what it leaves is a manifest, and the pixels of all images if asked to."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from datasets.files import FULL_RANGE, Files, Listing, Manifest, is_deep
from datasets.scan import check_files, has_pixels, require_files, write_pixels
from utils.arrays import is_written_array
from utils.console import counted, write
from utils.errors import UsageError
from utils.files import atomic, write_text
from utils.metrics import csv_text
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
    skip_damaged: bool = False,
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
        skip_damaged: leave damaged files out, which the manifest then names.

    Raises:
        UsageError: files are missing or damaged, all of which damaged.csv names, or other than they were; a class has
            no training image; no room.
    """
    began, target = time.perf_counter(), folder / "manifest.npz"
    require_every_class(name, listing, listing.splits["train"][1])
    old = Manifest.load(target)
    known = old.splits if old is not None and not old.skipped and old.fits(root, listing) else {}
    key = str(old.about.get("pixels", "")) if old is not None and known else secrets.token_hex(16)
    wanted = {split: folder / f"{split}_{side}.npy" for split in listing.splits if side}
    for split, files in known.items():
        if split in wanted and has_pixels(wanted[split], len(files.paths), side, key, verify):
            del wanted[split]
    if old is not None and known and not wanted and not verify:
        write(f"{target}: prepared already; --verify checks all files again")
        return old

    for split, (paths, _) in listing.splits.items():
        require_files(root, paths, listing.origins[split])
    if wanted:
        _require_room(folder, {path: len(listing.splits[split][0]) for split, path in wanted.items()}, side)
    splits: dict[str, Files] = {}
    damaged: list[tuple[str, str]] = []
    origins: list[str] = []
    levels = old.levels if old is not None and known else levels_of(root, listing.splits["train"][0], workers, side)
    with ExitStack() as whole:  # renamed at its end, the last one first: pixels, and then the manifest
        temporary = whole.enter_context(atomic(target))
        for split, (paths, labels) in listing.splits.items():
            if split in wanted:
                pixels = whole.enter_context(atomic(wanted[split]))
                seen = write_pixels(root, paths, side, pixels, workers, key, levels or FULL_RANGE)
                if skip_damaged and seen.damaged:  # once more, without them
                    good = [path for position, path in enumerate(paths) if position not in seen.damaged]
                    write_pixels(root, good, side, pixels, workers, key, levels or FULL_RANGE)
            elif split in known and not verify:
                splits[split] = known[split]
                continue
            else:
                seen = check_files(root, paths, workers)
            levels = levels or (seen.levels if split == "train" else None)
            damaged += [(paths[position], why) for position, why in seen.damaged.items()]
            origins += [listing.origins[split]] * bool(seen.damaged)
            whole_ones = [position for position in range(len(paths)) if position not in seen.damaged]
            if not whole_ones:
                report_damaged(damaged, folder / "damaged.csv", f"images that are whole; of {split} there is none")
            sizes, digests = seen.sizes[whole_ones], seen.digests[whole_ones]
            if split in known and not torch.equal(digests, known[split].digests):
                origin = listing.origins[split]
                raise UsageError(
                    f"images of {origin} have another content, or another size than before",
                    f"remove {target} to start anew",
                )
            splits[split] = Files([paths[position] for position in whole_ones], labels[whole_ones], sizes, digests)
            shorter = sizes.amin(dim=1)
            span = f"{int(shorter.min())} to {int(shorter.max())}, median {int(shorter.median())}"
            are = f"{len(seen.damaged):,} damaged" if seen.damaged else "all whole"
            write(f"{split}: {len(paths):,} images, {are}; shorter side {span} pixels")
        if damaged:
            allowed = f"images that are whole, as in {origins[0]}"
            allowed += ", or --skip_damaged" if "listing" in listing.about else ""
            report_damaged(damaged, folder / "damaged.csv", None if skip_damaged else allowed)
            require_every_class(name, listing, splits["train"].labels)
        else:
            damaged_csv = folder / "damaged.csv"
            if damaged_csv.is_file() and damaged_csv.read_bytes()[:13] == b"path,problem\n":
                damaged_csv.unlink()
        made = provenance("-m datasets.prepare", argv, torch.device("cpu"), time.perf_counter() - began)
        about = listing.about | {"provenance": made, "levels": levels, "skipped": [path for path, _ in damaged]}
        about |= {"pixels": key} if key else {}
        manifest = Manifest(name, str(root), splits, listing.class_names, about)
        manifest.write(temporary)
    stores = stores_of(manifest, folder)
    for path in (path for split in ("train", "val", "test") for path in folder.glob(f"{split}_*.npy")):
        if path not in stores and path.stem.rpartition("_")[2].isdecimal() and is_written_array(path):
            path.unlink(missing_ok=True)
    counts = torch.bincount(splits["train"].labels, minlength=len(listing.class_names)).tolist()
    write(f"{target}: {len(counts)} classes of {max(counts):,} to {min(counts):,} training images")
    return manifest


def require_every_class(name: str, listing: Listing, labels: Tensor) -> None:
    """Raises UsageError where a class has no image among these labels (N,)."""
    counts = torch.bincount(labels, minlength=len(listing.class_names)).tolist()
    if 0 in counts:
        number = counts.index(0)
        words = f"class {number} of {name} has no training image ({listing.class_names[number]})"
        raise UsageError(words, "at least one for every class")


def report_damaged(damaged: Sequence[tuple[str, str]], path: Path, allowed: str | None) -> None:
    """Writes which files are damaged, and why, and says so; where they are not to be skipped, that ends in UsageError.

    ``allowed`` is what the error says, None where they are skipped.
    """
    write_text(path, csv_text([{"path": name, "problem": why} for name, why in damaged]))
    words = f"{counted(len(damaged), 'image')} cannot be read, the first: {damaged[0][1]}"
    if allowed is not None:
        raise UsageError(f"{words}; all are in {path}", allowed)
    write(f"--skip_damaged: {words}; all are in {path}")


def levels_of(root: Path, paths: Sequence[str], workers: int, side: int) -> tuple[int, int] | None:
    """The smallest and largest value of 16-bit grey images, where pixels of such are about to be written."""
    may_be = side and not any(path.lower().endswith((".jpg", ".jpeg")) for path in paths)
    return check_files(root, paths, workers).levels if may_be and all(is_deep(root / path) for path in paths) else None


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
