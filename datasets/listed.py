"""Data sets of published lists of files: ImageNet-LT, Places-LT, iNaturalist 2018, once they are prepared."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datasets.files import Manifest
from datasets.photos import Photos
from datasets.spec import ImageSet, Shown, Source
from utils.options import UsageError

#: The side at which photos are shown where nothing else is said.
PHOTO_SIDE = 224


def read_listed(name: str, data_dir: str, shown: Shown) -> Source:
    """The data set that ``python -m datasets.prepare`` has left its manifest of in data_dir/<name>.

    Raises:
        UsageError: it has not been prepared.
    """
    home = Path(data_dir, name)
    manifest = Manifest.load(home / "manifest.npz")
    if manifest is None:
        again = f"python -m datasets.prepare {name} --root FOLDER_OF_IMAGES"
        again += "" if data_dir == "data/" else f" --data_dir {data_dir}"
        raise UsageError(f"{name} has not been prepared: there is no {home}/manifest.npz", f"first: {again}")
    return photos_of(manifest, shown, home)


def photos_of(manifest: Manifest, shown: Shown, home: Path) -> Source:
    """The splits of a manifest as photos; ``home`` is where its decoded pixels lie.

    Raises:
        UsageError: the cache was asked for and is not there.
    """
    sets = {}
    for split, files in manifest.splits.items():
        store = None
        if shown.how == "cache":
            found = sorted(home.glob(f"{split}_*.npy"), key=lambda path: int(path.stem.rpartition("_")[2]))
            if not found:
                root = manifest.about.get("source", manifest.root)
                again = f"python -m datasets.prepare {manifest.name} --root {root} --cache 256"
                raise UsageError(
                    f"--input cache: there is no {home}/{split}_256.npy", f"--input files; or first: {again}"
                )
            store = np.load(found[-1], mmap_mode="c")  # copy-on-write: torch wants writable memory
        size = shown.image_size or PHOTO_SIDE
        identity = str(manifest.about.get("home", ""))  # of data of one's own it follows from the files
        photos = Photos(
            manifest.root, files.paths, files.sizes, size, store, shown.how, shown.workers, identity=identity
        )
        sets[split] = ImageSet.of(photos, files.labels)
    return Source(sets["train"], sets["test"], manifest.class_names, sets.get("val"), shown.mean, shown.std)
