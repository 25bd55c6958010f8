"""Data sets of published lists of files: ImageNet-LT, Places-LT, iNaturalist 2018, once they are prepared."""

from __future__ import annotations

from pathlib import Path

from datasets.checked import stores_of
from datasets.files import FULL_RANGE, Manifest
from datasets.photos import Photos
from datasets.spec import ImageOptions, ImageSet, Source
from utils.arrays import open_array
from utils.errors import UsageError

#: The side at which photos are shown where nothing else is said.
PHOTO_SIDE = 224


def read_listed(name: str, data_dir: str, image_options: ImageOptions) -> Source:
    """The data set that ``python -m datasets.prepare`` has left its manifest of in data_dir/<name>.

    Raises:
        UsageError: it has not been prepared.
    """
    home = Path(data_dir, name)
    manifest = Manifest.load(home / "manifest.npz")
    if manifest is None:
        again = f"python -m datasets.prepare {name} --root FOLDER_OF_IMAGES"
        again += "" if data_dir == "data/" else f" --data_dir {data_dir}"
        why = "is damaged" if (home / "manifest.npz").exists() else "is not there"
        raise UsageError(f"{name} has not been prepared: {home}/manifest.npz {why}", f"first: {again}")
    return photos_of(manifest, image_options, home)


def photos_of(manifest: Manifest, image_options: ImageOptions, home: Path) -> Source:
    """The splits of a manifest as photos; ``home`` is where its decoded pixels lie.

    Raises:
        UsageError: the cache was asked for and is not there.
    """
    sets, stores = {}, _stores(manifest, home) if image_options.how == "cache" else {}
    for split, files in manifest.splits.items():
        store, identity = None, str(manifest.about.get("home", manifest.root))  # of own data it follows from the files
        if split in stores:
            store = open_array(stores[split], str(manifest.about.get("pixels", "")))
            identity += f" {stores[split].stat().st_mtime_ns}"
        size = image_options.image_size or PHOTO_SIDE
        photos = Photos(
            manifest.root,
            files.paths,
            files.sizes,
            size,
            store,
            image_options.how,
            image_options.workers,
            identity=identity,
            levels=image_options.levels or manifest.levels or FULL_RANGE,
            fit=image_options.fit,
        )
        sets[split] = ImageSet.of(photos, files.labels)
    return Source(
        sets["train"], sets["test"], manifest.class_names, sets.get("val"), image_options.mean, image_options.std
    )


def _stores(manifest: Manifest, home: Path) -> dict[str, Path]:
    """The decoded pixels of every split, of the largest side that all have."""
    found = stores_of(manifest, home).values()
    common = set.intersection(*({side for part, side in found if part == split} for split in manifest.splits))
    if not common:
        root = manifest.about.get("source", manifest.root)
        again = f"python -m datasets.prepare {manifest.name} --root {root} --cache 256"
        raise UsageError(
            f"--input cache: there are no whole decoded pixels in {home}", f"--input files; or first: {again}"
        )
    return {split: home / f"{split}_{max(common)}.npy" for split in manifest.splits}
